"""What a world knows of its own words and pictures, and the table of worlds: all that rewards ask of one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

from lvrpo.registry import resolve
from lvrpo.types import Fact, Image

WORLDS: Mapping[str, str] = {"scenes": "lvrpo.data.scenes.world:SceneWorld"}
"""Name -> class, called without arguments; a prompt names its own in ``Prompt.world``."""
METHODS = ("questions", "questions_about_the_rest", "paraphrases", "unreadable", "holds")
"""What anybody's class of a world must have."""

Asked = tuple[str, str]
"""A question and its right answer."""


class World(Protocol):
    """What follows from words, and whether it holds of pictures.

    A world without a grammar returns no questions, and each fact's own question alone; one without a verifier gives
    its facts no ``check``, and is not asked.
    """

    def questions(self, text: str) -> tuple[Fact, ...]:
        """The facts that must hold of a picture drawn for a text, or edited by it; () for a text it cannot read."""
        ...

    def questions_about_the_rest(self, instruction: str) -> tuple[Fact, ...]:
        """What an edit may leave as it is, of the kind "unchanged"; whoever sees the source keeps what holds there."""
        ...

    def paraphrases(self, facts: Sequence[Fact]) -> Sequence[Sequence[Asked]]:
        """For each fact of one picture its own question first, then others that ask for the same."""
        ...

    def unreadable(self, image: Image) -> str | None:
        """Why the facts of a picture cannot be checked; None where they can."""
        ...

    def holds(self, facts: Sequence[Sequence[Fact]], images: Sequence[Image]) -> Sequence[Sequence[bool]]:
        """Which facts hold of the picture beside them; the pictures are readable and of one size."""
        ...


def world_of(name: str) -> World:
    """The world called so; raises InputError for an unknown name, and for code of one's own without consent."""
    return _made(resolve("world", name, WORLDS, METHODS))


@functools.cache
def _made(world: type[World]) -> World:
    return world()
