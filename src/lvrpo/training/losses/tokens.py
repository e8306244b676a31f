"""Common parts of the losses on tokens (text, image tokens, masked image tokens): config and padded replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from lvrpo.config import Config
from lvrpo.policies.base import RolloutPolicy
from lvrpo.training.losses import base
from lvrpo.training.losses.base import Objective
from lvrpo.types import Group, MaskedSegment, SegmentKind, TokenSegment, Trajectory, segments_through

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

LR_HINT = (
    "was a multiplier of the learning rates: set optimizer.muon_lr and optimizer.adamw_lr, or the multipliers "
    "optimizer.expert_lr (by expert) and {section}.lr_scale"
)
"""Hint for the former key ``lr``."""
FLOW_ONLY_HINT = "trains a flow, and this section is for tokens: set flow.kind"
GUIDED_LOGPROBS_HINT = "is of all policies that draw with tokens: set rollout.guided_logprobs"
LIKELIHOOD_HINT = "says how masked tokens are scored: set rollout.masked_likelihood"


class TokenLossConfig(Config):
    """Options of all losses on tokens: text, image tokens, masked image tokens."""

    hints: ClassVar[Mapping[str, str]] = {
        "lr": LR_HINT,
        "kind=clip": "is called grpo",
        **dict.fromkeys(
            [f"kind={kind}" for kind in ("nft", "awm", "flow_grpo", "mix_grpo", "dance_grpo")], FLOW_ONLY_HINT
        ),
        "guided_logprobs": GUIDED_LOGPROBS_HINT,
        **dict.fromkeys(("likelihood", "draws", "schedule"), LIKELIHOOD_HINT),
    }
    weight: float = Field(default=1.0, ge=0)
    """Of this loss in the sum; 0 switches it off."""
    lr_scale: float = Field(default=1.0, gt=0, le=10)
    """Multiplier of the learning rates for these segments. Sections with different values get separate optimizer steps
    with separate moments."""


@dataclass(frozen=True)
class TokenGrid:
    """All tokens of one kind of segment, padded to (B, L): one row per trajectory, or per draw of masked segments."""

    logprobs: Float[torch.Tensor, "B L"]
    behavior: Float[torch.Tensor, "B L"]
    """Log-probs recorded by the sampling program."""
    anchor: Float[torch.Tensor, "B L"]
    """Old log-probs, the denominator of the ratio: ``trainer_logprobs`` if recomputed, else ``behavior``."""
    mask: Bool[torch.Tensor, "B L"]
    entropy: Float[torch.Tensor, "B L"]


class TokenObjective(Objective):
    """Base of the objectives on tokens."""

    def __init__(self, config: TokenLossConfig, max_new_tokens: int, kind: SegmentKind = "text") -> None:
        self.weight = config.weight
        self.max_new_tokens = max_new_tokens
        self.kind = kind


def recompute_behavior_logprobs(
    policy: RolloutPolicy, groups: Sequence[Group], kinds: Sequence[SegmentKind] = ("text",)
) -> list[Group]:
    """The groups with ``trainer_logprobs`` of these kinds, computed by ``policy`` before its update."""
    trajectories = [t for group in groups for t in group.trajectories if any(s.kind in kinds for s in t.segments)]
    scored: dict[int, Trajectory] = {}
    with torch.no_grad():
        size = base.MICROBATCH_DRAWINGS * base.TEXTS_PER_DRAWING
        for start in range(0, len(trajectories), size):
            part = trajectories[start : start + size]
            for trajectory, rows in zip(part, policy.logprobs(part, kinds), strict=True):
                segments = list(trajectory.segments)
                for s, (segment, row) in enumerate(zip(segments_through(trajectory, kinds), rows, strict=True)):
                    if isinstance(segment, TokenSegment) and segment.kind in kinds:
                        segments[s] = replace(segment, trainer_logprobs=row.logprobs.cpu())
                scored[id(trajectory)] = replace(trajectory, segments=tuple(segments))
    return [replace(group, trajectories=tuple(scored.get(id(t), t) for t in group.trajectories)) for group in groups]


def token_segments(trajectory: Trajectory, kind: SegmentKind) -> list[TokenSegment]:
    """The segments of a kind whose actions are tokens, in order."""
    return [segment for segment in trajectory.segments if isinstance(segment, TokenSegment) and segment.kind == kind]


def token_count(trajectory: Trajectory, kind: SegmentKind) -> int:
    """Number of scored tokens of a kind; over all draws of masked segments."""
    return sum(int(_scored(segment).sum()) for segment in token_segments(trajectory, kind))


def token_grid(policy: RolloutPolicy, trajectories: Sequence[Trajectory], kind: SegmentKind = "text") -> TokenGrid:
    """Replays the segments of a kind; each trajectory must have at least one."""
    now, behavior, anchor, masks, entropies = [], [], [], [], []
    for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories, [kind]), strict=True):
        found = [
            (segment, scored)
            for segment, scored in zip(segments_through(trajectory, [kind]), replayed, strict=True)
            if isinstance(segment, TokenSegment) and segment.kind == kind
        ]
        now += _rows([scored.logprobs for _, scored in found])
        device = now[-1].device
        behavior += _rows([segment.behavior_logprobs for segment, _ in found], device)
        anchors = [s.behavior_logprobs if s.trainer_logprobs is None else s.trainer_logprobs for s, _ in found]
        anchor += _rows(anchors, device)
        masks += _rows([_scored(segment) for segment, _ in found], device)
        entropies += _rows([scored.entropy for _, scored in found if scored.entropy is not None])
    padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (now, behavior, anchor, entropies)]
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return TokenGrid(padded[0], padded[1], padded[2], mask, padded[3])


def _scored(segment: TokenSegment) -> Bool[torch.Tensor, "R L"]:
    """Which log-probs of a segment count, (R, L), a row per draw."""
    if isinstance(segment, MaskedSegment):
        return segment.scored
    return torch.ones_like(segment.behavior_logprobs, dtype=torch.bool)[None]


def _rows(parts: Sequence[torch.Tensor], device: torch.device | None = None) -> list[torch.Tensor]:
    """Concatenates the segments of a trajectory, each (L,) or (R, L), to R rows."""
    return list(torch.cat([torch.atleast_2d(part) for part in parts], dim=1).to(device))
