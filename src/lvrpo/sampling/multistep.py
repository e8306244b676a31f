"""A second-order step of the probability flow, for the steps that are not trained: same price, fewer steps.

It needs what the step before predicted; the loop carries it:

    step = dpm_solver_step(x_t, v, t, t_next, previous)
    previous = predicted_data(x_t, v, t)

``previous`` is None at the first step and after a stochastic one, whose noise is no part of a smooth path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.sampling.flow_sde import FlowStep, Time, expand_time

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["PredictedData", "dpm_solver_step", "predicted_data"]


@dataclass(frozen=True)
class PredictedData:
    """What a multistep solver remembers of the step before."""

    x0: Tensor
    """float32 (B, N, C): the data that the velocity of that step pointed to."""
    t: Time
    """When."""


def predicted_data(x_t: Float[Tensor, " B *shape"], v: Float[Tensor, " B *shape"], t: Time) -> PredictedData:
    """The data that a velocity points to, to be handed to the next ``dpm_solver_step``.

    x0 = x_t - t v.

    Shapes: x_t and v (B, N, C), time () or (B,), to float32 (B, N, C).
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    x_t = x_t.float()
    return PredictedData(x0=x_t - expand_time(t, x_t) * v.float(), t=t)


def dpm_solver_step(
    x_t: Float[Tensor, " B *shape"],
    v: Float[Tensor, " B *shape"],
    t: Time,
    t_next: Time,
    previous: PredictedData | None = None,
) -> FlowStep:
    """The second-order multistep step of DPM-Solver++ (2M, arXiv:2211.01095) for a rectified flow: no noise.

    lambda(t) = log((1 - t) / t);  h = lambda(t_next) - lambda(t);  r = (lambda(t) - lambda(t_previous)) / h;
    D = x0 + (x0 - x0_previous) / (2r);  mean = (t_next / t) x_t + [(1 - t_next) - (1 - t) t_next / t] D;
    d mean / d x0 = [(1 - t_next) - (1 - t) t_next / t] (1 + 1 / (2r)).

    With D = x0 this is Euler's step (``ode_step``). So it is without ``previous``, and wherever lambda is infinite: at
    t_previous = 1 and at t_next = 0, hence in the first two steps and the last of a grid from 1 to 0. One call of the
    model a step, as Euler's, with an error of second order: data of std .6 are drawn with .601 / .602 at 10 / 40 steps
    (Euler .522 / .580).

    Shapes: x_t and v (B, N, C), times () or (B,), to a ``FlowStep`` with std 0.
    Raises: nothing; t = 0 gives nan.
    Differs from the paper: no.
    """
    x_t = x_t.float()
    t, t_next = expand_time(t, x_t), expand_time(t_next, x_t)
    x0 = x_t - t * v.float()
    weight = (1 - t_next) - (1 - t) * t_next / t  # of D
    slope = torch.zeros_like(weight)  # 1 / (2r)
    if previous is not None:
        t_previous = expand_time(previous.t, x_t)
        slope = (_lambda(t_next) - _lambda(t)) / (2 * (_lambda(t) - _lambda(t_previous)))
        slope = torch.where((t_next > 0) & (t_previous < 1), slope, 0.0)
        D = x0 + slope * (x0 - previous.x0)
    else:
        D = x0
    return FlowStep(mean=t_next / t * x_t + weight * D, std=torch.zeros_like(weight), mean_gain=weight * (1 + slope))


def _lambda(t: Tensor) -> Tensor:
    """Half the log signal-to-noise ratio of x_t = (1 - t) x0 + t noise."""
    return torch.log((1 - t) / t)
