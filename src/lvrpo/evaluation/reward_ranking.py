"""Ranking quality of rewards against ground truth within groups: Spearman's correlation and AUC."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import scipy
from numpy.typing import NDArray

from lvrpo.audit_records import Ranking, RankingChange, RewardRanking, Window
from lvrpo.evaluation.recorded_groups import SUCCESS, Array
from lvrpo.statistics import Interval, mean_interval, seeds_interval, welch_difference

BOOTSTRAP_LIMIT = 5000
"""Above this number of groups, Student's t replaces the bootstrap."""


def rank_rewards(
    scorers: Mapping[str, Array],
    verifiers: Sequence[str],
    category: NDArray[np.str_],
    step: NDArray[np.int64] | None = None,
    windows: Sequence[Window] = (),
    clusters: Sequence[Hashable] | None = None,
) -> tuple[RewardRanking, ...]:
    """The ranking of every reward of a task except the verifier; () without ground truth.

    ``scorers``: scores (N, G) by name, including ``SUCCESS``. ``verifiers``: rewards that grade by ground truth; the
    first that was scored is used, and ``SUCCESS`` where it does not apply. ``category`` and ``step``: (N,).
    ``clusters``: resampling units of the bootstrap, such as the image of a prompt.
    """
    rewards = {name: scores for name, scores in scorers.items() if name != SUCCESS}
    if SUCCESS not in scorers:
        return ()
    title, grades = SUCCESS, scorers[SUCCESS]
    for name in verifiers:
        if name in rewards:
            own = rewards.pop(name)
            applies = np.isfinite(own).any(axis=1, keepdims=True)
            title, grades = name if applies.all() else f"{name}, {SUCCESS}", np.where(applies, own, grades)
            break
    success = scorers[SUCCESS]

    def ranked(name: str, scores: Array) -> RewardRanking:
        rank, auc = rank_correlations(scores, grades), group_auc(scores, success)
        units = np.arange(len(scores)) if clusters is None else np.unique(np.array(clusters), return_inverse=True)[1]

        def ranking(rows: NDArray[np.bool_]) -> Ranking:
            differ = [(_centered(ranks) != 0).any(axis=1) for ranks in _ranks(scores[rows], grades[rows])]
            return Ranking(
                _mean(rank[rows], units[rows], lowest=-1.0),
                _mean(auc[rows], units[rows], lowest=0.0),
                silent=int((~differ[0] & differ[1]).sum()),
                alike=int((~differ[1] & _both_scored(scores[rows], grades[rows]).any(axis=1)).sum()),
            )

        along = None
        if step is not None and len(windows) > 1:
            first, last = ((step >= w.first) & (step <= w.last) for w in (windows[0], windows[-1]))
            along = RankingChange(ranking(first), ranking(last), *(_change(x[first], x[last]) for x in (rank, auc)))
        both = _both_scored(scores, success)
        return RewardRanking(
            name=name,
            verifier=title,
            is_success=bool(both.any() and np.array_equal(scores[both], success[both])),
            whole=ranking(np.ones(len(scores), dtype=np.bool_)),
            categories={c: ranking(category == c) for c in dict.fromkeys(category[both.any(axis=1)].tolist()) if c},
            along=along,
        )

    return tuple(ranked(name, scores) for name, scores in rewards.items())


def rank_correlations(one: Array, other: Array) -> NDArray[np.float64]:
    """(N, G) twice to (N,): Spearman's correlation of each group, over members that have both; ties share their mean
    rank. nan where one of the two is constant."""
    a, b = (_centered(ranks) for ranks in _ranks(one, other))
    spread = (a**2).sum(axis=1) * (b**2).sum(axis=1)
    return np.where(spread > 0, (a * b).sum(axis=1) / np.sqrt(np.where(spread > 0, spread, 1.0)), np.nan)


def group_auc(scores: Array, success: Array) -> NDArray[np.float64]:
    """(N, G) twice to (N,): the share of the pairs of a right and a wrong member in which the right one scores higher,
    a tie one half (the area under the curve, Mann and Whitney's U). nan where there is no such pair."""
    both = _both_scored(scores, success)
    ranks = _ranks(scores, success)[0]
    right, wrong = both & (success > 0.5), both & (success <= 0.5)
    n, m = right.sum(axis=1), wrong.sum(axis=1)
    above = np.where(right, ranks, 0.0).sum(axis=1) - n * (n + 1) / 2
    return np.where(n * m > 0, above / np.maximum(n * m, 1), np.nan)


def _both_scored(one: Array, other: Array) -> NDArray[np.bool_]:
    """(N, G): which members have both."""
    return np.isfinite(one) & np.isfinite(other)


def _ranks(one: Array, other: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ranks from 1 inside each group over the members that have both, nan for the others."""
    both = _both_scored(one, other)
    if not both.size:
        return np.full(one.shape, np.nan), np.full(other.shape, np.nan)
    a, b = (scipy.stats.rankdata(np.where(both, x, np.nan), axis=1, nan_policy="omit") for x in (one, other))
    return a, b


def _centered(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks minus their mean; 0 for members without one."""
    count = np.isfinite(ranks).sum(axis=1, keepdims=True)
    return np.where(np.isfinite(ranks), ranks - (count + 1) / 2, 0.0)


def _change(first: NDArray[np.float64], last: NDArray[np.float64]) -> Interval:
    return welch_difference(first[np.isfinite(first)], last[np.isfinite(last)])


def _mean(values: NDArray[np.float64], units: NDArray[np.int64], lowest: float) -> Interval:
    """Mean over groups of values in [``lowest``, 1]: identical values get Wilson's interval."""
    kept = np.isfinite(values)
    if kept.sum() > BOOTSTRAP_LIMIT:
        return seeds_interval(values[kept])
    found = mean_interval((values[kept] - lowest) / (1 - lowest), units[kept].tolist())
    score, low, high = (lowest + (1 - lowest) * x for x in (found.score, found.low, found.high))
    return Interval(score, low, high, found.n)
