"""Rows in, prompts out: the built-in world and the user's own files."""

from lvrpo.data.base import DATASETS, Task

__all__ = ["DATASETS", "Task"]
