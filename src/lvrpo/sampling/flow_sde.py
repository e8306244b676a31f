"""One step of a flow from t to t_next < t: the ODE and three stochastic steps that keep its marginals (CPS: nearly).

Conventions: t = 1 is noise, t = 0 is data; v the velocity, x0 = x_t - t v and x1 = x_t + (1 - t) v the data and the
noise that it predicts; dt = t_next - t < 0. A step is Gaussian: x_next = mean + std eps. Times are numbers or tensors
(B,), one per sample. Everything is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "STEPS",
    "FlowStep",
    "StepFunction",
    "cps_step",
    "dance_sde_step",
    "flow_sde_step",
    "ode_step",
    "step_logprob",
    "step_weights",
]

Time = float | Tensor
"""A time for all samples, or float (B,), one per sample."""


@dataclass(frozen=True)
class FlowStep:
    """The distribution of the next state: N(mean, std^2) in every dimension."""

    mean: Tensor
    """float32, shaped as the state (B, N, C)."""
    std: Tensor
    """float32, broadcastable to the mean: () or (B, 1, 1)."""
    mean_gain: Tensor
    """d mean / d x0-prediction at fixed x_t (v = (x_t - x0) / t), shaped as ``std``; positive in any sensible step."""

    def next_state(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise; the mean alone without noise."""
        return self.mean if noise is None else self.mean + self.std * noise


class StepFunction(Protocol):
    """Signature of the entries of ``STEPS``."""

    def __call__(self, x_t: Tensor, v: Tensor, t: Time, t_next: Time, noise_level: float) -> FlowStep: ...


def ode_step(
    x_t: Float[Tensor, " B *shape"], v: Float[Tensor, " B *shape"], t: Time, t_next: Time, noise_level: float = 0.0
) -> FlowStep:
    """The Euler step of the probability flow: no noise.

    mean = x_t + dt v;  std = 0;  d mean / d x0 = -dt / t.

    Shapes: x_t and v (B, N, C), times () or (B,). ``noise_level`` is ignored: all steps have one signature.
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    x_t, v, t, t_next = _prepare(x_t, v, t, t_next)
    dt = t_next - t
    return FlowStep(mean=x_t + dt * v, std=torch.zeros_like(dt), mean_gain=-dt / t)


def flow_sde_step(
    x_t: Float[Tensor, " B *shape"], v: Float[Tensor, " B *shape"], t: Time, t_next: Time, noise_level: float
) -> FlowStep:
    """The stochastic step of Flow-GRPO (arXiv:2505.05470).

    s = noise_level sqrt(t / (1 - t)), where t = 1 is replaced in this denominator by the second value of the grid,
    which is the t_next of that very step;
    mean = x_t (1 + s^2 / (2t) dt) + v (1 + s^2 (1 - t) / (2t)) dt;  std = s sqrt(-dt);
    d mean / d x0 = -(dt / t) (1 + s^2 (1 - t) / (2t)).

    Shapes: x_t and v (B, N, C), times () or (B,) with 0 < t <= 1. Noise level about 0.7.
    Raises: nothing; t = 0 gives nan.
    Differs from the paper: no. The step that ends at t = 0 keeps its noise: leave it out of the window.
    """
    x_t, v, t, t_next = _prepare(x_t, v, t, t_next)
    dt = t_next - t
    s = noise_level * torch.sqrt(t / (1 - torch.where(t >= 1, t_next, t)))
    mean = x_t * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    gain = -dt / t * (1 + s**2 * (1 - t) / (2 * t))
    return FlowStep(mean=mean, std=s * torch.sqrt(-dt), mean_gain=gain)


def dance_sde_step(
    x_t: Float[Tensor, " B *shape"], v: Float[Tensor, " B *shape"], t: Time, t_next: Time, noise_level: float
) -> FlowStep:
    """The stochastic step of DanceGRPO, with the same noise at every time (arXiv:2505.07818).

    score = -(x_t - (1 - t) x0) / t^2;  mean = x_t + dt v - noise_level^2 / 2 score dt;  std = noise_level sqrt(-dt);
    d mean / d x0 = -dt / t - noise_level^2 (1 - t) / (2 t^2) dt.

    Shapes: x_t and v (B, N, C), times () or (B,) with 0 < t <= 1. Noise level about 0.3.
    Raises: nothing; t = 0 gives nan.
    Differs from the paper: no. The step that ends at t = 0 keeps its noise: leave it out of the window.
    """
    x_t, v, t, t_next = _prepare(x_t, v, t, t_next)
    dt = t_next - t
    x0 = x_t - t * v
    score = -(x_t - (1 - t) * x0) / t**2
    mean = x_t + dt * v - noise_level**2 / 2 * score * dt
    gain = -dt / t - noise_level**2 * (1 - t) / (2 * t**2) * dt
    return FlowStep(mean=mean, std=noise_level * torch.sqrt(-dt), mean_gain=gain)


def cps_step(
    x_t: Float[Tensor, " B *shape"], v: Float[Tensor, " B *shape"], t: Time, t_next: Time, noise_level: float
) -> FlowStep:
    """The coefficient-preserving step: part of the noise of the next state is fresh (CPS, arXiv:2509.05952).

    s = t_next sin(noise_level pi / 2);  mean = (1 - t_next) x0 + sqrt(t_next^2 - s^2) x1;  std = s;
    d mean / d x0 = (1 - t_next) - sqrt(t_next^2 - s^2) (1 - t) / t.

    Shapes: x_t and v (B, N, C), times () or (B,) with 0 < t <= 1. Noise level in [0, 1]: 0 is the ODE; about 0.8.
    The last step (t_next = 0) has no noise and no log-density. The states carry the right amount of noise, but the
    variance of the images shrinks at every number of steps (data of std .6: .426 / .465 / .482 at 10 / 40 / 400
    steps).
    Raises: InputError for a noise level outside [0, 1].
    Differs from the paper: not in the step; its log-density here is that of the true Gaussian (see ``step_logprob``).
    """
    if not 0 <= noise_level <= 1:
        raise InputError(f"sampling.noise_level={noise_level} with sampler=cps: use 0..1")
    x_t, v, t, t_next = _prepare(x_t, v, t, t_next)
    x0 = x_t - t * v
    x1 = x_t + (1 - t) * v
    s = t_next * math.sin(noise_level * math.pi / 2)
    kept = t_next * math.cos(noise_level * math.pi / 2)  # sqrt(t_next^2 - s^2)
    gain = (1 - t_next) - kept * (1 - t) / t
    return FlowStep(mean=(1 - t_next) * x0 + kept * x1, std=s, mean_gain=gain)


STEPS: Mapping[str, StepFunction] = {
    "ode": ode_step,
    "flow_sde": flow_sde_step,
    "dance_sde": dance_sde_step,
    "cps": cps_step,
}
"""Every step by the name that ``Sampling.sampler`` uses."""


def step_logprob(
    x_next: Float[Tensor, " B *shape"],
    mean: Float[Tensor, " B *shape"],
    std: Float[Tensor, " ..."],
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, " B"]:
    """The log-density of a step, scored on exactly the state that was stored.

    log N(x_next; mean, std^2) = -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 per dimension, reduced over
    all but the first axis: ``sum`` is the step's log-density in nats; ``mean`` is 1/D of it (Flow-GRPO,
    arXiv:2505.05470), and its ratios lie as much closer to 1, hence clips of 1e-4 and less.

    Shapes: x_next and mean (B, N, C), std broadcastable to them, to float32 (B,).
    Raises: InputError for an unknown reduction. std = 0 has no density and gives nan or inf.
    Differs from the paper: CPS (arXiv:2509.05952) scores -mean (x_next - mean)^2 without 1 / (2 std^2), which weighs
    steps by their noise; here every sampler has its true Gaussian density, and levelling steps is left to
    ``step_weights``.
    """
    x_next, mean, std = x_next.float(), mean.float(), std.float()
    logprob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    if reduction == "mean":
        return logprob.flatten(1).mean(dim=1)
    if reduction == "sum":
        return logprob.flatten(1).sum(dim=1)
    raise InputError(f"sampling.logprob_reduction={reduction!r} is unknown: use mean or sum")


def step_weights(std: Float[Tensor, "*B W"], mean_gain: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
    """Weights of the steps of a trajectory that level the scale of their gradients.

    The gradient of a step's log-density to the predicted image has the size |d mean / d x0| / std (about 40 times
    larger in the last steps than in the first, while layout is decided in the first);
    weight_i = (std_i / |mean_gain_i|) / mean_j (std_j / |mean_gain_j|). For the ratio of ``guard_surrogate``, whose
    gradient has the size |d mean / d x0| alone, give ones for std.

    Shapes: std (with its sqrt(-dt)) and mean_gain of ``FlowStep``, (W,) or (B, W), to the same. Range: > 0, mean 1
    over W.
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    weights = std / mean_gain.abs()
    return weights / weights.mean(dim=-1, keepdim=True)


def _prepare(x_t: Tensor, v: Tensor, t: Time, t_next: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All in float32; times of one per sample (B,) as (B, 1, 1)."""
    x_t, v = x_t.float(), v.float()
    return x_t, v, expand_time(t, x_t), expand_time(t_next, x_t)


def expand_time(t: Time, x_t: Tensor) -> Tensor:
    """A time as float32, () or (B, 1, 1), on the device of the state."""
    time = torch.as_tensor(t, dtype=torch.float32, device=x_t.device)
    return time if time.ndim == 0 else time.view(-1, *[1] * (x_t.ndim - 1))
