"""Rejection-sampling fine-tuning (RAFT, arXiv:2304.06767): supervised losses on the best members of every group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import best_of_mask, reduce_tokens, velocity_regularizer
from lvrpo.policies.base import FlowPolicy
from lvrpo.training.losses.base import FrozenPolicy, GroupAdvantages, LossOutput, Member, Microbatch, kept_members
from lvrpo.training.losses.flow import FlowObjective, Noised, NoisingConfig, add_noise
from lvrpo.training.losses.tokens import TokenLossConfig, TokenObjective, token_count, token_grid
from lvrpo.types import Group, SegmentKind, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float


class TextBestOfConfig(TokenLossConfig):
    """Supervised loss on the best text of a group."""

    kind: Literal["best_of"] = "best_of"


class FlowBestOfConfig(NoisingConfig):
    """Supervised loss on the best images of a group."""

    kind: Literal["best_of"] = "best_of"
    top_k: int = Field(default=2, ge=1)
    """Images per group."""
    kl_coef: float = Field(default=2.0, ge=0)
    """Weight of the divergence from the reference, mean |v - v_ref|^2."""


def best_members(groups: Sequence[Group], advantages: GroupAdvantages, kind: SegmentKind, keep: int) -> list[Member]:
    """The ``keep`` best valid members of the groups with signal and segments of this kind."""
    chosen = best_of_mask(advantages.values, advantages.valid, keep=keep)
    return kept_members(groups, advantages.values, chosen, kind)


class TextBestOf(TokenObjective):
    """Cross-entropy per token of the best text, or image in tokens, of every group."""

    off_policy = True

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return best_members(groups, advantages, self.kind, 1)

    def size(self, members: Sequence[Member]) -> int:
        return sum(token_count(member.trajectory, self.kind) for member in members)

    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        grid = token_grid(policy, batch.trajectories, self.kind)
        loss = reduce_tokens(-grid.logprobs, grid.mask)
        return LossOutput(loss, {f"loss/{self.kind}/{batch.task}": loss})


class FlowBestOf(FlowObjective):
    """The flow-matching loss of the best images of every group."""

    off_policy = True
    config: FlowBestOfConfig

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return best_members(groups, advantages, "flow", self.config.top_k)

    def passes(self, trajectory: Trajectory) -> int:
        return self.config.timesteps_per_sample

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",) if self.config.kl_coef else ()

    def reference_outputs(
        self, name: FrozenPolicy, policy: FlowPolicy, batch: Microbatch
    ) -> Float[torch.Tensor, "B N C"]:
        return self._noised(policy, batch).velocity(policy)

    def _noised(self, policy: FlowPolicy, batch: Microbatch) -> Noised:
        return add_noise(policy, batch, self.config, "best_of", [trajectory.seed for trajectory in batch.trajectories])

    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        noised = self._noised(policy, batch)
        v = noised.velocity(policy)
        loss = noised.flow_loss(v).mean()
        metrics = {f"loss/flow/{batch.task}": loss}
        if self.config.kl_coef:
            divergence = velocity_regularizer(v, batch.frozen["reference"]).mean()
            metrics[f"kl/flow/{batch.task}"] = divergence
            loss = loss + self.config.kl_coef * divergence
        return LossOutput(loss, metrics)
