"""The rules for steps without noise against hand-worked numbers and flows whose solution is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from lvrpo.sampling import SOLVERS, PastStep, adams_bashforth_step, dpm_solver_step, ode_step, timestep_grid

ONE = torch.ones(1, 1)
MEAN, STD = 1.5, 0.6


def gaussian_velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """Of data N(MEAN, STD^2), exactly."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    x0 = MEAN + (1 - t) * STD**2 / variance * (x_t - (1 - t) * MEAN)
    return (x_t - x0) / t


def two_mode_velocity(std: float) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """Of data N(+-1, std^2), exactly."""

    def velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        modes = torch.tensor([-1.0, 1.0])
        weights = torch.softmax(-((x_t - (1 - t) * modes) ** 2) / (2 * variance), dim=-1)
        x0 = (weights * (modes + (1 - t) * std**2 / variance * (x_t - (1 - t) * modes))).sum(dim=-1, keepdim=True)
        return (x_t - x0) / t

    return velocity


def integrate(
    solver: str, grid: torch.Tensor, x_t: torch.Tensor, velocity: Callable = gaussian_velocity
) -> torch.Tensor:
    past = None
    for t, t_next in pairwise(grid):
        x_t, past = SOLVERS[solver](x_t, velocity(x_t, float(t)), t, t_next, past)
    return x_t


def drawn_std(solver: str, num_steps: int, shift: float = 1.0) -> float:
    """The spread of the data after integration: every step is linear, so two points tell it."""
    x_0 = integrate(solver, timestep_grid(num_steps, shift), torch.tensor([[0.0], [1.0]]))
    return float(x_0[1] - x_0[0])


def test_adams_bashforth_by_hand() -> None:
    past = PastStep(torch.tensor(0.9), ONE, 3 * ONE)
    # dt = -.2, dt_past = -.4: slope = 2 + .25 * (2 - 3) = 1.75; 1 - .2 * 1.75 = .65
    x_next, kept = adams_bashforth_step(ONE, 2 * ONE, torch.tensor(0.5), torch.tensor(0.3), past)
    assert x_next.item() == pytest.approx(0.65)
    assert (float(kept.t), kept.x_t.item(), kept.v.item()) == (0.5, 1.0, 2.0)


def test_dpm_solver_by_hand() -> None:
    # lambda(.75) = -log 3, lambda(.5) = 0, lambda(.25) = log 3: r = 1; x0 = .75, x0_past = .7 - .75 * .2 = .55,
    # D = .75 + (.75 - .55) / 2 = .85; x_next = .5 * 1 + .5 * .85
    x_next, _ = dpm_solver_step(ONE, 0.5 * ONE, 0.5, 0.25, PastStep(0.75, 0.7 * ONE, 0.2 * ONE))
    assert x_next.item() == pytest.approx(0.925)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.8), (0.6, 0.5), (0.2, 0.0)])
def test_without_a_past_it_is_eulers_step(solver: str, t: float, t_next: float) -> None:
    x_t, v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x_next, _ = SOLVERS[solver](x_t, v, t, t_next, None)
    torch.testing.assert_close(x_next, ode_step(x_t, v, t, t_next).mean)


@pytest.mark.parametrize(("t", "t_next", "t_past"), [(0.8, 0.6, 1.0), (0.2, 0.0, 0.4)])
def test_dpm_solver_is_eulers_step_where_its_time_is_infinite(t: float, t_next: float, t_past: float) -> None:
    x_t, v, before = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x_next, _ = dpm_solver_step(x_t, v, t, t_next, PastStep(t_past, before, -v))
    torch.testing.assert_close(x_next, ode_step(x_t, v, t, t_next).mean)


@pytest.mark.parametrize("solver", SOLVERS)
def test_times_may_differ_per_sample(solver: str) -> None:
    x_t, v, before = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    t_past, t, t_next = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.8, 0.6, 0.2]), torch.tensor([0.5, 0.5, 0.0])
    together, _ = SOLVERS[solver](x_t, v, t, t_next, PastStep(t_past, before, -v))
    for row in range(3):
        one = slice(row, row + 1)
        past = PastStep(t_past[row], before[one], -v[one])
        alone, _ = SOLVERS[solver](x_t[one], v[one], t[row], t_next[row], past)
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_computes_in_float32(solver: str) -> None:
    half = ONE.bfloat16()
    x_next, past = SOLVERS[solver](half, half, 0.75, 0.5, None)
    assert x_next.dtype == past.x_t.dtype == past.v.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_velocity_is_followed_exactly(solver: str, shift: float) -> None:
    noise, data = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    x_0 = integrate(solver, timestep_grid(6, shift), noise, lambda x_t, t: noise - data)
    torch.testing.assert_close(x_0, data)


@pytest.mark.parametrize(
    ("solver", "stds"),
    [
        ("euler", (0.5218, 0.5597, 0.5795, 0.5948)),
        ("adams_bashforth", (0.5925, 0.5984, 0.5996, 0.6000)),
        ("dpm_solver", (0.6006, 0.6056, 0.6022, 0.6002)),
    ],
)
def test_gaussian_data_are_drawn_with_their_mean_and_std(solver: str, stds) -> None:
    for num_steps, expected in zip((10, 20, 40, 160), stds, strict=True):
        mean, above = integrate(solver, timestep_grid(num_steps), torch.tensor([[0.0], [1.0]]))[:, 0].tolist()
        assert mean == pytest.approx(MEAN, abs=1e-4)
        assert above - mean == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams_bashforth", 2), ("dpm_solver", 2)])
def test_the_error_falls_with_the_order_of_the_rule(solver: str, order: int) -> None:
    """Between t = .9 and .1: half the step, half the error or a quarter of it."""
    start, end = (math.sqrt((1 - t) ** 2 * STD**2 + t**2) for t in (0.9, 0.1))
    errors = []
    for num_steps in (16, 32, 64):
        grid = 0.9 - 0.8 * torch.arange(num_steps + 1) / num_steps
        below, above = integrate(solver, grid, torch.tensor([[0.0], [start]]))[:, 0].tolist()
        errors.append(abs(above - below - end))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.08)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_adams_bashforth_is_of_second_order_from_noise_to_data(shift: float) -> None:
    first = [abs(drawn_std("euler", n, shift) - STD) for n in (8, 40, 80)]
    second = [abs(drawn_std("adams_bashforth", n, shift) - STD) for n in (8, 40, 80)]
    assert all(b < a / 4 for a, b in zip(first, second, strict=True))
    assert first[1] / first[2] == pytest.approx(2, abs=0.2)
    assert second[1] / second[2] > 2.5


@pytest.mark.parametrize(("solver", "std"), [("euler", 0.43), ("adams_bashforth", 0.57), ("dpm_solver", 0.47)])
def test_the_numbers_of_the_docstring(solver: str, std: float) -> None:
    assert drawn_std(solver, 8, 3.0) == pytest.approx(std, abs=0.005)


@pytest.mark.parametrize(
    ("std", "shift", "num_steps", "errors"),
    [
        (0.2, 1.0, 10, {"euler": 0.066, "adams_bashforth": 0.018, "dpm_solver": 0.040}),
        (0.2, 1.0, 20, {"euler": 0.035, "adams_bashforth": 0.005, "dpm_solver": 0.004}),
        (0.05, 3.0, 10, {"euler": 0.048, "adams_bashforth": 0.151, "dpm_solver": 0.048}),
    ],
)
def test_where_two_modes_are_sharp_the_rules_differ(std: float, shift: float, num_steps: int, errors: dict) -> None:
    """Data N(+-1, std^2): the rms distance to the finely integrated end."""
    velocity, x_1 = two_mode_velocity(std), torch.linspace(-2.15, 2.25, 12)[:, None]
    exact = integrate("adams_bashforth", timestep_grid(1000), x_1, velocity)
    for solver, expected in errors.items():
        x_0 = integrate(solver, timestep_grid(num_steps, shift), x_1, velocity)
        assert (x_0 - exact).square().mean().sqrt().item() == pytest.approx(expected, abs=0.002)
