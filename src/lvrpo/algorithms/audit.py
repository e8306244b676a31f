"""Attribution of the variance of advantages to rewards, and correlation of scores inside groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lvrpo.algorithms.advantages import NormalizeChoice, group_relative_advantages, normalize_rewards
from lvrpo.errors import ContractError, InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["VarianceShares", "advantage_parts", "group_correlation", "variance_shares"]

Normalization = Literal["reward", "sum"]


@dataclass(frozen=True)
class VarianceShares:
    """Decomposition of the variance of the advantages of each group; all in units of squared advantage."""

    by_reward: Float[Tensor, "P K"]
    """Covariance of each reward's contribution with the advantage; negative if a reward opposes the total."""
    rest: Float[Tensor, " P"]
    """Unexplained variance, such as that of a clamp; 0 for unclamped advantages."""
    total: Float[Tensor, " P"]
    """Variance of the advantages; 0 without signal."""

    def pooled(self) -> Float[Tensor, " K"]:
        """Shares over all groups, weighted by their variance; nan if all variances are 0."""
        return self.by_reward.sum(dim=0) / self.total.sum()


def advantage_parts(
    scores: Float[Tensor, "P G K"],
    mask: Bool[Tensor, "P G K"],
    weights: Float[Tensor, "*P K"],
    *,
    normalization: Normalization,
    std_floor: float = 1e-6,
    eps: float = 1e-4,
    normalize: Sequence[NormalizeChoice | None] | None = None,
    batches: Int[Tensor, " P"] | None = None,
) -> Float[Tensor, "P G K"]:
    """The contribution of each reward to the score that the advantage is proportional to within a group.

    ``reward`` (each normalized in its group, then summed: GDPO, arXiv:2601.05242): u_k = w_k (r_k - mean_G r_k) /
    (std_G r_k + eps), 0 where std_G r_k <= ``std_floor``. ``sum`` (summed, then normalized: GRPO, Dr.GRPO,
    leave-one-out, batch std): u_k = w_k (r_k - mean_G r_k). ``normalize`` and ``batches``: as in ``normalize_rewards``.

    Shapes: scores and mask (P, G, K), weights (K,), or (P, K) if they differ between groups, to (P, G, K); every u_k
    sums to 0 over the valid members.
    Raises: InputError for an unknown ``normalization``; ContractError for a valid score that is not finite.
    Differs from the paper: no paper given. A masked score contributes 0; for ``sum`` a member is valid only with a
    score from every reward that applies to its group.
    """
    if normalization == "reward":
        valid = mask
    elif normalization == "sum":
        applies = mask.any(dim=1, keepdim=True)
        whole = (mask | ~applies).all(dim=2, keepdim=True)
        valid = mask & whole
    else:
        raise InputError(f"normalization={normalization!r} is unknown: use reward or sum")
    P, G, K = scores.shape
    cells, counted = (x.transpose(1, 2).reshape(P * K, G) for x in (scores, valid))
    if normalization == "reward":
        centered = group_relative_advantages(cells, counted, std_floor=std_floor, eps=eps)
    else:
        centered = group_relative_advantages(cells, counted, std="none", std_floor=0.0)
    centered = centered.reshape(P, K, G).transpose(1, 2)
    if normalize is not None and any(normalize):
        one = torch.zeros(P, dtype=torch.int64) if batches is None else batches
        others = normalize_rewards(scores, mask, one, normalize, std_floor=std_floor, eps=eps)
        chosen = torch.tensor([how is not None for how in normalize])
        centered = torch.where(chosen, torch.where(valid, others, 0.0), centered)
    return centered * (weights if weights.ndim == 1 else weights[:, None]).to(centered.dtype)


def variance_shares(
    parts: Float[Tensor, "P G K"], advantages: Float[Tensor, "P G"], mask: Bool[Tensor, "P G"]
) -> VarianceShares:
    """Attributes Var(A) to the rewards by the covariance of their contributions with A.

    u = sum_k u_k;  lambda = Cov(u, A) / Var(u) per group, the regression coefficient of A on u;  c_k = lambda u_k.
    Then Var(A) = sum_k Cov(c_k, A) + Var(A - lambda u): the share of reward k is Cov(c_k, A) / Var(A), and shares and
    rest sum to 1. The rest is 0 if A is proportional to u, as for all advantages without clamp or trimming.

    Shapes: parts (P, G, K), advantages and mask (P, G), to (P, K), (P,), (P,). Range: the rest is never negative; a
    share may be, and another then exceeds 1.
    Raises: ContractError for a valid advantage that is not finite.
    Differs from the paper: no paper given. For independent rewards it is the share of variance, w_k^2 / sum_j w_j^2
    for GDPO; a covariance between two rewards is split evenly.
    """
    if not torch.where(mask, advantages, 0.0).isfinite().all():
        raise ContractError("an advantage is nan or infinite but not masked: mask it, with its reason")
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    A = torch.where(mask, advantages, 0.0).double()
    A = torch.where(mask, A - A.sum(dim=1, keepdim=True) / count, 0.0)
    u_k = torch.where(mask[..., None], parts, 0.0).double()
    u_k = torch.where(mask[..., None], u_k - u_k.sum(dim=1, keepdim=True) / count[..., None], 0.0)
    u = u_k.sum(dim=2)  # (P, G)
    spread = (u**2).sum(dim=1)
    scale = torch.where(spread > 0, (u * A).sum(dim=1) / spread, 0.0)  # lambda
    by_reward = scale[:, None] * (u_k * A[..., None]).sum(dim=1) / count
    rest = ((A - scale[:, None] * u) ** 2).sum(dim=1) / count[:, 0]
    return VarianceShares(by_reward, rest, (A**2).sum(dim=1) / count[:, 0])


def group_correlation(
    x: Float[Tensor, "P G"], y: Float[Tensor, "P G"], mask: Bool[Tensor, "P G"], *, std_floor: float = 1e-6
) -> tuple[float, int]:
    """Pooled within-group Pearson correlation of two scores of the same outputs, and the number of groups.

    rho = sum_p Cov_p(x, y) n_p / sqrt( sum_p Var_p(x) n_p * sum_p Var_p(y) n_p ), over the groups p in which both have
    a population std above ``std_floor``, with n_p members with both scores. Differences between prompts are excluded.

    Shapes: x, y, mask (P, G). Range: [-1, 1]; nan without such a group.
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    centered = []
    for values in (x, y):
        valid = torch.where(mask, values, 0.0).double()
        centered.append(torch.where(mask, valid - valid.sum(dim=1, keepdim=True) / count, 0.0))
    a, b = centered
    spreads = [((v**2).sum(dim=1) / count[:, 0]).sqrt() > std_floor for v in (a, b)]
    rows = spreads[0] & spreads[1]
    a, b = a[rows], b[rows]
    rho = (a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt()
    return float(rho.clamp(-1, 1)), int(rows.sum())
