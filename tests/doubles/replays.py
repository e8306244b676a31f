"""Replays of sampled trajectories, compared with the log-probs that were recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvrpo.policies.base import RolloutPolicy
from lvrpo.types import FlowSegment, Group, Trajectory


def members(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def differences(
    policy: RolloutPolicy, trajectories: Sequence[Trajectory], kind: type = object, relative: bool = True
) -> list[float]:
    """The largest difference in each segment of a kind that has log-probs.

    ``relative``: to the size of the numbers where that is above 1, as with log-densities that are sums.
    """
    out = []
    with torch.no_grad():
        replayed = policy.logprobs(trajectories)
    for trajectory, rows in zip(trajectories, replayed, strict=True):
        for segment, row in zip(trajectory.segments, rows, strict=True):
            recorded = segment.behavior_logprobs
            assert row.logprobs.shape == recorded.shape
            assert isinstance(segment, FlowSegment) or (row.entropy is not None and row.entropy.shape == recorded.shape)
            if isinstance(segment, kind) and len(recorded):
                scale = recorded.abs().clamp(min=1) if relative else 1
                out.append(float(((row.logprobs - recorded).abs() / scale).max()))
    return out


def difference(policy: RolloutPolicy, trajectories: Sequence[Trajectory]) -> float:
    """The largest of the ``differences``, none of which is relative."""
    return max(differences(policy, trajectories, relative=False))


def worst(policy: RolloutPolicy, trajectories: Sequence[Trajectory]) -> float:
    """The largest of the relative ``differences``; 0 where nothing has log-probs."""
    return max(differences(policy, trajectories), default=0.0)
