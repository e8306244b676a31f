from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import InputError
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.types import Fact, Group, Image, Parts, Prompt


def image(level: float) -> Image:
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
            (0.75, "circle ?", "yes"): 1e-30,
            (0.25, "dark ?", "no"): 0.2,
            (0.75, "dark ?", "no"): 0.9,
        }
    )
    outputs = [[image(0.25)], [image(0.75)]]
    scores = SelfVQA().score([group(two, outputs), group(one, outputs)], fake)
    assert scores.values.flatten().tolist() == pytest.approx([0.3, 0.5, 0.2, 0.9])
    assert not scores.failures
    assert len(fake.asked) == 6
    assert all(len(context) == 2 for context, _ in fake.asked)


def test_where_it_applies() -> None:
    known = facts(("color ?", "red"))
    assert SelfVQA().applies(Prompt("a", "generate", ("x",), ("image",), facts=known))
    assert SelfVQA().applies(Prompt("a", "reason", ("x",), ("text", "image"), facts=known))
    assert not SelfVQA().applies(Prompt("a", "generate", ("x",), ("image",)))
    assert not SelfVQA().applies(Prompt("a", "understand", ("x",), ("text",), facts=known))


def test_both_orders_take_the_preference_for_a_place_out(
    group: Callable[..., Group], judge: Callable[..., Any]
) -> None:
    """A judge that says whatever is named first is at one half, though it is never wrong by its own words."""
    prompt = Prompt("a", "generate", ("x",), ("image",), facts=facts(("is it ?", "no"), ("color ?", "red")))
    table = {
        (0.5, "is it ? yes or no", "yes"): 0.6,
        (0.5, "is it ? yes or no", "no"): 0.2,
        (0.5, "is it ? no or yes", "yes"): 0.2,
        (0.5, "is it ? no or yes", "no"): 0.6,
        (0.5, "color ?", "red"): 0.9,
    }
    reward = SelfVQA(choices="{question} {first} or {second}")
    scores = reward.score([group(prompt, [[image(0.5)]])], judge(table))
    assert scores.values.tolist() == [[pytest.approx((0.5 + 0.9) / 2)]]


def test_only_facts_of_the_named_kinds_are_asked(group: Callable[..., Group], judge: Callable[..., Any]) -> None:
    both = (Fact("seen", "color ?", "red"), Fact("unseen", "where ?", "left"))
    prompt = Prompt("a", "generate", ("x",), ("image",), facts=both)
    reward = SelfVQA(kinds=["seen"])
    scores = reward.score([group(prompt, [[image(0.5)]])], judge({(0.5, "color ?", "red"): 0.75}))
    assert scores.values.tolist() == [[0.75]]
    assert not reward.applies(Prompt("b", "generate", ("x",), ("image",), facts=both[1:]))


def test_a_judge_that_says_nan_and_images_that_cannot_be_read_are_masked(
    group: Callable[..., Group], judge: Callable[..., Any]
) -> None:
    prompt = Prompt("a", "generate", ("x",), ("image",), facts=facts(("color ?", "red")))
    fake = judge({(0.25, "color ?", "red"): 0.5, (0.5, "color ?", "red"): math.nan})
    fake.image_size = 8
    outputs = [[image(0.25)], [image(0.5)], [image(math.nan)], [torch.zeros(3, 16, 8)]]
    source = ConfiguredReward(RewardConfig(name="self_vqa"), SelfVQA())
    table = score_groups([source], [group(prompt, outputs)], fake)
    assert table.mask.flatten().tolist() == [True, False, False, False]
    assert table.reasons == {
        (0, 1, 0): "failed: the judge gave nan for a log-prob",
        (0, 2, 0): "failed: the image holds values that are no numbers",
        (0, 3, 0): "failed: an image of 8 x 16: the judge reads 8 x 8",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": "{question} yes or no"}, "must hold {question}, {first} and {second} only"),
        ({"choices": "{question} {first} {second} {third}"}, "must hold {question}, {first} and {second} only"),
        ({"choices": "{question} {first} {second} {"}, "must hold {question}, {first} and {second} only"),
        ({"both": ["yes", "yes"]}, "must be two different answers"),
        ({"split": {}}, "options.split={}: is called questions now"),
        ({"paraphrases": 3}, "options.paraphrases=3: was removed: leave it out"),
        ({"bound": 1.0}, "options.bound=1.0: was removed: leave it out"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name="self_vqa", options=options)])


BITS = 5
KNOWN = Prompt(
    "k", "generate", ("five facts",), ("image",), facts=facts(*((f"fact {k} ?", "yes") for k in range(BITS)))
)


class Perfect:
    """Sees each fact, one column each, and is sure of it; of a blank image it can only guess."""

    def __init__(self, by_image: bool = True) -> None:
        self.by_image = by_image

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.one(c, text) for c, text in zip(contexts, texts, strict=True)]).log()

    def one(self, context: Parts, text: str) -> float:
        image, question = context
        assert isinstance(image, torch.Tensor)
        level = float(image[0, 0, int(str(question).split()[1])])
        yes = level if self.by_image else 0.7
        return max(yes if text == "yes" else 1 - yes, 1e-30)  # the log-prob of nothing at all is no number


def shown(bits: Sequence[float]) -> Image:
    return torch.tensor(bits, dtype=torch.float32).expand(3, 4, len(bits)).clone()


@given(st.lists(st.booleans(), min_size=BITS, max_size=BITS), st.integers(0, BITS - 1), st.booleans())
def test_one_more_fact_never_scores_lower(held: list[bool], one: int, orders: bool) -> None:
    """With a perfect judge the score is the share of facts that hold; nothing drawn is a guess of one half."""
    more = [*held]
    more[one] = True
    reward = SelfVQA(choices="{question} {first} or {second}" if orders else None)
    drawn = [[shown([float(b) for b in bits])] for bits in (held, more)] + [
        [shown([0.5] * BITS)],
        [shown([0.0] * BITS)],
    ]
    values = reward.score([offline_group(KNOWN, drawn)], Perfect()).values[0]  # type: ignore[arg-type]  # a double
    assert values.tolist() == pytest.approx([sum(held) / BITS, sum(more) / BITS, 0.5, 0.0], abs=1e-6)
    assert values[1] >= values[0]


def test_a_judge_that_answers_fluently_whatever_is_drawn_tells_no_one_apart() -> None:
    """Questions that the image does not answer give every member the same score: no advantage for anybody."""
    drawn = [[shown([float(b)] * BITS)] for b in (0, 1, 0.5)]
    values = SelfVQA().score([offline_group(KNOWN, drawn)], Perfect(by_image=False)).values[0]  # type: ignore[arg-type]
    assert values.tolist() == pytest.approx([0.7] * 3)


def test_a_fact_with_choices_is_the_share_of_the_right_one(group: Callable[..., Group], judge: Any) -> None:
    """.5 among .5, .3 and .2 is .5; .02 among .02, .01 and .01 is .5 as well, though it is said rarely."""
    facts = (
        Fact("color", "what color ?", "red", choices=("blue", "red", "green")),
        Fact("count", "how many ?", "2", choices=("1", "2", "3")),
    )
    prompt = Prompt("p", "generate", ("a red cube",), ("image",), facts=facts)
    table = {(0.5, "what color ?", "red"): 0.5, (0.5, "what color ?", "blue"): 0.3, (0.5, "what color ?", "green"): 0.1}
    table |= {(0.5, "how many ?", "1"): 0.01, (0.5, "how many ?", "2"): 0.02, (0.5, "how many ?", "3"): 0.01}
    reader = judge(table)
    scores = SelfVQA().score([group(prompt, [[torch.full((3, 2, 2), 0.5)]])], reader)
    assert scores.values.item() == pytest.approx((0.5 / 0.9 + 0.5) / 2)
    assert [answer for _, answer in reader.asked] == ["red", "blue", "green", "2", "1", "3"]
