"""Direct preference optimization on the best and the worst member of every group, for text and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import PreferenceLoss, dpo_loss, flow_dpo_loss, preference_pairs
from lvrpo.policies.base import FlowPolicy
from lvrpo.sampling import monte_carlo_logprob
from lvrpo.training.losses.base import FrozenPolicy, GroupAdvantages, LossOutput, Member, Microbatch, has_kind
from lvrpo.training.losses.flow import FlowObjective, NoisingConfig, add_noise
from lvrpo.training.losses.tokens import TokenLossConfig, TokenObjective, token_grid, token_segments
from lvrpo.types import Group, ScoredSegment, SegmentKind, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float


class TextDPOConfig(TokenLossConfig):
    """DPO on the best and the worst text of a group (arXiv:2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    dpo_beta: float = Field(default=0.1, gt=0)
    """The larger, the closer the policy stays to the reference."""


class FlowDPOConfig(NoisingConfig):
    """Diffusion-DPO on the best and the worst image of a group (arXiv:2311.12908)."""

    kind: Literal["dpo"] = "dpo"
    dpo_beta: float = Field(default=100.0, gt=0)
    """The larger, the closer the policy stays to the reference."""


def preference_members(groups: Sequence[Group], advantages: GroupAdvantages, kind: SegmentKind) -> list[Member]:
    """Winner, loser, winner, loser ... of the groups with signal and segments of this kind."""
    found = preference_pairs(advantages.values, advantages.valid)
    return [
        Member(group.trajectories[g], float(advantages.values[p, g]))
        for p, group in enumerate(groups)
        if has_kind(group, kind) and bool(found.valid[p])
        for g in (int(found.winner[p]), int(found.loser[p]))
    ]


class TextDPO(TokenObjective):
    """DPO on log-probs of texts or images in tokens, summed over tokens (arXiv:2305.18290)."""

    unit = 2
    off_policy = True
    config: TextDPOConfig

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return preference_members(groups, advantages, self.kind)

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",)

    def reference_outputs(self, name: FrozenPolicy, policy: FlowPolicy, batch: Microbatch) -> Float[torch.Tensor, " B"]:
        return whole_logprobs(policy, batch.trajectories, self.kind)

    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        logprobs, ref = whole_logprobs(policy, batch.trajectories, self.kind), batch.frozen["reference"]
        result = dpo_loss(logprobs[::2], logprobs[1::2], ref[::2], ref[1::2], beta=self.config.dpo_beta)
        return preference_output(batch, self.kind, result)


class FlowDPO(FlowObjective):
    """DPO on flow-matching losses at noise and times shared by each pair (arXiv:2311.12908, arXiv:2501.13918)."""

    unit = 2
    off_policy = True
    config: FlowDPOConfig

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return preference_members(groups, advantages, "flow")

    def passes(self, trajectory: Trajectory) -> int:
        return self.config.timesteps_per_sample

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",)

    def reference_outputs(self, name: FrozenPolicy, policy: FlowPolicy, batch: Microbatch) -> Float[torch.Tensor, " B"]:
        return self._losses(policy, batch)

    def _losses(self, policy: FlowPolicy, batch: Microbatch) -> Float[torch.Tensor, " B"]:
        """Flow-matching losses; winner and loser share noise and times."""
        seeds = [member.trajectory.seed for member in batch.members[::2] for _ in range(2)]
        noised = add_noise(policy, batch, self.config, "dpo", seeds)
        return noised.flow_loss(noised.velocity(policy))

    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        losses, ref = self._by_pair(self._losses(policy, batch)), self._by_pair(batch.frozen["reference"])
        return preference_output(batch, "flow", flow_dpo_loss(*losses, *ref, beta=self.config.dpo_beta))

    def _by_pair(self, losses: Float[torch.Tensor, " B"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of winners and of losers, one per pair and time."""
        rows = losses.view(-1, 2, self.config.timesteps_per_sample)
        return rows[:, 0].flatten(), rows[:, 1].flatten()


def whole_logprobs(
    policy: FlowPolicy, trajectories: Sequence[Trajectory], kind: SegmentKind
) -> Float[torch.Tensor, " B"]:
    """The log-prob in nats of all segments of a kind in each trajectory; its estimate for likelihood=monte_carlo."""
    grid = token_grid(policy, trajectories, kind)
    masked = [[s for s in token_segments(t, kind) if isinstance(s, ScoredSegment)] for t in trajectories]
    if not masked[0] or masked[0][0].likelihood == "path":
        return torch.where(grid.mask, grid.logprobs, 0.0).sum(dim=1)
    drawn = torch.tensor([sum(int((s.reveal_steps[: len(s.tokens)] >= 0).sum()) for s in own) for own in masked])
    by_draw = (len(trajectories), -1, grid.mask.shape[1])
    return monte_carlo_logprob(grid.logprobs.view(by_draw), grid.mask.view(by_draw)) * drawn.to(grid.logprobs)


def preference_output(batch: Microbatch, name: str, result: PreferenceLoss) -> LossOutput:
    """The mean loss, and the share of pairs that the policy ranks correctly."""
    loss, ordered = result.loss.mean(), (result.margin > 0).float().mean()
    return LossOutput(loss, {f"loss/{name}/{batch.task}": loss, f"preference/{name}/{batch.task}": ordered})
