from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lvrpo.errors import ContractError
from lvrpo.policies.base import Sampling
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.policies import Policies
from lvrpo.training.preflight import Check, first_update_checks, require, rollout_checks, weights_check
from lvrpo.types import FlowSegment, Group, RewardTable, Segment, TextSegment, Trajectory

SAMPLING = Sampling(group_size=4, max_new_tokens=4, num_steps=4, sampler="flow_sde", window=(0, 1), guidance_scale=2.0)


def table_of(groups: list[Group], spread: bool = True, reasons: dict[tuple[int, int, int], str] | None = None) -> Any:
    P, G = len(groups), len(groups[0])
    scores = torch.linspace(0, 1, G).repeat(P, 1)[..., None] if spread else torch.ones(P, G, 1)
    mask = torch.ones(P, G, 1, dtype=torch.bool)
    for cell in reasons or {}:
        mask[cell] = False
    return RewardTable(("r",), torch.ones(1), scores, mask, reasons or {}, tuple(group.prompt.task for group in groups))


@pytest.fixture
def policy(lively_policy: Callable[..., TinyPolicy]) -> TinyPolicy:
    return lively_policy()


@pytest.fixture
def groups(policy: TinyPolicy, prompts: Any) -> list[Group]:
    return policy.sample(prompts, SAMPLING, list(range(len(prompts))))


def broken(policy: TinyPolicy, groups: list[Group], table: RewardTable | None = None) -> list[Check]:
    return [c for c in rollout_checks(policy, groups, table or table_of(groups), 0.01) if not c.ok]


def edit(group: Group, members: slice, kind: type, **changes: Any) -> Group:
    """The group with fields of its segments changed in some members."""

    def changed(segment: Segment) -> Segment:
        return replace(segment, **changes) if isinstance(segment, kind) else segment

    trajectories: list[Trajectory] = list(group.trajectories)
    trajectories[members] = [replace(t, segments=tuple(map(changed, t.segments))) for t in trajectories[members]]
    return replace(group, trajectories=tuple(trajectories))


def test_an_honest_rollout_keeps_every_promise(policy: TinyPolicy, groups: list[Group]) -> None:
    checks = rollout_checks(policy, groups, table_of(groups), 0.01)
    require(checks)
    names = [check.check for check in checks]
    for kind in ("text", "image"):
        assert sum(kind in name for name in names) == 3
        assert next(c for c in checks if f"replay, {kind}, own batch" in c.check).limit == 0
    assert len(names) == len(set(names)) == 9
    assert set(checks[0].as_dict()) == {"check", "value", "limit", "ok", "detail"}


def test_failures_that_a_reward_may_have(policy: TinyPolicy, groups: list[Group]) -> None:
    table = table_of(groups)
    mask = table.mask.clone()
    mask[0, 0, 0] = False
    table = replace(table, mask=mask, reasons={(0, 0, 0): "failed: timed out"})
    (breach,) = broken(policy, groups, table)
    assert breach.check == "scores that failed"
    assert "failed: timed out; if it may, say up to which share: max_failed" in breach.detail
    assert all(c.ok for c in rollout_checks(policy, groups, table, 0.01, may_fail=table.names))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"guidance_renorm": "global"},
        {"noise_level": 0.6},
        {"sampler": "dance_sde"},
        {"logprob_reduction": "sum"},
        {"trained_steps": (1, 2)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_drawings_scored_otherwise_than_sampled(
    changes: dict[str, Any], policy: TinyPolicy, groups: list[Group]
) -> None:
    edited = [edit(group, slice(None), FlowSegment, **changes) for group in groups]
    found = broken(policy, edited)
    assert [c.check.split(",")[0] for c in found][:2] == ["replay", "replay"]
    assert all("image" in c.check for c in found)
    assert found[0].value > 1e-4
    with pytest.raises(ContractError, match=r"step-0 contract: replay, image, own batch.*compare guidance"):
        require(found)


def test_text_scored_at_another_temperature(policy: TinyPolicy, groups: list[Group]) -> None:
    edited = [edit(group, slice(None), TextSegment, temperature=0.8) for group in groups]
    found = broken(policy, edited)
    assert found
    assert all("text" in c.check for c in found)


def test_a_policy_updated_since(lively_policy: Callable[..., TinyPolicy], groups: list[Group]) -> None:
    updated = lively_policy()
    with torch.no_grad():
        for parameter in updated.parameters():
            parameter.mul_(1.001)
    names = {c.check for c in broken(updated, groups)}
    assert {f"replay, {kind}, own batch: max |difference|" for kind in ("text", "image")} <= names


def test_a_replay_that_is_not_a_number(policy: TinyPolicy, groups: list[Group]) -> None:
    segment = groups[-1].trajectories[0].segments[-1]
    assert isinstance(segment, FlowSegment)
    edited = [*groups[:-1], edit(groups[-1], slice(0, 1), FlowSegment, next_states=segment.next_states * torch.nan)]
    assert "replay, image, own batch: max |difference|" in {c.check for c in broken(policy, edited)}


@pytest.mark.parametrize(
    "changes",
    [
        {"trained_steps": (1, 2)},
        {"guidance_scale": 1.0},
        {"noise_level": 0.2},
        {"guided_logprobs": "detach_uncond"},
        {"timesteps": torch.linspace(1, 0, 5) ** 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_torn_group(changes: dict[str, Any], policy: TinyPolicy, groups: list[Group]) -> None:
    torn = [*groups[:-1], edit(groups[-1], slice(2, None), FlowSegment, **changes)]
    (found,) = [c for c in broken(policy, torn) if "members differ" in c.check]
    assert found.value == 1
    assert "must share" in found.detail


def test_weights_that_are_not_float32(policy: TinyPolicy) -> None:
    assert weights_check(Policies(policy)).ok
    policy.transformer.layers[1].generation.up_proj.to(torch.bfloat16)  # type: ignore[union-attr]
    found = weights_check(Policies(policy))
    assert not found.ok
    assert found.check == "trainable weights not in float32"
    assert found.value == 1
    assert "cast transformer.layers.1.generation.up_proj.weight to float32" in found.detail
    policy.requires_grad_(False)
    assert weights_check(Policies(policy)).ok


def test_rewards_without_spread(policy: TinyPolicy, groups: list[Group]) -> None:
    (found,) = broken(policy, groups, table_of(groups, spread=False))
    assert found.check == "groups with signal"
    assert "easier prompts" in found.detail
    assert not broken(policy, groups, table_of(groups))


def test_scores_that_failed(policy: TinyPolicy, groups: list[Group]) -> None:
    reasons = {(0, 0, 0): "not applicable", (1, 2, 0): "failed: timed out"}
    (found,) = broken(policy, groups, table_of(groups, reasons=reasons))
    assert found.check == "scores that failed"
    assert found.detail == "r: failed: timed out; if it may, say up to which share: max_failed of that reward"
    assert not broken(policy, groups, table_of(groups, reasons={(0, 0, 0): "not applicable"}))


def test_groups_without_two_valid_scores_are_named(policy: TinyPolicy, groups: list[Group]) -> None:
    """As of two members where one of each failed: nothing is wrong with the spread."""
    reasons = {(p, g, 0): "failed: away" for p in range(len(groups)) for g in range(1, 4)}
    table = table_of(groups, reasons=reasons)
    (found,) = (c for c in rollout_checks(policy, groups, table, 0.01, may_fail=table.names) if not c.ok)
    assert found.check == "groups with signal"
    assert found.detail == (
        "no group had two valid scores to compare, 1 at most of 4 members: raise rollout.group_size, or use a reward "
        "that fails less often"
    )


def test_a_missing_kl_gradient_is_distinguished_from_groups_without_scores(
    lively_policy: Callable[..., TinyPolicy], groups: list[Group]
) -> None:
    policies = Policies(lively_policy())
    drawn = [group for group in groups if group.prompt.output == ("image",)]
    table = table_of(drawn, reasons={(i, g, 0): "failed: away" for i in range(len(drawn)) for g in range(1, 4)})
    found = {c.check: c for c in first_update_checks(policies, drawn, table, 0.01)}
    check = found["gradient of the image divergence"]
    assert not check.ok
    assert check.detail.startswith("no group of images had two valid scores to compare, 1 at most of 4 members")
    spread = first_update_checks(policies, drawn, table_of(drawn, spread=False), 0.01)
    assert "no group of images has a reward that spreads" in spread[-1].detail
    silent = first_update_checks(policies, drawn, table_of(drawn), 0.01)
    assert "layer of zeros" in silent[-1].detail
