"""What every source of prompts promises, and the table of sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from lvrpo.types import Example, Prompt, Task

DATASETS: Mapping[str, str] = {
    "scenes": "lvrpo.data.scenes.prompts:ScenePrompts",
    "jsonl": "lvrpo.data.jsonl:JsonlPrompts",
}
"""Name -> class, called with (config, split, seed). ``lvrpo.registry.resolve`` imports it."""
SOURCE_METHODS = ("prompt", "prompts")
"""What anybody's class of a source must have."""


@runtime_checkable
class PromptSource(Protocol):
    """Prompts by task and index, at random access."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that it has prompts for."""
        ...

    def prompt(self, task: Task, index: int) -> Prompt:
        """The prompt at an index >= 0; a finite source starts over, reshuffled, when it ends."""
        ...

    def prompts(self, task: Task, n: int, start: int = 0) -> list[Prompt]:
        """``n`` prompts from ``start`` on."""
        ...

    def example(self, task: Task, index: int) -> Example:
        """The prompt with outputs to imitate; raises InputError where the source has none."""
        ...
