"""Advantages of a step from its reward table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator

from lvrpo.algorithms import (
    gdpo_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    normalize_rewards,
    signal_mask,
    trimmed_advantages,
    win_rate,
)
from lvrpo.algorithms.advantages import NormalizeChoice
from lvrpo.config import Config, default_kind
from lvrpo.training.losses.base import KINDS, Advantages, GroupAdvantages
from lvrpo.types import TASKS, Group, OutputKind, RewardTable, TaskKind

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class AdvantagesConfig(Config):
    """Options of all advantage estimators."""

    hints: ClassVar[Mapping[str, str]] = {
        "kind=group_relative": "is called grpo",
        "kind=leave_one_out": "is called rloo",
        "kind=dr_grpo": "is kind=grpo with std=none",
    }
    std_floor: float = Field(default=0.01, ge=0)
    """Minimum standard deviation of rewards in a group; groups below have no signal."""
    clamp: float = Field(default=5.0, gt=0)
    """Advantages lie within [-clamp, clamp]."""
    stages: Literal["shared", "per_segment"] = "shared"
    """For trajectories of text and image. shared: both segments have the same advantage; per_segment: each has that of
    the rewards that score it (``rewards.segments``)."""


class GDPOConfig(AdvantagesConfig):
    """Each reward normalized in its group, then summed (arXiv:2601.05242)."""

    kind: Literal["gdpo"] = "gdpo"
    std: Literal["population", "sample"] = "population"
    """Divisor of the standard deviations: population (n) or sample (n - 1)."""


class SummedConfig(AdvantagesConfig):
    """Options of advantages of the weighted sum of the rewards."""

    joint: tuple[TaskKind, TaskKind] | None = None
    """The k-th groups of these two tasks share one reward, the sum of both, member by member (CoRL,
    arXiv:2505.17534)."""

    @model_validator(mode="after")
    def _joint_is_of_whole(self) -> Self:
        if self.joint is not None and self.stages == "per_segment":
            raise ValueError("joint sums the rewards of whole trajectories: use stages=shared")
        return self


class GRPOAdvantagesConfig(SummedConfig):
    """grpo: summed, then normalized in the group (arXiv:2402.03300); win_rate: each reward replaced by the win rate
    within the group, then as grpo."""

    kind: Literal["grpo", "win_rate"] = "grpo"
    std: Literal["population", "sample", "batch", "none"] = "population"
    """Standard deviation to divide by; batch: over all groups of a task; none: no division (Dr.GRPO)."""


class RLOOConfig(SummedConfig):
    """The sum minus the mean of the other members, leave-one-out (arXiv:2402.14740)."""

    kind: Literal["rloo"] = "rloo"


class TrimmedConfig(SummedConfig):
    """The sum normalized by the trimmed mean and std of its group."""

    kind: Literal["trimmed"] = "trimmed"
    trim: float = Field(default=0.125, ge=0, lt=0.5)
    """Share of the group that is trimmed at either end."""


AdvantageConfig = Annotated[
    GDPOConfig | GRPOAdvantagesConfig | RLOOConfig | TrimmedConfig, Field(discriminator="kind"), default_kind("gdpo")
]


def segment_advantages(table: RewardTable, groups: Sequence[Group], config: AdvantageConfig) -> Advantages:
    """The advantages of a step for every kind of segment; 0 in groups without signal."""
    if config.stages == "shared":
        return dict.fromkeys(KINDS, compute_advantages(table, config))
    tables = [replace(table, mask=table.mask & judging_rewards(table, groups, kind)[:, None]) for kind in KINDS]
    return {kind: compute_advantages(own, config) for kind, own in zip(KINDS, tables, strict=True)}


def trajectory_advantages(advantages: Advantages, groups: Sequence[Group]) -> Float[torch.Tensor, "P G"]:
    """One advantage per trajectory for the rollout log: that of its last segment."""
    return torch.where(_has_image(groups)[:, None], advantages["image"].values, advantages["text"].values)


def trajectory_rewards(
    table: RewardTable, groups: Sequence[Group], config: AdvantageConfig
) -> Bool[torch.Tensor, "P K"] | None:
    """The rewards that contribute to ``trajectory_advantages``; None: all."""
    if config.stages == "shared":
        return None
    return torch.where(
        _has_image(groups)[:, None], judging_rewards(table, groups, "image"), judging_rewards(table, groups, "text")
    )


def judging_rewards(table: RewardTable, groups: Sequence[Group], kind: OutputKind) -> Bool[torch.Tensor, "P K"]:
    """The rewards that score one kind of segment: none in groups without it; all in groups of a single kind."""
    has_kind = torch.tensor([kind in group.prompt.output for group in groups])
    several = torch.tensor([len(group.prompt.output) > 1 for group in groups])
    judges = torch.tensor([kind in table.judges.get(name, KINDS) for name in table.names])
    return has_kind[:, None] & (judges[None, :] | ~several[:, None])


def compute_advantages(table: RewardTable, config: AdvantageConfig) -> GroupAdvantages:
    """One advantage per trajectory from the rewards of positive weight; 0 in groups without signal.

    A member is valid with any valid score (gdpo), or with those of all rewards that apply to its group (other kinds).
    """
    table, floor, clamp = table.trained(), config.std_floor, config.clamp
    if config.kind == "gdpo":
        tasks = torch.tensor([TASKS.index(task) for task in table.tasks])
        values = gdpo_advantages(
            table.scores,
            table.mask,
            table.weights,
            tasks,
            std=config.std,
            std_floor=floor,
            clamp=clamp,
            normalize=reward_normalizations(table),
        )
        return GroupAdvantages(values, table.mask.any(dim=2))
    if config.kind == "win_rate":
        rates, mask = win_rates(table.scores, table.mask, floor)
        table, floor = replace(table, scores=rates.nan_to_num(), mask=mask), 1e-6
    scaled = table.scores
    if table.normalize:
        tasks = torch.tensor([TASKS.index(task) for task in table.tasks])
        scaled = normalize_rewards(table.scores, table.mask, tasks, reward_normalizations(table), std_floor=floor)
    scores = torch.where(table.mask, scaled * table.weights, 0.0).sum(dim=2)
    mask = complete_members(table.mask)
    if config.joint is not None:
        scores, mask = joint_scores(scores, mask, table.tasks, config.joint)
    return GroupAdvantages(_summed_advantages(scores, mask, table.tasks, config, floor), mask)


def _summed_advantages(
    scores: Float[torch.Tensor, "P G"],
    mask: Bool[torch.Tensor, "P G"],
    tasks: Sequence[TaskKind],
    config: GRPOAdvantagesConfig | RLOOConfig | TrimmedConfig,
    floor: float,
) -> Float[torch.Tensor, "P G"]:
    """The advantages of weighted sums of rewards, (P, G)."""
    clamp = config.clamp
    if config.kind == "rloo":
        return leave_one_out_advantages(scores, mask, std_floor=floor).clamp(-clamp, clamp)
    if config.kind == "trimmed":
        return trimmed_advantages(scores, mask, trim=config.trim, std_floor=floor, clamp=clamp)
    if config.std != "batch":
        return group_relative_advantages(scores, mask, std=config.std, std_floor=floor, clamp=clamp)
    advantages = torch.zeros_like(scores)
    for task in dict.fromkeys(tasks):
        rows = torch.tensor([name == task for name in tasks])
        advantages[rows] = group_relative_advantages(
            scores[rows], mask[rows], std="batch", std_floor=floor, clamp=clamp
        )
    return advantages


def reward_normalizations(table: RewardTable) -> list[NormalizeChoice | None]:
    """``rewards.normalize`` of each reward."""
    return [cast("NormalizeChoice | None", table.normalize.get(name)) for name in table.names]


def complete_members(mask: Bool[torch.Tensor, "P G K"]) -> Bool[torch.Tensor, "P G"]:
    """Members with a valid score from every reward that applies to their group."""
    return (mask | ~mask.any(dim=1, keepdim=True)).all(dim=2) & mask.any(dim=2)


def win_rates(
    scores: Float[torch.Tensor, "P G K"], mask: Bool[torch.Tensor, "P G K"], std_floor: float
) -> tuple[Float[torch.Tensor, "P G K"], Bool[torch.Tensor, "P G K"]]:
    """Scores and mask with every score replaced by its win rate among the valid members, a tie counting one half.

    A reward with a standard deviation below ``std_floor`` in a group ties everywhere; nan, and masked, for a member
    without another to compare with.
    """
    rates = torch.empty_like(scores)
    for k in range(scores.shape[2]):
        score, valid = torch.where(mask[..., k], scores[..., k], 0.0), mask[..., k]
        ahead = (score[:, :, None] - score[:, None, :]).sign()  # (P, G, G)
        ahead = torch.where(signal_mask(score, valid, std_floor)[:, None, None], ahead, 0.0)
        rates[..., k] = win_rate(0.5 + 0.5 * ahead, valid[:, :, None] & valid[:, None, :])
    return rates, mask & rates.isfinite()


def joint_scores(
    scores: Float[torch.Tensor, "P G"],
    mask: Bool[torch.Tensor, "P G"],
    tasks: Sequence[TaskKind],
    joint: tuple[TaskKind, TaskKind],
) -> tuple[Float[torch.Tensor, "P G"], Bool[torch.Tensor, "P G"]]:
    """Scores and mask in which the k-th groups of two tasks share the sum of their scores."""
    one, other = ([p for p, task in enumerate(tasks) if task == name] for name in joint)
    scores, mask = scores.clone(), mask.clone()
    scores[one] = scores[other] = scores[one] + scores[other]
    mask[one] = mask[other] = mask[one] & mask[other]
    return scores, mask


def _has_image(groups: Sequence[Group]) -> Bool[torch.Tensor, " P"]:
    """Whether the last segment is an image."""
    return torch.tensor(["image" in group.prompt.output for group in groups])
