"""The built-in world as rewards see it."""

from __future__ import annotations

from collections.abc import Sequence

from lvrpo.data.scenes import verifier
from lvrpo.data.scenes.objects import CELL
from lvrpo.data.scenes.paraphrases import paraphrases
from lvrpo.data.scenes.text_questions import questions_of_text, questions_of_the_rest
from lvrpo.data.worlds import Asked
from lvrpo.types import Fact, Image


class SceneWorld:
    """Grammar and verifier of the scenes; see ``lvrpo.data.worlds.World``."""

    def questions(self, text: str) -> tuple[Fact, ...]:
        return questions_of_text(text)

    def questions_about_the_rest(self, instruction: str) -> tuple[Fact, ...]:
        return questions_of_the_rest(instruction)

    def paraphrases(self, facts: Sequence[Fact]) -> list[tuple[Asked, ...]]:
        return paraphrases(facts)

    def unreadable(self, image: Image) -> str | None:
        height, width = image.shape[1:]
        if height % CELL or width % CELL:
            return f"a picture of {width} x {height}: the verifier reads multiples of {CELL}"
        return None

    def holds(self, facts: Sequence[Sequence[Fact]], images: Sequence[Image]) -> list[list[bool]]:
        return [verifier.fact_results(of, reading) for of, reading in zip(facts, verifier.read(images), strict=True)]
