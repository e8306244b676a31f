from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lvrpo.rewards.own_vqa import OwnVQA
from lvrpo.types import Fact, Group, Image, Prompt


def picture(level: float) -> Image:
    return torch.full((3, 8, 8), level)


def facts(*pairs: tuple[str, str]) -> tuple[Fact, ...]:
    return tuple(Fact("question", question, answer) for question, answer in pairs)


def test_the_score_is_the_mean_probability_of_the_right_answers(
    group: Callable[..., Group], judge: Callable[..., Any]
) -> None:
    two = Prompt("a", "generate", ("red circle",), ("image",), facts=facts(("color ?", "red"), ("circle ?", "yes")))
    one = Prompt("b", "generate", ("dark",), ("image",), facts=facts(("dark ?", "no")))
    fake = judge(
        {
            (0.25, "color ?", "red"): 0.5,
            (0.25, "circle ?", "yes"): 0.1,
            (0.75, "color ?", "red"): 1.0,
            (0.75, "circle ?", "yes"): 0.0,
            (0.25, "dark ?", "no"): 0.2,
            (0.75, "dark ?", "no"): 0.9,
        }
    )
    outputs = [[picture(0.25)], [picture(0.75)]]
    scores = OwnVQA().score([group(two, outputs), group(one, outputs)], fake)
    assert scores.values.flatten().tolist() == pytest.approx([0.3, 0.5, 0.2, 0.9])
    assert not scores.failures
    assert len(fake.asked) == 6
    assert all(len(context) == 2 for context, _ in fake.asked)


def test_where_it_applies() -> None:
    known = facts(("color ?", "red"))
    assert OwnVQA().applies(Prompt("a", "generate", ("x",), ("image",), facts=known))
    assert OwnVQA().applies(Prompt("a", "reason", ("x",), ("text", "image"), facts=known))
    assert not OwnVQA().applies(Prompt("a", "generate", ("x",), ("image",)))
    assert not OwnVQA().applies(Prompt("a", "understand", ("x",), ("text",), facts=known))
