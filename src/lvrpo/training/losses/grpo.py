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
from lvrpo.policies.base import RolloutPolicy
from lvrpo.training.losses.base import FrozenPolicy, GroupAdvantages, LossOutput, Member, Microbatch
from lvrpo.training.losses.tokens import (
    TokenGrid,
    TokenLossConfig,
    TokenObjective,
    token_count,
    token_grid,
    token_segments,
)
from lvrpo.types import Group

if TYPE_CHECKING:
    from jaxtyping import Float

KL = {"k2": k2, "k3": k3}


class PolicyGradientConfig(TokenLossConfig):
    """Options of GRPO and its variants."""

    clip_low: float = Field(default=0.2, gt=0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    importance_cap: float | None = Field(default=None, ge=0)
    """Truncated importance sampling for a rollout engine: the ratio is relative to log-probs recomputed by the trainer
    before the update, and each token is weighted by min(recomputed / behavior, cap). None: 2 with ``rollout.engine``,
    otherwise off; 0: off."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Weight of the KL divergence from the reference."""
    kl: Literal["k2", "k3"] = "k3"
    """KL estimator; k2 has the gradient of the KL divergence, k3 a lower variance near the reference."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    reduction: Literal["token", "trajectory", "constant"] = "token"
    """token: mean over all tokens of a task (DAPO); trajectory: mean over trajectories of the mean over tokens (GRPO);
    constant: sum over tokens divided by rollout.max_new_tokens (Dr.GRPO), or by the number of tokens of an image."""

    def with_importance_cap(self, default: float | None) -> Self:
        """Resolves ``importance_cap``: ``default`` for None, None (off) for 0."""
        cap = default if self.importance_cap is None else self.importance_cap or None
        return self.model_copy(update={"importance_cap": cap})


class GRPOConfig(PolicyGradientConfig):
    """grpo: clipped ratio per token (arXiv:2402.03300, there with clip_high=0.2, reduction=trajectory and
    kl_coef=0.04); gspo: per sequence (arXiv:2507.18071); cispo: clipped weights (arXiv:2506.13585)."""

    kind: Literal["grpo", "gspo", "cispo"] = "grpo"


class DAPOConfig(PolicyGradientConfig):
    """grpo without a KL term (arXiv:2503.14476)."""

    kind: Literal["dapo"] = "dapo"
    kl_coef: float = Field(default=0.0, ge=0)


class DrGRPOConfig(PolicyGradientConfig):
    """grpo with symmetric clip bounds, constant reduction and no KL term (arXiv:2503.20783); use with
    advantages.std=none."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    clip_high: float = Field(default=0.2, gt=0)
    kl_coef: float = Field(default=0.0, ge=0)
    reduction: Literal["token", "trajectory", "constant"] = "constant"


class GRPO(TokenObjective):
    """Policy gradient on the tokens of the valid members of every group with signal."""

    config: GRPOConfig | DAPOConfig | DrGRPOConfig

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        return [
            Member(trajectory, advantage)
            for group, A, valid in zip(groups, advantages.values.tolist(), advantages.valid.tolist(), strict=True)
            if any(A)
            for trajectory, advantage, is_valid in zip(group.trajectories, A, valid, strict=True)
            if is_valid and token_segments(trajectory, self.kind)
        ]

    def size(self, members: Sequence[Member]) -> int:
        """Number of tokens for the token reduction, else of trajectories."""
        if self.config.reduction != "token":
            return len(members)
        return sum(token_count(member.trajectory, self.kind) for member in members)

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",) if self.config.kl_coef else ()

    def reference_outputs(
        self, name: FrozenPolicy, policy: RolloutPolicy, batch: Microbatch
    ) -> Float[torch.Tensor, "B L"]:
        return token_grid(policy, batch.trajectories, self.kind).logprobs

    def loss(self, policy: RolloutPolicy, batch: Microbatch) -> LossOutput:
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
        """Divisor of the constant reduction: ``max_new_tokens``, or the number of tokens of an image."""
        return float(self.max_new_tokens if self.kind == "text" else grid.mask.shape[1])
