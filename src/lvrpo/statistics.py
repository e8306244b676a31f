"""Scores with their uncertainty: 95 % intervals by bootstrap over prompts, and by Student's t over seeds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # scipy.stats is imported lazily: it takes half a second
from numpy.typing import ArrayLike, NDArray

from lvrpo.errors import ContractError

CONFIDENCE = 0.95
RESAMPLES = 2000
POWER = 0.8
TINY = 1e-12
"""A standard error up to this is a rounding error."""
MIN_SEEDS = 3
"""Minimum number of seeds for a significance statement; tables mark cells with fewer."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    score: float
    low: float
    high: float
    n: int
    """Number of values (prompts or seeds)."""

    def as_dict(self) -> dict[str, float | int]:
        """As JSON, for ``summary.json``."""
        return {"score": self.score, "low": self.low, "high": self.high, "n": self.n}

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is significant: 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """Mean of per-prompt scores with a percentile bootstrap.

    ``clusters``: the cluster of each value (the prompt of several samples); whole clusters are resampled. If all values
    are equal, 0/1 scores get Wilson's interval with the number of clusters as the sample size, others an interval of
    width 0. Bounds are nan for one cluster and for no value. Raises ContractError for a value that is not finite.
    """
    scores = _to_finite_array(values)
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

    If all differences of 0/1 scores are equal, the half width is Wilson's upper bound on the frequency of another
    difference; other equal differences get an interval of width 0.
    Raises ContractError if the two have different lengths or a value is not finite.
    """
    differences = _paired(before, after)
    if differences.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    sums, counts = _by_cluster(differences, clusters)
    score = float(differences.mean())
    if np.all(differences == differences[0]):
        low, high = _no_spread(score, sums.size)
        if all(np.isin(_to_finite_array(scores), (0.0, 1.0)).all() for scores in (before, after)):
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

    With ``strata``, a label per score of each side (the category of its prompt), the difference is stratified,

        sum_s w_s (mean_s after - mean_s before),    w_s = share of s in both sides together,

    and the variance is that within strata, pooled on each side. Strata that one side lacks are left out.

    Bounds are nan if a side has no degree of freedom (at most as many scores as strata); width 0 if all scores of a
    stratum are equal. Raises ContractError for a value that is not finite, or unless there is one label per score.
    """
    one, two = _to_finite_array(before), _to_finite_array(after)
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
    values: Floats, codes: NDArray[np.int64], strata: NDArray[np.int64], weights: Floats
) -> tuple[float, ...]:
    """Weighted mean over the strata of one side, its squared error, and its degrees of freedom."""
    groups = [values[codes == s] for s in strata]
    means = np.array([group.mean() for group in groups])
    freedom = sum(group.size for group in groups) - len(groups)
    within = sum(float(((group - mean) ** 2).sum()) for group, mean in zip(groups, means, strict=True))
    squares = float((weights**2 / [group.size for group in groups]).sum())
    return float(weights @ means), within / freedom * squares if freedom else float("nan"), freedom


def paired_t_difference(before: ArrayLike, after: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean of ``after - before`` over the same prompts, with Student's t interval for any ``confidence``.

    (``paired_difference`` has too few resamples for the tails far beyond 95 %.)
    Raises ContractError if the two have different lengths or a value is not finite.
    """
    return _t_interval(_paired(before, after), confidence)


def seeds_interval(scores: ArrayLike) -> Interval:
    """Mean over seeds with Student's t interval; bounds are nan for one seed.

    Raises ContractError for a value that is not finite.
    """
    return _t_interval(_to_finite_array(scores), CONFIDENCE)


@dataclass(frozen=True)
class TwoWayInterval:
    """A mean over seeds and prompts, both as random effects."""

    interval: Interval
    """``n`` is the number of seeds."""
    detectable: float
    """The smallest effect that is detectable with these seeds and prompts (``detectable_effect``)."""
    p: float
    """Two-sided p-value of no difference."""

    @property
    def too_few(self) -> bool:
        """Whether there are fewer than ``MIN_SEEDS`` seeds, or the interval is not finite."""
        return self.interval.n < MIN_SEEDS or not np.isfinite(self.interval.low)


def seeds_and_prompts_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> TwoWayInterval:
    """Mean over seeds (S rows) and prompts (P columns, the same for every seed), both as random effects.

        V = V_seeds + max(0, V_prompts - V_both),   interval = mean +- t_f sqrt(max(V, V_prompts))

    V_seeds: variance of the S seed means over S; V_prompts: that of the P prompt means, clustered by ``clusters``;
    V_both: the contribution of a single (seed, cluster), which both contain (two-way clustering, Cameron, Gelbach and
    Miller 2011). f by Satterthwaite from S - 1 and C - 1 for the two terms of V. With few seeds t is wide, where a
    bootstrap over seeds would be too narrow.

    All but the mean is nan for one seed or one cluster; if all values are equal the interval has width 0 and the others
    are nan. Raises ContractError unless values are finite and of shape (S, P).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ContractError(f"scores of shape {table.shape}: give a row per seed and a column per prompt")
    _to_finite_array(table)
    unknown = float("nan")
    (s, p), mean = table.shape, float(table.mean())
    by_prompt, by_seed = table.mean(axis=0), table.mean(axis=1)
    sums, counts = _by_cluster(by_prompt, clusters)
    c = sums.size
    if s < 2 or c < 2:
        return TwoWayInterval(Interval(mean, unknown, unknown, s), unknown, unknown)
    of_seeds = float(by_seed.var(ddof=1)) / s
    of_prompts = _clustered_variance(sums, counts)
    rest = table - by_prompt - by_seed[:, None] + mean
    both = sum(float((_by_cluster(row, clusters)[0] ** 2).sum()) for row in rest)
    prompts_only = max(0.0, of_prompts - both * s / (s - 1) * c / (c - 1) / (s * p) ** 2)
    spread = of_seeds**2 / (s - 1) + prompts_only**2 / (c - 1)
    error = max(of_seeds + prompts_only, of_prompts) ** 0.5
    if error <= TINY or spread == 0:
        return TwoWayInterval(Interval(mean, mean, mean, s), unknown, unknown)
    freedom = (of_seeds + prompts_only) ** 2 / spread
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = float(2 * scipy.stats.t.sf(abs(mean) / error, freedom))
    return TwoWayInterval(Interval(mean, mean - half, mean + half, s), detectable_effect(error, freedom), p_value)


def standard_error(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Clustered standard error of a mean over prompts; nan for fewer than two clusters.

    sqrt( C / (C - 1) sum_c (sum_{i in c} (x_i - mean))^2 ) / n; without clusters every value is one.
    """
    sums, counts = _by_cluster(_to_finite_array(values), clusters)
    return _clustered_variance(sums, counts) ** 0.5 if sums.size > 1 else float("nan")


def detectable_effect(
    error: float, freedom: float = float("inf"), level: float = 1 - CONFIDENCE, power: float = POWER
) -> float:
    """The smallest true difference that a two-sided test at ``level`` detects with probability ``power``.

        (t_f(1 - level / 2) + t_f(power)) * standard error;   2.802 standard errors by default, f being infinite

    (Cohen 1988). ``freedom``: f, such as seeds - 1 for an error over seeds. nan for an error of nan.
    """
    quantiles = scipy.stats.norm if np.isinf(freedom) else scipy.stats.t(freedom)
    return float(quantiles.ppf(1 - level / 2) + quantiles.ppf(power)) * error


def detectable_difference(before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """``detectable_effect`` of the paired difference of the same prompts, from its standard error.

    nan if all differences are equal. Raises ContractError if the two have different lengths or a value is not finite.
    """
    error = standard_error(_paired(before, after), clusters)
    return detectable_effect(error if error > TINY else float("nan"))


def paired_p_value(before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Two-sided p of no mean difference over the same prompts: Student's t of the clustered error, C - 1 degrees.

    If all differences are equal, p is that of a sign test, 2^(1 - C), or 1 if they are 0. nan for fewer than two
    clusters. Raises ContractError if the two have different lengths or a value is not finite.
    """
    differences = _paired(before, after)
    sums, counts = _by_cluster(differences, clusters)
    if sums.size < 2:
        return float("nan")
    mean, error = float(differences.mean()), _clustered_variance(sums, counts) ** 0.5
    if mean == 0:
        return 1.0
    if error <= TINY:
        return float(0.5 ** (sums.size - 1))
    return float(2 * scipy.stats.t.sf(abs(mean) / error, sums.size - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values (Holm 1979), which control the family-wise error rate.

        adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),   p_(1) <= ... <= p_(m)

    nan stays nan and is not counted. Raises ContractError for a p-value outside [0, 1].
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
    """A statistic of weighted clusters with a percentile bootstrap over the clusters.

    ``statistic`` maps the count of each cluster in each resample, (R, C), to a value per resample, (R,); nan values (a
    category that was not drawn) are left out. ``n``: reported sample size, the number of clusters by default.
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
    one, two = _to_finite_array(before), _to_finite_array(after)
    if one.shape != two.shape:
        raise ContractError(f"{one.size} scores before and {two.size} after: pair the same prompts")
    return two - one


def _clustered_variance(sums: Floats, counts: Floats) -> float:
    """Variance of the mean sum(sums) / sum(counts) for independent clusters."""
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


def _to_finite_array(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ContractError("a score is not finite: leave missing scores out, they are never numbers")
    return array


def _by_cluster(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and count of each cluster; without clusters every value is one."""
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


# --- divergence of a reward and a held-out scorer ---

MIN_GROUPS = 10
"""Minimum number of groups (or prompts) in each compared part of a run."""


@dataclass(frozen=True)
class Divergence:
    """A significant rise of a reward with a significant fall of a scorer."""

    part: int
    """Index of the earlier part that the last one was compared with."""
    reward: Interval
    """Change of the reward; its interval lies above 0."""
    scorer: Interval
    """Change of the scorer; its interval lies below 0."""


def comparable(rewards: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> list[int]:
    """Indices of the earlier parts that, like the last part, have ``MIN_GROUPS`` values of reward and scorer."""
    sizes = [min(np.size(one), np.size(other)) for one, other in zip(rewards, scores, strict=True)]
    return [i for i in range(len(sizes) - 1) if min(sizes[i], sizes[-1]) >= MIN_GROUPS]


def divergence(
    rewards: Sequence[ArrayLike],
    scores: Sequence[ArrayLike],
    confidence: float,
    paired: bool = False,
    strata: tuple[Sequence[Sequence[Hashable]], Sequence[Sequence[Hashable]]] | None = None,
) -> Divergence | None:
    """The largest significant fall of a scorer while a reward rose, from an earlier part of a run to its last; or None.

    ``rewards`` and ``scores`` hold one value per group for each part, in order, ``strata`` a label for each value.
    Changes have Welch's t interval, stratified, or Student's for scores that are ``paired`` (the same prompts in the
    same order). Both intervals must exclude 0, so the error rate is below 1 - ``confidence``.
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
