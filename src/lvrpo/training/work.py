"""What an update replays: the chosen members, as many at a time as a gradient is kept for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lvrpo.policies.base import Policy
from lvrpo.policies.mot.batching import cut
from lvrpo.training.limits import LimitsConfig
from lvrpo.training.methods import objectives_of
from lvrpo.training.objective import Batch, FrozenPolicy, Member, Metrics, Objective, Policies
from lvrpo.types import SegmentKind, Task

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig


@dataclass(frozen=True)
class Work:
    """Members of a task that are replayed together for one kind of segment."""

    task: Task
    kind: SegmentKind
    members: Sequence[Member]
    share: float
    """What these members count of all chosen ones of the task."""

    def objective(self, config: TrainConfig, policy: Policy) -> Objective:
        """What trains these members."""
        return next(o for o in objectives_of(config, policy.writes) if o.kind == self.kind)

    def batch(self, step: int, metrics: Metrics, frozen: Mapping[FrozenPolicy, torch.Tensor]) -> Batch:
        """As the objective takes it."""
        return Batch(self.task, step, self.members, self.share, metrics, frozen)


def backward(policies: Policies, config: TrainConfig, work: Work, step: int, metrics: Metrics) -> None:
    """Adds the gradient of some work to the live policy's, weighted as in the sum of all."""
    compared = work.objective(config, policies.live).compared_with
    frozen: dict[FrozenPolicy, torch.Tensor] = {
        name: frozen_terms(name, getattr(policies, name), config, work, step) for name in compared
    }
    backward_live(policies.live, config, work, step, metrics, frozen)


@torch.no_grad()
def frozen_terms(name: FrozenPolicy, policy: Policy, config: TrainConfig, work: Work, step: int) -> torch.Tensor:
    """What one of the policies that the objective compares with says of some work."""
    return work.objective(config, policy).frozen_terms(name, policy, work.batch(step, Metrics(), {}))


def backward_live(
    live: Policy,
    config: TrainConfig,
    work: Work,
    step: int,
    metrics: Metrics,
    frozen: Mapping[FrozenPolicy, torch.Tensor],
) -> None:
    """``backward`` where the frozen policies were asked before."""
    objective = work.objective(config, live)
    loss = objective.loss(live, work.batch(step, metrics, frozen))
    (config.task_weights.get(work.task, 1.0) * objective.weight * work.share * loss).backward()


def hands(
    task: Task, chosen: Sequence[Member], objective: Objective, policy: Policy, limits: LimitsConfig, count: int
) -> list[list[Work]]:
    """The chosen members of a task dealt out to so many processes, each hand in parts that are replayed together."""
    units = [chosen[start : start + objective.unit] for start in range(0, len(chosen), objective.unit)]
    whole, out = objective.size(chosen), []
    for rank in range(count):
        hand = [member for unit in units[rank::count] for member in unit]
        out.append(
            [
                Work(task, objective.kind, members, objective.size(members) / whole)
                for members in parts(hand, objective, policy, limits)
            ]
        )
    return out


def parts(
    chosen: Sequence[Member], objective: Objective, policy: Policy, limits: LimitsConfig
) -> Iterator[Sequence[Member]]:
    """The chosen members, as many at a time as are replayed at once; what belongs together stays so.

    Drawings of different sizes are replayed apart.
    """
    unit = objective.unit
    units = [chosen[start : start + unit] for start in range(0, len(chosen), unit)]
    sizes: dict[object, list[Sequence[Member]]] = {}
    for members in units:
        image = members[0].trajectory.image if objective.output == "image" else None
        size = None if image is None else image.shape
        sizes.setdefault(size, []).append(members)
    for same in sizes.values():
        if limits.backward_tokens is None:
            at_once = max(1, objective.at_once(limits.backward_members) // unit)
            cuts = [list(range(i, min(i + at_once, len(same)))) for i in range(0, len(same), at_once)]
        else:
            cuts = cut_by_tokens(same, objective, policy, limits.backward_tokens)
        for indices in cuts:
            yield [member for i in indices for member in same[i]]


def cut_by_tokens(
    units: Sequence[Sequence[Member]], objective: Objective, policy: Policy, limit: int
) -> list[list[int]]:
    """Indices of units that are replayed together."""
    counted = [[policy.tokens(member.trajectory) for member in members] for members in units]
    new = [
        sum(
            tokens.text + tokens.drawing * objective.passes(member.trajectory)
            for tokens, member in zip(counts, members, strict=True)
        )
        for counts, members in zip(counted, units, strict=True)
    ]
    prompts = [members[0].trajectory.prompt.id for members in units]
    return cut(prompts, [counts[0].context for counts in counted], new, limit)
