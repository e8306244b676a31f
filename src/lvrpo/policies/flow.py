"""Images drawn by a flow, whatever network gives the velocity: guidance settings, integration, records, replay."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.checkpoint import checkpoint

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.decoding import computes_last_step_alone
from lvrpo.sampling import (
    SOLVERS,
    STEPS,
    check_window,
    compressed_grid,
    normal_noise,
    step_logprob,
    timestep_grid,
)
from lvrpo.sampling.guidance import Renorm
from lvrpo.types import FlowSegment, Image, Trajectory

Velocity = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""States (B, N, C) and a time, as a tensor () and as a number, to guided velocities (B, N, C).

The number avoids a GPU synchronization."""


@dataclass(frozen=True)
class Guidance:
    """Guidance settings, as in ``Sampling``."""

    scale: float
    image_scale: float
    renorm: Renorm
    renorm_min: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    detach_uncond: bool = False
    """Whether the gradient goes through the conditional branch alone."""

    def active(self, t: float) -> bool:
        """Whether a step at time t is guided."""
        return self.interval[0] < t <= self.interval[1]

    def unguided(self) -> AbstractContextManager[object]:
        """The context of all that the branches besides the conditional one compute."""
        return torch.no_grad() if self.detach_uncond else nullcontext()


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


def flow_segment(trajectory: Trajectory) -> FlowSegment:
    """The image of a trajectory: its last segment."""
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    return segment


# --- settings ---


def guidance_of(settings: Sampling | FlowSegment) -> Guidance:
    """The guidance settings of a sampling, or those that an image was sampled with."""
    return Guidance(
        settings.guidance_scale,
        settings.image_guidance_scale,
        cast(Renorm, settings.guidance_renorm),  # a segment's is recorded from a Sampling
        settings.guidance_renorm_min,
        settings.guidance_interval,
        settings.guided_logprobs == "detach_uncond",
    )


def stochastic_steps(sampling: Sampling) -> tuple[int, ...]:
    """The steps that are sampled with noise and recorded."""
    return sampling.window if sampling.sampler != "ode" else ()


def sampling_grid(sampling: Sampling) -> torch.Tensor:
    """The times (T + 1,) of ``sampling.timestep_shift``, with ``steps_after_window`` of them after the window."""
    window, shift = stochastic_steps(sampling), sampling.timestep_shift or 1.0
    if window and sampling.steps_after_window is not None:
        return compressed_grid(sampling.num_steps, window[-1] + 1, sampling.steps_after_window, shift)
    return timestep_grid(sampling.num_steps, shift)


def replay_settings(segment: FlowSegment) -> Hashable:
    """Images with equal settings are replayed in one batch."""
    return (
        *(segment.trained_steps, tuple(segment.timesteps.tolist()), segment.sampler, segment.noise_level),
        *(segment.logprob_reduction, guidance_of(segment), tuple(segment.image.shape)),
    )


# --- sampling ---


def draw_noise(
    sampling: Sampling, noise_seeds: Sequence[int], step_seeds: Sequence[int], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The initial noise (B, N, C), and that of the W stochastic steps (B, W, N, C) where there are any, on the CPU."""
    window = stochastic_steps(sampling)
    return normal_noise(noise_seeds, shape), normal_noise(step_seeds, (len(window), *shape)) if window else None


def integrate(
    velocity: Velocity,
    sampling: Sampling,
    timesteps: torch.Tensor,
    x_t: torch.Tensor,
    step_noise: torch.Tensor | None,
) -> FlowSample:
    """Integrates from noise (B, N, C) to data over ``timesteps`` (T + 1,), from 1 to 0.

    Steps of ``sampling.window`` are stochastic, with noise ``step_noise`` (B, W, N, C), and recorded, others solve the
    ODE. Raises InputError for a window that does not fit, and for guidance with ``guided_logprobs="none"``.
    """
    if sampling.guided_logprobs == "none" and (sampling.guidance_scale, sampling.image_guidance_scale) != (1, 1):
        raise InputError("sampling.guided_logprobs=none: a flow is guided in its log-probs: use joint or detach_uncond")
    shape, window = x_t.shape[1:], stochastic_steps(sampling)
    check_window(window, sampling.num_steps, sampling.sampler)
    timesteps = timesteps.to(x_t.device)
    states, next_states, logprobs, means = [], [], [], []
    solve, past, times = SOLVERS[sampling.solver], None, timesteps.tolist()
    steps: Iterable[int] = range(len(timesteps) - 1)
    if computes_last_step_alone():  # a guided one, with the one after it where a rule of second order keeps both
        first = next((i for i in steps if guidance_of(sampling).active(times[i])), 0)
        steps = sorted({first, *([first + 1] if sampling.solver != "euler" else []), *window} & set(steps))
    for i in steps:
        t, t_next = timesteps[i], timesteps[i + 1]
        v = velocity(x_t, t, times[i])
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


def flow_segments(sample: FlowSample, images: torch.Tensor | Sequence[Image], sampling: Sampling) -> list[FlowSegment]:
    """The segments of B images (3, H, W); states and means, which are large, are kept in host memory."""
    stochastic = sampling.sampler != "ode"
    on_host = (sample.states.cpu(), sample.next_states.cpu(), sample.means.cpu())
    return [
        FlowSegment(
            latent=latent,
            timesteps=sample.timesteps,
            trained_steps=stochastic_steps(sampling),
            states=states,
            next_states=next_states,
            behavior_logprobs=logprobs,
            sampler=sampling.sampler,
            noise_level=sampling.noise_level,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            guidance_renorm=sampling.guidance_renorm,
            logprob_reduction=sampling.logprob_reduction,
            image=image,
            guidance_renorm_min=sampling.guidance_renorm_min,
            guidance_interval=sampling.guidance_interval,
            guided_logprobs=sampling.guided_logprobs,
            means=means if stochastic else None,
        )
        for latent, logprobs, image, states, next_states, means in zip(
            sample.latents, sample.logprobs, images, *on_host, strict=True
        )
    ]


# --- replay ---


def replay_steps(
    velocity: Velocity, flows: Sequence[FlowSegment], device: torch.device, recompute: bool = False
) -> ReplayedFlow:
    """Scores the recorded steps of images of equal ``replay_settings`` by the velocities of the current weights.

    ``recompute``: each step is computed again in the backward pass, so that activations of one step are kept.
    """
    first = flows[0]
    states = torch.stack([flow.states for flow in flows]).to(device)
    next_states = torch.stack([flow.next_states for flow in flows]).to(device)
    timesteps = first.timesteps.to(device)
    if not first.trained_steps:
        return ReplayedFlow(states.new_zeros(len(states), 0), states, states.new_zeros(0))
    again = recompute and torch.is_grad_enabled() and len(first.trained_steps) > 1
    logprobs, means, stds, times = [], [], [], timesteps.tolist()
    for w, i in enumerate(first.trained_steps):
        t, t_next, x_t = timesteps[i], timesteps[i + 1], states[:, w]
        if again:
            v = checkpoint(velocity, x_t, t, times[i], use_reentrant=False, preserve_rng_state=False)
            assert isinstance(v, torch.Tensor)
        else:
            v = velocity(x_t, t, times[i])
        step = STEPS[first.sampler](x_t, v, t, t_next, first.noise_level)
        logprobs.append(step_logprob(next_states[:, w], step.mean, step.std, first.logprob_reduction))
        means.append(step.mean)
        stds.append(step.std.reshape(()))
    return ReplayedFlow(torch.stack(logprobs, dim=1), torch.stack(means, dim=1), torch.stack(stds))
