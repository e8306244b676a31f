"""When a flow is evaluated, and which steps are sampled with noise and trained. t = 1 is noise, t = 0 is data."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "check_window",
    "compressed_grid",
    "decaying_window",
    "fast_window",
    "flow_time",
    "full_window",
    "random_window",
    "shift_time",
    "sliding_window",
    "timestep_grid",
]


def shift_time(tau: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """Moves times towards the noise.

    t = shift tau / (1 + (shift - 1) tau).

    Shapes: any, to the same. Range: [0, 1] to [0, 1], ends fixed; shift = 1 changes nothing, a larger one raises t.
    Raises: InputError for a shift that is not positive.
    Differs from the paper: no paper given.
    """
    if shift <= 0:
        raise InputError(f"timestep_shift={shift}: use a positive number (1 is uniform)")
    return shift * tau / (1 + (shift - 1) * tau)


def timestep_grid(num_steps: int, shift: float = 1.0) -> Float[Tensor, " T1"]:
    """The times between which an image is integrated.

    t_i = shift_time(1 - i / num_steps), i = 0 .. num_steps.

    Shapes: float32 (num_steps + 1,). Range: falls from exactly 1 to exactly 0.
    Raises: InputError for num_steps below 1 or a shift that is not positive.
    Differs from the paper: no paper given.
    """
    if num_steps < 1:
        raise InputError(f"sampling.num_steps={num_steps}: use 1 or more")
    tau = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
    grid = shift_time(tau, shift).float()
    grid[0], grid[-1] = 1.0, 0.0
    return grid


def compressed_grid(num_steps: int, window_end: int, steps_after: int, shift: float = 1.0) -> Float[Tensor, " T1"]:
    """A grid with fewer steps after the window, for a solver of higher order (MixGRPO-Flash, arXiv:2507.21802).

    t_i = shift_time(1 - i / num_steps) for i <= window_end; from there to 0 in ``steps_after`` equal steps of the
    unshifted time. ``window_end`` is the number of steps up to and with the last of the window.

    Shapes: float32 (window_end + steps_after + 1,). Range: falls from exactly 1 to exactly 0; its beginning is that of
    ``timestep_grid``, so a window means the same steps in both.
    Raises: InputError for a window_end outside 0 .. num_steps - 1, steps_after outside 1 .. num_steps - window_end, or
    a shift that is not positive.
    Differs from the paper: the number of steps is given instead of a ratio.
    """
    if not 0 <= window_end < num_steps or not 1 <= steps_after <= num_steps - window_end:
        raise InputError(
            f"sampling.num_steps={num_steps} with the window's end at {window_end} and {steps_after} steps after it: "
            f"use 0..{num_steps - 1} and 1..{max(num_steps - window_end, 1)}"
        )
    before = torch.arange(num_steps, num_steps - window_end - 1, -1, dtype=torch.float64) / num_steps
    after = before[-1] * torch.arange(steps_after - 1, -1, -1, dtype=torch.float64) / steps_after
    grid = shift_time(torch.cat([before, after]), shift).float()
    grid[0], grid[-1] = 1.0, 0.0
    return grid


def flow_time(logits: Float[Tensor, "*shape"], shift: float = 1.0) -> Float[Tensor, "*shape"]:
    """Random training times from random logits.

    t = shift_time(sigmoid(logits)); logits ~ N(m, s^2) give the logit-normal times of flow matching.

    Shapes: any, to the same. Range: (0, 1); logit -inf is a clean image, t = 0.
    Raises: InputError for a shift that is not positive.
    Differs from the paper: no paper given.
    """
    return shift_time(torch.sigmoid(logits), shift)


def full_window(num_steps: int) -> tuple[int, ...]:
    """All steps but the last, which ends at t = 0: there Flow-SDE leaves its noise in the image and CPS has none.

    Range: 0 .. num_steps - 2; empty for one step.
    Raises: InputError for num_steps below 1.
    Differs from the paper: Flow-GRPO (arXiv:2505.05470) does not mention the last step.
    """
    if num_steps < 1:
        raise InputError(f"sampling.num_steps={num_steps}: use 1 or more")
    return tuple(range(num_steps - 1))


def fast_window(num_steps: int, size: int, seed: int) -> tuple[int, ...]:
    """A short run of steps with a random start in the first half; the ODE before and after it (Flow-GRPO-Fast).

    start uniform on 0 .. num_steps // 2 - 1 (as far as size lets it end before the last step); start .. start + size
    - 1.

    One window per group: all members share it, so the seed is derived from the group, never from the member.
    Range: within ``full_window``.
    Raises: InputError for a size below 1 or above num_steps - 1.
    Differs from the paper: the last step is never part of it.
    """
    _check_size(num_steps, size)
    starts = min(num_steps // 2, num_steps - size)
    start = random.Random(seed).randrange(starts)
    return tuple(range(start, start + size))


def sliding_window(
    num_steps: int, size: int, iteration: int, *, stride: int = 1, iterations_per_stride: int = 1
) -> tuple[int, ...]:
    """A run of steps that moves from the noise to the data as training goes on (MixGRPO, arXiv:2507.21802).

    l = stride * (iteration // iterations_per_stride), wrapped over the starts 0 .. num_steps - 1 - size; l .. l +
    size - 1.

    A function of the iteration alone, so resuming needs nothing else.
    Range: within ``full_window``.
    Raises: InputError for a size below 1 or above num_steps - 1, a stride or iterations_per_stride below 1, or a
    negative iteration.
    Differs from the paper: the last step is never part of it, and it restarts after the last position.
    """
    _check_size(num_steps, size)
    if stride < 1 or iterations_per_stride < 1 or iteration < 0:
        raise InputError(
            f"window stride={stride}, iterations_per_stride={iterations_per_stride}, iteration={iteration}: "
            "use 1 or more for the first two and 0 or more for the last"
        )
    start = stride * (iteration // iterations_per_stride) % (num_steps - size)
    return tuple(range(start, start + size))


def random_window(num_steps: int, size: int, seed: int) -> tuple[int, ...]:
    """A run of steps anywhere (the random strategy of MixGRPO, arXiv:2507.21802); the ODE before and after it.

    start uniform on 0 .. num_steps - 1 - size; start .. start + size - 1.

    One window per group, as ``fast_window``.
    Range: within ``full_window``.
    Raises: InputError for a size below 1 or above num_steps - 1.
    Differs from the paper: the last step is never part of it.
    """
    _check_size(num_steps, size)
    start = random.Random(seed).randrange(num_steps - size)
    return tuple(range(start, start + size))


def decaying_window(
    num_steps: int,
    size: int,
    iteration: int,
    *,
    iterations_at_start: int = 25,
    decay: float = 0.1,
    threshold: int = 13,
    stride: int = 1,
) -> tuple[int, ...]:
    """A run of steps that moves from the noise to the data, ever faster (the exponential decay of MixGRPO,
    arXiv:2507.21802).

    It stays at start l for ceil(iterations_at_start exp(-decay max(0, l - threshold))) iterations, then moves by
    ``stride``; after the last of 0 .. num_steps - 1 - size it restarts. The defaults are for 25 steps.

    A function of the iteration alone, so resuming needs nothing else.
    Range: within ``full_window``.
    Raises: InputError for a size below 1 or above num_steps - 1, a stride or iterations_at_start below 1, a negative
    decay or iteration.
    Differs from the paper: as ``sliding_window``.
    """
    _check_size(num_steps, size)
    if stride < 1 or iterations_at_start < 1 or decay < 0 or iteration < 0:
        raise InputError(
            f"window stride={stride}, iterations_at_start={iterations_at_start}, decay={decay}, iteration={iteration}: "
            "use 1 or more for the first two and 0 or more for the others"
        )
    starts = range(0, num_steps - size, stride)
    stays = [math.ceil(iterations_at_start * math.exp(-decay * max(0, start - threshold)) - 1e-9) for start in starts]
    left = iteration % sum(stays)
    for start, stay in zip(starts, stays, strict=True):
        if left < stay:
            return tuple(range(start, start + size))
        left -= stay
    raise AssertionError("the iteration is reduced to one round of the window")


def check_window(window: tuple[int, ...], num_steps: int, sampler: str = "flow_sde") -> None:
    """Checks that a window names steps that exist, once each, in order, and that its sampler puts noise into them.

    The last step is allowed for flow_sde and dance_sde, not for cps, whose last step has no noise.

    Raises: InputError otherwise.
    Differs from the paper: no paper given.
    """
    if not window:
        return
    if sampler == "ode":
        raise InputError(f"sampling.window={list(window)} but sampler=ode has no noise: leave the window empty")
    last = num_steps - 2 if sampler == "cps" else num_steps - 1
    if max(window) > last:
        raise InputError(f"sampling.num_steps={num_steps} but window ends at {max(window)}: use 0..{last}")
    if min(window) < 0:
        raise InputError(f"sampling.num_steps={num_steps} but window starts at {min(window)}: use 0..{last}")
    if list(window) != sorted(set(window)):
        raise InputError(f"sampling.window={list(window)} repeats or reorders steps: list each once, rising")


def _check_size(num_steps: int, size: int) -> None:
    if not 1 <= size <= num_steps - 1:
        raise InputError(f"sampling.num_steps={num_steps} but window size is {size}: use 1..{num_steps - 1}")
