from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import (
    VarianceShares,
    advantage_parts,
    gdpo_advantages,
    group_correlation,
    group_relative_advantages,
    leave_one_out_advantages,
    variance_shares,
)
from lvrpo.errors import ContractError, InputError

NAN = float("nan")
BINARY = [0.0, 0, 1, 1]
CONTINUOUS = [0.30, 0.31, 0.30, 0.31]


def table(*rewards: list[float]) -> torch.Tensor:
    """One group, (1, G, K)."""
    return torch.tensor(rewards).T[None]


def close(actual: torch.Tensor, expected: list, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.float(), torch.tensor(expected), rtol=0, atol=atol)


def everyone(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[:2], dtype=torch.bool)


def summed(scores: torch.Tensor, weights: torch.Tensor, **options: float) -> tuple[torch.Tensor, VarianceShares]:
    A = group_relative_advantages((scores * weights).sum(dim=2), everyone(scores))
    parts = advantage_parts(scores, torch.ones_like(scores) > 0, weights, normalization="sum", **options)
    return A, variance_shares(parts, A, everyone(scores))


def gdpo(scores: torch.Tensor, weights: torch.Tensor, **options: float) -> tuple[torch.Tensor, VarianceShares]:
    mask = torch.ones_like(scores) > 0
    A = gdpo_advantages(scores, mask, weights, torch.zeros(len(scores), dtype=torch.int64), **options)
    parts = advantage_parts(scores, mask, weights, normalization="reward", **options)
    return A, variance_shares(parts, A, everyone(scores))


def test_summing_lets_the_binary_reward_drown_the_continuous_one() -> None:
    """r1 = +-.5 and r2 = +-.005 about their means: variances .25 and .000025."""
    A, shares = summed(table(BINARY, CONTINUOUS), torch.ones(2))
    close(A, [[-1.01, -0.99, 0.99, 1.01]], atol=1e-3)
    close(shares.pooled(), [0.99990001, 0.00009999])
    assert shares.pooled()[1] < 0.05


def test_gdpo_gives_each_its_configured_share_within_10_percent() -> None:
    A, shares = gdpo(table(BINARY, CONTINUOUS), torch.ones(2))
    close(A, [[-1.41, -0.01, 0.01, 1.41]], atol=0.015)
    # z of size .5 / .5001 and .005 / .0051
    close(shares.pooled(), [0.509803, 0.490197], atol=1e-5)
    close(gdpo(table(BINARY, CONTINUOUS), torch.ones(2), eps=0.0)[1].pooled(), [0.5, 0.5])


@pytest.mark.parametrize(
    ("rewards", "weights", "expected"),
    [
        ((BINARY, [0.0, 1, 0, 1]), [2.0, 1], [0.8, 0.2]),  # independent: w_k^2 / sum w^2
        ((BINARY, BINARY), [3.0, 1], [0.75, 0.25]),  # the same: w_k / sum w
        (([0.0, 1], [1.0, 0]), [2.0, 1], [2.0, -1.0]),  # against each other: u = 2 - 1
        ((BINARY, [7.0] * 4), [1.0, 1], [1.0, 0.0]),  # constant: nothing
    ],
)
def test_shares_by_hand(rewards: tuple[list[float], ...], weights: list[float], expected: list[float]) -> None:
    for shares in (summed, gdpo):
        _, found = shares(table(*rewards), torch.tensor(weights), **({"eps": 0.0} if shares is gdpo else {}))
        close(found.pooled(), expected)
        close(found.rest, [0.0])


def test_parts_by_hand() -> None:
    scores, mask = table([1.0, 3], [5.0, 5.2]), torch.ones(1, 2, 2) > 0
    weights = torch.tensor([2.0, 10.0])
    close(advantage_parts(scores, mask, weights, normalization="sum"), [[[-2.0, -1.0], [2.0, 1.0]]], atol=1e-5)
    close(advantage_parts(scores, mask, weights, normalization="reward", eps=0.0), [[[-2.0, -10.0], [2.0, 10.0]]])
    floored = advantage_parts(scores, mask, weights, normalization="reward", std_floor=0.5, eps=0.0)
    close(floored, [[[-2.0, 0.0], [2.0, 0.0]]])


def test_a_member_with_a_missing_term_has_no_part_in_a_sum() -> None:
    scores = table([0.0, 1, 2, 8], [0.0, 3, NAN, 0])
    mask = ~scores.isnan()
    parts = advantage_parts(scores, mask, torch.ones(2), normalization="sum")
    close(parts[0].T, [[-3.0, -2, 0, 5], [-1.0, 2, 0, -1]])
    each = advantage_parts(scores, mask, torch.ones(2), normalization="reward", eps=0.0)
    assert each[0, 2, 1] == 0
    assert each[0, 2, 0] != 0


def test_a_reward_that_does_not_apply_has_no_part() -> None:
    scores = torch.cat([table(BINARY, CONTINUOUS), table([NAN] * 4, CONTINUOUS)])
    for normalization in ("sum", "reward"):
        parts = advantage_parts(scores, ~scores.isnan(), torch.ones(2), normalization=normalization)
        assert (parts[1, :, 0] == 0).all()
        assert (parts[1, :, 1] != 0).all()


def test_what_a_clamp_cuts_off_is_the_rest() -> None:
    """u = (-1.5, -1.5, -.5, 3.5), clamped to 1: Var A = 2.6875 / 4, lambda = 6.75 / 17, rest = Var A - 6.75^2 / 68."""
    scores = table([0.0, 0, 1, 5])
    parts = advantage_parts(scores, scores > -1, torch.ones(1), normalization="sum")
    shares = variance_shares(parts, torch.tensor([[-1.0, -1, -0.5, 1]]), everyone(scores))
    close(shares.total, [0.671875])
    close(shares.by_reward, [[0.670037]])
    close(shares.rest, [0.001838])


def test_pooled_shares_weigh_groups_by_their_variance() -> None:
    shares = VarianceShares(torch.tensor([[3.0, 0], [0, 1]]), torch.zeros(2), torch.tensor([3.0, 1]))
    close(shares.pooled(), [0.75, 0.25])
    nothing = VarianceShares(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1))
    assert nothing.pooled().isnan().all()


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (P, G, K) on a grid of 1/16, a mask with holes, weights (K,)."""
    P, G, K = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    size = P * G * K
    scores = draw(st.lists(st.integers(-32, 32), min_size=size, max_size=size))
    mask = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=size, max_size=size))
    weights = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=K, max_size=K))
    return torch.tensor(scores).view(P, G, K) / 16, torch.tensor(mask).view(P, G, K), torch.tensor(weights)


@given(tables())
def test_shares_and_rest_are_all_of_gdpo_and_nothing_is_left_over(given: tuple[torch.Tensor, ...]) -> None:
    scores, mask, weights = given
    A = gdpo_advantages(scores, mask, weights, torch.zeros(len(scores), dtype=torch.int64))
    found = variance_shares(advantage_parts(scores, mask, weights, normalization="reward"), A, mask.any(dim=2))
    torch.testing.assert_close(found.by_reward.sum(dim=1) + found.rest, found.total)
    assert (found.rest <= 1e-9 + 1e-9 * found.total).all()


@given(tables(), st.sampled_from(["population", "sample", "batch", "none", "leave one out"]))
def test_every_normaliser_of_a_sum_is_read_off_the_advantages(given: tuple[torch.Tensor, ...], std: str) -> None:
    scores, mask, weights = given
    applies = mask.any(dim=1, keepdim=True)
    whole = (mask | ~applies).all(dim=2) & mask.any(dim=2)
    total = torch.where(mask, scores * weights, 0.0).sum(dim=2)
    if std == "leave one out":
        A = leave_one_out_advantages(total, whole)
    else:
        A = group_relative_advantages(total, whole, std=std)  # type: ignore[arg-type]  # one of its literals
    found = variance_shares(advantage_parts(scores, mask, weights, normalization="sum"), A, whole)
    torch.testing.assert_close(found.by_reward.sum(dim=1) + found.rest, found.total)
    assert (found.rest <= 1e-9 + 1e-9 * found.total).all()


@given(tables(), st.integers(0, 2**31))
def test_masked_entries_are_ignored_and_order_does_not_matter(given: tuple[torch.Tensor, ...], seed: int) -> None:
    scores, mask, weights = given
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(scores.shape[:2], generator=generator)
    members = mask.any(dim=2)
    rows, columns = (torch.randperm(n, generator=generator) for n in A.shape)
    for normalization in ("sum", "reward"):
        one = variance_shares(advantage_parts(scores, mask, weights, normalization=normalization), A, members)
        garbage, wild = torch.where(mask, scores, NAN), torch.where(members, A, NAN)
        parts = advantage_parts(garbage, mask, weights, normalization=normalization)
        other = variance_shares(parts[rows][:, columns], wild[rows][:, columns], members[rows][:, columns])
        torch.testing.assert_close(one.by_reward[rows], other.by_reward)
        torch.testing.assert_close(one.rest[rows], other.rest)
        assert (one.rest >= 0).all()


def test_a_single_member_that_counts_has_no_variance() -> None:
    shares = variance_shares(torch.ones(1, 3, 2), torch.ones(1, 3), torch.tensor([[False, True, False]]))
    assert [found.abs().sum().item() for found in (shares.by_reward, shares.rest, shares.total)] == [0, 0, 0]


def test_parts_of_rewards_with_a_batch_std_follow_their_batches() -> None:
    """Deviations of 1 and 3: each divided by its own std, or both by that of 0, 2, 0 and 6, the root of 6."""
    scores = torch.tensor([[[0.0], [2.0]], [[0.0], [6.0]]])
    of_all = [6**-0.5, 3 * 6**-0.5]
    for batches, expected in ((torch.tensor([0, 1]), [1.0, 1.0]), (torch.tensor([7, 7]), of_all), (None, of_all)):
        parts = advantage_parts(
            scores, scores > -1, torch.ones(1), normalization="sum", eps=0.0, normalize=["batch"], batches=batches
        )
        close(parts[:, 1, 0], expected)


def test_correlation_by_hand() -> None:
    """Sum of products 4, sums of squares 5 and 5 in the first group; 1, 1 and 1 in the second; the third is flat."""
    x = torch.tensor([[0.0, 1, 2, 3], [9.0, 8, 8.5, NAN], [1.0, 2, 3, 4]])
    y = torch.tensor([[10.0, 11, 13, 12], [0.0, -1, NAN, -0.5], [5.0, 5, 5, 5]])
    mask = ~(x.isnan() | y.isnan())
    rho, groups = group_correlation(x, y, mask)
    # first: 4, 5, 5; second, over its first two members: 1/2, 1/2, 1/2
    assert rho == pytest.approx(4.5 / 5.5)
    assert groups == 2
    assert group_correlation(x, -y, mask)[0] == pytest.approx(-4.5 / 5.5)
    assert group_correlation(x, x, mask) == (pytest.approx(1.0), 3)


def test_correlation_leaves_out_what_differs_between_groups() -> None:
    """Over all outputs the two rise together; inside every group they go against each other."""
    x = torch.tensor([[0.0, 1], [10, 11], [20, 21]])
    y = torch.tensor([[1.0, 0], [11, 10], [21, 20]])
    assert group_correlation(x, y, x > -1) == (-1.0, 3)


def test_correlation_of_nothing_is_no_number() -> None:
    x = torch.tensor([[1.0, 1, 1]])
    rho, groups = group_correlation(x, x, x > 0)
    assert rho != rho
    assert groups == 0
    small = torch.tensor([[0.0, 0.01]])
    assert group_correlation(small, small, small > -1, std_floor=0.1)[1] == 0


def test_wrong_input_is_refused() -> None:
    scores = table(BINARY)
    with pytest.raises(InputError, match="normalization='gdpo' is unknown: use reward or sum"):
        advantage_parts.__wrapped__(scores, scores > -1, torch.ones(1), normalization="gdpo")  # type: ignore[attr-defined]
    with pytest.raises(ContractError, match="nan or infinite"):
        variance_shares(scores, torch.tensor([[1.0, NAN, 0, 0]]), everyone(scores))
    with pytest.raises(ContractError, match="nan or infinite"):
        advantage_parts(scores / 0, scores > -1, torch.ones(1), normalization="sum")


def test_a_group_that_spreads_less_than_the_floor_has_no_part_in_the_correlation() -> None:
    x = torch.tensor([[0.0, 0.15, 0.0, 0.15], [0.0, 0.4, 0.0, 0.4]])  # std .075 and .2
    y = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert group_correlation(x, y, torch.ones(2, 4, dtype=torch.bool), std_floor=0.1) == (pytest.approx(1.0), 1)
