"""KL estimators and distances to a reference policy, all differentiable in the current policy.

Estimators at sampled actions are elementwise; entries that are masked later must be finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["corrected_k3", "gaussian_kl", "k1", "k2", "k3", "velocity_regularizer"]


def k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The naive estimator of KL(policy || reference) at sampled actions.

    k1 = -d, d = ref_logprobs - logprobs.

    Shapes: equal, to the same. Range: any sign; unbiased, but its gradient has mean 0: for logging, not as a loss.
    Raises: nothing.
    Differs from the paper: no.
    """
    d = ref_logprobs.detach() - logprobs
    return -d


def k2(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half the squared log-ratio at sampled actions: a biased estimate with the gradient of KL(policy || reference).

    k2 = d^2 / 2, d = ref_logprobs - logprobs.

    Shapes: equal, to the same. Range: >= 0.
    Raises: nothing.
    Differs from the paper: no.
    """
    d = ref_logprobs.detach() - logprobs
    return d**2 / 2


def k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The low-variance estimator of KL(policy || reference) at sampled actions (GRPO, arXiv:2402.03300).

    k3 = exp(d) - d - 1, d = ref_logprobs - logprobs.

    Unbiased; its gradient, at samples of the policy, is that of the *forward* KL(reference || policy).

    Shapes: equal, to the same. Range: >= 0; exp(d) is huge where the policy is far less likely than the reference.
    Raises: nothing.
    Differs from the paper: no.
    """
    d = ref_logprobs.detach() - logprobs
    return torch.expm1(d) - d


def corrected_k3(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    behavior_logprobs: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """k3 weighted by the importance ratio: an estimator of KL(policy || reference) and its gradient, on and off policy
    (DeepSeek-V3.2, arXiv:2512.02556).

    ratio k3, ratio = exp(logprobs - behavior_logprobs), with its gradient.

    Shapes: equal, to the same. Range: >= 0.
    Raises: nothing.
    Differs from the paper: no. The ratio is not clipped.
    """
    ratio = torch.exp(logprobs - behavior_logprobs.detach())
    return ratio * k3(logprobs, ref_logprobs)


def gaussian_kl(
    mean: Float[Tensor, " B *shape"],
    mean_ref: Float[Tensor, " B *shape"],
    std: Float[Tensor, " ..."],
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, " B"]:
    """The exact KL of two flow steps of equal variance, N(mean, std^2) and N(mean_ref, std^2).

    KL per dimension = (mean - mean_ref)^2 / (2 std^2), std the step's standard deviation, e.g. s sqrt(-dt) for
    Flow-SDE; reduced over all but the first axis by ``mean`` (1/D of the step's KL) or ``sum`` (the step's KL in nats).

    Shapes: mean and mean_ref (B, N, C), std broadcastable to them, to (B,). Range: >= 0; inf or nan for std = 0.
    Raises: InputError for an unknown reduction.
    Differs from the paper: Flow-GRPO's code (arXiv:2505.05470) omits the factor -dt of std^2, so its coefficient
    depends on the number of steps.
    """
    kl = ((mean - mean_ref.detach()) ** 2 / (2 * std**2)).flatten(1)
    if reduction == "mean":
        return kl.mean(dim=1)
    if reduction == "sum":
        return kl.sum(dim=1)
    raise InputError(f"kl reduction={reduction!r} is unknown: use mean or sum")


def velocity_regularizer(v: Float[Tensor, " B *shape"], v_ref: Float[Tensor, " B *shape"]) -> Float[Tensor, " B"]:
    """The squared distance of two velocities (UniGRPO, arXiv:2603.23500).

    mean |v - v_ref|^2 over all but the first axis; unlike the KL of a step it does not depend on the noise level.

    Shapes: v and v_ref (B, N, C) to (B,). Range: >= 0, in squared units of the velocity.
    Raises: nothing.
    Differs from the paper: per sample, without the coefficient.
    """
    return ((v - v_ref.detach()) ** 2).flatten(1).mean(dim=1)
