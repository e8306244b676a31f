"""Rank correlations and areas inside groups, worked by hand and against the libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from lvrpo.audit_records import RewardRanking
from lvrpo.evaluation import reward_ranking
from lvrpo.evaluation.reward_ranking import SUCCESS, group_auc, rank_correlations, rank_rewards

NAN = math.nan


def floats(rows: Any) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_spearman_with_ties_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3.5, 3.5: rho = 3 / sqrt(4.5 * 4)."""
    one, other = [0.1, 0.2, 0.2, 0.9], [0.0, 0.0, 1.0, 1.0]
    found = rank_correlations(floats([one, one[::-1]]), floats([other, other]))
    assert found.tolist() == pytest.approx([3 / math.sqrt(18), -3 / math.sqrt(18)])


def test_a_member_without_a_score_has_no_rank() -> None:
    found = rank_correlations(floats([[1, NAN, 2, 3], [1, 9, 2, 3]]), floats([[1, 5, 3, 2], [1, NAN, 3, 2]]))
    assert found.tolist() == pytest.approx([0.5, 0.5])


def test_areas_by_hand() -> None:
    """Of right .4, .9 and wrong .1, .4: three pairs are ranked right and one is a tie."""
    scores = floats([[0.1, 0.4, 0.4, 0.9], [0.1, NAN, 0.4, 0.9], [0.5] * 4, [0.1, 0.2, 0.3, 0.4]])
    success = floats([[0, 0, 1, 1], [0, 1, 1, NAN], [0, 1, 0, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(group_auc(scores, success), [3.5 / 4, 1, 0.5, NAN])


def validity(scores: Any, success: Any, grades: Any = None, **options: Any) -> RewardRanking:
    scorers = {"judge": floats(scores), SUCCESS: floats(success)}
    if grades is not None:
        scorers["facts"] = floats(grades)
    category = options.pop("category", np.full(len(scores), ""))
    (found,) = rank_rewards(scorers, ["facts"], category, **options)
    return found


def test_constant_groups_are_left_out_and_counted() -> None:
    """One group counts; in one the reward is constant, in one the verifier, in one both; one has no score."""
    scores = [[1, 2, 3], [5, 5, 5], [1, 2, 3], [5, 5, 5], [NAN] * 3]
    success = [[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 0]]
    whole = validity(scores, success).whole
    assert (whole.rank.n, whole.silent, whole.alike) == (1, 1, 2)
    assert whole.rank.score == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert (whole.auc.n, whole.auc.score) == (2, 0.75)  # a constant reward is a tie in every pair
    assert math.isnan(whole.auc.low) is False


def test_groups_count_alike_however_many_pairs_they_have() -> None:
    scores, success = [[1, 2, 3, 4], [4, 3, 2, 1]], [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert validity(scores, success).whole.auc.score == 0.5


def test_a_graded_verifier_sees_more_than_success() -> None:
    """No member is right, so there is no pair for the area; the facts rank them all the same."""
    found = validity([[1, 2, 3]], [[0, 0, 0]], [[0.0, 0.5, 0.75]])
    assert (found.verifier, found.whole.rank.score, found.whole.auc.n) == ("facts", 1, 0)
    assert math.isnan(found.whole.auc.score)


def test_categories_are_apart() -> None:
    scores, success = [[1, 2], [2, 1], [1, 2], [NAN, NAN]], [[0, 1]] * 4
    found = validity(scores, success, category=np.array(["colors", "digits", "", "sum"]))
    assert {name: (r.auc.score, r.rank.score) for name, r in found.categories.items()} == {
        "colors": (1, 1),
        "digits": (0, -1),
    }
    assert found.whole.auc.score == pytest.approx(2 / 3)


def test_groups_that_share_a_image_are_resampled_together() -> None:
    scores, success = [[1, 2]] * 20 + [[2, 1]] * 20, [[0, 1]] * 40
    apart = validity(scores, success).whole.auc
    images = ["a"] * 20 + ["b"] * 20
    together = validity(scores, success, clusters=images).whole.auc
    assert apart.score == together.score == 0.5
    assert (together.low, together.high) == (0, 1)
    assert apart.high - apart.low < 0.35


def test_all_groups_agreeing_leave_room_for_another() -> None:
    found = validity([[1, 2]] * 20, [[0, 1]] * 20).whole
    assert (found.auc.score, found.rank.score) == (1, 1)
    assert 0.8 < found.auc.low < 0.9  # Wilson's bound for 20 of 20
    assert found.rank.low == pytest.approx(2 * found.auc.low - 1)


def test_many_groups_have_an_interval_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    success = (rng.random((1000, 4)) < 0.5).astype(np.float32)
    scores = success + rng.normal(size=success.shape)
    few = validity(scores, success).whole
    monkeypatch.setattr(reward_ranking, "BOOTSTRAP_LIMIT", 100)
    many = validity(scores, success).whole
    for one, other in ((few.auc, many.auc), (few.rank, many.rank)):
        assert one.n == other.n
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.004)


some_scores = arrays(np.float32, (4, 6), elements=st.sampled_from([0, 0.25, 0.5, 1, NAN]))
some_success = arrays(np.float32, (4, 6), elements=st.sampled_from([0, 1]))


@given(some_scores, some_success, st.permutations(range(6)))
def test_the_order_of_members_changes_nothing(scores: Any, success: Any, order: list[int]) -> None:
    one, other = validity(scores, success), validity(scores[:, order], success[:, order])
    assert repr(one) == repr(other)


@given(some_success)
def test_success_itself_has_an_area_of_one(success: Any) -> None:
    found = validity(success, success)
    assert found.is_success
    whole = found.whole
    assert whole.silent == 0
    assert (whole.auc.score, whole.rank.score) == (1, 1) or whole.auc.n == whole.rank.n == 0


@given(some_scores, some_success)
def test_the_libraries_agree(scores: Any, success: Any) -> None:
    rank, auc = rank_correlations(scores, success), group_auc(scores, success)
    for p, (row, right) in enumerate(zip(scores, success, strict=True)):
        there = np.isfinite(row)
        row, right = row[there], right[there]
        mixed = len(np.unique(right)) == 2
        assert math.isnan(auc[p]) != mixed
        if mixed:
            assert auc[p] == pytest.approx(roc_auc_score(right, row))
        if mixed and len(np.unique(row)) > 1:
            assert rank[p] == pytest.approx(spearmanr(row, right)[0])
        else:
            assert math.isnan(rank[p])
