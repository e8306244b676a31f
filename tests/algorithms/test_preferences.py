from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import dpo_loss, flow_dpo_loss, flow_matching_loss
from lvrpo.errors import InputError

numbers = st.floats(-4, 4, width=32)
pairs = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)


def columns(rows) -> list[torch.Tensor]:
    return list(torch.tensor(rows).T)


def test_dpo_by_hand() -> None:
    # z = .5 [(-10 + 11) - (-13 + 12)] = 1 and .5 [(-11 + 10) - (-10 + 12)] = -1.5
    out = dpo_loss(
        torch.tensor([-10.0, -11.0]),
        torch.tensor([-13.0, -10.0]),
        torch.tensor([-11.0, -10.0]),
        torch.tensor([-12.0, -12.0]),
        beta=0.5,
    )
    torch.testing.assert_close(out.margin, torch.tensor([1.0, -1.5]))
    torch.testing.assert_close(out.loss, torch.tensor([0.3132617, 1.7014133]))


def test_flow_dpo_by_hand() -> None:
    # z = -(4 / 2) [(.5 - .7) - (.9 - .6)] = 1
    out = flow_dpo_loss(torch.tensor([0.5]), torch.tensor([0.9]), torch.tensor([0.7]), torch.tensor([0.6]), beta=4.0)
    torch.testing.assert_close(out.margin, torch.tensor([1.0]))
    torch.testing.assert_close(out.loss, torch.tensor([0.3132617]))


@given(pairs)
def test_at_the_reference_the_loss_is_log_two_with_a_gradient_of_half_beta(rows) -> None:
    winner, loser = (column.clone().requires_grad_() for column in columns(rows)[:2])
    for function, sign in ((dpo_loss, -1), (flow_dpo_loss, 0.5)):
        out = function(winner, loser, winner, loser, beta=0.3)
        torch.testing.assert_close(out.loss, torch.full_like(out.loss, math.log(2)))
        to_winner, to_loser = torch.autograd.grad(out.loss.sum(), (winner, loser))
        torch.testing.assert_close(to_winner, torch.full_like(to_winner, sign * 0.15))
        torch.testing.assert_close(to_loser, -to_winner)


@given(pairs)
def test_swapping_a_pair_turns_the_margin(rows) -> None:
    win, lose, ref_win, ref_lose = columns(rows)
    for function in (dpo_loss, flow_dpo_loss):
        there = function(win, lose, ref_win, ref_lose, beta=0.7)
        back = function(lose, win, ref_lose, ref_win, beta=0.7)
        torch.testing.assert_close(back.margin, -there.margin)
        # log sigmoid(z) - log sigmoid(-z) = z
        torch.testing.assert_close(back.loss - there.loss, there.margin, rtol=1e-4, atol=1e-4)


@given(pairs, numbers)
def test_what_noise_and_time_do_to_all_losses_alike_cancels(rows, shift: float) -> None:
    win, lose, ref_win, ref_lose = columns(rows)
    there = flow_dpo_loss(win, lose, ref_win, ref_lose, beta=0.7)
    moved = flow_dpo_loss(win + shift, lose - 2 * shift, ref_win + shift, ref_lose - 2 * shift, beta=0.7)
    torch.testing.assert_close(moved.loss, there.loss, rtol=1e-4, atol=1e-4)


def test_a_preference_refuses_a_beta_that_is_not_positive() -> None:
    zero = torch.zeros(1)
    for function in (dpo_loss, flow_dpo_loss):
        with pytest.raises(InputError, match=r"beta=0.0: use a positive number"):
            function(zero, zero, zero, zero, beta=0.0)


def test_dpo_on_tabular_policies_is_maximum_likelihood_of_the_preferences() -> None:
    """Bradley-Terry: where one output is preferred 3 times in 4, the margin of the optimum is log 3."""
    logits = torch.zeros(2, requires_grad=True)
    reference = torch.tensor([0.9, 0.1]).log()
    optimizer = torch.optim.SGD([logits], lr=8.0)
    for _ in range(60):
        logprobs = logits.log_softmax(0)
        a, b = logprobs[:1], logprobs[1:]
        first = dpo_loss(a, b, reference[:1], reference[1:], beta=0.5)
        second = dpo_loss(b, a, reference[1:], reference[:1], beta=0.5)
        optimizer.zero_grad()
        (0.75 * first.loss + 0.25 * second.loss).sum().backward()
        optimizer.step()
    assert first.margin.item() == pytest.approx(math.log(3), abs=1e-4)


def test_flow_matching_loss_by_hand() -> None:
    v = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    x0 = torch.tensor([[[0.5, -1.0]], [[1.0, 1.0]]])
    noise = torch.tensor([[[1.0, 2.0]], [[1.0, 1.0]]])
    assert flow_matching_loss(v, x0, noise).tolist() == [0.625, 0.0]  # (.5^2 + 1^2) / 2
