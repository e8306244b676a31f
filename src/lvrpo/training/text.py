"""Training text: an importance-weighted objective on tokens, a divergence from the reference, an entropy bonus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import clipped_surrogate, k3, reduce_tokens
from lvrpo.config import Config
from lvrpo.policies.base import Policy
from lvrpo.training import objective
from lvrpo.training.objective import Batch, Member, Objective
from lvrpo.types import Group, OutputKind, TextSegment, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class TextConfig(Config):
    """How text segments are trained."""

    weight: float = Field(default=1.0, ge=0)
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    kl_coef: float = Field(default=0.05, ge=0)
    """Of the k3 estimate of the divergence from the reference."""
    entropy_coef: float = Field(default=0.0, ge=0)
    reduction: Literal["token", "trajectory"] = "token"


class TokenObjective(Objective):
    """Policy gradient on the tokens of every group with signal."""

    kind: ClassVar[OutputKind] = "text"

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.weight = config.weight

    @property
    def rows_at_once(self) -> int:
        return 8 * objective.MICRO_BATCH

    def choose(self, groups: Sequence[Group], A: Float[torch.Tensor, "P G"]) -> list[Member]:
        return [
            Member(trajectory, float(A[p, g]))
            for p, group in enumerate(groups)
            if bool((A[p] != 0).any())
            for g, trajectory in enumerate(group.trajectories)
            if any(isinstance(segment, TextSegment) for segment in trajectory.segments)
        ]

    def size(self, members: Sequence[Member]) -> int:
        """Tokens or trajectories, whichever the reduction counts."""
        if self.config.reduction == "trajectory":
            return len(members)
        return sum(
            len(s.tokens) for member in members for s in member.trajectory.segments if isinstance(s, TextSegment)
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        config = self.config
        logprobs, behavior, mask, entropy = token_grid(batch.policies.live, batch.trajectories)
        advantage = batch.advantages().to(logprobs.device)[:, None]
        surrogate = clipped_surrogate(
            logprobs, behavior, advantage, mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        loss = reduce_tokens(surrogate.loss_terms, mask, config.reduction)
        batch.log(f"loss/text/{batch.task}", loss)
        batch.log("ratio/text", surrogate.ratio[mask].mean())
        batch.log("clip_fraction/text", surrogate.clipped[mask].float().mean())
        batch.log(f"entropy/{batch.task}", entropy[mask].mean())
        if config.kl_coef:
            with torch.no_grad():
                ref_logprobs, _, _, _ = token_grid(batch.policies.reference, batch.trajectories)
            divergence = reduce_tokens(k3(logprobs, ref_logprobs), mask, config.reduction)
            batch.log(f"kl/text/{batch.task}", divergence)
            loss = loss + config.kl_coef * divergence
        if config.entropy_coef:
            loss = loss - config.entropy_coef * reduce_tokens(entropy, mask, config.reduction)
        return loss


def token_grid(
    policy: Policy, trajectories: Sequence[Trajectory]
) -> tuple[
    Float[torch.Tensor, "B L"], Float[torch.Tensor, "B L"], Bool[torch.Tensor, "B L"], Float[torch.Tensor, "B L"]
]:
    """Log-probs now, log-probs at sampling, mask and entropies of all text tokens, padded to (B, L)."""
    now, behavior, entropies = [], [], []
    for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories), strict=True):
        texts = [
            (segment, scored)
            for segment, scored in zip(trajectory.segments, replayed, strict=True)
            if isinstance(segment, TextSegment)
        ]
        now.append(torch.cat([scored.logprobs for _, scored in texts]))
        behavior.append(torch.cat([segment.behavior_logprobs for segment, _ in texts]).to(now[-1].device))
        entropies.append(torch.cat([scored.entropy for _, scored in texts if scored.entropy is not None]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(row), dtype=torch.bool, device=row.device) for row in now], batch_first=True)
    return pad(now, batch_first=True), pad(behavior, batch_first=True), mask, pad(entropies, batch_first=True)
