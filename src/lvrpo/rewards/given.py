"""Outputs that no policy sampled, as a group, so that rewards can score them: references, corruptions, a user's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvrpo.sampling import derive_seed
from lvrpo.types import FlowSegment, Group, Image, Part, Prompt, Segment, TextSegment, Trajectory


def given_group(prompt: Prompt, outputs: Sequence[Sequence[Part]]) -> Group:
    """One member per entry of ``outputs``, each a text or a picture for every entry of ``prompt.output``.

    They can be scored, not replayed: their log-probs are empty. Seeds are a function of the prompt and the member.
    """
    members = []
    for member, parts in enumerate(outputs):
        segments = tuple(_text(part) if isinstance(part, str) else _drawn(part) for part in parts)
        members.append(Trajectory(prompt, member, segments, derive_seed(prompt.id, "given", member)))
    return Group(prompt, tuple(members))


def _text(text: str) -> Segment:
    return TextSegment(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 1.0, text, True)


def _drawn(image: Image) -> Segment:
    none = torch.zeros(0, 0, 0)
    return FlowSegment(
        latent=torch.zeros(0, 0),
        timesteps=torch.zeros(0),
        trained_steps=(),
        states=none,
        next_states=none,
        behavior_logprobs=torch.zeros(0),
        sampler="ode",
        noise_level=0.0,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        guidance_renorm="none",
        logprob_reduction="mean",
        image=image,
    )
