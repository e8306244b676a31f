"""The interface of a loss: which group members it trains on, and its value on a microbatch of them.

One objective per segment kind. A new method is a class with ``select_members`` and ``loss``, and a line in the table of
its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch

from lvrpo.errors import ContractError
from lvrpo.policies.base import FlowPolicy
from lvrpo.types import (
    SEGMENT_KINDS,
    FlowSegment,
    Group,
    ImageTokenSegment,
    OutputKind,
    Segment,
    SegmentKind,
    TaskKind,
    TextSegment,
    Trajectory,
    segments_through,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

KINDS: tuple[OutputKind, ...] = ("text", "image")
"""The kinds of outputs, each with its own advantages."""

MICROBATCH_DRAWINGS = 192
"""Default number of images per microbatch."""
TEXTS_PER_DRAWING = 8
"""Texts per microbatch, relative to images."""


@dataclass(frozen=True)
class GroupAdvantages:
    """The advantages of all groups for one kind of segment."""

    values: Float[torch.Tensor, "P G"]
    valid: Bool[torch.Tensor, "P G"]
    """Members with a valid score; the others have advantage 0 and are not trained on."""

    @classmethod
    def all_valid(cls, values: Float[torch.Tensor, "P G"]) -> GroupAdvantages:
        """Advantages with all members valid."""
        return cls(values, torch.ones_like(values, dtype=torch.bool))

    def rows(self, rows: Sequence[int]) -> GroupAdvantages:
        """The advantages of some groups."""
        return GroupAdvantages(self.values[rows], self.valid[rows])


Advantages = Mapping[OutputKind, GroupAdvantages]
"""Advantages by kind of output."""


@dataclass
class Metrics:
    """Weighted sums and counts by name, such as "loss/text"."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    pending: list[tuple[str, torch.Tensor | float, float]] = field(default_factory=list)
    """Name, mean and count of metrics that are not summed yet, because they may still be on a GPU."""

    def add(self, name: str, value: torch.Tensor | float, count: float = 1.0) -> None:
        """Adds a mean over ``count`` items, without waiting for a GPU."""
        if isinstance(value, torch.Tensor):
            value = value.item() if value.device.type == "cpu" else value.detach()
        self.pending.append((name, value, count))

    def add_all(self, means: Mapping[str, torch.Tensor | float], count: float = 1.0) -> None:
        """Adds several means over ``count`` items."""
        for name, value in means.items():
            self.add(name, value, count)

    def include(self, other: Metrics) -> None:
        """Adds the sums and counts of another update."""
        self.fetch()
        for name, total in other.fetch().sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]

    def fetch(self) -> Self:
        """Sums pending metrics, with one transfer from the GPU."""
        tensors = [value for _, value, _ in self.pending if isinstance(value, torch.Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        for name, value, count in self.pending:
            number = next(numbers) if isinstance(value, torch.Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + number * count
            self.counts[name] = self.counts.get(name, 0.0) + count
        self.pending.clear()
        return self

    def means(self) -> dict[str, float]:
        """The weighted means."""
        self.fetch()
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


@dataclass(frozen=True)
class Member:
    """A selected trajectory with its advantage."""

    trajectory: Trajectory
    advantage: float


FrozenPolicy = Literal["old", "reference"]
"""Weight sets of ``Policies`` whose outputs a loss may use."""
FROZEN: tuple[FrozenPolicy, ...] = ("reference", "old")


@dataclass(frozen=True)
class Microbatch:
    """Selected members of one task for one kind of segment that are in one forward and backward pass."""

    task: TaskKind
    kind: SegmentKind
    step: int
    members: Sequence[Member]
    share: float
    """Its share of the ``Objective.size`` of all selected members of the task."""
    weight: float = 1.0
    """Weight of its loss: task weight * objective weight * share."""
    frozen: Mapping[FrozenPolicy, torch.Tensor] = field(default_factory=dict)
    """``Objective.reference_outputs`` of each of ``Objective.frozen_policies``."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return [member.trajectory for member in self.members]

    def advantages(self) -> Float[torch.Tensor, " B"]:
        """On the CPU."""
        return torch.tensor([member.advantage for member in self.members])


@dataclass(frozen=True)
class LossOutput:
    """The loss of a microbatch."""

    loss: torch.Tensor
    """Mean over its members, differentiable."""
    metrics: Mapping[str, torch.Tensor | float]
    """Means over its members, by name."""


class Objective(ABC):
    """The training objective of one kind of segment."""

    kind: SegmentKind
    samples_with: ClassVar[Literal["policy", "old"]] = "policy"
    """The weight set that samples its segments."""
    off_policy: ClassVar[bool] = False
    """Whether it also learns from outputs of other policies."""
    unit: ClassVar[int] = 1
    """Number of consecutive members that are not split: 2 for pairs."""
    weight: float
    """Weight of its loss."""

    @property
    def output(self) -> OutputKind:
        """The kind of output whose advantages it uses."""
        return "text" if self.kind == "text" else "image"

    def max_members(self, limit: int | None) -> int:
        """Members per microbatch; ``limit``: in images, None: ``MICROBATCH_DRAWINGS``."""
        members = MICROBATCH_DRAWINGS if limit is None else limit
        return members * (TEXTS_PER_DRAWING if self.output == "text" else 1)

    @abstractmethod
    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        """The (valid) members to train on."""

    def size(self, members: Sequence[Member]) -> int:
        """The denominator of the mean that ``loss`` takes over these members."""
        return len(members)

    def passes(self, trajectory: Trajectory) -> int:
        """Number of forward passes of the image tokens with a gradient."""
        return recorded_passes(trajectory, [self.kind])

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        """The frozen policies whose outputs the loss needs."""
        return ()

    def reference_outputs(self, name: FrozenPolicy, policy: FlowPolicy, batch: Microbatch) -> torch.Tensor:
        """Outputs of the frozen policy ``name`` that the loss needs; called without grad."""
        raise ContractError(
            f"{type(self).__name__} has frozen_policies={self.frozen_policies} and no reference_outputs"
        )

    @abstractmethod
    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        """The mean loss of a microbatch and its metrics."""


def has_kind(group: Group, kind: SegmentKind) -> bool:
    """Whether the members of a group have segments of a kind."""
    return any(segment.kind == kind for segment in group.trajectories[0].segments)


def kept_members(
    groups: Sequence[Group], advantages: Float[torch.Tensor, "P G"], keep: Bool[torch.Tensor, "P G"], kind: SegmentKind
) -> list[Member]:
    """The members to keep of the groups with segments of this kind, with their advantages."""
    return [
        Member(trajectory, advantage)
        for group, A, kept in zip(groups, advantages.tolist(), keep.tolist(), strict=True)
        if has_kind(group, kind)
        for trajectory, advantage, is_kept in zip(group.trajectories, A, kept, strict=True)
        if is_kept
    ]


def recorded_passes(trajectory: Trajectory, kinds: Collection[SegmentKind] = SEGMENT_KINDS) -> int:
    """``segment_passes`` of the segments that ``RolloutPolicy.logprobs`` replays for these kinds."""
    return sum(segment_passes(segment) for segment in segments_through(trajectory, kinds))


def segment_passes(segment: Segment) -> int:
    """Number of forward passes with gradient in the replay of an image: one per trained step of a flow, one for image
    tokens, one per step or draw of masked tokens; and one more per active guidance branch that has one. 0 for text."""
    if isinstance(segment, TextSegment):
        return 0
    if isinstance(segment, FlowSegment):
        low, high = segment.guidance_interval
        guided = segment.guidance_scale != 1 and segment.guided_logprobs == "joint"
        branches = guided * (1 + (segment.image_guidance_scale != 1))
        times = [float(segment.timesteps[i]) for i in segment.trained_steps]
        return sum(1 + branches * (low < t <= high) for t in times)
    branches = 1 + (segment.guidance_scale != 1 and segment.guided_logprobs == "joint")
    if isinstance(segment, ImageTokenSegment):
        return branches
    steps = len(segment.scored) if segment.likelihood == "monte_carlo" else int(segment.reveal_steps.max()) + 1
    return steps * branches
