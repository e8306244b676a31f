"""One update of BAGEL: all tasks, images of several sizes, any limit on what is replayed at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients_only import differentiate

from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.flow import flow_segment
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import KINDS, GroupAdvantages, recorded_passes
from lvrpo.training.microbatches import LimitsConfig, split
from lvrpo.training.policies import Policies
from lvrpo.types import Group, Image, Prompt

GUIDED: dict[str, Any] = {
    "flow": {"kind": "flow_grpo", "kl": "velocity", "kl_coef": 0.1},
    "rollout": {
        "sampler": "flow_sde",
        "num_steps": 4,
        "window": {"kind": "fast", "size": 2},
        "guidance_scale": 4.0,
        "image_guidance_scale": 2.0,
        "guidance_renorm": "text_channel",
    },
}
METHODS: dict[str, dict[str, Any]] = {"guided steps": GUIDED, "fresh noise": {"flow": {"kind": "nft"}}}


def image(seed: int, height: int = 16, width: int = 16) -> Image:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def prompts() -> list[Prompt]:
    return [
        Prompt("u", "understand", (image(1, 9, 16), "is it blue"), ("text",)),
        Prompt("g", "generate", ("two blue squares",), ("image",)),
        Prompt("e", "edit", (image(2), "make it red"), ("image",)),
        Prompt("f", "edit", (image(3, 8, 16), "make it blue"), ("image",)),
        Prompt("r", "reason", ("draw one",), ("text", "image")),
    ]


def sampled(policy: BagelPolicy, config: TrainConfig) -> list[Group]:
    return policy.sample(prompts(), config.rollout.sampling(0, 0), list(range(5)))


@pytest.fixture
def policies(saved: Path) -> Policies:
    return Policies(BagelPolicy.load(saved))


def gradient(policies: Policies, groups: list[Group], config: TrainConfig) -> torch.Tensor:
    live = policies.policy
    assert isinstance(live, BagelPolicy)
    A = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]).expand(len(groups), -1)
    config.limits.apply(live)
    differentiate(policies, groups, dict.fromkeys(KINDS, GroupAdvantages.all_valid(A)), config, 0)
    found = [p.grad.flatten() for p in live.parameters() if p.grad is not None]
    live.zero_grad(set_to_none=True)
    return torch.cat(found)


@pytest.mark.parametrize("method", METHODS)
def test_limits_move_the_gradient_by_rounding_alone(method: str, policies: Policies) -> None:
    tree: dict[str, Any] = METHODS[method] | {"device": "cpu"}
    tree["rollout"] = {"group_size": 4, "max_new_tokens": 4} | tree.get("rollout", {})
    config = TrainConfig.model_validate(tree)
    live = policies.policy
    assert isinstance(live, BagelPolicy)
    groups = sampled(live, config)
    assert len({t.image.shape for group in groups for t in group.trajectories if t.image is not None}) == 2
    free = gradient(policies, groups, config)
    assert free.norm() > 1e-3
    for limits in ({"backward_tokens": 1}, {"microbatch_size": 1}, {"backward_tokens": 400, "forward_tokens": 90},
                   {"gradient_checkpointing": True}):  # fmt: skip
        limited = gradient(policies, groups, TrainConfig.model_validate(tree | {"limits": limits}))
        print(f"{method}, {limits}: {float((limited - free).norm() / free.norm()):.1e}")
        assert (limited - free).norm() < 1e-5 * free.norm()


def test_what_is_replayed_together(policies: Policies) -> None:
    tree = GUIDED | {"device": "cpu", "text": {"weight": 0.0}}
    config = TrainConfig.model_validate(tree | {"rollout": GUIDED["rollout"] | {"group_size": 4}})
    live = policies.policy
    assert isinstance(live, BagelPolicy)
    groups = [group for group in sampled(live, config) if group.prompt.task == "edit"]
    (objective,) = objectives_of(config, ("text", "flow"))
    A = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]).expand(2, -1)
    chosen = objective.select_members(groups, GroupAdvantages.all_valid(A))
    assert len(chosen) == 8
    assert [len(part) for part in split(chosen, objective, live, LimitsConfig())] == [4, 4]  # two sizes
    first = chosen[0].trajectory
    assert recorded_passes(first) == 2 * 3  # steps, branches
    held = replace(flow_segment(first), guided_logprobs="detach_uncond")
    assert recorded_passes(replace(first, segments=(held,))) == 2
    assert objective.passes(first) == 2 * 3 + 2  # and the divergence
    count = live.count_tokens(first)
    assert count.image == 4 * 4 + 2
    assert count.context == 18 + 18 + len(live.tokenizer.encode("make it red")) + 2
    two = count.context + 2 * 8 * count.image
    assert [len(part) for part in split(chosen[:4], objective, live, LimitsConfig(backward_tokens=two))] == [2, 2]
    assert [len(part) for part in split(chosen[:4], objective, live, LimitsConfig(backward_tokens=two - 1))] == [
        1,
        1,
        1,
        1,
    ]


def test_two_limits_of_one_thing_are_refused() -> None:
    with pytest.raises(InputError, match=r"backward_tokens=9 and limits.microbatch_size=1: two limits of one thing"):
        load_config(TrainConfig, None, ["limits={backward_tokens: 9, microbatch_size: 1}"])
