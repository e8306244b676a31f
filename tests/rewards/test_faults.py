"""Faults of images and judges, for every reward that reads images: masked with a reason, never a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lvrpo.data.scenes import facts as scene_facts
from lvrpo.data.scenes.grammar import Mention
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Sampling
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.types import Group, Image, Parts, Prompt, RewardTable

SIZE = 16
FACT = scene_facts.relation(Mention("circle"), Mention("star"), "left")
DRAW = Prompt("d", "generate", ("draw a circle left of a star",), ("image",), facts=(FACT,))
LEFT_HALF = torch.arange(SIZE).expand(SIZE, SIZE) < SIZE // 2
SOURCE = torch.full((3, SIZE, SIZE), 0.2)
EDIT = Prompt("e", "edit", (SOURCE, "add a circle"), ("image",), facts=(FACT,), edited=LEFT_HALF)
NAN_IMAGE = "the image holds values that are no numbers"
OTHER_SIZE = "an image of 24 x 16: the judge reads 16 x 16"


class Strict:
    """A judge as the tiny policy is: it refuses images of another size, and knows the level of any other.

    ``says``: what it says instead of a number; ``raises``: what it raises.
    """

    image_size = SIZE

    def __init__(self, says: float | None = None, raises: Exception | None = None) -> None:
        self.says, self.raises = says, raises
        self.asked: set[str] = set()

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.asked.add("read")
        return torch.tensor([self.of(context, len(text)) for context, text in zip(contexts, texts, strict=True)])

    def image_logprob(
        self, contexts: Sequence[Parts], images: Sequence[Image], draws: int, seeds: Sequence[int], **_: Any
    ) -> torch.Tensor:
        self.asked.add("draw")
        levels = [self.of((image, *context), len(context)) for context, image in zip(contexts, images, strict=True)]
        return torch.tensor(levels)[:, None].expand(-1, draws)

    def hidden_states(self, parts: Sequence[Any], layer: int) -> list[torch.Tensor]:
        self.asked.add("read")
        return [torch.tensor([[self.of((part,), 1), 1.0]]) for part in parts]

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        self.asked.add("read")
        for prompt in prompts:
            self.of(prompt.parts, 1)
        return [offline_group(prompt, [["a circle"]]) for prompt in prompts]

    def of(self, context: Parts, more: int) -> float:
        if self.raises is not None:
            raise self.raises
        for image in (part for part in context if isinstance(part, torch.Tensor)):
            if tuple(image.shape) != (3, SIZE, SIZE):
                raise InputError(f"image of shape {tuple(image.shape)}")
            assert image.isfinite().all(), "an image that is no image reached the judge"
        if self.says is not None:
            return self.says
        levels = [float(part.mean()) for part in context if isinstance(part, torch.Tensor)]
        return -1.0 - more / 10 + sum(levels) / (2 + len(levels))


REWARDS: dict[str, dict[str, Any]] = {
    "self_vqa": {},
    "self_vqa, both orders": {"choices": "{question} {first} or {second}"},
    "caption_back": {},
    "semantic": {},
    "instruction": {},
    "instruction, verifier": {"by": "verifier"},
    "knowledge": {},
    "scene_facts": {},
    "edit_consistency": {},
    "edit_consistency, pixels": {"ask": False},
}
BY_RULE = ("instruction, verifier", "scene_facts", "edit_consistency, pixels")
"""They ask no judge."""


def source(name: str, **config: Any) -> ConfiguredReward:
    row = RewardConfig(name=name.split(",")[0], options=REWARDS[name], label=name, **config)
    return build_rewards([row])[0]


def scored(name: str, judge: Strict, *drawn: Image, **config: Any) -> RewardTable:
    prompt = EDIT if name.startswith("edit_consistency") else DRAW
    made = source(name, **config)
    assert made.scores(prompt)
    group = offline_group(prompt, [[image] for image in drawn])
    return score_groups([made], [group], judge)  # type: ignore[arg-type]  # a double


@pytest.mark.parametrize("name", REWARDS)
def test_a_image_that_cannot_be_read_is_masked_alone(name: str) -> None:
    """The others score as if it had not been there."""
    levels = (0.3, 0.9, 0.6)
    good = [torch.full((3, SIZE, SIZE), level) for level in levels]
    holed = good[0].clone()
    holed[:, 0, 0] = math.nan
    wide = torch.full((3, SIZE, 24), 0.3)
    table = scored(name, Strict(), good[0], holed, good[1], wide, good[2])
    alone = scored(name, Strict(), *good)
    assert alone.mask.all(), alone.reasons
    assert table.reasons[0, 1, 0].endswith(NAN_IMAGE)
    if name in ("instruction, verifier", "scene_facts"):
        assert table.mask[0, 3, 0]  # the verifier reads any multiple of 8
    elif name.startswith("edit_consistency"):
        assert table.reasons[0, 3, 0] == "failed: an image of (3, 16, 24) for a source of (3, 16, 16)"
    else:
        assert table.reasons[0, 3, 0].endswith(OTHER_SIZE)
    torch.testing.assert_close(table.scores[0, [0, 2, 4], 0], alone.scores[0, :, 0])
    assert table.mask[0, [0, 2, 4], 0].all()


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_declares_the_sides_of_the_judge_that_it_asks(name: str) -> None:
    """A run watches and renews its judge by them."""
    judge, declared = Strict(), set(source(name).sides)
    scored(name, judge, *(torch.full((3, SIZE, SIZE), level) for level in (0.3, 0.9)))
    assert judge.asked == declared
    if declared:
        assert source(name, judge="tiny").sides == ()
    else:
        with pytest.raises(InputError, match="asks no judge"):
            source(name, judge="tiny")


def test_the_verifier_does_not_read_half_a_cell() -> None:
    odd = torch.full((3, SIZE, 20), 0.3)
    for name in ("scene_facts", "instruction, verifier"):
        table = scored(name, Strict(), odd, torch.full((3, SIZE, SIZE), 0.3))
        assert table.reasons == {(0, 0, 0): "failed: an image of 20 x 16: the verifier reads multiples of 8"}


ASKED = [name for name in REWARDS if name not in (*BY_RULE, "caption_back")]
READING = ("self_vqa", "instruction", "knowledge", "edit_consistency")
READ = [name for name in ASKED if name.split(",")[0] in READING]
"""They take log-probs of texts for what they are; the others compare numbers of any size."""
NO_NUMBERS = [(name, said) for name in ASKED for said in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize(("name", "said"), [*NO_NUMBERS, *((name, 3.0) for name in READ)])
def test_a_judge_that_says_no_number_gives_no_score(name: str, said: float) -> None:
    images = [torch.full((3, SIZE, SIZE), level) for level in (0.3, 0.9)]
    table = scored(name, Strict(says=said), *images)
    assert not table.mask.any()
    assert all(reason.startswith("failed: ") for reason in table.reasons.values())
    with pytest.raises(ContractError, match=r"failed on 2 of 2 outputs, max_failed=0\.5"):
        scored(name, Strict(says=said), *images, max_failed=0.5)


@pytest.mark.parametrize("said", [math.nan, math.inf, -math.inf, 3.0])
@pytest.mark.parametrize("name", ["knowledge", "agreement"])
def test_a_judge_of_texts_that_says_no_log_prob_gives_no_score(name: str, said: float) -> None:
    ask = Prompt("q", "understand", (torch.full((3, SIZE, SIZE), 0.2), "what is it ?"), ("text",))
    sources = build_rewards([RewardConfig(name=name)])
    group = offline_group(ask, [["cube"], ["ball"], ["cube"]])
    table = score_groups(sources, [group], Strict(says=said))  # type: ignore[arg-type]  # a double
    assert not table.mask.any()
    assert set(table.reasons.values()) == {
        f"failed: the judge gave {said:g} for a log-prob"
        if name == "knowledge"
        else "failed: the judge gave the answer no number"
    }


def test_a_judge_sure_but_for_rounding_is_sure() -> None:
    images = [torch.full((3, SIZE, SIZE), level) for level in (0.3, 0.9)]
    for name in ("self_vqa", "knowledge"):
        table = scored(name, Strict(says=1e-4), *images)
        assert table.scores[..., 0].tolist() == [[1.0, 1.0]]
        assert table.mask.all()


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in BY_RULE])
def test_a_judge_that_breaks_gives_no_score(name: str) -> None:
    images = [torch.full((3, SIZE, SIZE), level) for level in (0.3, 0.9)]
    broken = Strict(raises=RuntimeError("out of order"))
    table = scored(name, broken, *images)
    assert not table.mask.any()
    assert all("out of order" in reason for reason in table.reasons.values())
    with pytest.raises(ContractError, match="out of order"):
        scored(name, broken, *images, max_failed=0.0)
    with pytest.raises(ContractError, match="out of order"):
        scored(name, broken, *images, on_failure="stop")


@pytest.mark.parametrize("name", ["self_vqa", "instruction", "knowledge", "scene_facts"])
def test_a_prompt_without_facts_gets_no_score(name: str) -> None:
    bare = Prompt("b", "generate", ("draw a circle",), ("image",))
    made = source(name)
    assert not made.scores(bare)
    group = offline_group(bare, [[torch.full((3, SIZE, SIZE), 0.5)]] * 2)
    table = score_groups([made], [group], Strict())  # type: ignore[arg-type]
    assert not table.mask.any()
    assert set(table.reasons.values()) == {"not applicable"}
