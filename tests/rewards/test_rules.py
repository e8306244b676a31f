"""Rules on texts: numbers, choices, boxes, form, length."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import InputError
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.rewards.verifiable_text import (
    Boxed,
    MultipleChoice,
    Numeric,
    TextFormat,
    TextLength,
    chosen,
    last_boxed,
    last_number,
    last_text,
    options_of,
    same_formula,
)
from lvrpo.types import Group, Prompt, TextSegment

NUMBER = Prompt("n", "reason", ("how many ?",), ("text",), answer="12")


def scores(reward: Any, prompt: Prompt, *texts: str) -> list[float]:
    result = reward.score([offline_group(prompt, [[text] for text in texts])], None)
    assert not result.failures
    return result.values[0].tolist()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", "12"),
        ("the answer is 1,234.50.", "1234.5"),
        ("first 3, then 4", "4"),
        ("-7", "-7"),
        ("x = -7.5", "-7.5"),
        ("5-3", "3"),
        ("10 - 3 = 7", "7"),
        ("3/4", "3/4"),
        ("it is 12 %", "12/100"),
        ("2e3", "2000"),
        ("2.5E-1", "1/4"),
        (".5", "1/2"),
        ("twelve", "12"),
        ("7 of them, no, three", "3"),
        ("three, that is 4", "4"),
        ("−4", "-4"),
        ("5/0", None),
        ("A4", None),
        ("4th", None),
        ("none", None),
        ("", None),
        ("1,23", "23"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Fraction(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=4))
def test_a_number_is_read_as_it_is_written(value: Any) -> None:
    assert last_number(f"so the result is {value:f}") == Fraction(value)


def test_numeric_scores() -> None:
    assert scores(Numeric(), NUMBER, "12", "twelve", "it is 12.0", "13", "no idea", "12 or 13") == [1, 1, 1, 0, 0, 0]
    assert scores(Numeric(relative=0.1), NUMBER, "13.2", "13.3", "10.8", "-12") == [1, 0, 1, 0]
    assert scores(Numeric(absolute=0.5), NUMBER, "12.5", "12.51") == [1, 0]
    assert scores(Numeric(), NUMBER, "12 %", "0.12") == [1, 0]
    assert scores(Numeric(), NUMBER, "of the 50% that is 12", "50% off: 0.12", "not 3, but 12 %") == [1, 0, 1]
    assert scores(Numeric(), replace(NUMBER, answer="12%"), "12 %", "0.12", "12") == [1, 1, 0]


def test_where_numbers_apply() -> None:
    prompts = [NUMBER, replace(NUMBER, answer="red"), replace(NUMBER, answer=None), replace(NUMBER, output=("image",))]
    assert [Numeric().applies(p) for p in prompts] == [True, False, False, False]


CHOICE = Prompt("c", "reason", ("Which ?\nA. a red cat\nB. a dog\n(C) 7",), ("text",), answer="B")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("B. a dog", "B"),
        ("The answer is B.", "B"),
        ("Answer: (b)", "B"),
        ("**Answer: B**", "B"),
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        ("It is not (A), it is (B)", "B"),
        ("The answer is A. No, the answer is B.", "B"),
        ("a dog", "B"),
        ("Dog", "B"),
        ("seven", "C"),
        ("I think that B fits", "B"),
        ("A dog it is", None),
        ("I do not know", None),
        ("", None),
        ("the answer is a dog", None),
        ("The answer is A because it is red.", "A"),
        ("The answer is B because it is old.", "B"),
        ("the answer is a as it is red", "A"),
    ],
)
def test_chosen(text: str, letter: str | None) -> None:
    options = {"A": "red cat", "B": "dog", "C": "7"}
    assert options_of(CHOICE) == options
    assert chosen(text, options) == letter


def test_multiple_choice_scores() -> None:
    assert scores(MultipleChoice(), CHOICE, "B", "A", "", "a dog") == [1, 0, 0, 1]
    assert scores(MultipleChoice(), replace(CHOICE, parts=("Which ?",), answer="(b)"), "b", "a dog") == [1, 0]
    assert MultipleChoice().applies(CHOICE)
    assert not MultipleChoice().applies(replace(CHOICE, answer="a dog"))
    inline = replace(CHOICE, parts=("Which? (A) red (B) blue (C) green",))
    assert options_of(inline) == {"A": "red", "B": "blue", "C": "green"}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{7} then \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{}", ""),
        ("7", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", "1/2", True),
        (r"-\frac{1}{2}", "-0.5", True),
        ("1,000", "1000", True),
        (r"50\%", "0.5", True),
        (r"x^2 + 1", "x^2+1", True),
        (r"\text{red}", "red", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("x+1", "1+x", False),
        ("12", "2", False),
        ("", "", False),
        ("3 apples", "3", False),
    ],
)
def test_same_formula(given: str, right: str, same: bool) -> None:
    assert same_formula(given, right) is same
    assert same_formula(right, given) is same


def test_boxed_scores() -> None:
    assert scores(Boxed(), NUMBER, r"\boxed{12}", "12", r"\boxed{13}", r"\boxed{24/2}") == [1, 0, 0, 1]
    assert scores(Boxed(), replace(NUMBER, answer=r"so \boxed{x+1}"), r"\boxed{x + 1}") == [1]


def test_boxed_as_mathematics() -> None:
    pytest.importorskip("math_verify")
    reward = Boxed(compare="math_verify")
    assert scores(reward, replace(NUMBER, answer="x+1"), r"\boxed{1+x}", r"\boxed{x}") == [1, 0]


def test_form_scores() -> None:
    right = "<think>it\nis red</think>\n<answer>red</answer>"
    twice = "<think>a</think><think>b</think><answer>c</answer>"
    texts = (right, twice, "red", f"{right} !", "<think></think><answer></answer>")
    assert scores(TextFormat(), NUMBER, *texts) == [1, 0, 0, 0, 0]
    assert scores(TextFormat(form="boxed"), NUMBER, r"so \boxed{1}", r"\boxed{1} \boxed{2}", "1") == [1, 0, 0]
    assert scores(TextFormat(form="one_line"), NUMBER, "red", "red\nblue", "") == [1, 0, 0]
    assert scores(TextFormat(form=r"(yes|no)"), NUMBER, "yes", "yes.") == [1, 0]


def test_length_by_hand() -> None:
    reward = TextLength(limit=10, buffer=4, least=2)
    assert [reward.length_score(n) for n in (0, 1, 2, 6, 7, 9, 10, 11)] == [-1, -1, 0, 0, -0.25, -0.75, -1, -1]
    assert [TextLength(limit=10).length_score(n) for n in (10, 11)] == [0, -1]


def cut(group: Group, member: int) -> Group:
    trajectories = list(group.trajectories)
    segment = last_text(trajectories[member])
    assert isinstance(segment, TextSegment)
    trajectories[member] = replace(trajectories[member], segments=(replace(segment, ended=False),))
    return replace(group, trajectories=tuple(trajectories))


@pytest.mark.parametrize("name", ["numeric", "boxed"])
def test_a_text_that_was_cut_off_is_masked_or_scored_as_configured(name: str) -> None:
    group = cut(offline_group(NUMBER, [[r"\boxed{12}"], [r"\boxed{12}"]]), 1)
    masked = score_groups(build_rewards([RewardConfig(name=name)]), [group], None)  # type: ignore[arg-type]
    assert masked.mask[..., 0].tolist() == [[True, False]]
    assert masked.reasons == {(0, 1, 0): "failed: the text was cut off at the length limit"}
    sources = build_rewards([RewardConfig(name=name, options={"cut_off": "score"})])
    scored = score_groups(sources, [group], None)  # type: ignore[arg-type]
    assert scored.scores[..., 0].tolist() == [[1, 1]]


def test_a_trajectory_without_text_is_masked() -> None:
    drawn = offline_group(replace(NUMBER, output=("image",)), [[torch.zeros(3, 8, 8)]])
    for reward in (Numeric(), TextLength(limit=3)):
        assert reward.score([drawn], None).failures == {(0, 0): "nothing was written"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("numeric", {"relative": 1}, "options.relative=1: must be < 1"),
        ("numeric", {"cut_off": "zero"}, "options.cut_off=zero: must be 'mask' or 'score'"),
        ("boxed", {"compare": "sympy"}, "options.compare=sympy: must be 'plain' or 'math_verify'"),
        ("text_format", {"form": "("}, r"text_format.options.form=\(: no regular expression"),
        ("text_length", {"limit": 0}, "options.limit=0: must be >= 1"),
        ("text_length", {}, "options.limit: is missing: set it"),
        ("multiple_choice", {"letters": 4}, "options.letters: unknown key: there are cut_off"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name=name, options=options)])
