"""Tasks and datasets: prompts of the built-in world and of the user's own files."""

from lvrpo.data.base import DATASETS, Task

__all__ = ["DATASETS", "Task"]
