"""Policy objectives: the clipped surrogate and how its terms are reduced. Tokens and flow steps alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["SurrogateLoss", "clipped_surrogate", "reduce_tokens"]

LossReduction = Literal["token", "trajectory", "constant"]


@dataclass(frozen=True)
class SurrogateLoss:
    """The clipped surrogate per action, not yet reduced."""

    loss_terms: Tensor
    """To minimise; 0 where masked."""
    ratio: Tensor
    """exp(logprobs - behavior_logprobs), detached; 1 where masked."""
    clipped: Tensor
    """bool: where the clip is active, that is where the term has no gradient; False where masked."""


def clipped_surrogate(
    logprobs: Float[Tensor, "*shape"],
    behavior_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*#shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """The PPO clip, with a bound of its own on either side (GRPO, arXiv:2402.03300; DAPO, arXiv:2503.14476).

    ratio = exp(logprobs - behavior_logprobs);  loss = -min(ratio A, clamp(ratio, 1 - clip_low, 1 + clip_high) A).

    Shapes: logprobs, behavior_logprobs and mask share a shape, (B, L) tokens or (B, W) flow steps; advantages broadcast
    to it, e.g. (B, 1). Units: the clip bounds the ratio of *one action's* density; where a flow step's log-density is a
    mean over D latent dimensions, the same change of the policy moves it by 1/D of what it moves the sum, so the clip
    has to be as much smaller. Computed in float32.
    Raises: InputError for a negative bound.
    Differs from the paper: nothing in the term; reduction over actions is left to ``reduce_tokens``.
    """
    if clip_low < 0 or clip_high < 0:
        raise InputError(f"clip_low={clip_low}, clip_high={clip_high}: both bounds have to be 0 or more")
    A = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logprobs.float() - behavior_logprobs.float(), 0.0)
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * A, clipped * A)
    active = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    return SurrogateLoss(loss_terms=torch.where(mask, -surrogate, 0.0), ratio=ratio.detach(), clipped=active)


def reduce_tokens(
    terms: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    how: LossReduction = "token",
    *,
    constant: float | None = None,
) -> Float[Tensor, ""]:
    """Reduces the terms of a batch of trajectories to one loss.

    ``token``: sum_bl terms / sum_bl mask, one denominator for the batch (DAPO, arXiv:2503.14476): long answers weigh
    more.
    ``trajectory``: mean_b (sum_l terms / sum_l mask) (GRPO, arXiv:2402.03300): every answer weighs the same.
    ``constant``: mean_b sum_l terms / constant (Dr.GRPO, arXiv:2503.20783): no weight depends on a length.

    Shapes: terms and mask (B, L) to a scalar. A trajectory without a valid action is left out of numerator and
    denominator; with nothing valid at all the result is 0, still attached to the graph.
    Raises: InputError for an unknown ``how``, or for ``constant`` without a positive constant.
    Differs from the paper: nothing, but for trajectories that are masked out.
    """
    terms = torch.where(mask, terms, 0.0)
    count = mask.sum(dim=1)  # (B,)
    trajectories = (count > 0).sum().clamp(min=1)
    if how == "token":
        return terms.sum() / count.sum().clamp(min=1)
    if how == "trajectory":
        return (terms.sum(dim=1) / count.clamp(min=1)).sum() / trajectories
    if how == "constant":
        if constant is None or constant <= 0:
            raise InputError(
                f"loss_reduction=constant with constant={constant}: give the divisor, e.g. the length limit"
            )
        return terms.sum() / (trajectories * constant)
    raise InputError(f"loss_reduction={how!r} is unknown: use token, trajectory or constant")
