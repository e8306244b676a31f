"""Supervised losses of a policy of discrete tokens: the replay of its targets.

Letters: N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import RolloutPolicy
from lvrpo.sampling import mask_draws
from lvrpo.types import (
    Example,
    Image,
    ImageTokenSegment,
    MaskedSegment,
    MaskedTextSegment,
    Parts,
    ScoredSegment,
    Segment,
    TextSegment,
    Trajectory,
)


class TokenTargets(RolloutPolicy, Protocol):
    """A policy that says which tokens a target has."""

    masked_text: bool
    """Whether its texts are of masked tokens."""

    def answer_ids(self, parts: Parts, text: str) -> list[int]:
        """Ids of a text as the answer to a prompt, end token included."""
        ...

    def encode_image(self, image: Image) -> torch.Tensor:
        """Codes of an image, int64, of any shape in raster order."""
        ...


def token_losses(
    policy: TokenTargets, examples: Sequence[Example], generator: torch.Generator
) -> Mapping[str, torch.Tensor]:
    """ "text" and "image": mean cross-entropy per token of the targets after their prompts, in nats.

    Of masked image tokens a random share is masked, cos(pi u / 2) with u uniform in [0, 1] (MaskGIT, arXiv:2202.04200),
    and scored; of masked texts a uniform share (LLaDA, arXiv:2502.09992). Where the text of a prompt is dropped, the
    image is scored by the branch without a prompt, at guidance scale 0. Raises InputError for an example of another
    kind.
    """
    trajectories = []
    for example in examples:
        if example.dropped == "image":
            raise InputError(f"example {example.prompt.id!r}: this policy draws from text alone: it drops no image")
        scale = 0.0 if example.dropped else 1.0
        segments = [
            _text(policy, example.prompt.parts, part, generator)
            if isinstance(part, str)
            else _image(policy, part, scale, int(torch.randint(2**62, (), generator=generator)))
            for part in example.outputs
        ]
        trajectories.append(Trajectory(example.prompt, 0, tuple(segments), 0))
    found: dict[str, list[torch.Tensor]] = {"text": [], "image": []}
    for trajectory, rows in zip(trajectories, policy.logprobs(trajectories), strict=True):
        for segment, row in zip(trajectory.segments, rows, strict=True):
            scored = row.logprobs
            if isinstance(segment, ScoredSegment):
                scored = scored[segment.scored.to(scored.device)]
            found["text" if isinstance(segment, TextSegment) else "image"].append(-scored)
    return {name: torch.cat(terms).mean() for name, terms in found.items() if terms}


def _text(policy: TokenTargets, parts: Parts, text: str, generator: torch.Generator) -> Segment:
    """From left to right unless the policy writes masked texts."""
    tokens = torch.tensor(policy.answer_ids(parts, text), dtype=torch.int64)
    if not policy.masked_text:
        return TextSegment(tokens, torch.zeros(len(tokens)), 1.0, text, True)
    seed = int(torch.randint(2**62, (), generator=generator))
    scored, steps = mask_draws([seed], len(tokens), 1, "uniform")[0], torch.zeros_like(tokens)
    fields = {"decoded": tokens, "reveal_steps": steps, "scored": scored}
    none = torch.zeros(scored.shape)
    return MaskedTextSegment(tokens, none, 1.0, text, True, **fields, likelihood="monte_carlo")


def _image(policy: TokenTargets, image: Image, scale: float, seed: int) -> Segment:
    """In order where the policy draws so, else masked."""
    codes = policy.encode_image(image).flatten().cpu()
    if "tokens" in policy.segment_kinds:
        return ImageTokenSegment(codes, torch.zeros(len(codes)), 1.0, scale, image)
    scored = mask_draws([seed], len(codes), 1)[0]
    steps = torch.zeros(len(codes), dtype=torch.int64)
    return MaskedSegment(codes, steps, scored, torch.zeros(scored.shape), "monte_carlo", 1.0, scale, image)
