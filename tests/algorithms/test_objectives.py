from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import clipped_surrogate, objectives, reduce_tokens
from lvrpo.errors import InputError

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
