"""Policy-gradient objectives on tokens and flow steps: importance ratios, clipping, and reductions.

An objective takes log-probs, advantages and a mask, all (B, L), and returns unreduced terms to minimize. Masked entries
are ignored (they may be nan). All terms of a loss (surrogate, KL, entropy) share one denominator: ``reduce_tokens``, or
``reduction_weights`` with gradient accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = [
    "TOKEN_OBJECTIVES",
    "ClipBounds",
    "SurrogateLoss",
    "TokenObjective",
    "cispo_surrogate",
    "clipped_surrogate",
    "entropy_bonus",
    "gspo_surrogate",
    "guard_surrogate",
    "reduce_tokens",
    "reduction_weights",
    "scaled_clip",
    "truncated_weights",
]

LossReduction = Literal["token", "trajectory", "constant"]


@dataclass(frozen=True)
class SurrogateLoss:
    """The unreduced surrogate per action."""

    loss_terms: Tensor
    """To minimize; 0 where masked."""
    ratio: Tensor
    """The importance ratio before clipping, detached; 1 where masked."""
    clipped: Tensor
    """bool: where the clip is active and the term has no gradient (CISPO: a clipped weight); False where masked."""


class TokenObjective(Protocol):
    """The signature of the entries of ``TOKEN_OBJECTIVES``."""

    def __call__(
        self,
        logprobs: Tensor,
        behavior_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        clip_low: float,
        clip_high: float,
    ) -> SurrogateLoss: ...


class ClipBounds(NamedTuple):
    """Bounds of the ratio: [1 - low, 1 + high]."""

    low: float
    high: float


def clipped_surrogate(
    logprobs: Float[Tensor, "*shape"],
    behavior_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*#shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """The PPO clip with separate lower and upper bounds (GRPO, arXiv:2402.03300; DAPO, arXiv:2503.14476).

    ratio = exp(logprobs - behavior_logprobs);  loss = -min(ratio A, clamp(ratio, 1 - clip_low, 1 + clip_high) A).

    Shapes: logprobs, behavior_logprobs and mask share a shape, (B, L) tokens or (B, W) flow steps; advantages broadcast
    to it, e.g. (B, 1). Units: the clip bounds the ratio of *one action's* density; the log-ratio of a flow step whose
    log-density is a mean over D dimensions is 1/D of that of the sum, so its clip has to be smaller by that factor
    (``scaled_clip``). Computed in float32.
    Raises: InputError for a negative bound.
    Differs from the paper: nothing in the term; reduction over actions is left to ``reduce_tokens``.
    """
    log_ratio = torch.where(mask, logprobs.float() - behavior_logprobs.float(), 0.0)
    return _clip(log_ratio, advantages, mask, clip_low, clip_high)


def gspo_surrogate(
    logprobs: Float[Tensor, "B L"],
    behavior_logprobs: Float[Tensor, "B L"],
    advantages: Float[Tensor, "#B #L"],
    mask: Bool[Tensor, "B L"],
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """The clip on the ratio of the whole sequence, per token (GSPO and GSPO-token, arXiv:2507.18071).

    s = exp(mean_t (logprobs_t - behavior_logprobs_t)) over the valid tokens of a row;
    ratio_t = sg(s) exp(logprobs_t - sg(logprobs_t)), equal to s in value;
    loss_t = -min(ratio_t A_t, clamp(ratio_t, 1 - clip_low, 1 + clip_high) A_t).

    With one advantage per sequence the terms of a row are equal, and their mean has GSPO's value and gradient,
    s A mean_t grad logprobs_t. So the ``trajectory`` reduction is the paper's objective; other reductions weight
    sequences by length. With an advantage per token this is GSPO-token.

    Shapes: logprobs, behavior_logprobs and mask (B, L); advantages broadcast to them. Units: the ratio is per token
    (a geometric mean), hence clips of 3e-4 and 4e-4.
    Raises: InputError for a negative bound.
    Differs from the paper: no. Masked tokens are left out of the mean.
    """
    log_ratio = torch.where(mask, logprobs.float() - behavior_logprobs.float(), 0.0)
    log_s = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    per_token = torch.where(mask, log_s.detach() + (log_ratio - log_ratio.detach()), 0.0)
    return _clip(per_token, advantages, mask, clip_low, clip_high)


def cispo_surrogate(
    logprobs: Float[Tensor, "*shape"],
    behavior_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*#shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """Clips the importance weight instead of the term, so that all tokens keep a gradient (CISPO, arXiv:2506.13585).

    ratio = exp(logprobs - behavior_logprobs);
    loss = -sg(clamp(ratio, 1 - clip_low, 1 + clip_high)) A logprobs.

    Shapes: as ``clipped_surrogate``. Range: the value contains logprobs and is not meaningful, only its gradient is.
    ``clip_low`` = 1: no lower bound, as in the paper's experiments.
    Raises: InputError for a negative bound.
    Differs from the paper: no; the token reduction of the paper is ``reduce_tokens`` with ``token``.
    """
    _check_bounds(clip_low, clip_high)
    A = torch.where(mask, advantages, 0.0)
    logprobs = torch.where(mask, logprobs.float(), 0.0)
    ratio = torch.exp(logprobs.detach() - torch.where(mask, behavior_logprobs.float(), 0.0))
    weight = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    capped = mask & ((ratio > 1 + clip_high) | (ratio < 1 - clip_low))
    return SurrogateLoss(loss_terms=-weight * A * logprobs, ratio=ratio, clipped=capped)


TOKEN_OBJECTIVES: Mapping[str, TokenObjective] = {
    "grpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "gspo": gspo_surrogate,
    "cispo": cispo_surrogate,
}
"""The token objectives by their name in a configuration."""


def guard_surrogate(
    logprobs: Float[Tensor, "B W"],
    behavior_logprobs: Float[Tensor, "B W"],
    step_kl: Float[Tensor, "B W"],
    std: Float[Tensor, " ..."],
    advantages: Float[Tensor, "#B #W"],
    mask: Bool[Tensor, "B W"],
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """The clip on a centered ratio of flow steps with equal scale at all steps (GRPO-Guard, arXiv:2510.22319).

    log ratio = (logprobs - behavior_logprobs + b) std;  b = |mean - mean_behavior|^2 / (2 std^2);
    loss = -min(ratio A, clamp(ratio, 1 - clip_low, 1 + clip_high) A).

    For x_next = mean_behavior + std eps the log ratio is eps . (mean - mean_behavior): its mean is 0, and its variance
    does not grow as std falls. ``step_kl`` is b: ``gaussian_kl`` of the current step against the behavior step, with
    the reduction of the log-probs and *with its gradient*, which is part of that of the ratio. ``std``: the step's
    standard deviation, e.g. s sqrt(-dt).

    Shapes: logprobs, behavior_logprobs, step_kl and mask (B, W); std (W,) or (B, W); advantages (B, 1) or (B, W).
    Units: the log ratio is std times the plain one, so the clip is smaller by about that factor too.
    Raises: InputError for a negative bound.
    Differs from the paper: its weight 1 / -dt per step is left to the caller: ``step_weights`` with ones for std.
    """
    centered = torch.where(mask, logprobs.float() - behavior_logprobs.float() + step_kl.float(), 0.0)
    log_ratio = centered * torch.where(mask, std.float(), 1.0)
    return _clip(log_ratio, advantages, mask, clip_low, clip_high)


def truncated_weights(
    trainer_logprobs: Float[Tensor, "B L"],
    sampler_logprobs: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    cap: float,
    level: Literal["token", "sequence"] = "token",
) -> Float[Tensor, "B L"]:
    """Truncated importance weights that correct for a rollout engine whose log-probs differ from the trainer's.

    token: w_t = min(exp(trainer_t - sampler_t), cap);  sequence: w = min(exp(sum_t (trainer_t - sampler_t)), cap), the
    same for all tokens of a row. Multiply the terms of any objective by them, then reduce.

    ``trainer_logprobs``: under the behavior weights, computed by the trainer. The weights correct numerical differences
    (precision, kernels, a stale copy), not the policy's update, which is the ratio of the objective.

    Shapes: all (B, L), to (B, L), detached; 0 where masked. Range: [0, cap].
    Raises: InputError for a cap that is not positive, or an unknown level.
    Differs from the paper: Yao et al. 2025 (Your Efficient RL Framework Secretly Brings You Off-Policy RL Training)
    use the token level.
    """
    if cap <= 0:
        raise InputError(f"importance cap={cap}: use a positive number, e.g. 2")
    if level not in ("token", "sequence"):
        raise InputError(f"importance level={level!r} is unknown: use token or sequence")
    log_weight = torch.where(mask, trainer_logprobs.detach().float() - sampler_logprobs.detach().float(), 0.0)
    if level == "sequence":
        log_weight = log_weight.sum(dim=1, keepdim=True).expand_as(log_weight)
    return torch.where(mask, torch.exp(log_weight).clamp(max=cap), 0.0)


def entropy_bonus(
    entropy: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    how: LossReduction = "token",
    *,
    constant: float | None = None,
) -> Float[Tensor, ""]:
    """The entropy bonus, to be added to a loss with a coefficient.

    bonus = -reduce(H_t), with the same denominator as the policy's terms.

    Shapes: entropy (as from ``token_entropy``) and mask (B, L) to a scalar. Range: <= 0, in nats.
    Raises: InputError as ``reduce_tokens``.
    Differs from the paper: no paper given.
    """
    return -reduce_tokens(entropy, mask, how, constant=constant)


def reduce_tokens(
    terms: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    how: LossReduction = "token",
    *,
    constant: float | None = None,
) -> Float[Tensor, ""]:
    """Reduces the terms of a batch of trajectories to one loss.

    ``token``: sum_bl terms / sum_bl mask, one denominator for the batch (DAPO, arXiv:2503.14476): longer answers have
    more weight.
    ``trajectory``: mean_b (sum_l terms / sum_l mask) (GRPO, arXiv:2402.03300): all answers have equal weight.
    ``constant``: mean_b sum_l terms / constant (Dr.GRPO, arXiv:2503.20783): weights are independent of length.

    Shapes: terms and mask (B, L) to a scalar. Trajectories without a valid action are left out; without any valid
    action the result is 0, attached to the graph.
    Raises: InputError for an unknown ``how``, or for ``constant`` without a positive constant.
    Differs from the paper: only in masked trajectories.
    """
    terms = torch.where(mask, terms, 0.0)
    count = mask.sum(dim=1)  # (B,)
    trajectories = (count > 0).sum().clamp(min=1)
    if how == "token":
        return terms.sum() / count.sum().clamp(min=1)
    if how == "trajectory":
        return (terms.sum(dim=1) / count.clamp(min=1)).sum() / trajectories
    return terms.sum() / (trajectories * _divisor(how, constant))


def reduction_weights(
    mask: Bool[Tensor, "B L"], how: LossReduction = "token", *, constant: float | None = None
) -> Float[Tensor, "B L"]:
    """The weight of each term in ``reduce_tokens``, for gradient accumulation over microbatches.

    reduce_tokens(terms) = sum_bl weights terms; so the weighted sums of the microbatches, with their rows of the
    batch's weights, add up to the loss of the batch for any split. The mean of microbatch means does not.

    Shapes: mask (B, L) to (B, L), 0 where masked. Range: sums to 1 for ``token`` and ``trajectory``.
    Raises: InputError as ``reduce_tokens``.
    Differs from the paper: as ``reduce_tokens``.
    """
    valid = mask.float()
    count = valid.sum(dim=1, keepdim=True)  # (B, 1)
    trajectories = (count > 0).sum().clamp(min=1)
    if how == "token":
        return valid / count.sum().clamp(min=1)
    if how == "trajectory":
        return valid / count.clamp(min=1) / trajectories
    return valid / (trajectories * _divisor(how, constant))


def scaled_clip(
    clip_low: float, clip_high: float, num_dimensions: int, reduction: Literal["mean", "sum"] = "mean"
) -> ClipBounds:
    """Converts the clip bounds of a flow step from the ``mean`` reduction of its log-density to another reduction.

    mean: unchanged;  sum over D dimensions: low = 1 - (1 - clip_low)^D, high = (1 + clip_high)^D - 1.

    The ratio for the sum is the D-th power of that for the mean, so with these bounds both clip the same samples.
    Published clips (1e-6 .. 1e-4) are for the mean; with the sum the gradient is D times as large.

    Range: low in [0, 1], high >= 0.
    Raises: InputError for a negative bound, a clip_low above 1, num_dimensions below 1, an unknown reduction, or a
    bound too wide for D dimensions.
    Differs from the paper: no paper given.
    """
    _check_bounds(clip_low, clip_high)
    if clip_low > 1 or num_dimensions < 1:
        raise InputError(f"clip_low={clip_low} over {num_dimensions} dimensions: use 0..1 over 1 or more")
    if reduction == "mean":
        return ClipBounds(clip_low, clip_high)
    if reduction != "sum":
        raise InputError(f"logprob_reduction={reduction!r} is unknown: use mean or sum")
    log_high = num_dimensions * math.log1p(clip_high)
    if log_high > 80:  # exp(88.7) is the largest float32
        raise InputError(
            f"clip_high={clip_high} of the mean over {num_dimensions} dimensions is a ratio of e^{log_high:.0f} of the "
            "sum, which clips nothing: use a smaller one"
        )
    low = 1.0 if clip_low == 1 else -math.expm1(num_dimensions * math.log1p(-clip_low))
    return ClipBounds(low, math.expm1(log_high))


def _clip(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> SurrogateLoss:
    """-min(ratio A, clamp(ratio) A); ``log_ratio`` is 0 where masked."""
    _check_bounds(clip_low, clip_high)
    A = torch.where(mask, advantages, 0.0)
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * A, clipped * A)
    active = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    return SurrogateLoss(loss_terms=torch.where(mask, -surrogate, 0.0), ratio=ratio.detach(), clipped=active)


def _check_bounds(clip_low: float, clip_high: float) -> None:
    if clip_low < 0 or clip_high < 0:
        raise InputError(f"clip_low={clip_low}, clip_high={clip_high}: both bounds have to be 0 or more")


def _divisor(how: str, constant: float | None) -> float:
    """Validates and returns the divisor of the ``constant`` reduction; raises InputError for another one."""
    if how != "constant":
        raise InputError(f"loss_reduction={how!r} is unknown: use token, trajectory or constant")
    if constant is None or constant <= 0:
        raise InputError(f"loss_reduction=constant with constant={constant}: give the divisor, e.g. the length limit")
    return constant
