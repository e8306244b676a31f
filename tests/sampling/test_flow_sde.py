from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from lvrpo.errors import InputError
from lvrpo.sampling import STEPS, flow_sde, step_logprob, step_weights, timestep_grid

ONE = torch.ones(1, 1, 1)


@pytest.mark.parametrize(
    ("sampler", "noise_level", "t", "t_next", "mean", "std", "gain"),
    [
        ("ode", 0.0, 0.5, 0.25, 0.875, 0.0, 0.5),
        ("flow_sde", 0.7, 0.5, 0.25, 0.721875, 0.35, 0.6225),  # s = .7
        ("flow_sde", 0.7, 1.0, 0.875, 0.6925, 0.7, 0.125),  # s^2 = .49 / (1 - .875)
        ("dance_sde", 0.3, 0.5, 0.25, 0.846875, 0.15, 0.5225),  # score = -2.5
        ("cps", 0.5, 0.5, 0.25, 0.783471, 0.176777, 0.573223),  # s = .25 sin 45 degrees
        ("cps", 0.5, 0.25, 0.0, 0.875, 0.0, 1.0),  # the last step is x0 = 1 - .25 * .5
    ],
)
def test_steps_by_hand(sampler, noise_level, t, t_next, mean, std, gain) -> None:
    step = STEPS[sampler](ONE, 0.5 * ONE, t, t_next, noise_level)
    torch.testing.assert_close(step.mean, mean * ONE, rtol=0, atol=1e-6)
    torch.testing.assert_close(step.std, torch.tensor(std), rtol=0, atol=1e-6)
    torch.testing.assert_close(step.mean_gain, torch.tensor(gain), rtol=0, atol=1e-6)
    torch.testing.assert_close(step.next_state(2 * ONE), (mean + 2 * std) * ONE)
    assert torch.equal(step.next_state(), step.mean)


@pytest.mark.parametrize("sampler", STEPS)
def test_mean_gain_is_the_derivative_of_the_mean(sampler: str) -> None:
    for t, t_next in ((1.0, 0.8), (0.6, 0.5), (0.2, 0.1)):
        x_t = 0.3 * ONE
        x0 = (0.7 * ONE).requires_grad_()
        step = STEPS[sampler](x_t, (x_t - x0) / t, t, t_next, 0.4)
        (gradient,) = torch.autograd.grad(step.mean.sum(), x0)
        torch.testing.assert_close(gradient.squeeze(), step.mean_gain.detach())


@pytest.mark.parametrize("sampler", STEPS)
def test_without_noise_every_step_is_the_ode(sampler: str) -> None:
    x_t, v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for t, t_next in ((1.0, 0.8), (0.5, 0.1), (0.2, 0.0)):
        step = STEPS[sampler](x_t, v, t, t_next, 0.0)
        torch.testing.assert_close(step.mean, x_t + (t_next - t) * v)
        assert not step.std.any()


@pytest.mark.parametrize("sampler", STEPS)
def test_times_may_differ_per_sample(sampler: str) -> None:
    x_t, v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    t, t_next = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.7, 0.3, 0.1])
    together = STEPS[sampler](x_t, v, t, t_next, 0.5)
    assert together.std.shape == (3, 1, 1)
    for row in range(3):
        alone = STEPS[sampler](x_t[row : row + 1], v[row : row + 1], float(t[row]), float(t_next[row]), 0.5)
        assert torch.equal(together.mean[row], alone.mean[0])
        assert together.std[row] == alone.std
        assert together.mean_gain[row] == alone.mean_gain


def test_steps_compute_in_float32() -> None:
    half = ONE.bfloat16()
    for step in STEPS.values():
        assert step(half, half, 0.5, 0.25, 0.5).mean.dtype == torch.float32


def test_cps_refuses_more_noise_than_there_is() -> None:
    for outside in (-0.3, 1.3):
        with pytest.raises(InputError, match=r"use 0..1$"):
            STEPS["cps"](ONE, ONE, 0.5, 0.25, outside)


# Closed-form physics: the data are N(MEAN, STD^2), so the best velocity is known and linear in the state.

MEAN, STD = 1.5, 0.6


def exact_velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
    variance = (1 - t) ** 2 * STD**2 + t**2
    x0 = MEAN + (1 - t) * STD**2 / variance * (x_t - (1 - t) * MEAN)
    return (x_t - x0) / t


def final_moments(sampler: str, noise_level: float, num_steps: int) -> tuple[float, float]:
    """Mean and std after integration, exactly: each step maps N(m, s^2) to N(mean(m), slope^2 s^2 + std^2)."""
    mean, variance = 0.0, 1.0
    grid = timestep_grid(num_steps).tolist()
    for t, t_next in pairwise(grid):
        x_t = torch.tensor([[mean], [mean + 1]])
        step = STEPS[sampler](x_t, exact_velocity(x_t, t), t, t_next, noise_level)
        mean, above = step.mean[:, 0].tolist()
        variance = (above - mean) ** 2 * variance + float(step.std) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    ("sampler", "noise_level", "stds"),
    [
        ("ode", 0.0, (0.523, 0.580, 0.598)),
        ("flow_sde", 0.7, (0.578, 0.599, 0.601)),
        ("dance_sde", 0.3, (0.530, 0.582, 0.598)),
        ("cps", 0.8, (0.426, 0.465, 0.482)),
    ],
)
def test_gaussian_data_are_drawn_with_their_mean_and_std(sampler: str, noise_level: float, stds) -> None:
    for num_steps, expected in zip((10, 40, 400), stds, strict=True):
        mean, std = final_moments(sampler, noise_level, num_steps)
        assert mean == pytest.approx(MEAN, abs=0.002)
        assert std == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize(("sampler", "noise_level"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8)])
def test_sampled_states_have_the_moments_of_the_closed_form(sampler: str, noise_level: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(20_000, 1, generator=generator)
    grid = timestep_grid(10).tolist()
    for t, t_next in pairwise(grid):
        step = STEPS[sampler](x_t, exact_velocity(x_t, t), t, t_next, noise_level)
        x_t = step.next_state(torch.randn(20_000, 1, generator=generator))
    mean, std = final_moments(sampler, noise_level, 10)
    assert x_t.mean().item() == pytest.approx(mean, abs=0.02)  # 5 standard errors
    assert x_t.std().item() == pytest.approx(std, abs=0.015)


@pytest.mark.parametrize(("sampler", "noise_level"), [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3)])
def test_with_many_steps_the_std_of_the_data_is_reached(sampler: str, noise_level: float) -> None:
    error = [abs(final_moments(sampler, noise_level, num_steps)[1] - STD) for num_steps in (10, 400)]
    assert error[1] < 0.003 < error[0]


# step_logprob, step_weights


def test_step_logprob_by_hand() -> None:
    x_next, mean = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 3.0]]])
    std = torch.tensor(2.0)
    # -1 / 8 - log 2 - .918939 and -log 2 - .918939
    torch.testing.assert_close(step_logprob(x_next, mean, std, "sum"), torch.tensor([-3.349171]))
    torch.testing.assert_close(step_logprob(x_next, mean, std), torch.tensor([-1.674586]))


@given(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32), st.floats(0.0625, 4, width=32))
def test_step_logprob_is_that_of_torch_distributions(x: float, mean: float, std: float) -> None:
    x_next, means = x + torch.arange(12.0).view(2, 3, 2), torch.full((2, 3, 2), mean)
    stds = torch.tensor([std, 2 * std]).view(2, 1, 1)
    exact = Normal(means, stds.expand(2, 3, 2)).log_prob(x_next)
    torch.testing.assert_close(step_logprob(x_next, means, stds, "sum"), exact.sum(dim=(1, 2)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(step_logprob(x_next, means, stds), exact.mean(dim=(1, 2)), rtol=1e-5, atol=1e-4)


def test_step_logprob_refuses_an_unknown_reduction() -> None:
    with pytest.raises(InputError, match="use mean or sum"):
        flow_sde.step_logprob.__wrapped__(ONE, ONE, ONE, "max")


def test_step_weights_by_hand() -> None:
    torch.testing.assert_close(step_weights(torch.ones(2), torch.tensor([1.0, 3.0])), torch.tensor([1.5, 0.5]))
    weights = step_weights(torch.ones(2, 2), torch.tensor([[1.0, 3.0], [-2.0, 2.0]]))
    torch.testing.assert_close(weights, torch.tensor([[1.5, 0.5], [1.0, 1.0]]))


def test_step_weights_level_the_gradients_of_a_trajectory() -> None:
    """Unweighted, the size of d logprob / d x0 grows 40-fold over the seven noisy steps of eight."""
    grid = timestep_grid(8)
    x_t = ONE.expand(7, 1, 1)
    step = STEPS["cps"](x_t, x_t, grid[:7], grid[1:8], 0.7)
    std, gain = step.std.flatten(), step.mean_gain.flatten()
    expected = torch.tensor([0.16, 0.30, 0.50, 0.82, 1.36, 2.52, 6.33])
    torch.testing.assert_close(gain / std, expected, rtol=0, atol=0.005)
    weights = step_weights(std, gain)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights * gain / std, torch.full((7,), float((weights * gain / std)[0])))
