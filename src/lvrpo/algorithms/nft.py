"""DiffusionNFT: policy optimization of a flow on the forward process, without recorded trajectories or log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.algorithms.kl import velocity_regularizer
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["NFTLoss", "nft_loss", "old_policy_decay", "reward_probability"]


@dataclass(frozen=True)
class NFTLoss:
    """The DiffusionNFT loss per sample, each (B,)."""

    loss: Tensor
    """To minimise: policy + kl_coef * velocity_kl."""
    policy: Tensor
    """The reward-weighted term alone."""
    velocity_kl: Tensor
    """mean |v - v_ref|^2, without its coefficient."""
    distance_to_old: Tensor
    """mean |v - v_old|^2, detached; monitor it: a tenfold rise precedes a collapse."""


def nft_loss(
    v: Float[Tensor, " B *shape"],
    v_old: Float[Tensor, " B *shape"],
    v_ref: Float[Tensor, " B *shape"] | None,
    x_t: Float[Tensor, " B *shape"],
    t: Float[Tensor, " B"],
    x0: Float[Tensor, " B *shape"],
    q: Float[Tensor, " B"],
    *,
    beta: float,
    kl_coef: float = 0.0,
    advantage_max: float = 1.0,
    weight_floor: float = 1e-5,
) -> NFTLoss:
    """Fits an implicit positive policy to good samples and an implicit negative one to bad samples (arXiv:2509.16117).

    v+ = beta v + (1 - beta) v_old;  v- = (1 + beta) v_old - beta v;  x0+- = x_t - t v+-;
    L = (A_max / beta) [ q mean|x0+ - x0|^2 / w+ + (1 - q) mean|x0- - x0|^2 / w- ] + kl_coef mean|v - v_ref|^2,
    with w+- = sg(mean|x0+- - x0|), at least ``weight_floor``, per sample.

    Shapes: v, v_old, v_ref, x_t, x0 (B, N, C), t and q (B,) to fields (B,). ``x_t`` = (1 - t) x0 + t noise with fresh
    noise, ``q`` in [0, 1] as from ``reward_probability``. v_old and v_ref get no gradient. At v = v_old the gradient is
    proportional to 2 q - 1, so 0 for advantage 0.
    Raises: InputError for beta <= 0, or for a kl_coef without v_ref.
    Differs from the paper: no; the result is per sample, to be averaged by the caller.
    """
    if beta <= 0:
        raise InputError(f"nft beta={beta}: use a positive number, e.g. 0.5")
    if kl_coef != 0 and v_ref is None:
        raise InputError(f"nft kl_coef={kl_coef} needs a reference: give v_ref or set kl_coef=0")
    v, v_old, x_t, x0 = v.float(), v_old.detach().float(), x_t.float(), x0.float()
    time = t.float().view(-1, *[1] * (v.ndim - 1))
    v_positive = beta * v + (1 - beta) * v_old
    v_negative = (1 + beta) * v_old - beta * v
    positive = _weighted_error(x_t - time * v_positive, x0, weight_floor)
    negative = _weighted_error(x_t - time * v_negative, x0, weight_floor)
    policy = advantage_max / beta * (q * positive + (1 - q) * negative)
    velocity_kl = torch.zeros_like(policy) if v_ref is None else velocity_regularizer(v, v_ref.float())
    return NFTLoss(
        loss=policy + kl_coef * velocity_kl,
        policy=policy,
        velocity_kl=velocity_kl,
        distance_to_old=velocity_regularizer(v.detach(), v_old),
    )


def reward_probability(advantages: Float[Tensor, "*shape"], advantage_max: float) -> Float[Tensor, "*shape"]:
    """The probability that a sample counts as positive (DiffusionNFT, arXiv:2509.16117).

    q = 1/2 + 1/2 clip(A / A_max, -1, 1).

    Shapes: any, to the same. Range: [0, 1]; 1/2 for advantage 0.
    Raises: InputError for A_max <= 0.
    Differs from the paper: no.
    """
    if advantage_max <= 0:
        raise InputError(f"advantage_max={advantage_max}: use a positive number")
    return 0.5 + 0.5 * (advantages / advantage_max).clamp(-1, 1)


def old_policy_decay(step: int, *, rate: float, ceiling: float) -> float:
    """The decay of the moving average that is the old policy: on-policy at first, slower later (arXiv:2509.16117).

    decay = min(rate * step, ceiling);  old <- decay * old + (1 - decay) * current.

    Range: [0, ceiling]; 0 at step 0, where old becomes a copy of current.
    Raises: InputError for a ceiling outside [0, 1).
    Differs from the paper: rate and ceiling are arguments.
    """
    if not 0 <= ceiling < 1:
        raise InputError(f"decay ceiling={ceiling}: use a number in [0, 1)")
    return min(rate * step, ceiling)


def _weighted_error(x0_predicted: Tensor, x0: Tensor, weight_floor: float) -> Tensor:
    """mean|x0^ - x0|^2 / sg(mean|x0^ - x0|), per sample (B,)."""
    error = (x0_predicted - x0).flatten(1)
    weight = error.detach().abs().mean(dim=1).clamp(min=weight_floor)
    return (error**2).mean(dim=1) / weight
