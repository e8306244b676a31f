"""The interfaces of a task (prompts, reward, success metric) and of a world (verifier), and their registries."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lvrpo.data.leakage import ComparedPrompt
from lvrpo.errors import InputError
from lvrpo.registry import resolve
from lvrpo.types import Example, Fact, Image, Prompt, TaskKind

# --- tasks ---


DATASETS: Mapping[str, str] = {
    "scenes": "lvrpo.data.scenes.prompts:ScenePrompts",
    "jsonl": "lvrpo.data.jsonl:JsonlPrompts",
    "datasets": "lvrpo.data.tables:DatasetPrompts",
}
"""Name -> class of a ``Task``, called with (config, split, seed). ``lvrpo.registry.resolve`` imports it."""


class Task(ABC):
    """One split of prompts, with the reward and the metric of success of what is made of them.

    A task of your own is a subclass in a file that ``data.source`` names, called with (options, split, seed). It has
    ``tasks`` and ``prompt``; ``success`` and ``reward`` where outputs are scored by its own rules. The parameters of
    both are those of a reward function (``lvrpo.rewards.function.PARAMETERS``).
    """

    success: Callable[..., float | None] | None = None
    """Whether an output is right, as True or False; where it is None, the prompt's answer and facts say it."""
    reward: Callable[..., float | None] | None = None
    """The score that the reward "task" trains on; more is better."""

    @property
    @abstractmethod
    def tasks(self) -> tuple[TaskKind, ...]:
        """The kinds of prompts that it has."""

    @abstractmethod
    def prompt(self, task: TaskKind, index: int) -> Prompt:
        """The prompt at an index >= 0; a finite task starts over, reshuffled, when it ends."""

    def prompts(self, task: TaskKind, n: int, start: int = 0) -> list[Prompt]:
        """``n`` prompts from ``start`` on."""
        return [self.prompt(task, index) for index in range(start, start + n)]

    def example(self, task: TaskKind, index: int) -> Example:
        """The prompt with outputs to imitate; raises InputError where there are none."""
        raise InputError("these prompts have no outputs to imitate: give rows with a 'target'")


class LazyPrompts(Sequence[Prompt]):
    """Prompts that are made at each access, as the images of all may not fit into memory."""

    def __init__(self, make: Callable[[int], Prompt], places: Sequence[int]) -> None:
        """``make``: the prompt of one of ``places``."""
        self._make, self._places = make, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:  # Any: of an integer a Prompt, of a slice LazyPrompts
        found = self._places[index]
        return LazyPrompts(self._make, found) if isinstance(index, slice) else self._make(found)


class ComparableTask(Task):
    """A task whose splits are compared when a run starts, by what its prompts say and show."""

    @property
    @abstractmethod
    def prefixes(self) -> Sequence[str]:
        """Prefixes of prompts that carry no meaning, such as "draw"."""

    @abstractmethod
    def compared(self, prompts: Sequence[Prompt]) -> list[ComparedPrompt]:
        """Its prompts in the form in which they are compared."""


# --- worlds: all that rewards ask of one ---


WORLDS: Mapping[str, str] = {"scenes": "lvrpo.data.scenes.verifier:SceneWorld"}
"""Name -> class, called without arguments; a prompt names its own in ``Prompt.world``."""
WORLD_METHODS = ("questions", "unchanged_questions", "unreadable", "holds")
"""Methods that the class of a world must have."""


class World(Protocol):
    """Derives facts and questions from texts, and checks facts against images.

    A world without a grammar returns no questions; one without a verifier gives its facts no ``check``, and is not
    called.
    """

    def questions(self, text: str) -> tuple[Fact, ...]:
        """The facts that must hold of an image drawn for a text, or edited by it; () for a text it cannot read."""
        ...

    def unchanged_questions(self, instruction: str) -> tuple[Fact, ...]:
        """Questions of kind "unchanged" about what an edit may keep; the judge drops those false of the source."""
        ...

    def unreadable(self, image: Image) -> str | None:
        """Why the facts of an image cannot be checked; None where they can."""
        ...

    def holds(self, facts: Sequence[Sequence[Fact]], images: Sequence[Image]) -> Sequence[Sequence[bool]]:
        """Whether each fact holds of the image beside it; the images are readable and of one size."""
        ...


def world_of(name: str) -> World:
    """The world of a name; raises InputError for an unknown one, and for code of the user without consent."""
    return _made(resolve("world", name, WORLDS, WORLD_METHODS))


@functools.cache
def _made(world: type[World]) -> World:
    return world()
