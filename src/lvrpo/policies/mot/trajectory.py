"""Segments of a trajectory: records of sampled texts and images, and their replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from lvrpo.policies.base import Sampling
from lvrpo.policies.mot import flow_sampler
from lvrpo.policies.mot.generate import TokenizedText
from lvrpo.policies.mot.model_runner import ModelRunner, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.sampling.guidance import Renorm
from lvrpo.types import FlowSegment, Image, Segment, TextSegment, Trajectory


def text_segment(runner: ModelRunner, text: TokenizedText, logprobs: torch.Tensor, temperature: float) -> TextSegment:
    """The segment of a sampled text with log-probs (L,)."""
    return TextSegment(
        tokens=torch.tensor(text.tokens, dtype=torch.int64),
        behavior_logprobs=logprobs.detach().cpu(),
        temperature=temperature,
        text=runner.tokenizer.decode(text.tokens),
        ended=text.ended,
    )


def tokenized_text(segment: Segment) -> TokenizedText:
    """The tokens of a text segment."""
    assert isinstance(segment, TextSegment)
    return TokenizedText(tuple(segment.tokens.tolist()), segment.ended)


def temperature_of(segment: Segment) -> float:
    """The sampling temperature of a text segment."""
    assert isinstance(segment, TextSegment)
    return segment.temperature


def flow_segment(sample: flow_sampler.FlowSample, b: int, image: Image, sampling: Sampling) -> FlowSegment:
    """The segment of image b of a batch; states and means, which are large, are kept in host memory."""
    stochastic = sampling.sampler != "ode"
    return FlowSegment(
        latent=sample.latents[b],
        timesteps=sample.timesteps,
        trained_steps=sampling.window if stochastic else (),
        states=sample.states[b].cpu(),
        next_states=sample.next_states[b].cpu(),
        behavior_logprobs=sample.logprobs[b],
        sampler=sampling.sampler,
        noise_level=sampling.noise_level,
        guidance_scale=sampling.guidance_scale,
        image_guidance_scale=sampling.image_guidance_scale,
        guidance_renorm=sampling.guidance_renorm,
        logprob_reduction=sampling.logprob_reduction,
        image=image,
        guidance_renorm_min=sampling.guidance_renorm_min,
        guidance_interval=sampling.guidance_interval,
        means=sample.means[b].cpu() if stochastic else None,
    )


def replay_flows(
    runner: ModelRunner, cache: Cache, rows: Sequence[Row], segments: Sequence[Segment]
) -> flow_sampler.ReplayedFlow:
    """Scores flow segments of equal ``replay_settings`` under the current weights, after the contexts in ``cache``.

    ``rows``: the prompts, without sampled text, as ``flow_sampler.prefill_guidance`` takes them.
    """
    flows = [segment for segment in segments if isinstance(segment, FlowSegment)]
    first = flows[0]
    renorm = cast(Renorm, first.guidance_renorm)  # recorded from a Sampling
    guidance = flow_sampler.Guidance(
        first.guidance_scale, first.image_guidance_scale, renorm, first.guidance_renorm_min, first.guidance_interval
    )
    device = cache.rope.device
    return flow_sampler.replay_steps(
        runner,
        flow_sampler.prefill_guidance(runner, cache, rows, guidance),
        torch.stack([f.states for f in flows]).to(device),
        torch.stack([f.next_states for f in flows]).to(device),
        first.timesteps.to(device),
        first.trained_steps,
        first.sampler,
        first.noise_level,
        first.logprob_reduction,
        guidance,
        runner.encoders.output_grid(*first.image.shape[1:]),
    )


def replay_settings(trajectory: Trajectory) -> tuple[object, ...]:
    """Trajectories with equal settings are replayed in one batch."""
    out: list[object] = []
    for s in trajectory.segments:
        if isinstance(s, TextSegment):
            out.append(s.temperature)
        elif isinstance(s, FlowSegment):
            out += [s.trained_steps, tuple(s.timesteps.tolist()), s.sampler, s.noise_level, s.logprob_reduction]
            out += [s.guidance_scale, s.image_guidance_scale, s.guidance_renorm, s.guidance_renorm_min]
            out += [s.guidance_interval, tuple(s.image.shape)]
    return tuple(out)
