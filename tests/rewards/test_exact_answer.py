from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lvrpo.rewards.verifiable_text import ExactAnswer, answers_match, normalize_answer
from lvrpo.types import Prompt

QUESTION = Prompt("q", "understand", ("how many ?",), ("text",), answer="three")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Three.", "3"),
        ("three", "3"),
        ("3.", "3"),
        ("03", "3"),
        ("3.50", "3.5"),
        ("-0", "0"),
        ("+7", "7"),
        ("-7.0", "-7"),
        ("0.50", "0.5"),
        ("３", "3"),  # full width
        ("a red circle", "red circle"),
        ("An  apple!", "apple"),
        ('"yes"', "yes"),
        ("yes, it is", "yes it is"),
        ("1/2", "1/2"),
        ("50%", "50%"),
        ("twelve", "12"),
        ("thirteen", "thirteen"),
        ("e.g.", "e.g"),
        ("", ""),
        ("?!", ""),
        ("...", ""),
        ("A", "a"),
        ("(A)", "a"),
        ("The", "the"),
        ("theory", "theory"),
        ("−7", "-7"),
        ("दिन।", "दिन"),
        ("नी\u0943ला", "नी\u0943ला"),
        ("ดี", "ดี"),
        ("3\ufe0f", "3"),
        ("❤\ufe0f", ""),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal
    assert normalize_answer(normal) == normal


@pytest.mark.parametrize(
    ("given", "right", "match"),
    [
        ("Three", "3", True),
        ("3", "three", True),
        ("three three", "3", False),
        ("13", "3", False),
        ("-3", "3", False),
        ("3.1", "3", False),
        ("no", "yes", False),
        ("", "A", False),
        ("the", "A", False),
        ("a", "A", True),
        ("b", "A", False),
        ("", "3", False),
        ("3 circles", "3", False),
        ("−3", "-3", True),
        ("−3", "3", False),
        ("दिन", "दान", False),  # day, gift: they differ in a vowel sign
        ("कि", "की", False),
        ("दिन!", "दिन", True),
        (" <", "<", True),
        ("<", ">", False),
        ("=", "", False),
        ("😀", "🎉", False),
        ("<", "3", False),
    ],
)
def test_answers_match(given: str, right: str, match: bool) -> None:
    assert answers_match(given, right) is match
    assert answers_match(right, given) is match


def test_scores(group: Callable[..., Any], judge: Callable[..., Any]) -> None:
    reward = ExactAnswer()
    groups = [group(QUESTION, [["3"], ["four"]]), group(replace(QUESTION, answer="red"), [["blue"], ["a red"]])]
    scores = reward.score(groups, judge({}))
    assert scores.values.tolist() == [[1, 0], [0, 1]]
    assert not scores.failures


def test_where_it_applies() -> None:
    thought = replace(QUESTION, task="reason", output=("text", "image"))
    drawing = replace(QUESTION, output=("image",))
    unknown = replace(QUESTION, answer=None)
    assert [ExactAnswer().applies(p) for p in (QUESTION, thought, drawing, unknown)] == [True, True, False, False]
    assert [ExactAnswer(thoughts=False).applies(p) for p in (QUESTION, thought)] == [True, False]
