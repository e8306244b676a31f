"""Flow sampling with a Mixture-of-Transformers: the guided velocity and the sampling loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from lvrpo.policies.base import Sampling
from lvrpo.policies.mot.model_runner import Grid, ModelRunner, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.sampling import (
    SOLVERS,
    STEPS,
    check_window,
    compressed_grid,
    guide,
    normal_noise,
    step_logprob,
    timestep_grid,
)
from lvrpo.sampling.guidance import Renorm


@dataclass(frozen=True)
class GuidanceCaches:
    """The caches of the guidance branches, B rows each; None for a branch that is not used."""

    full: Cache
    no_text: Cache | None
    no_image: Cache | None


@dataclass(frozen=True)
class Guidance:
    """Guidance settings, as in ``Sampling``."""

    scale: float
    image_scale: float
    renorm: Renorm
    renorm_min: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def active(self, t: float) -> bool:
        """Whether a step at time t is guided."""
        return self.interval[0] < t <= self.interval[1]


@dataclass(frozen=True)
class FlowSample:
    """A batch of sampled latents and its W trained steps."""

    latents: torch.Tensor
    """(B, N, C)."""
    timesteps: torch.Tensor
    """(T + 1,)."""
    states: torch.Tensor
    """(B, W, N, C)."""
    next_states: torch.Tensor
    """(B, W, N, C)."""
    logprobs: torch.Tensor
    """(B, W)."""
    means: torch.Tensor
    """(B, W, N, C)."""


@dataclass(frozen=True)
class ReplayedFlow:
    """The W trained steps of a batch under the current weights."""

    logprobs: torch.Tensor
    """(B, W)."""
    means: torch.Tensor
    """(B, W, N, C)."""
    stds: torch.Tensor
    """(W,)."""


def guidance_of(sampling: Sampling) -> Guidance:
    """The guidance settings of a sampling."""
    return Guidance(
        sampling.guidance_scale,
        sampling.image_guidance_scale,
        sampling.guidance_renorm,
        sampling.guidance_renorm_min,
        sampling.guidance_interval,
    )


def prefill_guidance(
    runner: ModelRunner, full: Cache, prompt_rows: Sequence[Row], guidance: Guidance
) -> GuidanceCaches:
    """Prefills the unguided branches; ``prompt_rows`` are the prompts, without sampled text."""
    no_text = no_image = None
    if guidance.scale != 1.0:
        cache, index = runner.prefill_shared([runner.without_text(row) for row in prompt_rows])
        no_text = cache.select(index)
    if guidance.scale != 1.0 and guidance.image_scale != 1.0:
        cache, index = runner.prefill_shared([runner.without_images(row) for row in prompt_rows])
        no_image = cache.select(index)
    return GuidanceCaches(full, no_text, no_image)


def velocity(
    runner: ModelRunner, cache: Cache, x_t: torch.Tensor, t: torch.Tensor, grid: Grid | None = None
) -> torch.Tensor:
    """The model's velocity (B, N, C) at states (B, N, C) and times (B,), unguided; the cache is unchanged.

    ``grid`` None: the default grid.
    """
    noise = runner.noise(grid or runner.encoders.default_grid(None))
    hidden = runner.run([(noise,)] * len(x_t), cache, (x_t, t), extend=False)
    return runner.encoders.velocity(hidden.drawing.unflatten(0, x_t.shape[:2]), x_t, t)


def velocity_and_features(
    runner: ModelRunner, cache: Cache, x_t: torch.Tensor, t: torch.Tensor, grid: Grid, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``velocity``, and the drawing expert's states (B, N, D) after ``layer`` layers."""
    hidden = runner.run([(runner.noise(grid),)] * len(x_t), cache, (x_t, t), keep_layers=True, extend=False)
    v = runner.encoders.velocity(hidden.drawing.unflatten(0, x_t.shape[:2]), x_t, t)
    return v, hidden.layers[layer - 1][1].unflatten(0, x_t.shape[:2])


def guided_velocity(
    runner: ModelRunner,
    caches: GuidanceCaches,
    x_t: torch.Tensor,
    t: torch.Tensor,
    guidance: Guidance,
    grid: Grid,
    at: float | None = None,
) -> torch.Tensor:
    """Three-way classifier-free guidance at one time () for all rows; one pass per branch.

    ``at`` is the same time as a number, which avoids a GPU synchronization.
    """
    times = t.expand(len(x_t))
    v = velocity(runner, caches.full, x_t, times, grid)
    if caches.no_text is None or not guidance.active(float(t) if at is None else at):
        return v
    v_no_text = velocity(runner, caches.no_text, x_t, times, grid)
    v_no_image = velocity(runner, caches.no_image, x_t, times, grid) if caches.no_image is not None else None
    return guide(
        v,
        v_no_text,
        v_no_image,
        guidance_scale=guidance.scale,
        image_guidance_scale=guidance.image_scale,
        renorm=guidance.renorm,
        renorm_min=guidance.renorm_min,
    )


def sample_flow(
    runner: ModelRunner,
    caches: GuidanceCaches,
    sampling: Sampling,
    noise_seeds: Sequence[int],
    step_seeds: Sequence[int],
    grid: Grid,
) -> FlowSample:
    """Images of one grid, each from its own noise."""
    shape = grid[0] * grid[1], runner.encoders.channels
    device = caches.full.rope.device
    window = sampling.window if sampling.sampler != "ode" else ()
    step_noise = normal_noise(step_seeds, (len(window), *shape)).to(device) if window else None
    return integrate(runner, caches, sampling, normal_noise(noise_seeds, shape).to(device), step_noise, grid)


def integrate(
    runner: ModelRunner,
    caches: GuidanceCaches,
    sampling: Sampling,
    x_t: torch.Tensor,
    step_noise: torch.Tensor | None,
    grid: Grid,
) -> FlowSample:
    """From noise (B, N, C) to data; steps of ``sampling.window`` are stochastic, with noise ``step_noise``
    (B, W, N, C), and recorded, others solve the ODE."""
    shape = x_t.shape[1:]
    device = x_t.device
    guidance = guidance_of(sampling)
    window = sampling.window if sampling.sampler != "ode" else ()
    timesteps = timestep_grid(sampling.num_steps, sampling.timestep_shift or 1.0).to(device)
    if window and sampling.steps_after_window is not None:
        ends, shift = window[-1] + 1, sampling.timestep_shift or 1.0
        timesteps = compressed_grid(sampling.num_steps, ends, sampling.steps_after_window, shift).to(device)
    check_window(window, sampling.num_steps, sampling.sampler)
    states, next_states, logprobs, means = [], [], [], []
    solve, past, times = SOLVERS[sampling.solver], None, timesteps.tolist()
    for i in range(len(timesteps) - 1):
        t, t_next = timesteps[i], timesteps[i + 1]
        v = guided_velocity(runner, caches, x_t, t, guidance, grid, times[i])
        if i in window:
            assert step_noise is not None
            step = STEPS[sampling.sampler](x_t, v, t, t_next, sampling.noise_level)
            x_next = step.mean + step.std * step_noise[:, window.index(i)]
            states.append(x_t)
            next_states.append(x_next)
            means.append(step.mean)
            logprobs.append(step_logprob(x_next, step.mean, step.std, sampling.logprob_reduction))
            x_t, past = x_next, None
        else:
            x_t, past = solve(x_t, v, t, t_next, past)
    batch = len(x_t)
    return FlowSample(
        latents=x_t,
        timesteps=timesteps,
        states=torch.stack(states, dim=1) if states else x_t.new_zeros(batch, 0, *shape),
        next_states=torch.stack(next_states, dim=1) if states else x_t.new_zeros(batch, 0, *shape),
        logprobs=torch.stack(logprobs, dim=1) if states else x_t.new_zeros(batch, 0),
        means=torch.stack(means, dim=1) if states else x_t.new_zeros(batch, 0, *shape),
    )


def replay_steps(
    runner: ModelRunner,
    caches: GuidanceCaches,
    states: torch.Tensor,
    next_states: torch.Tensor,
    timesteps: torch.Tensor,
    trained_steps: Sequence[int],
    sampler: str,
    noise_level: float,
    reduction: Literal["mean", "sum"],
    guidance: Guidance,
    grid: Grid,
) -> ReplayedFlow:
    """Scores recorded steps under the current weights, by the calls that sampled them.

    With gradient checkpointing, whole steps are recomputed too, so that activations of one step are kept.
    """
    if not trained_steps:
        return ReplayedFlow(states.new_zeros(len(states), 0), states, states.new_zeros(0))
    again = runner.transformer.checkpointing and torch.is_grad_enabled() and len(trained_steps) > 1
    logprobs, means, stds, times = [], [], [], timesteps.tolist()
    for w, i in enumerate(trained_steps):
        t, t_next = timesteps[i], timesteps[i + 1]
        x_t = states[:, w]
        inputs = runner, caches, x_t, t, guidance, grid, times[i]
        if again:
            v = checkpoint(guided_velocity, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            v = guided_velocity(*inputs)
        step = STEPS[sampler](x_t, v, t, t_next, noise_level)
        logprobs.append(step_logprob(next_states[:, w], step.mean, step.std, reduction))
        means.append(step.mean)
        stds.append(step.std.reshape(()))
    return ReplayedFlow(torch.stack(logprobs, dim=1), torch.stack(means, dim=1), torch.stack(stds))
