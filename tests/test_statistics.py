from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lvrpo.errors import ContractError
from lvrpo.statistics import (
    RESAMPLES,
    Interval,
    bootstrap_statistic,
    detectable_difference,
    detectable_effect,
    holm,
    mean_interval,
    paired_difference,
    paired_p_value,
    paired_t_difference,
    seeds_and_prompts_interval,
    seeds_interval,
    standard_error,
    welch_difference,
)

shares = st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), min_size=2, max_size=40)


def close(interval: Interval, score: float, low: float, high: float, n: int) -> bool:
    found = (interval.score, interval.low, interval.high)
    return found == pytest.approx((score, low, high), abs=5e-4, nan_ok=True) and interval.n == n


def test_the_bootstrap_agrees_with_the_normal_approximation() -> None:
    values = np.repeat([1.0, 0.0], [900, 1500])
    interval = mean_interval(values)
    half = 1.96 * math.sqrt(0.375 * 0.625 / 2400)
    assert interval.score == 0.375
    assert interval.low == pytest.approx(0.375 - half, abs=0.002)
    assert interval.high == pytest.approx(0.375 + half, abs=0.002)
    assert interval.n == 2400


def test_two_values_by_hand() -> None:
    # the resamples of (0, 1) have means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert close(mean_interval([0.0, 1.0]), 0.5, 0.0, 1.0, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1] * 10, (1.0, 0.72247, 1.0)),  # Wilson: 1 / (1 + z^2 / n) with z = 1.95996
        ([0] * 10, (0.0, 0.0, 0.27753)),
        ([1], (1.0, 0.20654, 1.0)),
        ([0.5] * 4, (0.5, 0.5, 0.5)),
        ([0.5], (0.5, math.nan, math.nan)),
        ([], (math.nan, math.nan, math.nan)),
    ],
)
def test_values_without_spread(values: list[float], expected: tuple[float, float, float]) -> None:
    assert close(mean_interval(values), *expected, len(values))


def test_clusters_are_resampled() -> None:
    rng = np.random.default_rng(0)
    prompts = (rng.random(200) < 0.5).astype(float)
    values = np.repeat(prompts, 8)
    clusters = [f"prompt {i // 8}" for i in range(values.size)]
    alone, clustered, once = mean_interval(values), mean_interval(values, clusters), mean_interval(prompts)
    assert clustered.score == alone.score
    assert clustered.n == 1600
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)
    # eight copies of one right answer are one observation
    assert close(mean_interval([1.0] * 80, [i // 8 for i in range(80)]), 1.0, 0.72247, 1.0, 80)


def test_clusters_of_unequal_size_keep_the_mean_over_values() -> None:
    interval = mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert interval.score == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)
    assert math.isnan(mean_interval([1.0, 0.0], ["a", "a"]).low)


def test_pairs_tell_more_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(300)
    before, after = (easy > 0.5).astype(float), (easy > 0.45).astype(float)
    paired = paired_difference(before, after)
    one, two = mean_interval(before), mean_interval(after)
    assert paired.score == pytest.approx(after.mean() - before.mean())
    assert paired.excludes_zero
    assert paired.high - paired.low < (one.high - one.low) / 1.5
    assert one.high > two.low
    same = paired_difference(after, before)
    assert same.score == -paired.score
    assert same.excludes_zero


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1, 0] * 5, [1, 0] * 5, (0.0, -0.27753, 0.27753)),
        ([0] * 10, [1] * 10, (1.0, 0.72247, 1.0)),
        ([0.1, 0.3], [0.1, 0.3], (0.0, 0.0, 0.0)),
        ([0.25], [0.5], (0.25, math.nan, math.nan)),
        ([], [], (math.nan, math.nan, math.nan)),
    ],
)
def test_pairs_without_spread(before: list[float], after: list[float], expected: tuple[float, float, float]) -> None:
    assert close(paired_difference(before, after), *expected, len(before))


def test_seeds_by_hand() -> None:
    # t(0.975, 2) = 4.302653; standard deviation 1; standard error 1 / sqrt(3)
    assert close(seeds_interval([1.0, 2.0, 3.0]), 2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5, 3)
    assert close(seeds_interval([0.5]), 0.5, math.nan, math.nan, 1)
    assert close(seeds_interval([]), math.nan, math.nan, math.nan, 0)
    assert close(seeds_interval([0.25, 0.25]), 0.25, 0.25, 0.25, 2)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth, hits = 0.3, 0
    for _ in range(200):
        interval = mean_interval((rng.random(60) < truth).astype(float))
        hits += interval.low <= truth <= interval.high
    assert 0.90 <= hits / 200 <= 0.99


@given(values=shares)
def test_an_interval_holds_its_score_and_stays_in_range(values: list[float]) -> None:
    interval = mean_interval(values)
    assert 0 <= interval.low <= interval.score <= interval.high <= 1 + 1e-12
    assert interval == mean_interval(values)


@given(values=shares)
def test_no_change_has_score_zero_inside(values: list[float]) -> None:
    interval = paired_difference(values, values)
    assert interval.score == 0
    assert interval.low <= 0 <= interval.high
    assert not interval.excludes_zero


def test_tensors_and_booleans_are_values_too() -> None:
    assert mean_interval(torch.tensor([True, False])) == mean_interval([1, 0])
    assert mean_interval([1, 0]).as_dict() == {"score": 0.5, "low": 0.0, "high": 1.0, "n": 2}


@pytest.mark.parametrize("function", [mean_interval, seeds_interval])
def test_a_missing_score_is_never_a_number(function) -> None:
    with pytest.raises(ContractError, match="not finite"):
        function([0.5, float("nan")])


def test_lengths_must_agree() -> None:
    with pytest.raises(ContractError, match="2 scores before and 1 after"):
        paired_difference([1, 2], [1])
    with pytest.raises(ContractError, match="2 scores but 1 clusters"):
        mean_interval([1, 2], ["a"])


def test_welch_by_hand() -> None:
    """Variances 1 and 4 over 4 and 5 values: error sqrt(.25 + .8), freedom 1.05^2 / (.25^2 / 3 + .8^2 / 4) = 6.0975."""
    before = np.array([-1.0, 0, 0, 1]) * math.sqrt(1.5) + 3
    after = np.array([-2.0, -1, 0, 1, 2]) * math.sqrt(1.6) + 5
    assert before.var(ddof=1) == pytest.approx(1)
    assert after.var(ddof=1) == pytest.approx(4)
    half = 2.43758 * math.sqrt(1.05)  # the 97.5 % point of t at 6.0975 degrees of freedom
    assert close(welch_difference(before, after), 2.0, 2.0 - half, 2.0 + half, 4)
    wide = welch_difference(before, after, confidence=0.999)
    assert wide.high - wide.score > 2 * half


def test_welch_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=12), rng.normal(0.5, 3, size=40)
    expected = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.99)
    found = welch_difference(one, other, 0.99)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_welch_within_strata_by_hand() -> None:
    """Labels a: 1, 3 -> 4, 6, 8; b: 11 -> 10, 12. Shares 5/8 and 3/8, changes 4 and 0. Squares within labels: 2 over 1
    degree of freedom before, 8 + 2 over 3 after, each times sum_s w_s^2 / n_s."""
    before, after = [1.0, 3.0, 11.0], [4.0, 6.0, 8.0, 10.0, 12.0]
    labels = (["a", "a", "b"], ["a", "a", "a", "b", "b"])
    one = 2.0 / 1 * ((5 / 8) ** 2 / 2 + (3 / 8) ** 2 / 1)
    two = 10.0 / 3 * ((5 / 8) ** 2 / 3 + (3 / 8) ** 2 / 2)
    freedom = (one + two) ** 2 / (one**2 / 1 + two**2 / 3)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(one + two)
    found = welch_difference(before, after, strata=labels)
    assert close(found, 2.5, 2.5 - half, 2.5 + half, 3)


def test_strata_take_out_what_labels_differ_by() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3
    one, two = (10.0 * labels + rng.normal(m, 1, 60) for m in (0, 1))
    alike = welch_difference(one, two, strata=(labels.tolist(), labels.tolist()))
    centered = welch_difference(one - 10.0 * labels, two - 10.0 * labels)
    assert alike.score == pytest.approx(centered.score)
    assert alike.high - alike.low == pytest.approx(centered.high - centered.low, rel=0.05)
    assert alike.low > 0 > welch_difference(one, two).low
    assert welch_difference(one, two, strata=(["x"] * 60, ["x"] * 60)) == welch_difference(one, two)


def test_strata_that_one_side_lacks_do_not_count() -> None:
    whole = welch_difference([1.0, 2.0, 3.0, 90.0], [2.0, 4.0, -70.0], strata=(["a", "a", "a", "b"], ["a", "a", "c"]))
    assert whole == welch_difference([1.0, 2.0, 3.0], [2.0, 4.0])
    assert math.isnan(welch_difference([1.0], [2.0], strata=(["a"], ["b"])).score)
    with pytest.raises(ContractError, match="2 and 1 scores but 1 and 1 strata"):
        welch_difference([1.0, 2.0], [1.0], strata=(["a"], ["a"]))


def test_welch_within_strata_keeps_its_confidence() -> None:
    """Two labels far apart, in other shares on each side: 95 % intervals miss the change in about 5 % of trials."""
    rng, missed = np.random.default_rng(2), 0
    for _ in range(600):
        sides = [(rng.random(30) < share).astype(int) for share in (0.3, 0.6)]
        one, two = (5.0 * side + rng.normal(m, 1, 30) for side, m in zip(sides, (0.0, 0.4), strict=True))
        found = welch_difference(one, two, strata=(sides[0].tolist(), sides[1].tolist()))
        missed += not found.low <= 0.4 <= found.high
    assert 15 <= missed <= 45


def test_welch_of_little() -> None:
    assert math.isnan(welch_difference([], [1.0]).score)
    assert close(welch_difference([1.0], [2.0, 3.0]), 1.5, math.nan, math.nan, 1)
    assert close(welch_difference([1.0, 1.0], [2.0, 2.0]), 1.0, 1.0, 1.0, 2)


def test_the_paired_t_interval_by_hand() -> None:
    # differences -1, 0, 1, 2: mean .5, std sqrt(5 / 3), error .645497; t(3) at 97.5 % is 3.18245, at 99.5 % 5.84091
    one, other = [1.0, 1, 1, 1], [0.0, 1, 2, 3]
    assert close(paired_t_difference(one, other), 0.5, 0.5 - 3.18245 * 0.645497, 0.5 + 3.18245 * 0.645497, 4)
    assert paired_t_difference(one, other, 0.99).high == pytest.approx(0.5 + 5.84091 * 0.645497, abs=1e-4)
    with pytest.raises(ContractError, match="pair the same prompts"):
        paired_t_difference([1.0], [1.0, 2.0])


# --- what a comparison can tell ---


def test_a_standard_error_by_hand() -> None:
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3) / 2)  # std 1/sqrt(3) over sqrt(4)
    # clusters (0, 0) and (1, 1): residual sums -1 and 1; sqrt(2 / 1 * 2) / 4
    assert standard_error([0.0, 0.0, 1.0, 1.0], ["p", "p", "q", "q"]) == pytest.approx(0.5)
    assert math.isnan(standard_error([1.0]))


def test_the_detectable_effect_is_2_8_standard_errors() -> None:
    assert detectable_effect(0.01) == pytest.approx(0.0280159, abs=1e-6)  # 1.959964 + 0.841621
    # two degrees of freedom: t = 4.302653 and 1.060660
    assert detectable_effect(0.01, freedom=2) == pytest.approx(0.0536331, abs=1e-6)
    assert math.isnan(detectable_effect(math.nan))
    before, after = [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]
    assert detectable_difference(before, after) == pytest.approx(2.8015852 * math.sqrt(1 / 12), abs=1e-6)
    assert math.isnan(detectable_difference(before, before))
    with pytest.raises(ContractError, match="pair the same prompts"):
        detectable_difference([0.0], [0.0, 1.0])


def test_the_detectable_effect_is_found_with_its_power() -> None:
    rng = np.random.default_rng(0)
    true = detectable_effect(1 / math.sqrt(200))
    found = [paired_p_value(np.zeros(200), rng.normal(true, 1, 200)) < 0.05 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_p_values_by_hand() -> None:
    # differences 0, 1, 1, 0: t = .5 / sqrt(1 / 12) = sqrt(3), 3 degrees of freedom
    assert paired_p_value([0.0] * 4, [0.0, 1.0, 1.0, 0.0]) == pytest.approx(2 * stats.t.sf(math.sqrt(3), 3))
    assert paired_p_value([0.0] * 5, [1.0] * 5) == 1 / 16
    assert paired_p_value([1.0] * 5, [1.0] * 5) == 1.0
    assert math.isnan(paired_p_value([0.0], [1.0]))
    assert math.isnan(paired_p_value([0.0, 0.0], [1.0, 1.0], ["p", "p"]))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=30))
def test_p_values_are_those_of_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    p = paired_p_value(before, after)
    assert 0 <= p <= 1
    if np.std(after - before) > 1e-6:
        assert p == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=1e-9)


def test_holm_by_hand() -> None:
    # sorted .01, .02, .03, .5 times 4, 3, 2, 1: .04, .06, .06, .5, never falling
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, math.nan, 0.3]) == pytest.approx([0.08, math.nan, 0.3], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ContractError, match="must lie in"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_raises_p_and_keeps_its_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(one <= other <= 1 for one, other in zip(p, adjusted, strict=True))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    assert min(adjusted) == pytest.approx(min(1, len(p) * min(p)))


def test_seeds_and_prompts_by_hand() -> None:
    # additive: seeds 0 and 1, prompts 0 and 2, no interaction
    both = seeds_and_prompts_interval([[0.0, 2.0], [1.0, 3.0]])
    found = both.interval
    # V_seeds = .5 / 2, V_prompts = 2 / 2; f = 1.25^2 / (.25^2 + 1) = 1.470588
    half = stats.t.ppf(0.975, 1.470588235) * math.sqrt(1.25)
    assert close(found, 1.5, 1.5 - half, 1.5 + half, 2)
    assert both.p == pytest.approx(2 * stats.t.sf(1.5 / math.sqrt(1.25), 1.470588235))
    assert both.detectable == pytest.approx(
        (stats.t.ppf(0.975, 1.470588235) + stats.t.ppf(0.8, 1.470588235)) * math.sqrt(1.25)
    )
    # interaction alone: residuals +-.5, V_both = 4 * .25 * 2 * 2 / 16 = .25 and no variance of means
    assert close(seeds_and_prompts_interval([[0.0, 1.0], [1.0, 0.0]]).interval, 0.5, 0.5, 0.5, 2)
    assert close(seeds_and_prompts_interval([[0.0, 1.0]]).interval, 0.5, math.nan, math.nan, 1)
    with pytest.raises(ContractError, match="a row per seed"):
        seeds_and_prompts_interval([0.0, 1.0])


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5), (0.1, 0.5)])
def test_seeds_and_prompts_cover_the_truth(of_seeds: float, of_prompts: float) -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        x = rng.normal(0, of_seeds, (4, 1)) + rng.normal(0, of_prompts, (1, 60)) + rng.normal(0, 0.4, (4, 60))
        interval = seeds_and_prompts_interval(x).interval
        covered.append(interval.low <= 0 <= interval.high)
    assert np.mean(covered) > 0.92


def test_two_seeds_are_too_few_to_tell() -> None:
    rng = np.random.default_rng(0)
    assert seeds_and_prompts_interval(rng.normal(size=(2, 9))).too_few
    assert seeds_and_prompts_interval(rng.normal(size=(4, 1))).too_few
    assert not seeds_and_prompts_interval(rng.normal(size=(3, 9))).too_few


def test_prompts_of_one_image_are_one_cluster_across_seeds() -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(rng.normal(size=(1, 10)), 4, axis=1) + rng.normal(scale=0.01, size=(3, 40))
    alone = seeds_and_prompts_interval(images).interval
    together = seeds_and_prompts_interval(images, np.repeat(np.arange(10), 4).tolist()).interval
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_a_bootstrapped_mean_is_that_of_mean_interval() -> None:
    values = np.repeat([1.0, 0.0], [30, 70])
    found = bootstrap_statistic(lambda weights: weights @ values / weights.sum(axis=1), values.size)
    expected = mean_interval(values)
    assert found.score == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.015)
    seen: list[tuple[int, ...]] = []

    def half_missing(weights: np.ndarray) -> np.ndarray:
        seen.append(weights.shape)
        return np.where(weights[:, 0] > 0, 1.0, np.nan)

    assert close(bootstrap_statistic(half_missing, 3, n=12), 1.0, 1.0, 1.0, 12)
    assert seen == [(1, 3), (RESAMPLES, 3)]
