"""Estimators of an evaluation's record, worked by hand and against every subset."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import ContractError
from lvrpo.metrics import (
    ReadBack,
    agreement,
    answer_entropy,
    balanced_accuracy,
    best_of_n,
    best_of_n_weights,
    collapsed_forms,
    group_spread,
    pass_at_k,
    recalls,
)

samples = st.lists(
    st.tuples(st.sampled_from([0.1, 0.5, 0.5, 0.9, 0.95]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=7
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
        (4, 2, 2, 5 / 6),  # 1 - C(2, 2) / C(4, 2) = 1 - 1 / 6
        (16, 4, 4, 1 - 495 / 1820),  # C(12, 4) / C(16, 4)
        (16, 1, 16, 1.0),
        (16, 0, 16, 0.0),
        (4, 3, 2, 1.0),  # two of four cannot both be the wrong one
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ContractError, match="pass@"):
        pass_at_k(n, c, k)


def test_best_of_n_by_hand() -> None:
    # of the subsets of two of {.1, .2, .3}: {.1, .2} picks .2, the other two pick .3
    assert best_of_n_weights([0.1, 0.3, 0.2], 2) == pytest.approx([0, 2 / 3, 1 / 3])
    assert best_of_n([0.1, 0.3, 0.2], [1.0, 0.0, 1.0], 2) == pytest.approx(1 / 3)
    # one is below two tied ones: {a, b} and {a, c} pick the tied one, {b, c} either: 1/2 each
    assert best_of_n_weights([0.1, 0.3, 0.3], 2) == pytest.approx([0, 1 / 2, 1 / 2])
    assert best_of_n_weights([0.5, 0.5, 0.5, 0.5], 3) == pytest.approx([1 / 4] * 4)
    assert best_of_n([0.1, 0.3, 0.2, 0.9], [1, 1, 0, 0], 1) == pytest.approx(1 / 2)
    assert best_of_n([0.1, 0.3, 0.2, 0.9], [1, 1, 0, 0], 4) == 0.0


@given(samples, st.data())
def test_best_of_n_is_the_mean_over_every_subset(rows: list[tuple[float, float]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(rows)))
    picked = []
    for subset in combinations(rows, n):
        top = max(score for score, _ in subset)
        tied = [success for score, success in subset if score == top]
        picked.append(sum(tied) / len(tied))
    scores, successes = [score for score, _ in rows], [success for _, success in rows]
    assert best_of_n(scores, successes, n) == pytest.approx(sum(picked) / len(picked))
    assert sum(best_of_n_weights(scores, n)) == pytest.approx(1)


@given(samples, st.data())
def test_no_judge_is_better_than_pass_at_k_and_a_perfect_one_is_it(
    rows: list[tuple[float, float]], data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(rows)))
    scores, successes = [score for score, _ in rows], [success for _, success in rows]
    ceiling = pass_at_k(len(rows), int(sum(successes)), n)
    assert best_of_n(scores, successes, n) <= ceiling + 1e-9
    assert best_of_n(successes, successes, n) == pytest.approx(ceiling)


def test_best_of_n_refuses_missing_scores_and_too_few_samples() -> None:
    with pytest.raises(ContractError, match="not finite"):
        best_of_n([0.1, math.nan], [1, 0], 1)
    with pytest.raises(ContractError, match="best of 3 among 2"):
        best_of_n([0.1, 0.2], [1, 0], 3)
    with pytest.raises(ContractError, match="2 scores of 1 samples"):
        best_of_n([0.1, 0.2], [1], 1)


def test_balanced_accuracy_by_hand() -> None:
    right = ["yes"] * 4 + ["no"]
    assert recalls(right, [1, 1, 1, 0, 1]) == {"yes": 0.75, "no": 1.0}
    assert balanced_accuracy(right, [1, 1, 1, 0, 1]) == pytest.approx(0.875)
    # always "yes": accuracy .8, balanced .5
    assert balanced_accuracy(right, [1, 1, 1, 1, 0]) == pytest.approx(0.5)
    assert math.isnan(balanced_accuracy([], []))
    with pytest.raises(ContractError, match="give one each"):
        balanced_accuracy(["yes"], [])


@given(st.lists(st.sampled_from("abc"), min_size=1), st.sampled_from("abc"))
def test_one_answer_for_all_has_the_balanced_accuracy_of_chance(right: list[str], given_answer: str) -> None:
    successes = [float(answer == given_answer) for answer in right]
    expected = 1 / len(set(right)) if given_answer in right else 0.0
    assert balanced_accuracy(right, successes) == pytest.approx(expected)


def test_entropy_by_hand() -> None:
    assert answer_entropy(["yes", "no"]) == pytest.approx(1.0)
    assert answer_entropy(["a", "b", "c", "d"] * 3) == pytest.approx(2.0)
    assert answer_entropy(["yes"] * 3 + ["no"]) == pytest.approx(0.811278, abs=1e-6)
    assert answer_entropy(["yes"] * 9) == 0.0
    assert math.isnan(answer_entropy([]))


@given(st.lists(st.sampled_from("abcde"), min_size=1))
def test_entropy_lies_between_none_and_that_of_equal_shares(answers: list[str]) -> None:
    assert 0 <= answer_entropy(answers) <= math.log2(len(set(answers))) + 1e-9


def test_forms_that_collapsed() -> None:
    mixed, yes, no = ["yes", "no"] * 10, ["yes"] * 19 + ["no"], ["no"] * 19 + ["yes"]
    before = {"fell": mixed, "kept": mixed, "was so": yes, "flipped": yes, "few": ["yes", "no"], "easy": mixed}
    after = {"fell": yes, "kept": mixed, "was so": yes, "flipped": no, "few": ["yes"] * 19, "easy": yes, "new": yes}
    found = collapsed_forms(before, after, right={"easy": yes, "fell": mixed})
    assert [(c.form, c.answer, c.share, c.before) for c in found] == [
        ("fell", "yes", 0.95, 0.5),
        ("flipped", "no", 0.95, 0.05),
    ]
    assert found[0].entropy_before == 1.0
    assert found[0].entropy == pytest.approx(0.286397, abs=1e-6)  # of shares .95 and .05
    assert [c.form for c in collapsed_forms(before, after)] == ["fell", "flipped", "easy"]
    assert collapsed_forms(before, after, share=0.96) == []
    with pytest.raises(ContractError, match="share="):
        collapsed_forms(before, after, share=0.5)


@given(st.dictionaries(st.sampled_from("fgh"), st.lists(st.sampled_from(["yes", "no"]), min_size=20, max_size=30)))
def test_nothing_collapses_where_nothing_changes(answers: dict[str, list[str]]) -> None:
    assert collapsed_forms(answers, answers) == []


def test_spread_inside_groups_by_hand() -> None:
    spread = group_spread([[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1]])
    assert spread.std == pytest.approx((0.5 + 0 + math.sqrt(3) / 4) / 3)
    assert (spread.signal, spread.groups) == (pytest.approx(2 / 3), 3)
    assert math.isnan(group_spread([[1.0]]).std)


def test_agreement_by_hand() -> None:
    # of 10 facts the reader finds 6, the verifier 5; they agree on 7: chance .6 * .5 + .4 * .5 = .5
    found = agreement([ReadBack(4, 3, 2, 3), ReadBack(6, 3, 3, 4)])
    assert (found.confirmed, found.hold, found.agree, found.facts) == (0.6, 0.5, 0.7, 10)
    assert found.kappa == pytest.approx(0.4)
    assert math.isnan(agreement([ReadBack(2, 2, 1, 1)]).kappa)
    assert math.isnan(agreement([]).confirmed)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_kappa_is_one_where_the_two_always_agree(pairs: list[tuple[bool, bool]]) -> None:
    always = [ReadBack(1, int(held), int(held), 1) for held, _ in pairs]
    found = agreement(always)
    assert math.isnan(found.kappa) or found.kappa == pytest.approx(1)
    any_two = agreement([ReadBack(1, int(a), int(b), int(a == b)) for a, b in pairs])
    assert math.isnan(any_two.kappa) or -1 - 1e-9 <= any_two.kappa <= 1 + 1e-9
