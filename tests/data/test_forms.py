"""Questions that differ in content alone have one form."""

from __future__ import annotations

import pytest

from lvrpo.data.scenes.grammar import (
    ASK_DIGIT,
    EDGES,
    RELATIONS,
    Mention,
    ask_color,
    ask_count,
    ask_edge,
    ask_exists,
    ask_more,
    ask_relation,
    ask_shape,
    ask_where,
)
from lvrpo.data.scenes.objects import COLORS, DIGITS, SHAPES
from lvrpo.data.scenes.questions import question_form

THINGS = [Mention(shape, color) for shape in (*SHAPES, *DIGITS, "object") for color in (None, *COLORS)]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("is there an orange star ?", "is there a THING ?"),
        ("Is there a 7?", "is there a THING ?"),
        ("where is the circle relative to the red star ?", "where is the THING relative to the THING ?"),
        ("are there more crosses than circles ?", "are there more THING than THING ?"),
        ("what color is the digit ?", "what color is the digit ?"),
        ("how many red circles are there ?", "how many THING are there ?"),
        ("draw 3 + 4", "draw THING + THING"),
        (ASK_DIGIT, ASK_DIGIT),
        ("a text of another world", "a text of another world"),
    ],
)
def test_forms_of_questions(text: str, form: str) -> None:
    assert question_form(text) == form


def test_content_does_not_change_the_form() -> None:
    assert len({question_form(ask_exists(thing)) for thing in THINGS}) == 1
    assert len({question_form(ask_where(thing)) for thing in THINGS}) == 1
    assert len({question_form(ask_shape(color)) for color in COLORS}) == 1
    assert len({question_form(ask_count(shape, color)) for shape in SHAPES for color in (None, *COLORS)}) == 1
    assert len({question_form(ask_more(a, b)) for a in SHAPES for b in SHAPES}) == 1
    assert len({question_form(ask_edge(thing, edge)) for thing in THINGS for edge in EDGES}) == 1
    assert len({question_form(ask_relation(THINGS[0], thing, r)) for thing in THINGS for r in RELATIONS}) == 1
    assert len({question_form(ask_color(thing.without_color())) for thing in THINGS}) == 1
