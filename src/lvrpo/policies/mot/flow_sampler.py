"""Flow sampling with a Mixture-of-Transformers: the guided velocity and the sampling loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lvrpo.policies import flow
from lvrpo.policies.base import Sampling
from lvrpo.policies.flow import FlowSample, Guidance, Velocity, guidance_of
from lvrpo.policies.mot.model_runner import Grid, ModelRunner, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.sampling import guide


@dataclass(frozen=True)
class GuidanceCaches:
    """The caches of the guidance branches, B rows each; None for a branch that is not used."""

    full: Cache
    no_text: Cache | None
    no_image: Cache | None


def prefill_guidance(
    runner: ModelRunner, full: Cache, prompt_rows: Sequence[Row], guidance: Guidance
) -> GuidanceCaches:
    """Prefills the unguided branches; ``prompt_rows`` are the prompts, without sampled text."""
    no_text = no_image = None
    with guidance.unguided():
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
    hidden = runner.run([(noise,)] * len(x_t), cache, (x_t, t), extend=False, outputs="generation")
    return runner.encoders.velocity(hidden.generation.unflatten(0, x_t.shape[:2]), x_t, t)


def velocity_and_features(
    runner: ModelRunner, cache: Cache, x_t: torch.Tensor, t: torch.Tensor, grid: Grid, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``velocity``, and the generation expert's states (B, N, D) after ``layer`` layers."""
    rows = [(runner.noise(grid),)] * len(x_t)
    hidden = runner.run(rows, cache, (x_t, t), keep_layers=True, extend=False, outputs="generation")
    v = runner.encoders.velocity(hidden.generation.unflatten(0, x_t.shape[:2]), x_t, t)
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
    with guidance.unguided():
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


def velocity_of(runner: ModelRunner, caches: GuidanceCaches, guidance: Guidance, grid: Grid) -> Velocity:
    """``guided_velocity`` as a function of state and time."""

    def at_state(x_t: torch.Tensor, t: torch.Tensor, at: float) -> torch.Tensor:
        return guided_velocity(runner, caches, x_t, t, guidance, grid, at)

    return at_state


def sample_flow(
    runner: ModelRunner,
    caches: GuidanceCaches,
    sampling: Sampling,
    noise_seeds: Sequence[int],
    step_seeds: Sequence[int],
    grid: Grid,
) -> FlowSample:
    """Images of one grid, each from its own noise."""
    device = caches.full.rope.device
    x_t, step_noise = flow.draw_noise(sampling, noise_seeds, step_seeds, (grid[0] * grid[1], runner.encoders.channels))
    step_noise = None if step_noise is None else step_noise.to(device)
    return integrate(runner, caches, sampling, x_t.to(device), step_noise, grid)


def integrate(
    runner: ModelRunner,
    caches: GuidanceCaches,
    sampling: Sampling,
    x_t: torch.Tensor,
    step_noise: torch.Tensor | None,
    grid: Grid,
) -> FlowSample:
    """``flow.integrate`` from noise (B, N, C) on the grid of times of ``sampling``."""
    velocity = velocity_of(runner, caches, guidance_of(sampling), grid)
    return flow.integrate(velocity, sampling, flow.sampling_grid(sampling), x_t, step_noise)
