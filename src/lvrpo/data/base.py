"""The protocols of prompt sources and worlds, and the tables of both."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from lvrpo.data.leakage import ComparedPrompt
from lvrpo.registry import resolve
from lvrpo.types import Example, Fact, Image, Prompt, TaskKind

# --- sources of prompts ---


DATASETS: Mapping[str, str] = {
    "scenes": "lvrpo.data.scenes.prompts:ScenePrompts",
    "jsonl": "lvrpo.data.jsonl:JsonlPrompts",
    "datasets": "lvrpo.data.tables:DatasetPrompts",
}
"""Name -> class, called with (config, split, seed). ``lvrpo.registry.resolve`` imports it."""
SOURCE_METHODS = ("prompt", "prompts")
"""Methods that the class of a source must have."""


@runtime_checkable
class PromptSource(Protocol):
    """Prompts by task and index, at random access."""

    @property
    def tasks(self) -> tuple[TaskKind, ...]:
        """The tasks that it has prompts for."""
        ...

    def prompt(self, task: TaskKind, index: int) -> Prompt:
        """The prompt at an index >= 0; a finite source starts over, reshuffled, when it ends."""
        ...

    def prompts(self, task: TaskKind, n: int, start: int = 0) -> list[Prompt]:
        """``n`` prompts from ``start`` on."""
        ...

    def example(self, task: TaskKind, index: int) -> Example:
        """The prompt with outputs to imitate; raises InputError where the source has none."""
        ...


@runtime_checkable
class ComparableSource(PromptSource, Protocol):
    """A source whose splits are compared when a run starts, by what its prompts say and show."""

    @property
    def prefixes(self) -> Sequence[str]:
        """Prefixes of prompts that carry no meaning, such as "draw"."""
        ...

    def compared(self, prompts: Sequence[Prompt]) -> list[ComparedPrompt]:
        """Its prompts in the form in which they are compared."""
        ...


# --- worlds: all that rewards ask of one ---


WORLDS: Mapping[str, str] = {"scenes": "lvrpo.data.scenes.verifier:SceneWorld"}
"""Name -> class, called without arguments; a prompt names its own in ``Prompt.world``."""
WORLD_METHODS = ("questions", "unchanged_questions", "paraphrases", "unreadable", "holds")
"""Methods that the class of a world must have."""

QuestionAnswer = tuple[str, str]
"""A question and its right answer."""


class World(Protocol):
    """Derives facts and questions from texts, and checks facts against pictures.

    A world without a grammar returns no questions, and each fact's own question alone; one without a verifier gives
    its facts no ``check``, and is not called.
    """

    def questions(self, text: str) -> tuple[Fact, ...]:
        """The facts that must hold of a picture drawn for a text, or edited by it; () for a text it cannot read."""
        ...

    def unchanged_questions(self, instruction: str) -> tuple[Fact, ...]:
        """Questions of kind "unchanged" about what an edit may keep; the judge drops those false of the source."""
        ...

    def paraphrases(self, facts: Sequence[Fact]) -> Sequence[Sequence[QuestionAnswer]]:
        """For each fact of one picture: its own question first, then other wordings of it."""
        ...

    def unreadable(self, image: Image) -> str | None:
        """Why the facts of a picture cannot be checked; None where they can."""
        ...

    def holds(self, facts: Sequence[Sequence[Fact]], images: Sequence[Image]) -> Sequence[Sequence[bool]]:
        """Whether each fact holds of the picture beside it; the pictures are readable and of one size."""
        ...


def world_of(name: str) -> World:
    """The world of a name; raises InputError for an unknown one, and for code of the user without consent."""
    return _made(resolve("world", name, WORLDS, WORLD_METHODS))


@functools.cache
def _made(world: type[World]) -> World:
    return world()
