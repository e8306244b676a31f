from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.rewards.given import given_group
from lvrpo.rewards.preference import Preference
from lvrpo.rewards.table import RewardConfig, build_rewards
from lvrpo.types import Parts, Prompt

DRAW = Prompt("d", "generate", ("a cat",), ("image",))
ASK = Prompt("q", "understand", (torch.zeros(3, 4, 4), "what ?"), ("text",))


def level(value: float) -> torch.Tensor:
    return torch.full((3, 4, 4), value)


class Chooser:
    """Prefers brighter pictures and longer texts; ``bias`` speaks for whatever is named first."""

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias
        self.contexts: list[Parts] = []

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.contexts += contexts
        out = []
        for context, text in zip(contexts, texts, strict=True):
            *_, one, two, question = context
            assert question == "Which fits better: a cat Answer first or second." or "what ?" in str(question)
            margin = self.value(one) - self.value(two) + self.bias
            out.append(margin if text == "first" else -margin)
        return torch.tensor(out)

    def value(self, part: Any) -> float:
        return float(part.mean()) if isinstance(part, torch.Tensor) else float(len(part))


def score(reward: Preference, judge: Chooser, prompt: Prompt, *outputs: Any) -> torch.Tensor:
    result = reward.score([given_group(prompt, [[output] for output in outputs])], judge)  # type: ignore[arg-type]
    assert not result.failures
    return result.values[0]


def test_all_against_all_by_hand() -> None:
    values = score(Preference(opponents=None), Chooser(), DRAW, level(0.1), level(0.9), level(0.5), level(0.5))
    assert values.tolist() == pytest.approx([0, 1, 0.5, 0.5])


def test_a_preference_for_a_place_is_a_tie() -> None:
    values = score(Preference(opponents=None), Chooser(bias=5.0), DRAW, level(0.1), level(0.9))
    assert values.tolist() == [0.5, 0.5]


def test_texts_are_compared_and_equal_ones_are_not_asked() -> None:
    judge = Chooser()
    values = score(Preference(opponents=None), judge, ASK, "red", "a red cat", "red")
    assert values.tolist() == pytest.approx([0.25, 1, 0.25])
    assert len(judge.contexts) == 2 * 2 * 2  # two pairs, two orders, two labels
    assert all(isinstance(context[0], torch.Tensor) for context in judge.contexts)


@pytest.mark.parametrize("opponents", [1, 2, 4, None])
def test_no_pair_is_judged_twice(opponents: int | None) -> None:
    """Every ordered pair once with either word, for both of its members."""
    judge = Chooser()
    prompts = (DRAW, Prompt("e", "edit", (level(0.2), "a cat"), ("image",)))
    outputs = [level(i / 10) for i in range(6)]
    groups = [given_group(prompt, [[output] for output in outputs]) for prompt in prompts]
    Preference(opponents=opponents).score(groups, judge)  # type: ignore[arg-type]
    asked = Counter(tuple(id(part) for part in context[:-1]) for context in judge.contexts)
    assert set(asked.values()) == {2}
    assert all((*key[:-2], key[-1], key[-2]) in asked for key in asked)


@pytest.mark.parametrize(
    ("group", "opponents", "met"), [(8, 4, 4), (8, 2, 2), (8, 1, 2), (8, 7, 7), (5, 9, 4), (2, 4, 1)]
)
def test_every_member_meets_as_many_opponents(group: int, opponents: int, met: int) -> None:
    judge = Chooser()
    score(Preference(opponents=opponents), judge, DRAW, *(level(i / 10) for i in range(group)))
    pairs = {tuple(sorted(round(float(p.mean()), 3) for p in context[:2])) for context in judge.contexts}  # type: ignore[union-attr]
    assert len(judge.contexts) == 4 * len(pairs)
    counts = [sum(round(i / 10, 3) in pair for pair in pairs) for i in range(group)]
    assert counts == [met] * group
    assert len(pairs) <= len(list(combinations(range(group), 2)))


def test_an_empty_answer_and_a_judge_without_an_opinion_are_masked() -> None:
    class Nothing(Chooser):
        def value(self, part: Any) -> float:
            return math.nan if part == "???" else super().value(part)

    group = given_group(ASK, [[" "], ["red"], ["???"]])
    result = Preference().score([group], Nothing())  # type: ignore[arg-type]
    assert result.failures == {
        (0, 0): "there is nothing to compare",
        (0, 1): "no comparison with another member could be made",
        (0, 2): "no comparison with another member could be made",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "which ?"}, "must hold {prompt}"),
        ({"question": "{prompt} {answer}"}, "must hold {prompt} and no other name"),
        ({"labels": ["one", "one"]}, "must be two different answers"),
        ({"opponents": 0}, "options.opponents=0: must be >= 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name="preference", options=options)])


def test_where_it_applies() -> None:
    thought = Prompt("r", "reason", ("3 + 4",), ("text", "image"))
    assert [Preference().applies(p) for p in (DRAW, ASK, thought)] == [True, True, False]
