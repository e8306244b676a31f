"""Scores with their uncertainty: 95 % intervals by bootstrap over prompts, and by Student's t over seeds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # scipy.stats takes half a second to import: only when a statistic is asked for
from numpy.typing import ArrayLike, NDArray

from lvrpo.errors import ContractError

CONFIDENCE = 0.95
RESAMPLES = 2000
POWER = 0.8
TINY = 1e-12
"""A standard error of no more than this is rounding."""
MIN_SEEDS = 3
"""Seeds that a difference needs to be told from none; with fewer a table marks the cell."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that covers the true one in 95 of 100 experiments."""

    score: float
    low: float
    high: float
    n: int
    """How many values (prompts, or seeds) stand behind it."""

    def as_dict(self) -> dict[str, float | int]:
        """As ``summary.json`` holds it."""
        return {"score": self.score, "low": self.low, "high": self.high, "n": self.n}

    @property
    def clear_of_zero(self) -> bool:
        """Whether a difference is told from none."""
        return self.low > 0 or self.high < 0


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """Mean of per-prompt scores with a percentile bootstrap.

    ``clusters`` names what each value belongs to (the prompt of several samples): whole clusters are then resampled.
    Where all values are equal the bootstrap sees no spread: 0/1 scores get Wilson's interval, with the clusters as the
    sample size; others get an interval of width 0. One cluster alone says nothing of its spread: nan, as for no value.
    Raises ContractError on a value that is not finite.
    """
    scores = _checked(values)
    if scores.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    sums, counts = _by_cluster(scores, clusters)
    score = float(scores.mean())
    if np.all(scores == scores[0]):
        low, high = _wilson(score, sums.size) if scores[0] in (0.0, 1.0) else _no_spread(score, sums.size)
    else:
        low, high = _bootstrap(sums, counts, seed)
    return Interval(score, min(low, score), max(high, score), int(scores.size))


def paired_difference(
    before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval:
    """Mean of ``after - before`` over the same prompts, resampling prompts (or clusters) as pairs.

    Where all differences of 0/1 scores are equal, Wilson's bound on how often another one could have turned up is put
    on both sides; other equal differences get an interval of width 0.
    Raises ContractError if the two have different lengths or a value is not finite.
    """
    one, two = _checked(before), _checked(after)
    if one.shape != two.shape:
        raise ContractError(f"{one.size} scores before and {two.size} after: pair the same prompts")
    differences = two - one
    if differences.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    sums, counts = _by_cluster(differences, clusters)
    score = float(differences.mean())
    if np.all(differences == differences[0]):
        low, high = _no_spread(score, sums.size)
        if np.isin(one, (0.0, 1.0)).all() and np.isin(two, (0.0, 1.0)).all():
            share = _wilson(0.0, sums.size)[1]
            low, high = max(-1.0, score - share), min(1.0, score + share)
    else:
        low, high = _bootstrap(sums, counts, seed)
    return Interval(score, min(low, score), max(high, score), int(differences.size))


def welch_difference(
    before: ArrayLike,
    after: ArrayLike,
    confidence: float = CONFIDENCE,
    strata: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Interval:
    """Mean of ``after`` minus mean of ``before``, scores of different prompts, with Welch's t interval.

    With ``strata``, a label per score of each side (a category of prompts), means are compared within each label,

        sum_s w_s (mean_s after - mean_s before),    w_s = share of s in both sides together,

    and the variance is that within labels, pooled on each side: what labels differ by is no noise. Labels that one side
    lacks are left out.

    Fewer than two scores on a side (than one more than labels) say nothing of their spread: bounds of nan. Where
    neither side spreads, width 0. Raises ContractError on a value that is not finite, or without one label per score.
    """
    one, two = _checked(before), _checked(after)
    labels = strata or (np.zeros(one.size), np.zeros(two.size))
    if (len(labels[0]), len(labels[1])) != (one.size, two.size):
        raise ContractError(
            f"{one.size} and {two.size} scores but {len(labels[0])} and {len(labels[1])} strata: give one per score"
        )
    index: dict[Hashable, int] = {}
    codes = [np.array([index.setdefault(label, len(index)) for label in side], dtype=np.int64) for side in labels]
    size_one, size_two = (np.bincount(side, minlength=len(index)) for side in codes)
    both = np.flatnonzero((size_one > 0) & (size_two > 0))
    if both.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    weights = (size_one + size_two)[both] / (size_one + size_two)[both].sum()
    means, errors, freedoms = zip(
        *(_stratified(x, side, both, weights) for x, side in ((one, codes[0]), (two, codes[1]))), strict=True
    )
    score, n = means[1] - means[0], int(min(size_one[both].sum(), size_two[both].sum()))
    if min(freedoms) < 1:
        return Interval(score, float("nan"), float("nan"), n)
    if sum(errors) == 0:
        return Interval(score, score, score, n)
    freedom = sum(errors) ** 2 / sum(e**2 / f for e, f in zip(errors, freedoms, strict=True))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, freedom)) * sum(errors) ** 0.5
    return Interval(score, score - half, score + half, n)


def _stratified(
    values: Floats, codes: NDArray[np.int64], kept: NDArray[np.int64], weights: Floats
) -> tuple[float, ...]:
    """Weighted mean of one side's labels, its squared error, and the degrees of freedom of that."""
    groups = [values[codes == s] for s in kept]
    means = np.array([group.mean() for group in groups])
    freedom = sum(group.size for group in groups) - len(groups)
    within = sum(float(((group - mean) ** 2).sum()) for group, mean in zip(groups, means, strict=True))
    squares = float((weights**2 / [group.size for group in groups]).sum())
    return float(weights @ means), within / freedom * squares if freedom else float("nan"), freedom


def paired_t_difference(before: ArrayLike, after: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean of ``after - before`` over the same prompts, with Student's t interval: for any ``confidence``.

    The bootstrap of ``paired_difference`` is for reports at 95 %; far in the tails its resamples are too few.
    Raises ContractError if the two have different lengths or a value is not finite.
    """
    return _t_interval(_paired(before, after), confidence)


def seeds_interval(scores: ArrayLike) -> Interval:
    """Mean over seeds with Student's t interval; one seed says nothing of its spread, so its bounds are nan.

    Raises ContractError on a value that is not finite.
    """
    return _t_interval(_checked(scores), CONFIDENCE)


@dataclass(frozen=True)
class TwoWay:
    """A mean over seeds and prompts, both random."""

    interval: Interval
    """``n`` is the number of seeds."""
    detectable: float
    """The smallest effect that these seeds and prompts tell (``detectable_effect``)."""
    p: float
    """Of no difference, two-sided."""

    @property
    def too_few(self) -> bool:
        """Whether there are fewer than ``MIN_SEEDS``, or nothing to tell the spread from."""
        return self.interval.n < MIN_SEEDS or not np.isfinite(self.interval.low)


def over_seeds_and_prompts(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> TwoWay:
    """Mean over seeds (S rows) and prompts (P columns, the same for every seed) with both as random.

        V = V_seeds + max(0, V_prompts - V_both),   interval = mean +- t_f sqrt(max(V, V_prompts))

    V_seeds: variance of the S seed means over S; V_prompts: that of the P prompt means, whole ``clusters`` of prompts
    together; V_both: what a single (seed, cluster) contributes to each, so that it is counted once (two-way clustering,
    Cameron, Gelbach and Miller 2011). f by Satterthwaite from S - 1 and C - 1 for the two terms of V: with three seeds
    that differ, t is wide, where a bootstrap of three seeds would be too narrow.

    All but the mean is nan for one seed or one cluster; without any spread the interval has width 0 and the others are
    nan. Raises ContractError unless values are finite and of shape (S, P).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ContractError(f"scores of shape {table.shape}: give a row per seed and a column per prompt")
    _checked(table)
    unknown = float("nan")
    (s, p), mean = table.shape, float(table.mean())
    by_prompt, by_seed = table.mean(axis=0), table.mean(axis=1)
    sums, counts = _by_cluster(by_prompt, clusters)
    c = sums.size
    if s < 2 or c < 2:
        return TwoWay(Interval(mean, unknown, unknown, s), unknown, unknown)
    of_seeds = float(by_seed.var(ddof=1)) / s
    of_prompts = _cluster_variance(sums, counts)
    rest = table - by_prompt - by_seed[:, None] + mean
    both = sum(float((_by_cluster(row, clusters)[0] ** 2).sum()) for row in rest)
    own = max(0.0, of_prompts - both * s / (s - 1) * c / (c - 1) / (s * p) ** 2)
    spread = of_seeds**2 / (s - 1) + own**2 / (c - 1)
    error = max(of_seeds + own, of_prompts) ** 0.5
    if error <= TINY or spread == 0:
        return TwoWay(Interval(mean, mean, mean, s), unknown, unknown)
    freedom = (of_seeds + own) ** 2 / spread
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = float(2 * scipy.stats.t.sf(abs(mean) / error, freedom))
    return TwoWay(Interval(mean, mean - half, mean + half, s), detectable_effect(error, freedom), p_value)


def standard_error(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Of a mean over prompts, whole clusters being independent; nan for fewer than two of them.

    sqrt( C / (C - 1) sum_c (sum_{i in c} (x_i - mean))^2 ) / n; without clusters the usual one.
    """
    sums, counts = _by_cluster(_checked(values), clusters)
    return _cluster_variance(sums, counts) ** 0.5 if sums.size > 1 else float("nan")


def detectable_effect(
    error: float, freedom: float = float("inf"), level: float = 1 - CONFIDENCE, power: float = POWER
) -> float:
    """The smallest true difference that a two-sided test at ``level`` finds with probability ``power``.

        (t_f(1 - level / 2) + t_f(power)) * standard error;   2.802 standard errors by default, f being infinite

    (Cohen 1988). ``freedom``: f, such as seeds - 1 where the error is that over seeds. nan for an unknown error.
    """
    quantiles = scipy.stats.norm if np.isinf(freedom) else scipy.stats.t(freedom)
    return float(quantiles.ppf(1 - level / 2) + quantiles.ppf(power)) * error


def detectable_difference(before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """``detectable_effect`` of the paired difference of the same prompts, from its standard error.

    nan where all differences are equal: nothing is then known of their spread. Raises ContractError if the two have
    different lengths or a value is not finite.
    """
    error = standard_error(_paired(before, after), clusters)
    return detectable_effect(error if error > TINY else float("nan"))


def paired_p_value(before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Two-sided p of no mean difference over the same prompts: Student's t of the clustered error, C - 1 degrees.

    Equal differences have no error: p is then that of C equal signs, 2^(1 - C), and 1 where they are all 0. nan for
    fewer than two clusters. Raises ContractError if the two have different lengths or a value is not finite.
    """
    differences = _paired(before, after)
    sums, counts = _by_cluster(differences, clusters)
    if sums.size < 2:
        return float("nan")
    mean, error = float(differences.mean()), _cluster_variance(sums, counts) ** 0.5
    if mean == 0:
        return 1.0
    if error <= TINY:
        return float(0.5 ** (sums.size - 1))
    return float(2 * scipy.stats.t.sf(abs(mean) / error, sums.size - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979): each below .05 is then told at a family-wise level of .05.

        adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),   p_(1) <= ... <= p_(m)

    nan stays nan and is not counted. Raises ContractError for a p outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64).reshape(-1)
    known = np.flatnonzero(~np.isnan(p))
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise ContractError(f"p-values {p.tolist()}: must lie in [0, 1]")
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(order.size, 0, -1)
    adjusted = p.copy()
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return [float(each) for each in adjusted]


def bootstrap_statistic(
    statistic: Callable[[Floats], Floats], num_clusters: int, n: int | None = None, seed: int = 0
) -> Interval:
    """A statistic of weighted clusters with a percentile bootstrap over them.

    ``statistic`` maps how often each cluster is drawn, (R, C), to a value per resample, (R,); nan ones (a category that
    was not drawn) are left out. ``n``: what the interval says stands behind it; the clusters by default.
    """
    score = float(statistic(np.ones((1, num_clusters)))[0])
    n = num_clusters if n is None else n
    if num_clusters < 2:
        return Interval(score, float("nan"), float("nan"), n)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), RESAMPLES).astype(np.float64)
    found = statistic(weights)
    found = found[np.isfinite(found)]
    if not np.isfinite(score) or found.size == 0:
        return Interval(score, float("nan"), float("nan"), n)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(score, min(float(low), score), max(float(high), score), n)


def _paired(before: ArrayLike, after: ArrayLike) -> Floats:
    one, two = _checked(before), _checked(after)
    if one.shape != two.shape:
        raise ContractError(f"{one.size} scores before and {two.size} after: pair the same prompts")
    return two - one


def _cluster_variance(sums: Floats, counts: Floats) -> float:
    """Of the mean sum(sums) / sum(counts), clusters being independent."""
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float((residuals**2).sum()) * sums.size / (sums.size - 1) / float(counts.sum()) ** 2


def _t_interval(values: Floats, confidence: float) -> Interval:
    if values.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    error = float(values.std(ddof=1)) / values.size**0.5
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, values.size - 1)) * error
    return Interval(mean, mean - half, mean + half, int(values.size))


def _checked(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ContractError("a score is not finite: leave missing scores out, they are never numbers")
    return array


def _by_cluster(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and count of each cluster; each value is its own where no clusters are given."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != values.size:
        raise ContractError(f"{values.size} scores but {len(clusters)} clusters: give one cluster per score")
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(cluster, len(index)) for cluster in clusters], dtype=np.int64)
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    np.add.at(sums, codes, values)
    np.add.at(counts, codes, 1.0)
    return sums, counts


def _no_spread(score: float, n: int) -> tuple[float, float]:
    return (score, score) if n > 1 else (float("nan"), float("nan"))


def _wilson(share: float, n: int) -> tuple[float, float]:
    interval = scipy.stats.binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _bootstrap(sums: Floats, counts: Floats, seed: int) -> tuple[float, float]:
    if sums.size == 1:
        return float("nan"), float("nan")

    def ratio(total: Any, count: Any, axis: int = -1) -> Any:  # scipy calls it with arrays of any rank
        return total.sum(axis=axis) / count.sum(axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap(
            (sums, counts),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, 4_000_000 // sums.size),
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


# --- a reward and a scorer that go apart ---

MIN_GROUPS = 10
"""Groups (or prompts) that a part of a run needs to be compared."""


@dataclass(frozen=True)
class Divergence:
    """A reward rose and a scorer fell, each by more than chance explains."""

    part: int
    """Which earlier part the last one was compared with."""
    reward: Interval
    """Of the change, above 0 with its whole interval."""
    scorer: Interval
    """Below 0 with its whole interval."""


def comparable(rewards: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> list[int]:
    """The earlier parts that can be compared with the last: both sides have ``MIN_GROUPS`` of both."""
    sizes = [min(np.size(one), np.size(other)) for one, other in zip(rewards, scores, strict=True)]
    return [i for i in range(len(sizes) - 1) if min(sizes[i], sizes[-1]) >= MIN_GROUPS]


def divergence(
    rewards: Sequence[ArrayLike],
    scores: Sequence[ArrayLike],
    confidence: float,
    paired: bool = False,
    strata: tuple[Sequence[Sequence[Hashable]], Sequence[Sequence[Hashable]]] | None = None,
) -> Divergence | None:
    """Whether a reward rose while a scorer fell, from an earlier part of a run to its last: the worst fall, or None.

    ``rewards`` and ``scores`` hold one value per group for each part, in order, ``strata`` a label for each of these
    values. Changes have Welch's t interval, within strata, those of scores Student's where they are ``paired`` (of the
    same prompts in one order). Both intervals must be clear of 0, so chance parts them more rarely than ``confidence``
    says.
    """

    def change(parts: Sequence[ArrayLike], i: int, side: int) -> Interval:
        labels = None if strata is None else (strata[side][i], strata[side][-1])
        return welch_difference(parts[i], parts[-1], confidence, labels)

    found = []
    for i in comparable(rewards, scores):
        reward = change(rewards, i, 0)
        scorer = paired_t_difference(scores[i], scores[-1], confidence) if paired else change(scores, i, 1)
        if reward.low > 0 and scorer.high < 0:
            found.append(Divergence(i, reward, scorer))
    return min(found, key=lambda each: each.scorer.score, default=None)
