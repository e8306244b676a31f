from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from lvrpo.sampling import PredictedData, dpm_solver_step, ode_step, predicted_data, timestep_grid

ONE = torch.ones(1, 1, 1)


def test_dpm_solver_by_hand() -> None:
    # lambda(.75) = -log 3, lambda(.5) = 0, lambda(.25) = log 3: r = 1; D = .75 + (.75 - .55) / 2
    step = dpm_solver_step(ONE, 0.5 * ONE, 0.5, 0.25, PredictedData(x0=0.55 * ONE, t=0.75))
    torch.testing.assert_close(step.mean, 0.925 * ONE)  # .5 + .5 * .85
    torch.testing.assert_close(step.mean_gain, torch.tensor(0.75))
    assert step.std == 0
    torch.testing.assert_close(predicted_data(ONE, 0.5 * ONE, 0.5).x0, 0.75 * ONE)


@pytest.mark.parametrize(
    ("t", "t_next", "previous"),
    [(1.0, 0.8, None), (0.6, 0.5, None), (0.8, 0.6, PredictedData(ONE, 1.0)), (0.2, 0.0, PredictedData(ONE, 0.4))],
)
def test_it_is_eulers_step_where_there_is_nothing_to_extrapolate(t: float, t_next: float, previous) -> None:
    x_t, v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    step, euler = dpm_solver_step(x_t, v, t, t_next, previous), ode_step(x_t, v, t, t_next)
    torch.testing.assert_close(step.mean, euler.mean)
    torch.testing.assert_close(step.mean_gain, euler.mean_gain)


def test_times_may_differ_per_sample() -> None:
    x_t, v, x0 = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    t_previous, t, t_next = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.8, 0.6, 0.2]), torch.tensor([0.5, 0.5, 0.0])
    together = dpm_solver_step(x_t, v, t, t_next, PredictedData(x0, t_previous))
    for row in range(3):
        one = slice(row, row + 1)
        previous = PredictedData(x0[one], float(t_previous[row]))
        alone = dpm_solver_step(x_t[one], v[one], float(t[row]), float(t_next[row]), previous)
        torch.testing.assert_close(together.mean[one], alone.mean, rtol=0, atol=0)
        assert together.mean_gain[row] == alone.mean_gain


def test_mean_gain_is_the_derivative_of_the_mean() -> None:
    x_t, x0 = 0.3 * ONE, (0.7 * ONE).requires_grad_()
    step = dpm_solver_step(x_t, (x_t - x0) / 0.6, 0.6, 0.4, PredictedData(0.5 * ONE, 0.9))
    (gradient,) = torch.autograd.grad(step.mean.sum(), x0)
    torch.testing.assert_close(gradient.squeeze(), step.mean_gain.detach())


def test_it_computes_in_float32() -> None:
    half = ONE.bfloat16()
    assert dpm_solver_step(half, half, 0.5, 0.25, predicted_data(half, half, 0.75)).mean.dtype == torch.float32


# Closed-form physics: data N(MEAN, STD^2) with their exact velocity. Two starts a unit apart follow an affine map, so
# their distance at the end is the std that is drawn.

MEAN, STD = 1.5, 0.6


def exact_velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
    variance = (1 - t) ** 2 * STD**2 + t**2
    x0 = MEAN + (1 - t) * STD**2 / variance * (x_t - (1 - t) * MEAN)
    return (x_t - x0) / t


def integrate(grid: list[float], x_t: torch.Tensor, order: int, velocity: Callable = exact_velocity) -> torch.Tensor:
    previous = None
    for t, t_next in pairwise(grid):
        v = velocity(x_t, t)
        step = dpm_solver_step(x_t, v, t, t_next, previous)
        previous = predicted_data(x_t, v, t) if order == 2 else None
        x_t = step.mean
    return x_t


@pytest.mark.parametrize(
    ("order", "stds"), [(1, (0.5218, 0.5597, 0.5795, 0.5948)), (2, (0.6006, 0.6056, 0.6022, 0.6002))]
)
def test_gaussian_data_are_drawn_with_their_mean_and_std(order: int, stds) -> None:
    for num_steps, expected in zip((10, 20, 40, 160), stds, strict=True):
        mean, above = integrate(timestep_grid(num_steps).tolist(), torch.tensor([[0.0], [1.0]]), order)[:, 0].tolist()
        assert mean == pytest.approx(MEAN, abs=1e-4)
        assert above - mean == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_falls_with_the_order_of_the_solver(order: int) -> None:
    """Between t = .9 and .1, where lambda is finite: half the step, half the error or a quarter of it."""
    start, end = (math.sqrt((1 - t) ** 2 * STD**2 + t**2) for t in (0.9, 0.1))
    errors = []
    for num_steps in (16, 32, 64):
        grid = [0.9 - 0.8 * i / num_steps for i in range(num_steps + 1)]
        below, above = integrate(grid, torch.tensor([[0.0], [start]]), order)[:, 0].tolist()
        errors.append(abs(above - below - end))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


def test_two_sharp_modes_are_reached_no_worse_than_by_euler() -> None:
    """Data N(+-1, .2^2): the rms distance to the finely integrated end, 10 and 20 steps."""

    def velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
        variance = (1 - t) ** 2 * 0.04 + t**2
        modes = torch.tensor([-1.0, 1.0])
        weights = torch.softmax(-((x_t - (1 - t) * modes) ** 2) / (2 * variance), dim=-1)
        x0 = (weights * (modes + (1 - t) * 0.04 / variance * (x_t - (1 - t) * modes))).sum(dim=-1, keepdim=True)
        return (x_t - x0) / t

    x_1 = torch.linspace(-2.15, 2.25, 12)[:, None]
    exact = integrate(timestep_grid(1000).tolist(), x_1, 2, velocity)
    for num_steps, euler, solver in ((10, 0.066, 0.040), (20, 0.035, 0.004)):
        for order, expected in ((1, euler), (2, solver)):
            error = (integrate(timestep_grid(num_steps).tolist(), x_1, order, velocity) - exact).square().mean().sqrt()
            assert error.item() == pytest.approx(expected, abs=0.002)
