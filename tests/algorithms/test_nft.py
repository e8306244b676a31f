from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import nft_loss, old_policy_decay, reward_probability
from lvrpo.errors import InputError


def cell(*values: float) -> torch.Tensor:
    return torch.tensor([[list(values)]])  # (1, 1, C)


def test_nft_loss_by_hand() -> None:
    # v+ = .75, v- = .25; x0+ = .625, x0- = .875; errors .125 and .375; each |e|^2 / |e|; 3.8 (.75 * .125 + .25 * .375)
    out = nft_loss(
        cell(1.0), cell(0.5), None, cell(1.0), torch.tensor([0.5]), cell(0.5), torch.tensor([0.75]),
        beta=0.5, advantage_max=1.9,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, torch.tensor([0.7125]))
    torch.testing.assert_close(out.policy, torch.tensor([0.7125]))
    torch.testing.assert_close(out.distance_to_old, torch.tensor([0.25]))
    assert out.velocity_kl.tolist() == [0.0]


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_nft_loss_weights_and_velocity_kl_by_hand(q: float) -> None:
    # errors (.1, .3): mean square .05 over mean size .2; velocity kl (1 + 0) / 2
    v = cell(0.0, 0.4)
    out = nft_loss(
        v, v, cell(1.0, 0.4), cell(1.0, 1.0), torch.tensor([0.5]), cell(0.9, 0.5), torch.tensor([q]),
        beta=1.0, kl_coef=0.2,
    )  # fmt: skip
    torch.testing.assert_close(out.policy, torch.tensor([0.25]))
    torch.testing.assert_close(out.velocity_kl, torch.tensor([0.5]))
    torch.testing.assert_close(out.loss, torch.tensor([0.35]))
    assert out.distance_to_old.tolist() == [0.0]


def errors_after_a_step(q: float) -> tuple[float, float]:
    """Mean squared error of the predicted image before and after one small gradient step from v = v_old."""
    generator = torch.Generator().manual_seed(3)
    x0, noise, v_old = torch.randn(3, 2, 4, 5, generator=generator)
    t = torch.tensor([0.3, 0.8])
    x_t = (1 - t.view(2, 1, 1)) * x0 + t.view(2, 1, 1) * noise
    v = v_old.clone().requires_grad_()
    loss = nft_loss(v, v_old, None, x_t, t, x0, torch.full((2,), q), beta=0.5).loss.sum()
    (gradient,) = torch.autograd.grad(loss, v)

    def error(velocity: torch.Tensor) -> float:
        return float(((x_t - t.view(2, 1, 1) * velocity - x0) ** 2).mean())

    return error(v_old), error(v_old - 0.1 * gradient)


def test_nft_pulls_to_good_samples_and_away_from_bad_ones() -> None:
    before, after = errors_after_a_step(1.0)
    assert after < before
    before, after = errors_after_a_step(0.0)
    assert after > before
    before, after = errors_after_a_step(0.5)
    assert abs(after - before) < 1e-6


def test_nft_has_a_gradient_to_the_policy_alone_and_none_through_its_weights() -> None:
    v, v_old, v_ref, x_t = (cell(value).requires_grad_() for value in (1.0, 0.5, 0.0, 1.0))
    out = nft_loss(v, v_old, v_ref, x_t, torch.tensor([0.5]), cell(0.5), torch.tensor([1.0]), beta=0.5, kl_coef=1.0)
    out.loss.sum().backward()
    # d/dv of 2 e^2 / w is 4 e / w de/dv = 4 (-t beta) = -1; of the KL 2 (v - v_ref) = 2
    assert v.grad is not None
    torch.testing.assert_close(v.grad, cell(1.0))
    assert v_old.grad is None
    assert v_ref.grad is None


def test_nft_loss_is_finite_where_the_prediction_is_perfect() -> None:
    v = cell(0.5).requires_grad_()
    out = nft_loss(v, cell(0.5), None, cell(1.0), torch.tensor([1.0]), cell(0.5), torch.tensor([1.0]), beta=0.5)
    out.loss.sum().backward()
    assert out.loss.item() == 0
    assert v.grad is not None
    assert v.grad.isfinite().all()


def test_nft_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    v, v_old, v_ref, x_t, x0 = torch.randn(5, 4, 3, 2, generator=generator)
    t, q = torch.rand(2, 4, generator=generator)
    whole = nft_loss(v, v_old, v_ref, x_t, t, x0, q, beta=0.5, kl_coef=0.1)
    part = nft_loss(v[2:3], v_old[2:3], v_ref[2:3], x_t[2:3], t[2:3], x0[2:3], q[2:3], beta=0.5, kl_coef=0.1)
    torch.testing.assert_close(whole.loss[2:3], part.loss)


def test_nft_loss_refuses_what_it_cannot_do() -> None:
    arguments = (cell(0.0), cell(0.0), None, cell(0.0), torch.tensor([0.5]), cell(0.0), torch.tensor([0.5]))
    with pytest.raises(InputError, match="use a positive number"):
        nft_loss(*arguments, beta=0.0)
    with pytest.raises(InputError, match="needs a reference"):
        nft_loss(*arguments, beta=0.5, kl_coef=0.1)


def test_reward_probability_by_hand() -> None:
    advantages = torch.tensor([-9.0, -2.0, -1.0, 0.0, 0.5, 2.0, 9.0])
    assert reward_probability(advantages, 2.0).tolist() == [0.0, 0.0, 0.25, 0.5, 0.625, 1.0, 1.0]
    with pytest.raises(InputError, match="use a positive number"):
        reward_probability(advantages, 0.0)


@given(st.floats(-10, 10), st.floats(0.1, 10))
def test_reward_probability_is_symmetric(advantage: float, advantage_max: float) -> None:
    q = reward_probability(torch.tensor([advantage, -advantage]), advantage_max)
    torch.testing.assert_close(q.sum(), torch.tensor(1.0))


def test_old_policy_decay_by_hand() -> None:
    assert [old_policy_decay(step, rate=0.02, ceiling=0.5) for step in (0, 10, 25, 1000)] == [0.0, 0.2, 0.5, 0.5]
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        old_policy_decay(1, rate=0.02, ceiling=1.0)
