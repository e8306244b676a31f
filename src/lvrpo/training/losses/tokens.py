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
from lvrpo.types import Group, ScoredSegment, SegmentKind, SegmentLogprobs, TokenSegment, Trajectory, segments_through

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
    """Weight of this loss in the sum; 0 switches it off."""
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
        self.config, self.weight = config, config.weight
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
    return sum(
        int(segment.scored.sum()) if isinstance(segment, ScoredSegment) else segment.behavior_logprobs.numel()
        for segment in token_segments(trajectory, kind)
    )


def token_grid(policy: RolloutPolicy, trajectories: Sequence[Trajectory], kind: SegmentKind = "text") -> TokenGrid:
    """Replays the segments of a kind; each trajectory must have at least one."""
    segments = [token_segments(trajectory, kind) for trajectory in trajectories]
    scored: list[list[SegmentLogprobs]] = []
    for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories, [kind]), strict=True):
        through = segments_through(trajectory, [kind])
        scored.append([row for segment, row in zip(through, replayed, strict=True) if segment.kind == kind])
    now = [[row.logprobs for row in rows] for rows in scored]
    entropy = [[row.entropy for row in rows if row.entropy is not None] for rows in scored]
    behavior = [[segment.behavior_logprobs for segment in own] for own in segments]
    anchor = [
        [s.behavior_logprobs if s.trainer_logprobs is None else s.trainer_logprobs for s in own] for own in segments
    ]
    counted = [[segment.scored for segment in own if isinstance(segment, ScoredSegment)] for own in segments]

    rows = [1 if parts[0].ndim == 1 else len(parts[0]) for parts in behavior]
    tokens = [sum(part.shape[-1] for part in parts) for parts in behavior]
    lengths = torch.tensor(tokens).repeat_interleave(torch.tensor(rows))
    valid = torch.arange(max(tokens)) < lengths[:, None]
    device = now[0][0].device
    cells = valid.flatten().nonzero()[:, 0].to(device)
    valid = valid.to(device)

    def grid(parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """The segments of each trajectory, each (L,) or (R, L), in R rows, zero at padding."""
        if parts[0][0].ndim == 1:
            flat = torch.cat([part for own in parts for part in own])
        else:
            flat = torch.cat([torch.cat(list(own), dim=1).flatten() for own in parts])
        flat = flat.to(device)
        return flat.new_zeros(valid.numel()).index_copy(0, cells, flat).view(valid.shape)

    return TokenGrid(
        logprobs=grid(now),
        behavior=grid(behavior),
        anchor=grid(anchor),
        mask=grid(counted) if counted[0] else valid,
        entropy=grid(entropy),
    )
