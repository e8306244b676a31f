"""Direct preference optimization: of every group the best member against the worst, text or drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lvrpo.algorithms import PreferenceLoss, dpo_loss, flow_dpo_loss, preference_pairs
from lvrpo.policies.base import Policy
from lvrpo.training.flow import FlowObjective, add_noise
from lvrpo.training.objective import Batch, GroupAdvantages, Member
from lvrpo.training.text import TextObjective, token_grid
from lvrpo.types import Group, OutputKind, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float


def pairs(groups: Sequence[Group], advantages: GroupAdvantages, kind: OutputKind) -> list[Member]:
    """Winner, loser, winner, loser ... of the groups that have segments of this kind and a signal; both are valid."""
    found = preference_pairs(advantages.values, advantages.valid)
    return [
        Member(group.trajectories[g], float(advantages.values[p, g]))
        for p, group in enumerate(groups)
        if kind in group.prompt.output and bool(found.valid[p])
        for g in (int(found.winner[p]), int(found.loser[p]))
    ]


class TextDPO(TextObjective):
    """Log-probs of whole texts, summed over tokens (arXiv:2305.18290)."""

    unit = 2
    off_policy = True

    def choose(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return pairs(groups, advantages, "text")

    def loss(self, batch: Batch) -> torch.Tensor:
        logprobs = text_logprobs(batch.policies.live, batch.trajectories)
        with torch.no_grad():
            ref = text_logprobs(batch.policies.reference, batch.trajectories)
        result = dpo_loss(logprobs[::2], logprobs[1::2], ref[::2], ref[1::2], beta=self.config.dpo_beta)
        return reported(batch, "text", result)


class FlowDPO(FlowObjective):
    """Flow-matching losses at noise and times that the two of a pair share (arXiv:2311.12908, arXiv:2501.13918)."""

    unit = 2
    off_policy = True

    def choose(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return pairs(groups, advantages, "image")

    def loss(self, batch: Batch) -> torch.Tensor:
        seeds = [member.trajectory.seed for member in batch.members[::2] for _ in range(2)]
        noised = add_noise(batch, self.config, "dpo", seeds)
        losses = self._by_pair(noised.flow_loss(noised.velocity(batch.policies.live)))
        ref = self._by_pair(noised.flow_loss(noised.velocity(batch.policies.reference, frozen=True)))
        return reported(batch, "flow", flow_dpo_loss(*losses, *ref, beta=self.config.dpo_beta))

    def _by_pair(self, losses: Float[torch.Tensor, " B"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of winners and of losers, one per pair and draw."""
        rows = losses.view(-1, 2, self.config.noise_draws)
        return rows[:, 0].flatten(), rows[:, 1].flatten()


def text_logprobs(policy: Policy, trajectories: Sequence[Trajectory]) -> Float[torch.Tensor, " B"]:
    """The log-prob of everything written in each trajectory."""
    grid = token_grid(policy, trajectories)
    return torch.where(grid.mask, grid.logprobs, 0.0).sum(dim=1)


def reported(batch: Batch, name: str, result: PreferenceLoss) -> torch.Tensor:
    """The mean loss; it and the share of pairs that the policy orders rightly go into the metrics."""
    batch.log(f"loss/{name}/{batch.task}", result.loss.mean())
    batch.log(f"preference/{name}/{batch.task}", (result.margin > 0).float().mean())
    return result.loss.mean()
