"""Reasoning: sums and comparisons on an image, and drawing the answer of a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lvrpo.data.scenes import facts
from lvrpo.data.scenes.grammar import Caption, Mention
from lvrpo.data.scenes.layout import Layout
from lvrpo.data.scenes.objects import MAX_OBJECTS, SHAPES, Scene, SceneObject, text_split
from lvrpo.data.scenes.questions import QuestionChoice, larger, more, smaller, sum_of
from lvrpo.types import Fact


@dataclass(frozen=True)
class Reasoning:
    """A scene to reason about (None for text alone), the question, its answer, and the scene to draw, if any."""

    scene: Scene | None
    text: str
    answer: str
    drawing: Scene | None = None
    facts: tuple[Fact, ...] = ()
    content: str = ""
    """A canonical form of the question, whatever the image and wording; it determines the split of the row."""


def _in_split(layout: Layout, draw: Callable[[], tuple[int | str, ...]]) -> tuple[int | str, ...]:
    """The first operands of the layout's split: a sum or a comparison is of one split, drawn or asked of an image."""
    return next(found for found in iter(draw, None) if text_split(_content_of(found)) == layout.split)


def _content_of(operands: tuple[int | str, ...]) -> str:
    """The same for every order of addends, and for the larger and the smaller of two digits."""
    name, *values = operands
    return f"{name} {' '.join(map(str, values if name == 'more' else sorted(values)))}"


def _addends(layout: Layout) -> tuple[int, ...]:
    """Two or three digits whose sum is a digit."""
    rng = layout.rng

    def draw() -> tuple[int | str, ...]:
        total = rng.randrange(10)
        cuts = sorted(rng.randint(0, total) for _ in range(1 if rng.random() < 0.6 else 2))
        return ("sum", *(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)))

    return tuple(int(value) for value in _in_split(layout, draw)[1:])


def _pair(layout: Layout) -> tuple[int, int]:
    """Two different digits."""
    _, a, b = _in_split(layout, lambda: ("order", *layout.rng.sample(range(10), 2)))
    return int(a), int(b)


def _sum(layout: Layout, wanted: QuestionChoice) -> Reasoning:
    values = _addends(layout)
    scene = layout.retry(lambda: layout.digits(values), lambda s: s)
    question = sum_of(scene)
    return Reasoning(scene, question.text, question.answer, content=_content_of(("sum", *values)))


def _compare(layout: Layout, wanted: QuestionChoice) -> Reasoning:
    if wanted.form % 2:
        return _more(layout, wanted.yes)
    values = _pair(layout)
    scene = layout.retry(lambda: layout.digits(values), lambda s: s)
    question = smaller(scene) if wanted.form % 4 else larger(scene)
    return Reasoning(scene, question.text, question.answer, content=_content_of(("order", *values)))


def _more(layout: Layout, yes: bool) -> Reasoning:
    rng = layout.rng

    def draw() -> tuple[int | str, ...]:
        a, b = rng.sample(SHAPES, 2)
        many = rng.randint(2, MAX_OBJECTS - 1)
        return "more", a, many, b, rng.randint(1, min(many - 1, MAX_OBJECTS - many))

    operands = _in_split(layout, draw)
    a, b, many, few = str(operands[1]), str(operands[3]), int(operands[2]), int(operands[4])
    shapes = [a] * many + [b] * few

    def build() -> Scene:
        placed = zip(shapes, layout.cells(many + few), strict=True)
        return Scene(layout.ground(), tuple(SceneObject(s, layout.color_of(s), *cell) for s, cell in placed))

    scene = layout.retry(build, lambda s: s)
    question = more(scene, a, b) if yes else more(scene, b, a)
    return Reasoning(scene, question.text, question.answer, content=_content_of(operands))


def drawn_digit(layout: Layout, value: str) -> Scene:
    """An image of one digit."""
    return layout.retry(lambda: layout.digits((int(value),)), lambda s: s)


def _draw_answer(layout: Layout, wanted: QuestionChoice) -> Reasoning:
    if wanted.form % 2 == 0:
        values = _addends(layout)
        text, answer, name = f"draw {' + '.join(map(str, values))}", str(sum(values)), "sum"
    else:
        values, name = _pair(layout), "order"
        which, chosen = ("smaller", min(values)) if wanted.form % 4 == 1 else ("larger", max(values))
        text, answer = f"draw the {which} of {values[0]} and {values[1]}", str(chosen)
    said = facts.caption_facts(Caption((Mention(answer),)))
    return Reasoning(None, text, answer, drawn_digit(layout, answer), said, _content_of((name, *values)))


_REASON = {"sum": _sum, "compare": _compare, "draw_answer": _draw_answer}


def reason(category: str, layout: Layout, wanted: QuestionChoice | None = None) -> Reasoning:
    """A row of a reasoning category (KeyError for another name); ``wanted``: which form and answer, None for any."""
    return _REASON[category](layout, wanted or QuestionChoice(layout.rng.randrange(60), layout.rng.random() < 0.5))
