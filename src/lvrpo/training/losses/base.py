"""The interface of a loss: the members of the groups that it trains on, and its value on a microbatch of them.

One objective per segment kind. A new method is one class with ``select_members`` and ``loss``, and
one line in the table of its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy
from lvrpo.types import (
    SEGMENT_KINDS,
    FlowSegment,
    Group,
    ImageTokenSegment,
    OutputKind,
    Segment,
    SegmentKind,
    Task,
    TextSegment,
    Trajectory,
    segments_through,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

KINDS: tuple[OutputKind, ...] = ("text", "image")
"""The kinds of outputs, each with advantages of its own."""

MICROBATCH_DRAWINGS = 192
"""Drawings that are replayed together."""
TEXTS_PER_DRAWING = 8
"""So many texts are replayed in the place of a drawing."""


@dataclass(frozen=True)
class GroupAdvantages:
    """What one kind of segment of the members of all groups is trained with."""

    values: Float[torch.Tensor, "P G"]
    valid: Bool[torch.Tensor, "P G"]
    """Which members have a score; the others have advantage 0 and no part in the loss."""

    @classmethod
    def of_all(cls, values: Float[torch.Tensor, "P G"]) -> GroupAdvantages:
        """Where every member is valid."""
        return cls(values, torch.ones_like(values, dtype=torch.bool))

    def rows(self, rows: Sequence[int]) -> GroupAdvantages:
        """Those of some of the groups."""
        return GroupAdvantages(self.values[rows], self.valid[rows])


Advantages = Mapping[OutputKind, GroupAdvantages]
"""By the kind of segment that they train."""


@dataclass
class Metrics:
    """Sums and counts under names such as "loss/text"."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor | float, count: float = 1.0) -> None:
        """Adds a mean over ``count`` items."""
        number = float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
        self.sums[name] = self.sums.get(name, 0.0) + number * count
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_all(self, means: Mapping[str, torch.Tensor | float], count: float = 1.0) -> None:
        """Adds several means over ``count`` items."""
        for name, value in means.items():
            self.add(name, value, count)

    def include(self, other: Metrics) -> None:
        """Adds the sums and counts of another update."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]

    def means(self) -> dict[str, float]:
        """The weighted means."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


@dataclass(frozen=True)
class Member:
    """A trajectory that is trained, with its advantage."""

    trajectory: Trajectory
    advantage: float


FrozenPolicy = Literal["old", "reference"]
"""The sets of ``Policies`` that a loss may compare the policy with."""
FROZEN: tuple[FrozenPolicy, ...] = ("reference", "old")


@dataclass(frozen=True)
class Microbatch:
    """As many chosen members of one task as go through the policy at once, for one kind of segment."""

    task: Task
    kind: SegmentKind
    step: int
    members: Sequence[Member]
    share: float
    """What these members count of all chosen ones of the task."""
    weight: float = 1.0
    """Of its loss in the sum of all: that of the task, of the objective, and the share."""
    frozen: Mapping[FrozenPolicy, torch.Tensor] = field(default_factory=dict)
    """Outputs of ``Objective.frozen_policies`` on it, by ``Objective.reference_outputs``."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return [member.trajectory for member in self.members]

    def advantages(self) -> Float[torch.Tensor, " B"]:
        """On the CPU."""
        return torch.tensor([member.advantage for member in self.members])


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns of a microbatch."""

    loss: torch.Tensor
    """The mean over its members, with a gradient to the policy."""
    metrics: Mapping[str, torch.Tensor | float]
    """Means over its members, by name."""


class Objective(ABC):
    """How the segments of one kind are trained."""

    kind: SegmentKind
    samples_with: ClassVar[Literal["policy", "old"]] = "policy"
    """Which weights sample the segments that it trains."""
    off_policy: ClassVar[bool] = False
    """Whether it learns from outputs of other weights as well."""
    unit: ClassVar[int] = 1
    """So many consecutive members belong together: 2 for pairs."""
    weight: float
    """Of its loss in the sum."""

    @property
    def output(self) -> OutputKind:
        """Whose advantages train it."""
        return "text" if self.kind == "text" else "image"

    def at_once(self, limit: int | None) -> int:
        """Members that are replayed together; ``limit`` is in drawings, None: ``MICROBATCH_DRAWINGS``."""
        members = MICROBATCH_DRAWINGS if limit is None else limit
        return members * (TEXTS_PER_DRAWING if self.output == "text" else 1)

    @abstractmethod
    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        """The members to train, all of them valid."""

    def size(self, members: Sequence[Member]) -> int:
        """What these members count in the mean that ``loss`` takes."""
        return len(members)

    def passes(self, trajectory: Trajectory) -> int:
        """How often the tokens of its drawing go through the policy with a gradient."""
        return recorded_passes(trajectory, [self.kind])

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        """The frozen policies whose outputs the loss needs; they run before the trained one."""
        return ()

    def reference_outputs(self, name: FrozenPolicy, policy: Policy, batch: Microbatch) -> torch.Tensor:
        """What the loss compares the policy with: outputs of the frozen policy ``name``.

        Called without grad.
        """
        raise ContractError(
            f"{type(self).__name__} has frozen_policies={self.frozen_policies} and no reference_outputs"
        )

    @abstractmethod
    def loss(self, policy: Policy, batch: Microbatch) -> LossOutput:
        """The mean loss of a microbatch, with a gradient to the policy, and what there is to log."""


def has_kind(group: Group, kind: SegmentKind) -> bool:
    """Whether the members of a group have segments of a kind; all are made alike."""
    return any(segment.kind == kind for segment in group.trajectories[0].segments)


def flow_segment(trajectory: Trajectory) -> FlowSegment:
    """The drawing of a trajectory: its last segment."""
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    return segment


def recorded_passes(trajectory: Trajectory, kinds: Collection[SegmentKind] = SEGMENT_KINDS) -> int:
    """Of a replay of the recorded actions, as far as ``Policy.logprobs`` takes it for these kinds."""
    return sum(segment_passes(segment) for segment in segments_through(trajectory, kinds))


def segment_passes(segment: Segment) -> int:
    """How often a replay takes a drawing through the policy with a gradient: once per trained step of a flow, for all
    image tokens, per step or draw of masked ones; and once more per branch of guidance where it was active."""
    if isinstance(segment, TextSegment):
        return 0
    if isinstance(segment, FlowSegment):
        low, high = segment.guidance_interval
        branches = (segment.guidance_scale != 1) * (1 + (segment.image_guidance_scale != 1))
        times = [float(segment.timesteps[i]) for i in segment.trained_steps]
        return sum(1 + branches * (low < t <= high) for t in times)
    branches = 1 + (segment.guidance_scale != 1 and segment.guided_logprobs == "joint")
    if isinstance(segment, ImageTokenSegment):
        return branches
    steps = len(segment.scored) if segment.likelihood == "monte_carlo" else int(segment.reveal_steps.max()) + 1
    return steps * branches
