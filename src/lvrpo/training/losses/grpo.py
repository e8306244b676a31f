"""GRPO and its relatives on tokens: an importance-weighted objective, a KL term and an entropy bonus.

GRPO (arXiv:2402.03300), DAPO (arXiv:2503.14476), Dr.GRPO (arXiv:2503.20783), GSPO (arXiv:2507.18071), CISPO
(arXiv:2506.13585). They differ in the surrogate (``algorithms.TOKEN_OBJECTIVES``) and in their defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field

from lvrpo.algorithms import TOKEN_OBJECTIVES, entropy_bonus, k2, k3, reduce_tokens, truncated_weights
from lvrpo.policies.base import Policy
from lvrpo.training.losses.base import FrozenPolicy, GroupAdvantages, LossOutput, Member, Microbatch
from lvrpo.training.losses.tokens import (
    TokenGrid,
    TokenLossConfig,
    TokenObjective,
    token_count,
    token_grid,
    token_segments,
)
from lvrpo.types import Group, SegmentKind

if TYPE_CHECKING:
    from jaxtyping import Float

KL = {"k2": k2, "k3": k3}


class PolicyGradientConfig(TokenLossConfig):
    """What GRPO and its relatives have in common."""

    clip_low: float = Field(default=0.2, gt=0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    importance_cap: float | None = Field(default=None, ge=0)
    """Where the program that sampled is not the one that trains: the ratio is taken to log-probs that the policy
    gives at the start of the step, and min(these / those of the sampler, cap) weighs each token. None: 2 with another
    program (``rollout.engine``), else they are one; 0: they are taken for one."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Of the divergence from the reference."""
    kl: Literal["k2", "k3"] = "k3"
    """Its estimator; k2 has the divergence's own gradient, k3 a lower variance near the reference."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Of the mean entropy of the tokens, which is raised."""
    reduction: Literal["token", "trajectory", "constant"] = "token"
    """token: one denominator for all tokens of a task (DAPO, which has one); trajectory: every text of a task counts
    alike (GRPO); constant: sums over tokens divided by rollout.max_new_tokens (Dr.GRPO), or by the tokens of a drawing,
    all of which count."""

    def capped(self, another: float | None) -> Self:
        """With the ``importance_cap`` that is meant; ``another``: that of another program, where one samples."""
        cap = another if self.importance_cap is None else self.importance_cap or None
        return self.model_copy(update={"importance_cap": cap})


class GRPOConfig(PolicyGradientConfig):
    """The clipped ratio of each token (arXiv:2402.03300, there with clip_high=0.2, reduction=trajectory and
    kl_coef=0.04); gspo: of the whole text (arXiv:2507.18071); cispo: capped weights (arXiv:2506.13585)."""

    kind: Literal["grpo", "gspo", "cispo"] = "grpo"


class DAPOConfig(PolicyGradientConfig):
    """As grpo, without a divergence (arXiv:2503.14476)."""

    kind: Literal["dapo"] = "dapo"
    kl_coef: float = Field(default=0.0, ge=0)


class DrGRPOConfig(PolicyGradientConfig):
    """As grpo, with its bounds and constant reduction and without a divergence (arXiv:2503.20783); beside
    advantages.std=none."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    clip_high: float = Field(default=0.2, gt=0)
    kl_coef: float = Field(default=0.0, ge=0)
    reduction: Literal["token", "trajectory", "constant"] = "constant"


class GRPO(TokenObjective):
    """Policy gradient on the tokens of the valid members of every group with signal."""

    def __init__(
        self, config: GRPOConfig | DAPOConfig | DrGRPOConfig, max_new_tokens: int, kind: SegmentKind = "text"
    ) -> None:
        super().__init__(config, max_new_tokens, kind)
        self.config = config

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        A, valid = advantages.values, advantages.valid
        return [
            Member(trajectory, float(A[p, g]))
            for p, group in enumerate(groups)
            if bool((A[p] != 0).any())
            for g, trajectory in enumerate(group.trajectories)
            if bool(valid[p, g]) and token_segments(trajectory, self.kind)
        ]

    def size(self, members: Sequence[Member]) -> int:
        """Tokens or trajectories, whichever the reduction counts."""
        if self.config.reduction != "token":
            return len(members)
        return sum(token_count(member.trajectory, self.kind) for member in members)

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",) if self.config.kl_coef else ()

    def reference_outputs(self, name: FrozenPolicy, policy: Policy, batch: Microbatch) -> Float[torch.Tensor, "B L"]:
        return token_grid(policy, batch.trajectories, self.kind).logprobs

    def loss(self, policy: Policy, batch: Microbatch) -> LossOutput:
        config, kind = self.config, self.kind
        grid = token_grid(policy, batch.trajectories, kind)
        draws = len(grid.mask) // len(batch.members)
        advantage = batch.advantages().repeat_interleave(draws).to(grid.logprobs.device)[:, None]
        surrogate = TOKEN_OBJECTIVES[config.kind](
            grid.logprobs, grid.anchor, advantage, grid.mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        terms = surrogate.loss_terms
        metrics: dict[str, torch.Tensor] = {}
        if config.importance_cap is not None:
            weights = truncated_weights(grid.anchor, grid.behavior, grid.mask, cap=config.importance_cap)
            metrics[f"importance/{kind}"] = weights[grid.mask].mean()
            terms = weights * terms
        loss = self._reduced(terms, grid)
        metrics[f"loss/{kind}/{batch.task}"] = loss
        metrics[f"ratio/{kind}"] = surrogate.ratio[grid.mask].mean()
        metrics[f"clip_fraction/{kind}"] = surrogate.clipped[grid.mask].float().mean()
        entropy = "entropy" if kind == "text" else f"entropy/{kind}"
        metrics[f"{entropy}/{batch.task}"] = grid.entropy[grid.mask].mean()
        if config.kl_coef:
            divergence = self._reduced(KL[config.kl](grid.logprobs, batch.frozen["reference"]), grid)
            metrics[f"kl/{kind}/{batch.task}"] = divergence
            loss = loss + config.kl_coef * divergence
        if config.entropy_coef:
            bonus = entropy_bonus(grid.entropy, grid.mask, config.reduction, constant=self._constant(grid))
            loss = loss + config.entropy_coef * bonus
        return LossOutput(loss, metrics)

    def _reduced(self, terms: Float[torch.Tensor, "B L"], grid: TokenGrid) -> torch.Tensor:
        return reduce_tokens(terms, grid.mask, self.config.reduction, constant=self._constant(grid))

    def _constant(self, grid: TokenGrid) -> float:
        """The most tokens that a text may have; the tokens of a drawing, whose batch is of one size."""
        return float(self.max_new_tokens if self.kind == "text" else grid.mask.shape[1])
