from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import best_of_mask, best_worst_mask, centered_advantages, preference_pairs, resample_plan
from lvrpo.errors import ContractError, InputError

NAN = float("nan")


@st.composite
def groups(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (P, G) on a coarse grid, so that ties are common, and a mask with holes."""
    P, G = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    scores = draw(st.lists(st.integers(-3, 3), min_size=P * G, max_size=P * G))
    mask = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=P * G, max_size=P * G))
    return torch.tensor(scores).view(P, G) / 4, torch.tensor(mask).view(P, G)


# best_worst_mask, centered_advantages


@pytest.mark.parametrize(
    ("advantages", "keep", "chosen"),
    [
        ([0.1, 0.5, -0.3, 0.2, 0.0], 1, [1, 2]),
        ([0.1, 0.5, -0.3, 0.2, 0.0], 2, [1, 2, 3, 4]),
        ([1.0, 0, 0, 0], 1, [0, 3]),  # ties: rising index, so the last one is the worst
        ([1.0, 0, 0, 0], 2, [0, 1, 2, 3]),
        ([0.0, 0, 0, 1], 1, [2, 3]),
        ([0.1, -0.1], 9, [0, 1]),
        ([0.0, 0, 0], 1, []),
    ],
)
def test_best_worst_by_hand(advantages: list[float], keep: int, chosen: list[int]) -> None:
    assert best_worst_mask(torch.tensor([advantages]), keep)[0].nonzero().flatten().tolist() == chosen


def test_best_worst_never_takes_a_masked_member() -> None:
    advantages = torch.tensor([[NAN, 0.5, -0.3, 0.2], [NAN, NAN, NAN, NAN]])
    chosen = best_worst_mask(advantages, 1, ~advantages.isnan())
    assert chosen.tolist() == [[False, True, True, False], [False] * 4]


def test_best_worst_refuses_to_keep_none() -> None:
    with pytest.raises(InputError, match="use 1 or more"):
        best_worst_mask(torch.zeros(1, 2), 0)


@given(groups(), st.integers(1, 4))
def test_best_worst_keeps_two_k_members_none_in_between(table, keep: int) -> None:
    scores, mask = table
    chosen = best_worst_mask(scores, keep, mask)
    for values, valid, taken in zip(scores, mask, chosen, strict=True):
        distinct = values[valid].unique().numel() > 1
        assert taken.sum() == (min(2 * keep, int(valid.sum())) if distinct else 0)
        assert not (taken & ~valid).any()
        if distinct:
            assert taken[valid & (values == values[valid].max())].any()
            assert taken[valid & (values == values[valid].min())].any()


def test_centered_advantages_by_hand() -> None:
    """Best two and worst two of (1.7, 1.7, -.5, -.5, -.6, -1.8): kept 1.7, 1.7, -.6, -1.8, mean .25."""
    advantages = torch.tensor([[1.7, 1.7, -0.5, -0.5, -0.6, -1.8], [0.0] * 6])
    keep = torch.tensor([[True, True, False, False, True, True], [False] * 6])
    expected = torch.tensor([[1.45, 1.45, 0.0, 0.0, -0.85, -2.05], [0.0] * 6])
    torch.testing.assert_close(centered_advantages(advantages, keep), expected)


# best_of_mask


@pytest.mark.parametrize(
    ("scores", "options", "chosen"),
    [
        ([0.1, 0.5, -0.3, 0.5], {}, [1]),  # a tie: the lower index
        ([0.1, 0.5, -0.3, 0.5], {"keep": 2}, [1, 3]),
        ([0.1, NAN, -0.3, 0.5], {"keep": 2}, [0, 3]),
        ([0.1, NAN, -0.3, 0.5], {"keep": 9}, [0, 2, 3]),
        ([1.0, 0.0, 1.0, 0.0], {"keep": 4, "min_score": 1.0}, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], {}, []),
        ([1.0, 1.0, 1.0, 1.0], {"keep": 4, "min_score": 1.0, "min_gap": -1.0}, [0, 1, 2, 3]),
        ([0.30, 0.31, 0.30, 0.30], {"min_gap": 0.02}, []),
        ([NAN, 0.7, NAN, NAN], {}, []),
        ([NAN, NAN, NAN, NAN], {"min_gap": -1.0}, []),
    ],
)
def test_best_of_by_hand(scores: list[float], options: dict, chosen: list[int]) -> None:
    table = torch.tensor([scores])
    assert best_of_mask(table, ~table.isnan(), **options)[0].nonzero().flatten().tolist() == chosen


def test_a_choice_of_none_or_among_no_numbers_is_refused() -> None:
    scores = torch.tensor([[1.0, NAN]])
    with pytest.raises(InputError, match="use 1 or more"):
        best_of_mask(scores, ~scores.isnan(), keep=0)
    for function in (best_of_mask, preference_pairs):
        with pytest.raises(ContractError, match="mask it"):
            function(scores, torch.ones_like(scores, dtype=torch.bool))


@given(groups(), st.integers(1, 4))
def test_best_of_takes_the_highest_of_the_valid(table, keep: int) -> None:
    scores, mask = table
    chosen = best_of_mask(scores, mask, keep=keep)
    assert not (chosen & ~mask).any()
    for values, valid, taken in zip(scores, mask, chosen, strict=True):
        distinct = values[valid].unique().numel() > 1
        assert taken.sum() == (min(keep, int(valid.sum())) if distinct else 0)
        if taken.any() and (valid & ~taken).any():
            assert values[taken].min() >= values[valid & ~taken].max()


# preference_pairs


def test_preference_pairs_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, -0.3, 0.5], [0.2, NAN, 0.1, NAN], [0.5] * 4, [NAN, 1.0, NAN, NAN], [NAN] * 4])
    pairs = preference_pairs(scores, ~scores.isnan())
    assert pairs.valid.tolist() == [True, True, False, False, False]
    assert pairs.winner[:2].tolist() == [1, 0]
    assert pairs.loser[:2].tolist() == [2, 2]
    assert preference_pairs(scores, ~scores.isnan(), min_gap=0.2).valid.tolist() == [True] + [False] * 4
    with pytest.raises(InputError, match="use 0 or more"):
        preference_pairs(scores, ~scores.isnan(), min_gap=-1.0)


@given(groups(), st.sampled_from([NAN, 99.0]))
def test_a_pair_is_valid_different_and_ignores_masked_members(table, junk: float) -> None:
    scores, mask = table
    pairs = preference_pairs(scores, mask)
    dirty = preference_pairs(torch.where(mask, scores, junk), mask)
    for p in pairs.valid.nonzero()[:, 0].tolist():
        winner, loser = int(pairs.winner[p]), int(pairs.loser[p])
        assert mask[p, winner]
        assert mask[p, loser]
        assert scores[p, winner] == scores[p][mask[p]].max()
        assert scores[p, loser] == scores[p][mask[p]].min()
        assert (winner, loser) == (int(dirty.winner[p]), int(dirty.loser[p]))
    assert torch.equal(pairs.valid, dirty.valid)


# resample_plan


def test_refill_plan_by_hand() -> None:
    signal = torch.tensor([False, True, False, False, False, True, False])
    tasks = torch.tensor([1, 1, 1, 0, 1, 0, 2])
    plan = resample_plan(signal, tasks, 9)
    assert (plan.redraw.tolist(), plan.budget_left) == ((~signal).tolist(), 4)
    assert not plan.given_up.any()
    plan = resample_plan(signal, tasks, 4)  # groups 3, 0, 6 are the first of tasks 0, 1, 2; then the second of task 1
    assert plan.redraw.nonzero().flatten().tolist() == [0, 2, 3, 6]
    assert plan.given_up.nonzero().flatten().tolist() == [4]
    assert plan.budget_left == 0
    plan = resample_plan(signal, tasks, 2)
    assert plan.redraw.nonzero().flatten().tolist() == [0, 3]
    plan = resample_plan(signal, tasks, 0)
    assert plan.given_up.tolist() == (~signal).tolist()
    with pytest.raises(InputError, match="resample budget=-1 groups: use 0 or more"):
        resample_plan(signal, tasks, -1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 12))
def test_a_refill_spends_what_it_may_on_groups_without_signal(rows, budget: int) -> None:
    signal = torch.tensor([row[0] for row in rows])
    tasks = torch.tensor([row[1] for row in rows])
    plan = resample_plan(signal, tasks, budget)
    assert torch.equal(plan.redraw | plan.given_up, ~signal)
    assert not (plan.redraw & plan.given_up).any()
    assert plan.redraw.sum() == min(budget, int((~signal).sum())) == budget - plan.budget_left
    drawn = torch.bincount(tasks[plan.redraw], minlength=4)
    left = torch.bincount(tasks[plan.given_up], minlength=4)
    if left.any():  # a task that gives groups up has been given as many draws as any other, but for one
        assert drawn[left > 0].min() >= drawn.max() - 1
