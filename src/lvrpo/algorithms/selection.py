"""Selection of members and groups for training: top and bottom k, best of n, preference pairs, dynamic sampling.

Masked members are never selected. Ties go to the lower member index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.algorithms.advantages import check_finite
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "PreferencePairs",
    "ResamplePlan",
    "best_of_mask",
    "best_worst_mask",
    "centered_advantages",
    "preference_pairs",
    "resample_plan",
]


@dataclass(frozen=True)
class PreferencePairs:
    """One pair of members per group."""

    winner: Tensor
    """int64 (P,): the member with the highest score."""
    loser: Tensor
    """int64 (P,): the member with the lowest score."""
    valid: Tensor
    """bool (P,): whether the group has a pair; if False the indices are undefined."""


@dataclass(frozen=True)
class ResamplePlan:
    """The groups to resample in one round of dynamic sampling."""

    redraw: Tensor
    """bool (P,): groups without signal to be replaced by groups of new prompts of the same task."""
    given_up: Tensor
    """bool (P,): groups without signal beyond the budget."""
    budget_left: int
    """Remaining budget in groups after this round."""


def best_worst_mask(
    advantages: Float[Tensor, "P G"], keep: int, mask: Bool[Tensor, "P G"] | None = None
) -> Bool[Tensor, "P G"]:
    """Selects the ``keep`` best and the ``keep`` worst valid members of each group with signal.

    Members are sorted by descending advantage, ties by ascending index; the first and the last ``keep`` are selected,
    2 * keep different members if there are that many. None in a group without signal (all valid advantages equal).

    Shapes: advantages and mask (P, G) to (P, G).
    Raises: InputError for ``keep`` below 1.
    Differs from the paper: no paper given. With keep = 2 it halves the compute of a group of 8.
    """
    if keep < 1:
        raise InputError(f"keep={keep} members is no choice: use 1 or more")
    valid = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    ordered = torch.where(valid, advantages, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = ordered.argsort(dim=1)  # of each member, invalid ones last
    count = valid.sum(dim=1, keepdim=True)
    chosen = (rank < keep) | (rank >= count - keep)
    lowest = torch.where(valid, advantages, torch.inf).amin(dim=1, keepdim=True)
    highest = torch.where(valid, advantages, -torch.inf).amax(dim=1, keepdim=True)
    return chosen & valid & (highest > lowest)


def centered_advantages(advantages: Float[Tensor, "P G"], keep: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Advantages of the kept members of each group, centered again.

    A'_i = A_i - mean_{j kept} A_j for kept members, 0 for the others.

    The advantages of the best and the worst members of a skewed group do not sum to 0. The remainder would train the
    policy on its own samples independent of reward; few-step samples have less variance than it, so images fade.

    Shapes: advantages and keep (P, G) to (P, G). Range: sums to 0 over the kept members of every group.
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    kept = torch.where(keep, advantages, 0.0)
    mean = kept.sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(keep, advantages - mean, 0.0)


def best_of_mask(
    scores: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G"],
    *,
    keep: int = 1,
    min_score: float | None = None,
    min_gap: float = 1e-6,
) -> Bool[Tensor, "P G"]:
    """Selects the ``keep`` best valid members of each group for supervised training (RAFT, arXiv:2304.06767).

    chosen_i = (rank of r_i among the valid members, descending) < keep (and r_i >= min_score, if given).

    A group whose best and worst score differ by at most ``min_gap`` is skipped, as training on it would not depend on
    reward. A negative ``min_gap`` includes such groups: "every right answer" is keep = G, min_score = 1, min_gap = -1.

    Shapes: scores and mask (P, G) to (P, G).
    Raises: InputError for ``keep`` below 1; ContractError for a valid score that is not finite.
    Differs from the paper: groups without signal are left out.
    """
    if keep < 1:
        raise InputError(f"keep={keep} members is no choice: use 1 or more")
    check_finite(scores, mask)
    from_top = torch.where(mask, scores, -torch.inf)
    rank = from_top.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    gap = from_top.amax(dim=1, keepdim=True) - torch.where(mask, scores, torch.inf).amin(dim=1, keepdim=True)
    chosen = mask & (rank < keep) & (gap > min_gap)
    return chosen if min_score is None else chosen & (scores >= min_score)


def preference_pairs(
    scores: Float[Tensor, "P G"], mask: Bool[Tensor, "P G"], *, min_gap: float = 1e-6
) -> PreferencePairs:
    """The best and the worst valid member of each group as a preference pair (online DPO, arXiv:2402.04792).

    winner = argmax_i r_i;  loser = argmin_i r_i;  valid if r_winner - r_loser > min_gap.

    Shapes: scores and mask (P, G) to fields (P,).
    Raises: InputError for a negative ``min_gap``; ContractError for a valid score that is not finite.
    Differs from the paper: it compares two samples; here a pair is selected from G by score.
    """
    if min_gap < 0:
        raise InputError(f"preference min_gap={min_gap}: use 0 or more")
    check_finite(scores, mask)
    highest, winner = torch.where(mask, scores, -torch.inf).max(dim=1)
    lowest, loser = torch.where(mask, scores, torch.inf).min(dim=1)
    return PreferencePairs(winner=winner, loser=loser, valid=highest - lowest > min_gap)


def resample_plan(signal: Bool[Tensor, " P"], tasks: Int[Tensor, " P"], budget: int) -> ResamplePlan:
    """The groups without signal to resample in this round (dynamic sampling of DAPO, arXiv:2503.14476).

    With n groups without signal: all are resampled if n <= budget; else ``budget`` of them, round-robin over tasks
    (ascending task number, then group), so that a task that rarely has signal does not use the whole budget.

    Call it after every round with the current signal and remaining budget, until ``redraw`` is empty. Log the share of
    given-up groups: it is the share of samples without a training signal.

    Shapes: signal, as from ``signal_mask``, and tasks (P,) any integers, to fields (P,).
    Raises: InputError for a negative budget.
    Differs from the paper: DAPO samples until the batch is full; here the budget is fixed and shared by tasks.
    """
    if budget < 0:
        raise InputError(f"resample budget={budget} groups: use 0 or more")
    dead = ~signal
    index = torch.zeros_like(tasks)  # of a dead group within its task
    for task in tasks.unique():
        rows = dead & (tasks == task)
        index[rows] = torch.arange(int(rows.sum()), device=tasks.device)
    order = sorted(dead.nonzero()[:, 0].tolist(), key=lambda p: (int(index[p]), int(tasks[p])))
    redraw = torch.zeros_like(signal)
    redraw[order[:budget]] = True
    return ResamplePlan(redraw=redraw, given_up=dead & ~redraw, budget_left=budget - int(redraw.sum()))
