from __future__ import annotations

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lvrpo.algorithms
from lvrpo.algorithms import (
    gdpo_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    normalize_rewards,
    signal_mask,
    trimmed_advantages,
    win_rate,
)
from lvrpo.errors import ContractError, InputError

NAN = float("nan")


def everything(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def close(actual: torch.Tensor, expected: list, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=atol)


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (P, G, K) on a grid of 1/16, a mask with holes, and tasks (P,)."""
    P, G, K = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    size = P * G * K
    scores = draw(st.lists(st.integers(-32, 32), min_size=size, max_size=size))
    mask = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=size, max_size=size))
    tasks = draw(st.lists(st.integers(0, 2), min_size=P, max_size=P))
    return torch.tensor(scores).view(P, G, K) / 16, torch.tensor(mask).view(P, G, K), torch.tensor(tasks)


# group_relative_advantages


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("population", [-1.341641, -0.447214, 0.447214, 1.341641]),  # std = sqrt(1.25)
        ("sample", [-1.161895, -0.387298, 0.387298, 1.161895]),  # std = sqrt(5 / 3)
        ("none", [-1.5, -0.5, 0.5, 1.5]),
    ],
)
def test_group_relative_by_hand(std: str, expected: list[float]) -> None:
    scores = torch.tensor([[1.0, 2, 3, 4]])
    close(group_relative_advantages(scores, everything(scores), std=std, eps=0.0), [expected])


def test_group_relative_adds_eps_to_the_std() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4]])
    close(group_relative_advantages(scores, everything(scores), eps=0.1), [[-1.231493, -0.410498, 0.410498, 1.231493]])


def test_group_relative_by_the_std_of_the_batch() -> None:
    """The std of all twelve scores about their grand mean, dead groups included: sqrt(194 / 12 - (38 / 12)^2)."""
    scores = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 8], [5, 5, 5, 5]])
    expected = [
        [-0.605406, -0.201802, 0.201802, 0.605406],
        [-0.807207] * 3 + [2.421622],
        [0.0] * 4,
    ]  # std = 2.477678
    close(group_relative_advantages(scores, everything(scores), std="batch", eps=0.0), expected)


def test_group_relative_clamp() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4]])
    close(group_relative_advantages(scores, everything(scores), eps=0.0, clamp=1.0), [[-1.0, -0.447214, 0.447214, 1.0]])


def test_group_relative_runs_over_valid_members_only() -> None:
    scores = torch.tensor([[1.0, 2, 3, NAN], [1, NAN, NAN, NAN], [NAN] * 4])
    expected = [[-1.224745, 0, 1.224745, 0], [0.0] * 4, [0.0] * 4]
    close(group_relative_advantages(scores, ~scores.isnan(), eps=0.0), expected)


def test_group_relative_floor_drops_the_illusory_advantage() -> None:
    scores = torch.tensor([[0.30, 0.31, 0.30, 0.31]])
    close(group_relative_advantages(scores, everything(scores), std_floor=0.001, eps=0.0), [[-1.0, 1, -1, 1]])
    close(group_relative_advantages(scores, everything(scores), std_floor=0.01, eps=0.0), [[0.0] * 4])


def test_group_relative_refuses_an_unknown_std() -> None:
    scores = torch.zeros(1, 2)
    with pytest.raises(InputError, match="use population, sample, batch or none"):
        lvrpo.algorithms.advantages.group_relative_advantages.__wrapped__(scores, everything(scores), std="half")


@given(st.floats(-1e4, 1e4, width=32), st.integers(2, 9), st.sampled_from(["population", "sample", "batch", "none"]))
def test_equal_scores_give_exactly_zero(value: float, G: int, std: str) -> None:
    scores = torch.full((2, G), value)
    assert not group_relative_advantages(scores, everything(scores), std=std, std_floor=0.0, eps=0.0).any()


@given(tables(), st.integers(-8, 8), st.sampled_from(["population", "sample", "batch", "none"]))
def test_group_relative_sums_to_zero_and_ignores_a_constant(table, shift: int, std: str) -> None:
    scores, mask = table[0][..., 0], table[1][..., 0]
    advantages = group_relative_advantages(scores, mask, std=std)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(len(scores)), rtol=0, atol=1e-4)
    if std != "batch":  # the std of the batch sees a shift between groups, but not one of all
        per_group = torch.arange(len(scores))[:, None] * shift
        close(group_relative_advantages(scores + per_group, mask, std=std), advantages.tolist())
    close(group_relative_advantages(scores + shift, mask, std=std), advantages.tolist())


@given(tables(), st.sampled_from([NAN, float("inf"), -7.0]))
def test_masked_entries_are_ignored(table, junk: float) -> None:
    scores, mask, tasks = table
    K = scores.shape[2]
    dirty = torch.where(mask, scores, junk)
    first, first_mask, first_dirty = scores[..., 0], mask[..., 0], dirty[..., 0]
    for function in (group_relative_advantages, leave_one_out_advantages, trimmed_advantages):
        clean = function(first, first_mask)
        assert torch.equal(function(first_dirty, first_mask), clean)
        assert not clean[~first_mask].any()
    assert torch.equal(
        gdpo_advantages(dirty, mask, torch.ones(K), tasks), gdpo_advantages(scores, mask, torch.ones(K), tasks)
    )
    assert torch.equal(signal_mask(dirty, mask), signal_mask(scores, mask))


@pytest.mark.parametrize("junk", [NAN, float("inf")])
def test_a_valid_score_that_is_no_number_is_refused(junk: float) -> None:
    scores = torch.tensor([[0.0, 1, junk]])
    for function in (group_relative_advantages, leave_one_out_advantages, trimmed_advantages, signal_mask):
        with pytest.raises(ContractError, match="mask it"):
            function(scores, everything(scores))


# leave_one_out_advantages


def test_leave_one_out_by_hand() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [1, 2, NAN, NAN], [3, 3, 3, 3], [1, NAN, NAN, NAN]])
    expected = [[-2.0, -2 / 3, 2 / 3, 2], [-1, 1, 0, 0], [0.0] * 4, [0.0] * 4]
    close(leave_one_out_advantages(scores, ~scores.isnan()), expected)


# trimmed_advantages


def test_trimmed_by_hand() -> None:
    # without 0 and 90: 1, 2, 3, 4, 5, 6 of mean 3.5 and std sqrt(35 / 12)
    scores = torch.tensor([[4.0, 90, 1, 2, 3, 0, 5, 6]])
    expected = [[0.292770, 50.649216, -1.463850, -0.878310, -0.292770, -2.049390, 0.878310, 1.463850]]
    close(trimmed_advantages(scores, everything(scores), eps=0.0), expected, 2e-5)
    expected[0][1] = 3.0
    close(trimmed_advantages(scores, everything(scores), eps=0.0, clamp=3.0), expected)


def test_trimmed_counts_valid_members_only() -> None:
    scores = torch.tensor([[1.0, 2, 3, 8, NAN, NAN, NAN, NAN], [NAN] * 8])
    advantages = trimmed_advantages(scores, ~scores.isnan(), trim=0.25, eps=0.0)  # of 2 and 3: mean 2.5, std .5
    close(advantages, [[-3.0, -1, 1, 11, 0, 0, 0, 0], [0.0] * 8])


def test_trimmed_drops_what_only_the_trimmed_member_tells() -> None:
    scores = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 1]])
    assert not trimmed_advantages(scores, everything(scores)).any()
    close(trimmed_advantages(scores, everything(scores), trim=0.1, eps=0.0), [[-0.377964] * 7 + [2.645751]])


@given(tables(), st.integers(-8, 8), st.integers(1, 8), st.randoms(use_true_random=False))
def test_trimmed_ignores_shift_scale_and_order(table, shift: int, scale: int, random) -> None:
    scores, mask = table[0][..., 0], table[1][..., 0]
    advantages = trimmed_advantages(scores, mask, trim=0.25, eps=0.0)
    close(trimmed_advantages(scores * scale + shift, mask, trim=0.25, eps=0.0), advantages.tolist(), 1e-3)
    members = random.sample(range(scores.shape[1]), scores.shape[1])
    permuted = trimmed_advantages(scores[:, members], mask[:, members], trim=0.25, eps=0.0)
    close(permuted, advantages[:, members].tolist(), 1e-3)
    untrimmed = trimmed_advantages(scores, mask, trim=0.0)
    close(untrimmed, group_relative_advantages(scores, mask).tolist(), 1e-3)


def test_trimmed_refuses_to_trim_all() -> None:
    scores = torch.zeros(1, 2)
    with pytest.raises(InputError, match=r"use a share in \[0, 0.5\)"):
        trimmed_advantages(scores, everything(scores), trim=0.5)


# gdpo_advantages

HAND = torch.tensor([[[0, 0.30], [0, 0.31], [1, 0.30], [1, 0.31]]])
ONE_TASK = torch.zeros(1, dtype=torch.long)


def test_summing_first_drowns_the_quiet_reward() -> None:
    total = HAND.sum(dim=2)
    close(group_relative_advantages(total, everything(total), eps=0.0), [[-1.00995, -0.98995, 0.98995, 1.00995]], 2e-5)


def test_gdpo_by_hand() -> None:
    # z1 = .5 / .5001, z2 = .005 / .0051; s = -1.980192, -.019408, .019408, 1.980192, of std 1.400275
    advantages = gdpo_advantages(HAND, everything(HAND), torch.ones(2), ONE_TASK, eps=1e-4)
    close(advantages, [[-1.414045, -0.013859, 0.013859, 1.414045]], 1e-4)
    advantages = gdpo_advantages(HAND, everything(HAND), torch.ones(2), ONE_TASK, eps=0.0)
    close(advantages, [[-(2**0.5), 0, 0, 2**0.5]], 1e-4)


def test_gdpo_floor_silences_a_reward_in_its_group() -> None:
    advantages = gdpo_advantages(HAND, everything(HAND), torch.ones(2), ONE_TASK, std_floor=0.01, eps=0.0)
    close(advantages, [[-1.0, -1, 1, 1]])


def test_gdpo_weights() -> None:
    advantages = gdpo_advantages(HAND, everything(HAND), torch.tensor([3.0, 4.0]), ONE_TASK, eps=0.0)
    close(advantages, [[-7 / 5, 1 / 5, -1 / 5, 7 / 5]], 1e-4)  # s = +-3 +-4, of std 5


def test_gdpo_batch_step_runs_per_task() -> None:
    steps = torch.tensor([0.0, 0, 1, 1])
    scores = torch.stack([torch.stack([steps, steps], dim=1), torch.stack([steps, torch.full((4,), NAN)], dim=1)])
    weights = torch.ones(2)
    together = gdpo_advantages(scores, ~scores.isnan(), weights, torch.tensor([0, 0]), eps=0.0)
    close(together[:, 3], [1.264911, 0.632456])  # s = 2 and 1, std sqrt(2.5)
    apart = gdpo_advantages(scores, ~scores.isnan(), weights, torch.tensor([0, 1]), eps=0.0)
    close(apart[:, 3], [1.0, 1.0])


def test_gdpo_masked_reward_is_normalised_over_valid_members() -> None:
    scores = torch.tensor([[[1.0], [2], [3], [NAN]]])
    close(gdpo_advantages(scores, ~scores.isnan(), torch.ones(1), ONE_TASK, eps=0.0), [[-1.224745, 0, 1.224745, 0]])


def test_gdpo_dead_group_and_dead_member_do_not_inflate_the_others() -> None:
    dead = torch.full_like(HAND, 0.5)
    scores = torch.cat([HAND, dead])
    advantages = gdpo_advantages(scores, everything(scores), torch.ones(2), torch.zeros(2, dtype=torch.long), eps=0.0)
    close(advantages, [[-(2**0.5), 0, 0, 2**0.5], [0.0] * 4], 1e-4)
    scores = torch.cat([HAND, torch.full((1, 1, 2), NAN)], dim=1)
    advantages = gdpo_advantages(scores, ~scores.isnan(), torch.ones(2), ONE_TASK, eps=0.0)
    close(advantages, [[-(2**0.5), 0, 0, 2**0.5, 0]], 1e-4)


def test_gdpo_with_the_std_of_samples() -> None:
    # z1 = +-.5 / (.57735 + .1), z2 = +-.005 / (.0057735 + .1); s / (sqrt(4 / 3) of its population std + .1)
    advantages = gdpo_advantages(HAND, everything(HAND), torch.ones(2), ONE_TASK, std="sample", eps=0.1)
    z1, z2 = 0.7381674, 0.0472709
    std = ((2 * (z1 + z2) ** 2 + 2 * (z1 - z2) ** 2) / 3) ** 0.5
    a, b = (z1 + z2) / (std + 0.1), (z1 - z2) / (std + 0.1)
    close(advantages, [[-a, -b, b, a]], 2e-5)


def test_gdpo_clamp() -> None:
    advantages = gdpo_advantages(HAND, everything(HAND), torch.ones(2), ONE_TASK, eps=0.0, clamp=1.0)
    close(advantages, [[-1.0, 0, 0, 1]], 1e-4)


def test_gdpo_without_any_valid_score_is_zero() -> None:
    assert not gdpo_advantages(HAND, ~everything(HAND), torch.ones(2), ONE_TASK, eps=0.0).any()


@given(tables())
def test_gdpo_sums_to_zero_in_each_group_and_has_unit_scale(table) -> None:
    scores, mask, tasks = table
    advantages = gdpo_advantages(scores, mask, torch.ones(scores.shape[2]), tasks, eps=1e-4)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(len(scores)), rtol=0, atol=1e-3)
    assert advantages.square().mean() <= 1.001


@given(tables(), st.randoms(use_true_random=False), st.integers(-4, 4), st.integers(1, 8))
def test_gdpo_permutation_shift_and_scale(table, random, shift: int, scale: int) -> None:
    scores, mask, tasks = table
    P, G, K = scores.shape
    weights = torch.arange(1.0, K + 1)
    advantages = gdpo_advantages(scores, mask, weights, tasks, eps=0.0)
    members, groups = random.sample(range(G), G), random.sample(range(P), P)
    permuted = gdpo_advantages(scores[groups][:, members], mask[groups][:, members], weights, tasks[groups], eps=0.0)
    close(permuted, advantages[groups][:, members].tolist(), 1e-3)
    moved = scores * scale + shift * torch.arange(K)
    close(gdpo_advantages(moved, mask, weights, tasks, eps=0.0), advantages.tolist(), 1e-3)


def test_shapes_are_enforced() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        gdpo_advantages(HAND, everything(HAND), torch.ones(3), ONE_TASK)


# signal_mask, win_rate


def test_signal_mask_by_hand() -> None:
    scores = torch.tensor([[0.0, 1, NAN], [0.5, 0.5, NAN], [0.30, 0.31, 0.30], [1, NAN, NAN]])
    assert signal_mask(scores, ~scores.isnan()).tolist() == [True, False, True, False]
    assert signal_mask(scores, ~scores.isnan(), std_floor=0.01).tolist() == [True, False, False, False]
    table = torch.stack([torch.full((4, 3), 2.0), scores], dim=2)
    assert signal_mask(table, ~table.isnan()).tolist() == [True, False, True, False]


def test_win_rate_by_hand() -> None:
    wins = torch.tensor([[[9.0, 1, 1], [0, 9, 0.5], [0, 0.5, 9]]])
    close(win_rate(wins, everything(wins)), [[1.0, 0.25, 0.25]])
    played = torch.tensor([[[False, True, False], [True, False, False], [False, False, False]]])
    rates = win_rate(wins, played)
    assert rates[0, :2].tolist() == [1.0, 0.0]
    assert rates[0, 2].isnan()


def test_rewards_on_scales_of_their_own_by_hand() -> None:
    """Two groups of one batch: deviations of .5 and 1 inside, of all four scores sqrt(.625)."""
    scores = torch.tensor([[0.0, 1.0], [0.0, 2.0]])[..., None].expand(2, 2, 4)
    mask, batches = torch.ones(2, 2, 4, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    found = normalize_rewards(scores, mask, batches, ["group", "batch", "none", None], eps=0.0)
    batch = torch.tensor([0.0, 1.0, 0.0, 2.0]).std(correction=0)
    assert found[0, 1].tolist() == pytest.approx([1.0, 0.5 / float(batch), 0.5, 1.0])
    assert found[1, 0].tolist() == pytest.approx([-1.0, -1.0 / float(batch), -1.0, 0.0])
    apart = normalize_rewards(scores, mask, torch.tensor([0, 1]), ["batch"] * 4, eps=0.0)
    assert apart[:, 1, 0].tolist() == pytest.approx([1.0, 1.0])
    assert float(normalize_rewards(scores, mask, batches, ["group"] * 4)[0, 1, 0]) == pytest.approx(0.5 / 0.5001)
    floored = normalize_rewards(scores, mask, batches, ["none"] * 4, std_floor=0.6)
    assert floored[:, :, 0].tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_gdpo_with_weights_by_group_and_a_scale_of_its_own() -> None:
    """The second reward keeps its size, .1 against 1; the second group weighs it alone."""
    scores = torch.tensor([[[0.0, 0.0], [1.0, 0.2]], [[0.0, 0.0], [1.0, 0.2]]])
    mask, tasks = torch.ones_like(scores, dtype=torch.bool), torch.tensor([0, 1])
    weights = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    plain = gdpo_advantages(scores, mask, torch.ones(2), tasks, eps=0.0)
    assert torch.equal(gdpo_advantages(scores, mask, torch.ones(2, 2), tasks, eps=0.0), plain)
    found = gdpo_advantages(scores[:, :, [0, 1]], mask, weights, tasks, eps=0.0, normalize=[None, "none"])
    assert found.tolist() == [[pytest.approx(-1.0), pytest.approx(1.0)]] * 2
    mixed = torch.tensor([[[0.0, 0.2], [1.0, 0.0], [2.0, 0.0]]])
    A = gdpo_advantages(mixed, mixed > -1, torch.ones(2), tasks[:1], eps=0.0, normalize=["none", "none"])
    s = torch.tensor([-1 + 0.2 * 2 / 3, -0.2 / 3, 1 - 0.2 / 3])
    assert A[0].tolist() == pytest.approx((s / s.std(correction=0)).tolist(), rel=1e-5)
