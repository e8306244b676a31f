from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import (
    TOKEN_OBJECTIVES,
    cispo_surrogate,
    clipped_surrogate,
    entropy_bonus,
    gaussian_kl,
    gspo_surrogate,
    guard_surrogate,
    objectives,
    reduce_tokens,
    reduction_weights,
    scaled_clip,
    truncated_weights,
)
from lvrpo.errors import InputError
from lvrpo.sampling import step_logprob

NAN = float("nan")


def test_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, NAN]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, NAN]])
    behavior = torch.full_like(ratio, -3.0)
    out = clipped_surrogate(behavior + ratio.log(), behavior, advantages, ~ratio.isnan(), clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(out.loss_terms, torch.tensor([[-1.28, -0.5, 1.5, 0.8, -2.2, 0.0]]))
    torch.testing.assert_close(out.ratio, torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 1.0]]))
    assert out.clipped.tolist() == [[True, False, False, True, False, False]]


def test_clipped_surrogate_broadcasts_one_advantage_per_trajectory() -> None:
    zeros = torch.zeros(2, 3)
    out = clipped_surrogate(
        zeros, zeros, torch.tensor([[2.0], [-1.0]]), torch.ones(2, 3, dtype=torch.bool), clip_low=0.2, clip_high=0.2
    )
    assert out.loss_terms.tolist() == [[-2.0] * 3, [1.0] * 3]


actions = st.lists(
    st.tuples(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32), st.booleans()), min_size=1, max_size=8
)


@given(actions, st.sampled_from([0.0, 1e-5, 0.2]))
def test_at_ratio_one_the_gradient_is_reinforce(rows, clip: float) -> None:
    logprobs = torch.tensor([[row[0] for row in rows]], requires_grad=True)
    advantages = torch.tensor([[row[1] for row in rows]])
    mask = torch.tensor([[row[2] for row in rows]])
    out = clipped_surrogate(logprobs, logprobs.detach(), advantages, mask, clip_low=clip, clip_high=clip)
    assert not out.clipped.any()
    assert torch.equal(out.ratio, torch.ones_like(advantages))
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages, 0.0))


@given(actions)
def test_clipped_actions_and_only_those_lose_their_gradient(rows) -> None:
    logprobs = torch.tensor([[row[0] for row in rows]], requires_grad=True)
    advantages = torch.tensor([[row[1] for row in rows]])
    mask = torch.tensor([[row[2] for row in rows]])
    out = clipped_surrogate(logprobs, torch.zeros_like(advantages), advantages, mask, clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), logprobs)
    expected = torch.where(mask & ~out.clipped, -out.ratio * advantages, 0.0)
    torch.testing.assert_close(gradient, expected)


def test_clipped_surrogate_refuses_a_negative_bound() -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(InputError, match="0 or more"):
        clipped_surrogate(zeros, zeros, zeros, zeros == 0, clip_low=-0.2, clip_high=0.2)


TERMS = torch.tensor([[1.0, 2, 3], [4, NAN, NAN], [NAN, NAN, NAN]])


@pytest.mark.parametrize(("how", "expected"), [("token", 2.5), ("trajectory", 3.0), ("constant", 1.0)])
def test_reduce_tokens_by_hand(how, expected: float) -> None:
    loss = reduce_tokens(TERMS, ~TERMS.isnan(), how, constant=5.0)
    assert loss.item() == expected


@pytest.mark.parametrize("how", ["token", "trajectory", "constant"])
def test_reduce_tokens_of_nothing_is_zero_and_attached(how) -> None:
    terms = torch.ones(2, 2, requires_grad=True)
    loss = reduce_tokens(terms, torch.zeros(2, 2, dtype=torch.bool), how, constant=1.0)
    loss.backward()
    assert loss.item() == 0
    assert terms.grad is not None
    assert not terms.grad.any()


def test_reduce_tokens_refuses_what_it_cannot_do() -> None:
    mask = ~TERMS.isnan()
    with pytest.raises(InputError, match="give the divisor"):
        reduce_tokens(TERMS, mask, "constant")
    with pytest.raises(InputError, match="use token, trajectory or constant"):
        objectives.reduce_tokens.__wrapped__(TERMS, mask, "tokens")


def test_a_long_answer_weighs_more_per_token_only() -> None:
    terms = torch.zeros(2, 10)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0], mask[1, 0] = True, True
    terms[0] = 1.0
    assert math.isclose(reduce_tokens(terms, mask, "token").item(), 10 / 11, rel_tol=1e-6)
    assert reduce_tokens(terms, mask, "trajectory").item() == 0.5


# gspo_surrogate


def ratios(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs now and at sampling with these ratios, and the mask of those that are numbers."""
    ratio = torch.tensor(rows)
    behavior = torch.where(ratio.isnan(), NAN, -3.0)
    return behavior + ratio.log(), behavior, ~ratio.isnan()


def test_gspo_by_hand() -> None:
    logprobs, behavior, mask = ratios([[1.5, 0.5, NAN], [4.0, 1.0, 1.0], [4.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-2.0]])
    out = gspo_surrogate(logprobs, behavior, advantages, mask, clip_low=0.2, clip_high=0.28)
    s = [math.sqrt(0.75), 4 ** (1 / 3), 4 ** (1 / 3), 0.5]
    torch.testing.assert_close(out.ratio, torch.tensor([[s[0], s[0], 1.0], [s[1]] * 3, [s[2]] * 3, [s[3]] * 3]))
    expected = [[-s[0], -s[0], 0.0], [-1.28] * 3, [s[2]] * 3, [1.6] * 3]
    torch.testing.assert_close(out.loss_terms, torch.tensor(expected))
    assert out.clipped.tolist() == [[False] * 3, [True] * 3, [False] * 3, [True] * 3]


grids = st.lists(
    st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32), st.booleans()), min_size=3, max_size=3),
    min_size=1,
    max_size=4,
)


def split(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-ratios with a gradient, numbers of the same shape, and a mask."""
    table = torch.tensor([[cell[:2] for cell in row] for row in rows])
    mask = torch.tensor([[cell[2] for cell in row] for row in rows])
    return table[..., 0].clone().requires_grad_(), table[..., 1], mask


@given(grids, st.sampled_from(["token", "trajectory"]))
def test_gspo_token_has_the_value_and_gradient_of_the_sequence_form(rows, how) -> None:
    """min(s A, clamp(s) A) with one s per row, spelled out from the paper."""
    logprobs, numbers, mask = split(rows)
    advantages = numbers[:, :1]
    out = gspo_surrogate(logprobs, torch.zeros_like(numbers), advantages, mask, clip_low=0.2, clip_high=0.28)
    loss = reduce_tokens(out.loss_terms, mask, how)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    count = mask.sum(dim=1, keepdim=True)
    s = (torch.where(mask, logprobs, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)).exp()
    terms = -torch.minimum(s * advantages, s.clamp(0.8, 1.28) * advantages).expand_as(numbers)
    sequence_loss = reduce_tokens(terms, mask, how)
    torch.testing.assert_close(loss, sequence_loss)
    (expected,) = torch.autograd.grad(sequence_loss, logprobs)
    torch.testing.assert_close(gradient, expected)


# cispo_surrogate


def test_cispo_by_hand() -> None:
    logprobs, behavior, mask = ratios([[2.0, 0.5, 1.1, NAN]])
    logprobs.requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 2.0, NAN]])
    out = cispo_surrogate(logprobs, behavior, advantages, mask, clip_low=1.0, clip_high=0.28)
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-1.28, 0.5, -2.2, 0.0]]))
    torch.testing.assert_close(out.loss_terms[0, 0], torch.tensor(-1.28 * (-3.0 + math.log(2))))
    assert out.clipped.tolist() == [[True, False, False, False]]
    out = cispo_surrogate(logprobs, behavior, advantages, mask, clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-1.28, 0.8, -2.2, 0.0]]))
    assert out.clipped.tolist() == [[True, True, False, False]]


# What all token objectives share


@given(grids, st.sampled_from(list(TOKEN_OBJECTIVES)))
def test_at_ratio_one_every_objective_is_reinforce(rows, name: str) -> None:
    logprobs, numbers, mask = split(rows)
    advantages = numbers[:, :1]
    out = TOKEN_OBJECTIVES[name](logprobs, logprobs.detach(), advantages, mask, clip_low=0.0, clip_high=0.0)
    assert not out.clipped.any()
    assert torch.equal(out.ratio, torch.ones_like(numbers))
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages, 0.0))


@given(grids, st.sampled_from(list(TOKEN_OBJECTIVES)), st.sampled_from([NAN, math.inf, 7.0]))
def test_masked_entries_are_ignored(rows, name: str, junk: float) -> None:
    logprobs, numbers, mask = split(rows)
    dirty = torch.where(mask, logprobs.detach(), junk).requires_grad_()
    behavior = torch.where(mask, 0.1, junk)
    clean = TOKEN_OBJECTIVES[name](logprobs, torch.full_like(behavior, 0.1), numbers, mask, clip_low=0.2, clip_high=0.3)
    other = TOKEN_OBJECTIVES[name](dirty, behavior, torch.where(mask, numbers, junk), mask, clip_low=0.2, clip_high=0.3)
    assert torch.equal(clean.loss_terms, other.loss_terms)
    assert torch.equal(clean.ratio, other.ratio)
    assert torch.equal(clean.clipped, other.clipped)
    assert not other.loss_terms[~mask].any()
    (expected,) = torch.autograd.grad(clean.loss_terms.sum(), logprobs)
    (gradient,) = torch.autograd.grad(other.loss_terms.sum(), dirty)
    assert torch.equal(gradient, expected)


@given(grids, st.sampled_from(list(TOKEN_OBJECTIVES)), st.randoms(use_true_random=False))
def test_the_order_of_a_batch_changes_nothing(rows, name: str, random) -> None:
    logprobs, numbers, mask = split(rows)
    order = random.sample(range(len(rows)), len(rows))
    zeros = torch.zeros_like(numbers)
    out = TOKEN_OBJECTIVES[name](logprobs, zeros, numbers, mask, clip_low=0.2, clip_high=0.3)
    moved = TOKEN_OBJECTIVES[name](logprobs[order], zeros, numbers[order], mask[order], clip_low=0.2, clip_high=0.3)
    assert torch.equal(out.loss_terms[order], moved.loss_terms)


@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_every_objective_refuses_a_negative_bound(name: str) -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(InputError, match="0 or more"):
        TOKEN_OBJECTIVES[name](zeros, zeros, zeros, zeros == 0, clip_low=0.2, clip_high=-0.2)


# guard_surrogate


def test_guard_by_hand() -> None:
    # log ratios (-.3 + .1) .5 = -.1 and (.5 + .1) 2 = 1.2
    logprobs, step_kl = torch.tensor([[-0.3, 0.5, NAN]]), torch.tensor([[0.1, 0.1, NAN]])
    std, advantages = torch.tensor([0.5, 2.0, NAN]), torch.tensor([[1.0]])
    mask = ~logprobs.isnan()
    logprobs.requires_grad_()
    out = guard_surrogate(logprobs, torch.zeros(1, 3), step_kl, std, advantages, mask, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(out.ratio, torch.tensor([[math.exp(-0.1), math.exp(1.2), 1.0]]))
    torch.testing.assert_close(out.loss_terms, torch.tensor([[-math.exp(-0.1), -1.2, 0.0]]))
    assert out.clipped.tolist() == [[False, True, False]]
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5 * math.exp(-0.1), 0.0, 0.0]]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_guard_centers_the_log_ratio_and_levels_its_spread(reduction) -> None:
    """log ratio = reduce(eps (mean - mean_behavior)): mean 0 and one scale, where the plain one falls and spreads."""
    generator = torch.Generator().manual_seed(0)
    B, D, shift = 20_000, 16, 0.05
    plain, guarded = [], []
    for std in (torch.tensor(0.05), torch.tensor(0.5)):
        behavior_mean = torch.zeros(B, D)
        mean = behavior_mean + shift
        x_next = behavior_mean + std * torch.randn(B, D, generator=generator)
        logprobs = step_logprob(x_next, mean, std, reduction)[:, None]
        behavior = step_logprob(x_next, behavior_mean, std, reduction)[:, None]
        kl = gaussian_kl(mean, behavior_mean, std, reduction)[:, None]
        ones = torch.ones(B, 1)
        out = guard_surrogate(logprobs, behavior, kl, std, ones, ones > 0, clip_low=1.0, clip_high=1e9)
        plain.append(logprobs - behavior)
        guarded.append(out.ratio.log())
    scale = shift * math.sqrt(D) * (1 / D if reduction == "mean" else 1)
    for log_ratio in guarded:
        assert log_ratio.mean().item() == pytest.approx(0.0, abs=5 * scale / math.sqrt(B))
        assert log_ratio.std().item() == pytest.approx(scale, rel=0.02)
    assert plain[0].mean() < -10 * plain[1].mean().abs()
    assert plain[0].std() > 9 * plain[1].std()


def test_the_gradient_of_the_guarded_ratio_is_the_noise() -> None:
    """With the gradient of b, d log ratio / d mean = eps / D wherever the live mean stands."""
    noise, std = torch.tensor([[0.3, -1.2, 0.5, 2.0]]), torch.tensor(0.2)
    mean = torch.tensor([[0.1, 0.2, -0.3, 0.4]], requires_grad=True)
    behavior_mean = torch.zeros(1, 4)
    x_next = behavior_mean + std * noise
    out = guard_surrogate(
        step_logprob(x_next, mean, std)[:, None],
        step_logprob(x_next, behavior_mean, std)[:, None],
        gaussian_kl(mean, behavior_mean, std)[:, None],
        std,
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        clip_low=1.0,
        clip_high=1e9,
    )
    (gradient,) = torch.autograd.grad(out.loss_terms.sum(), mean)
    torch.testing.assert_close(gradient, -out.ratio * noise / 4)


# truncated_weights, entropy_bonus


def test_truncated_weights_by_hand() -> None:
    trainer, sampler, mask = ratios([[1.5, 4.0, 0.5, NAN], [2.0, 2.0, 0.5, 1.5]])
    token = truncated_weights(trainer, sampler, mask, cap=2.0)
    torch.testing.assert_close(token, torch.tensor([[1.5, 2.0, 0.5, 0.0], [2.0, 2.0, 0.5, 1.5]]))
    sequence = truncated_weights(trainer, sampler, mask, cap=2.5, level="sequence")
    torch.testing.assert_close(sequence, torch.tensor([[2.5, 2.5, 2.5, 0.0], [2.5] * 4]))
    sequence = truncated_weights(trainer, sampler, mask, cap=9.0, level="sequence")
    torch.testing.assert_close(sequence, torch.tensor([[3.0, 3.0, 3.0, 0.0], [3.0] * 4]))


def test_truncated_weights_have_no_gradient_and_need_a_cap() -> None:
    trainer = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not truncated_weights(trainer, torch.zeros(1, 2), mask, cap=2.0).requires_grad
    with pytest.raises(InputError, match=r"importance cap=0.0: use a positive number"):
        truncated_weights(trainer, torch.zeros(1, 2), mask, cap=0.0)
    with pytest.raises(InputError, match="use token or sequence"):
        objectives.truncated_weights.__wrapped__(trainer, torch.zeros(1, 2), mask, cap=1.0, level="row")


def test_uncapped_weights_make_the_samples_of_another_policy_unbiased() -> None:
    sampler, trainer = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    tokens = torch.tensor([[0], [1]])
    weights = truncated_weights(trainer[tokens], sampler[tokens], tokens >= 0, cap=10.0)[:, 0]
    reward = torch.tensor([3.0, -5.0])
    torch.testing.assert_close((sampler.exp() * weights * reward).sum(), (trainer.exp() * reward).sum())


def test_entropy_bonus_by_hand() -> None:
    entropy = torch.tensor([[1.0, 2, 3], [4, NAN, NAN]])
    mask = ~entropy.isnan()
    assert entropy_bonus(entropy, mask).item() == -2.5
    assert entropy_bonus(entropy, mask, "trajectory").item() == -3.0
    assert entropy_bonus(entropy, mask, "constant", constant=5.0).item() == -1.0


# reduction_weights, scaled_clip


def test_reduction_weights_by_hand() -> None:
    mask = ~TERMS.isnan()
    token = reduction_weights(mask)
    torch.testing.assert_close(token, torch.tensor([[0.25] * 3, [0.25, 0, 0], [0.0] * 3]))
    trajectory = reduction_weights(mask, "trajectory")
    torch.testing.assert_close(trajectory, torch.tensor([[1 / 6] * 3, [0.5, 0, 0], [0.0] * 3]))
    constant = reduction_weights(mask, "constant", constant=5.0)
    torch.testing.assert_close(constant, torch.tensor([[0.1] * 3, [0.1, 0, 0], [0.0] * 3]))
    with pytest.raises(InputError, match="give the divisor"):
        reduction_weights(mask, "constant", constant=0.0)


@given(grids, st.sampled_from(["token", "trajectory", "constant"]), st.integers(1, 3))
def test_microbatch_losses_add_up_to_the_batch_loss(rows, how, size: int) -> None:
    terms, _, mask = split(rows)
    weights = reduction_weights(mask, how, constant=7.0)
    parts = sum((weights[i : i + size] * terms[i : i + size]).sum() for i in range(0, len(rows), size))
    torch.testing.assert_close(parts, reduce_tokens(terms, mask, how, constant=7.0))


def test_scaled_clip_by_hand() -> None:
    assert scaled_clip(0.1, 0.2, 3) == (0.1, 0.2)
    low, high = scaled_clip(0.1, 0.2, 3, "sum")
    assert (low, high) == (pytest.approx(1 - 0.729), pytest.approx(0.728))
    assert scaled_clip(1.0, 0.0, 5, "sum") == (1.0, 0.0)
    assert scaled_clip(1e-4, 1e-4, 10_000, "sum").high == pytest.approx(math.e - 1, rel=1e-4)
    assert scaled_clip(0.0, math.e - 1, 80, "sum").high == pytest.approx(math.expm1(80))
    with pytest.raises(InputError, match=r"a ratio of e\^81 of the sum"):
        scaled_clip(0.0, math.e - 1, 81, "sum")


def test_scaled_clips_clip_the_same_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.zeros(500, 16), torch.full((500, 16), 0.1)
    std = torch.tensor(0.7)
    x_next = std * torch.randn(500, 16, generator=generator)
    advantages = torch.randn(500, 1, generator=generator)
    active = []
    for reduction in ("mean", "sum"):
        low, high = scaled_clip(0.02, 0.03, 16, reduction)
        logprobs = step_logprob(x_next, other, std, reduction)[:, None]
        behavior = step_logprob(x_next, mean, std, reduction)[:, None]
        out = clipped_surrogate(logprobs, behavior, advantages, advantages != 0, clip_low=low, clip_high=high)
        active.append(out.clipped)
    assert torch.equal(*active)
    assert 50 < active[0].sum() < 450


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 0.1, 4), "0 or more"),
        ((1.1, 0.1, 4), "clip_low=1.1 over 4 dimensions: use 0..1 over 1 or more"),
        ((0.1, 0.1, 0), "use 0..1 over 1 or more"),
        ((0.1, 0.2, 1024, "sum"), r"is a ratio of e\^187 of the sum, which clips nothing: use a smaller one"),
    ],
)
def test_scaled_clip_refuses_what_cannot_be(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scaled_clip(*arguments)
