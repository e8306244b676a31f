"""Segments of a trajectory: records of sampled texts and images, and their replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvrpo.policies import flow
from lvrpo.policies.flow import ReplayedFlow, guidance_of
from lvrpo.policies.mot import flow_sampler
from lvrpo.policies.mot.generate import TokenizedText
from lvrpo.policies.mot.model_runner import ModelRunner, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.types import FlowSegment, Segment, TextSegment, Trajectory


def text_segments(
    runner: ModelRunner, texts: Sequence[TokenizedText], logprobs: Sequence[torch.Tensor], temperature: float
) -> list[TextSegment]:
    """The segments of sampled texts with log-probs (L,) each; one transfer from the device."""
    counts = [len(text.tokens) for text in texts]
    tokens = torch.tensor([token for text in texts for token in text.tokens], dtype=torch.int64).split(counts)
    behavior = torch.cat(list(logprobs)).detach().cpu().split(counts)
    return [
        TextSegment(
            tokens=tokens[b],
            behavior_logprobs=behavior[b],
            temperature=temperature,
            text=runner.tokenizer.decode(text.tokens),
            ended=text.ended,
        )
        for b, text in enumerate(texts)
    ]


def tokenized_text(segment: Segment) -> TokenizedText:
    """The tokens of a text segment."""
    assert isinstance(segment, TextSegment)
    return TokenizedText(tuple(segment.tokens.tolist()), segment.ended)


def temperature_of(segment: Segment) -> float:
    """The sampling temperature of a text segment."""
    assert isinstance(segment, TextSegment)
    return segment.temperature


def replay_flows(runner: ModelRunner, cache: Cache, rows: Sequence[Row], segments: Sequence[Segment]) -> ReplayedFlow:
    """Scores flow segments of equal ``replay_settings`` under the current weights, after the contexts in ``cache``.

    ``rows``: the prompts, without sampled text, as ``flow_sampler.prefill_guidance`` takes them. With gradient
    checkpointing, whole steps are recomputed too.
    """
    flows = [segment for segment in segments if isinstance(segment, FlowSegment)]
    guidance = guidance_of(flows[0])
    caches = flow_sampler.prefill_guidance(runner, cache, rows, guidance)
    velocity = flow_sampler.velocity_of(
        runner, caches, guidance, runner.encoders.output_grid(*flows[0].image.shape[1:])
    )
    return flow.replay_steps(velocity, flows, cache.rope.device, runner.transformer.checkpointing)


def replay_settings(trajectory: Trajectory) -> tuple[object, ...]:
    """Trajectories with equal settings are replayed in one batch."""
    out: list[object] = []
    for s in trajectory.segments:
        if isinstance(s, TextSegment):
            out.append(s.temperature)
        elif isinstance(s, FlowSegment):
            out.append(flow.replay_settings(s))
    return tuple(out)
