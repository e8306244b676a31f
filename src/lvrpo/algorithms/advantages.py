"""Group-relative advantages.

Every function takes scores and a mask. Masked scores are ignored (they may be nan); masked members get advantage 0, and
so do groups without signal, whose scores do not differ. Statistics are over valid members only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lvrpo.errors import ContractError, InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "gdpo_advantages",
    "group_relative_advantages",
    "leave_one_out_advantages",
    "normalize_rewards",
    "signal_mask",
    "trimmed_advantages",
    "win_rate",
]

StdChoice = Literal["population", "sample", "batch", "none"]
NormalizeChoice = Literal["group", "batch", "none"]


def group_relative_advantages(
    scores: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G"],
    *,
    std: StdChoice = "population",
    std_floor: float = 1e-6,
    eps: float = 1e-4,
    clamp: float | None = None,
) -> Float[Tensor, "P G"]:
    """Scores relative to the group's mean, in units of a standard deviation (GRPO, arXiv:2402.03300).

    A_i = (r_i - mean_G) / (std + eps), with std by name: ``population`` (divisor n) or ``sample`` (n - 1) of the group,
    ``batch`` (population, of all valid scores of all groups: the global std of Flow-GRPO, arXiv:2505.05470) or ``none``
    (Dr.GRPO, arXiv:2503.20783: A = r - mean).

    ``batch`` includes the variance between groups; call it once per task, else the task with the largest variance sets
    the scale of all.

    Shapes: scores and mask (P, G) to (P, G). Range: |A| <= sqrt(n - 1) for ``population``; units of the scores for
    ``none``; within [-clamp, clamp] if ``clamp`` is given (the sum over a group is then no longer 0).
    Raises: InputError for an unknown ``std``; ContractError for a valid score that is not finite.
    Differs from the paper: a group whose population std is at most ``std_floor`` gets 0 for every choice of std, as
    dividing by a tiny std amplifies noise; masked members are left out of mean and std.
    """
    centered, group_std = _group_moments(scores, mask)
    signal = group_std > std_floor  # (P,)
    if std == "none":
        advantages = centered
    elif std == "population":
        advantages = centered / (group_std + eps)[:, None]
    elif std == "sample":
        advantages = centered / (group_std * _bessel(mask.sum(dim=1)) + eps)[:, None]
    elif std == "batch":
        batch_std = _masked_std(scores, mask)
        advantages = centered / (batch_std + eps)
    else:
        raise InputError(f"advantage std={std!r} is unknown: use population, sample, batch or none")
    advantages = torch.where(mask & signal[:, None], advantages, 0.0)
    return advantages if clamp is None else advantages.clamp(-clamp, clamp)


def trimmed_advantages(
    scores: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G"],
    *,
    trim: float = 0.125,
    std_floor: float = 1e-6,
    eps: float = 1e-4,
    clamp: float | None = None,
) -> Float[Tensor, "P G"]:
    """Scores relative to the trimmed mean and std of their group, which are robust to outliers.

    k = floor(trim n), n the number of valid members; mean_k and std_k (population) are over the n - 2k members without
    the k lowest and the k highest;  A_i = (r_i - mean_k) / (std_k + eps) for *all* valid members.

    Not for binary scores: a single right answer among eight is trimmed, and the group then has no signal.

    Shapes: scores and mask (P, G) to (P, G). Range: unbounded for the trimmed members, hence ``clamp``; the sum over a
    group is not 0. ``trim`` = 0 is ``group_relative_advantages``.
    Raises: InputError for a trim outside [0, 0.5); ContractError for a valid score that is not finite.
    Differs from the paper: no paper given. A group with std_k at most ``std_floor`` gets 0.
    """
    if not 0 <= trim < 0.5:
        raise InputError(f"advantage trim={trim}: use a share in [0, 0.5)")
    check_finite(scores, mask)
    count = mask.sum(dim=1, keepdim=True)
    cut = (trim * count + 1e-6).floor()
    rank = torch.where(mask, scores, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)  # invalid members last
    middle = mask & (rank >= cut) & (rank < count - cut)
    mean = torch.where(middle, scores, 0.0).sum(dim=1, keepdim=True) / middle.sum(dim=1, keepdim=True).clamp(min=1)
    _, std = _group_moments(scores, middle)
    advantages = torch.where(mask & (std > std_floor)[:, None], (scores - mean) / (std + eps)[:, None], 0.0)
    return advantages if clamp is None else advantages.clamp(-clamp, clamp)


def leave_one_out_advantages(
    scores: Float[Tensor, "P G"], mask: Bool[Tensor, "P G"], *, std_floor: float = 1e-6
) -> Float[Tensor, "P G"]:
    """Scores relative to the mean of the *other* members (RLOO).

    A_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean_G), n the number of valid members.

    Shapes: scores and mask (P, G) to (P, G). Range: units of the scores.
    Raises: ContractError for a valid score that is not finite.
    Differs from the paper: groups with std at most ``std_floor``, hence also those with one valid member, get 0.
    """
    centered, group_std = _group_moments(scores, mask)
    count = mask.sum(dim=1)
    advantages = (count / (count - 1).clamp(min=1))[:, None] * centered
    return torch.where(mask & (group_std > std_floor)[:, None], advantages, 0.0)


def gdpo_advantages(
    scores: Float[Tensor, "P G K"],
    mask: Bool[Tensor, "P G K"],
    weights: Float[Tensor, "*P K"],
    tasks: Int[Tensor, " P"],
    *,
    std: Literal["population", "sample"] = "population",
    std_floor: float = 1e-6,
    eps: float = 1e-4,
    clamp: float | None = None,
    normalize: Sequence[NormalizeChoice | None] | None = None,
) -> Float[Tensor, "P G"]:
    """Each reward is normalized in its group before the rewards are summed (GDPO, arXiv:2601.05242).

    z_k = (r_k - mean_G r_k) / (std_G r_k + eps);  s = sum_k w_k z_k;  A = (s - mean_task s) / (std_task s + eps).
    mean_task s is 0, as every z_k sums to 0 over the valid members of its group, so it is not computed. Both std are of
    the ``population`` (divisor n) or of the ``sample`` (n - 1). ``normalize``: another z_k per reward (see
    ``normalize_rewards``).

    Shapes: scores and mask (P, G, K), weights (K,), or (P, K) if they differ between groups, tasks (P,) any integers,
    to (P, G). Range: about unit std per task; within [-clamp, clamp] if ``clamp`` is given (the sum over a group is
    then no longer 0).
    Raises: ContractError for a valid score that is not finite.
    Differs from the paper: the batch normalization is per task, else the task with the largest variance sets the scale
    of all; a reward whose group std is at most ``std_floor`` contributes 0 in that group; a masked score contributes 0;
    std_task is over valid members of groups with signal, so that groups without signal do not change the scale.
    """
    P, G, K = scores.shape
    cells = scores.transpose(1, 2).reshape(P * K, G)
    valid = mask.transpose(1, 2).reshape(P * K, G)
    z = group_relative_advantages(cells, valid, std=std, std_floor=std_floor, eps=eps).reshape(P, K, G)
    if normalize is not None and any(normalize):
        others = normalize_rewards(scores, mask, tasks, normalize, std=std, std_floor=std_floor, eps=eps)
        chosen = torch.tensor([how is not None for how in normalize])
        z = torch.where(chosen[None, :, None], others.transpose(1, 2), z)
    if weights.ndim == 1:
        s = torch.einsum("k,pkg->pg", weights.to(z.dtype), z)  # (P, G)
    else:
        s = torch.einsum("pk,pkg->pg", weights.to(z.dtype), z)
    counted = mask.any(dim=2) & (s != 0).any(dim=1, keepdim=True)  # (P, G)
    advantages = torch.zeros_like(s)
    for task in tasks.unique():
        rows = tasks == task
        std_task = _masked_std(s[rows], counted[rows])
        if std == "sample":
            std_task = std_task * _bessel(counted[rows].sum())
        advantages[rows] = torch.where(std_task > 0, s[rows] / (std_task + eps), 0.0)
    return advantages if clamp is None else advantages.clamp(-clamp, clamp)


def normalize_rewards(
    scores: Float[Tensor, "P G K"],
    mask: Bool[Tensor, "P G K"],
    batches: Int[Tensor, " P"],
    normalize: Sequence[NormalizeChoice | None],
    *,
    std: Literal["population", "sample"] = "population",
    std_floor: float = 1e-6,
    eps: float = 1e-4,
) -> Float[Tensor, "P G K"]:
    """Normalizes every reward by its own method, before rewards are summed.

    ``group``: (r - mean_G) / (std_G + eps); ``batch``: (r - mean_G) / (std_batch + eps), one std for all valid scores
    of the groups with one number in ``batches``; ``none``: r - mean_G; None: r itself. The first three are 0 in a group
    whose std is at most ``std_floor``.

    Shapes: scores and mask (P, G, K), batches (P,), one choice for each of K rewards, to (P, G, K).
    Raises: InputError for an unknown choice; ContractError for a valid score that is not finite.
    Differs from the paper: GDPO (arXiv:2601.05242) and GRPO (arXiv:2402.03300) have one choice for all rewards.
    """
    out = scores.clone()
    for k, how in enumerate(normalize):
        score, valid = scores[..., k], mask[..., k]
        if how is None:
            continue
        if how == "group":
            out[..., k] = group_relative_advantages(score, valid, std=std, std_floor=std_floor, eps=eps)
        elif how == "none":
            out[..., k] = group_relative_advantages(score, valid, std="none", std_floor=std_floor)
        elif how == "batch":
            for batch in batches.unique():
                rows = batches == batch
                out[rows, :, k] = group_relative_advantages(
                    score[rows], valid[rows], std="batch", std_floor=std_floor, eps=eps
                )
        else:
            raise InputError(f"normalize={how!r} is unknown: use group, batch or none")
    return out


def signal_mask(
    scores: Float[Tensor, "P G *K"], mask: Bool[Tensor, "P G *K"], std_floor: float = 1e-6
) -> Bool[Tensor, " P"]:
    """Groups with signal: at least one reward whose valid scores have a population std above the floor.

    signal_p = max_k std_G(r_pk) > std_floor.

    Shapes: scores and mask (P, G) or (P, G, K) to (P,).
    Raises: ContractError for a valid score that is not finite.
    Differs from the paper: DAPO (arXiv:2503.14476) requires different total scores; this is per reward, with a floor.
    """
    P, G = scores.shape[:2]
    cells = scores.reshape(P, G, -1).transpose(1, 2)  # (P, K, G)
    valid = mask.reshape(P, G, -1).transpose(1, 2)
    K = cells.shape[1]
    _, group_std = _group_moments(cells.reshape(P * K, G), valid.reshape(P * K, G))
    return (group_std.reshape(P, K) > std_floor).any(dim=1)


def win_rate(wins: Float[Tensor, "P G G"], played: Bool[Tensor, "P G G"]) -> Float[Tensor, "P G"]:
    """The win rate of every member, a tie counting one half (Pref-GRPO, arXiv:2508.20751).

    reward_i = sum_j wins_ij / sum_j played_ij, over the pairs played, j != i.

    Shapes: wins (P, G, G), in [0, 1]: row i against column j; played (P, G, G), its diagonal ignored; to (P, G).
    Range: [0, 1]; nan for a member without comparisons, to be masked.
    Raises: nothing.
    Differs from the paper: any subset of the pairs may be played; with all of them the divisor is the paper's G - 1.
    """
    others = played & ~torch.eye(wins.shape[1], dtype=torch.bool, device=wins.device)
    return torch.where(others, wins, 0.0).sum(dim=2) / others.sum(dim=2)


def check_finite(scores: Tensor, mask: Tensor) -> None:
    """Raises ContractError for a valid score that is not finite, as nan > floor would pass as no signal."""
    if not torch.where(mask, scores, 0.0).isfinite().all():
        raise ContractError("a score is nan or infinite but not masked: mask it, with its reason")


def _group_moments(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centered scores (P, G), 0 where masked, and population std (P,), 0 where nothing is valid."""
    check_finite(scores, mask)
    lowest = torch.where(mask, scores, torch.inf).amin(dim=1, keepdim=True)
    # relative to the group's lowest score, so that equal scores have a std of exactly 0
    above = torch.where(mask, scores - lowest, 0.0)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    centered = torch.where(mask, above - above.sum(dim=1, keepdim=True) / count, 0.0)
    return centered, ((centered**2).sum(dim=1, keepdim=True) / count).sqrt().squeeze(1)


def _masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """Population std over all valid cells; 0 where there are none."""
    _, std = _group_moments(values.reshape(1, -1), mask.reshape(1, -1))
    return std[0]


def _bessel(count: Tensor) -> Tensor:
    """The factor from the population std of ``count`` values to the sample std."""
    return (count / (count - 1).clamp(min=1)).sqrt()
