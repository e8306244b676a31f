"""Reasoning: sums and comparisons on a picture, and drawing the answer of a sum."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lvrpo.data.scenes import facts
from lvrpo.data.scenes.grammar import Mention
from lvrpo.data.scenes.layout import Layout
from lvrpo.data.scenes.objects import MAX_OBJECTS, SHAPES, Scene, SceneObject
from lvrpo.data.scenes.questions import larger, more, sum_of
from lvrpo.types import Fact


@dataclass(frozen=True)
class Reasoning:
    """A picture to reason about (None for text alone), the question, its answer, and the picture to draw, if any."""

    picture: Scene | None
    text: str
    answer: str
    drawing: Scene | None = None
    facts: tuple[Fact, ...] = ()


def addends(rng: random.Random) -> tuple[int, int]:
    """Two digits whose sum is a digit; every sum 0 .. 9 is equally likely."""
    total = rng.randrange(10)
    first = rng.randint(0, total)
    return first, total - first


def _distinct(rng: random.Random) -> tuple[int, int]:
    first, second = rng.sample(range(10), 2)
    return first, second


def _sum(layout: Layout) -> Reasoning:
    scene = layout.until(lambda: layout.digits(addends(layout.rng)), lambda s: s)
    question = sum_of(scene)
    return Reasoning(scene, question.text, question.answer)


def _compare(layout: Layout) -> Reasoning:
    rng = layout.rng
    if rng.random() < 0.5:
        scene = layout.until(lambda: layout.digits(_distinct(rng)), lambda s: s)
        question = larger(scene)
        return Reasoning(scene, question.text, question.answer)
    a, b = rng.sample(SHAPES, 2)
    many = rng.randint(2, MAX_OBJECTS - 1)
    few = rng.randint(1, min(many - 1, MAX_OBJECTS - many))
    shapes = [a] * many + [b] * few

    def build() -> Scene:
        placed = zip(shapes, layout.cells(many + few), strict=True)
        return Scene(layout.ground(), tuple(SceneObject(s, layout.color_of(s), *cell) for s, cell in placed))

    scene = layout.until(build, lambda s: s)
    question = more(scene, a, b) if rng.random() < 0.5 else more(scene, b, a)
    return Reasoning(scene, question.text, question.answer)


def drawn_digit(layout: Layout, value: str) -> Scene:
    """A picture of one digit."""
    return layout.until(lambda: layout.digits((int(value),)), lambda s: s)


def _draw_answer(layout: Layout) -> Reasoning:
    rng = layout.rng
    if rng.random() < 0.5:
        a, b = addends(rng)
        text, answer = f"draw {a} + {b}", str(a + b)
    else:
        a, b = _distinct(rng)
        text, answer = f"draw the larger of {a} and {b}", str(max(a, b))
    return Reasoning(None, text, answer, drawn_digit(layout, answer), facts.of_caption((Mention(answer),)))


_REASON = {"sum": _sum, "compare": _compare, "draw_answer": _draw_answer}


def reason(category: str, layout: Layout) -> Reasoning:
    """A random row of a reasoning category (KeyError for another name)."""
    return _REASON[category](layout)
