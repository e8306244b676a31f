"""The second-order step against hand-worked numbers and a flow whose solution is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lvrpo.sampling import ode_step, timestep_grid
from lvrpo.sampling.solvers import PastVelocity, adams_bashforth_step

MEAN, STD = 1.5, 0.6


def exact_velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """Of data N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    x0 = MEAN + (1 - t) * STD**2 / variance * (x_t - (1 - t) * MEAN)
    return (x_t - x0) / t


def drawn_std(num_steps: int, order: int, shift: float = 1.0) -> float:
    """The spread of the data after integration: every step is linear, so two points tell it."""
    x_t, past = torch.tensor([[0.0], [1.0]]), None
    for t, t_next in pairwise(timestep_grid(num_steps, shift)):
        v = exact_velocity(x_t, float(t))
        if order == 2:
            x_t, past = adams_bashforth_step(x_t, v, t, t_next, past)
        else:
            x_t = ode_step(x_t, v, t, t_next).mean
    return float(x_t[1] - x_t[0])


def test_by_hand() -> None:
    one = torch.ones(1, 1)
    past = PastVelocity(torch.tensor(0.9), 3 * one)
    # dt = -.2, dt_past = -.4: slope = 2 + .25 * (2 - 3) = 1.75; 1 - .2 * 1.75 = .65
    x_next, kept = adams_bashforth_step(one, 2 * one, torch.tensor(0.5), torch.tensor(0.3), past)
    assert x_next.item() == pytest.approx(0.65)
    assert (kept.t.item(), kept.v.item()) == (0.5, 2.0)


def test_without_a_past_it_is_eulers_step() -> None:
    x_t, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    x_next, _ = adams_bashforth_step(x_t, v, torch.tensor(1.0), torch.tensor(0.8), None)
    torch.testing.assert_close(x_next, ode_step(x_t, v, 1.0, 0.8).mean)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_velocity_is_followed_exactly(shift: float) -> None:
    noise, data = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    x_t, past = noise, None
    for t, t_next in pairwise(timestep_grid(6, shift)):
        x_t, past = adams_bashforth_step(x_t, noise - data, t, t_next, past)
    torch.testing.assert_close(x_t, data)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_its_error_is_of_second_order(shift: float) -> None:
    first = [abs(drawn_std(n, 1, shift) - STD) for n in (8, 40, 80)]
    second = [abs(drawn_std(n, 2, shift) - STD) for n in (8, 40, 80)]
    assert all(b < a / 4 for a, b in zip(first, second, strict=True))
    assert first[1] / first[2] == pytest.approx(2, abs=0.2)
    assert second[1] / second[2] > 2.5


def test_the_numbers_of_the_docstring() -> None:
    assert drawn_std(8, 1, 3.0) == pytest.approx(0.43, abs=0.005)
    assert drawn_std(8, 2, 3.0) == pytest.approx(0.57, abs=0.005)
