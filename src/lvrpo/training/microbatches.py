"""What goes through a policy at once, so that a run fits into its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.distributed import gather
from lvrpo.policies.base import Policy
from lvrpo.policies.mot.model_runner import split_by_tokens
from lvrpo.training.losses.base import (
    FROZEN,
    KINDS,
    Advantages,
    FrozenPolicy,
    Member,
    Metrics,
    Microbatch,
    Objective,
)
from lvrpo.training.policies import Policies
from lvrpo.types import TASKS, Group, SegmentKind, Task

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig


class LimitsConfig(Config):
    """Limits in tokens: of pictures, texts and prompts, a prompt that several members share counted once.

    They move results by rounding alone.
    """

    hints: ClassVar[Mapping[str, str]] = {"backward_members": "is called {section}.microbatch_size"}

    forward_tokens: int | None = Field(default=None, ge=1)
    """At once where no gradient is kept: sampling, judging. None: the policy's own limit (BAGEL: 32768). The tiny
    policy goes by rows, 512 at once, whatever is set here."""
    backward_tokens: int | None = Field(default=None, ge=1)
    """At once where a gradient is kept, every trained step and every branch of guidance counted."""
    microbatch_size: int | None = Field(default=None, ge=1)
    """The same, in drawings, each at ``flow.timesteps_per_sample`` times; texts: eight times as many. None, and no
    ``backward_tokens``: 192, which suits small policies."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of being remembered: a third more time, a fraction of the
    memory. So are recorded steps of drawings, twice the time: one of them is remembered at once."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.backward_tokens is not None and self.microbatch_size is not None:
            raise ValueError(
                f"limits.backward_tokens={self.backward_tokens} and limits.microbatch_size={self.microbatch_size}: "
                "two limits of one thing: give one of them"
            )
        return self

    def apply(self, policy: Policy) -> None:
        """Sets a policy up."""
        policy.limit_tokens(self.forward_tokens)
        policy.checkpoint_gradients(self.gradient_checkpointing)


def minibatches(
    groups: Sequence[Group], advantages: Advantages, count: int
) -> Iterator[tuple[list[Group], Advantages]]:
    """The groups of a rollout in ``count`` parts, an optimizer step each; those of every task are dealt in turn."""
    if count == 1:
        yield list(groups), advantages
        return
    seen: Counter[Task] = Counter()
    parts: list[list[int]] = [[] for _ in range(count)]
    for p, group in enumerate(groups):
        parts[seen[group.prompt.task] % count].append(p)
        seen[group.prompt.task] += 1
    for rows in parts:
        if rows:
            yield [groups[p] for p in rows], {kind: advantages[kind].rows(rows) for kind in KINDS}


def microbatches(
    policy: Policy,
    objectives: Sequence[Objective],
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int,
    metrics: Metrics,
) -> list[Microbatch]:
    """What this rank differentiates: of each task and objective the members that it selects of its groups.

    Logs under ``signal/TASK`` the share of all groups with an advantage that is not 0.
    """
    chosen: list[tuple[Task, Objective, list[Member]]] = []
    for task in TASKS:
        rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
        if not rows or config.task_weights.get(task, 1.0) == 0:
            continue
        signal = (advantages["text"].values[rows] != 0) | (advantages["image"].values[rows] != 0)
        metrics.add(f"signal/{task}", signal.any(dim=1).float().mean())
        own = [p for p in rows if groups[p].trajectories]
        A = {kind: advantages[kind].rows(own) for kind in KINDS}
        for objective in objectives:
            members = objective.select_members([groups[p] for p in own], A[objective.output]) if own else []
            chosen.append((task, objective, members))
    sizes = gather([objective.size(members) for _, objective, members in chosen])
    found: list[Microbatch] = []
    for (task, objective, members), *of_ranks in zip(chosen, *sizes, strict=True):
        weight = config.task_weights.get(task, 1.0) * objective.weight
        for part in split(members, objective, policy, config.limits):
            share = objective.size(part) / sum(of_ranks)
            found.append(Microbatch(task, objective.kind, step, part, share, weight * share))
    return found


def in_units(members: Sequence[Member], objective: Objective) -> list[Sequence[Member]]:
    """Members that belong together, such as the two of a pair."""
    return [members[start : start + objective.unit] for start in range(0, len(members), objective.unit)]


def split(
    chosen: Sequence[Member], objective: Objective, policy: Policy, limits: LimitsConfig
) -> Iterator[Sequence[Member]]:
    """The chosen members, as many at a time as are replayed at once; what belongs together stays so.

    Drawings of different sizes are replayed apart.
    """
    sizes: dict[object, list[Sequence[Member]]] = {}
    for members in in_units(chosen, objective):
        image = members[0].trajectory.image if objective.output == "image" else None
        size = None if image is None else image.shape
        sizes.setdefault(size, []).append(members)
    for same in sizes.values():
        if limits.backward_tokens is None:
            at_once = max(1, objective.at_once(limits.microbatch_size) // objective.unit)
            cuts = [list(range(i, min(i + at_once, len(same)))) for i in range(0, len(same), at_once)]
        else:
            cuts = cut_by_tokens(same, objective, policy, limits.backward_tokens)
        for indices in cuts:
            yield [member for i in indices for member in same[i]]


def cut_by_tokens(
    units: Sequence[Sequence[Member]], objective: Objective, policy: Policy, limit: int
) -> list[list[int]]:
    """Indices of units that are replayed together."""
    counted = [[policy.count_tokens(member.trajectory) for member in members] for members in units]
    new = [
        sum(
            tokens.text + tokens.image * objective.passes(member.trajectory)
            for tokens, member in zip(counts, members, strict=True)
        )
        for counts, members in zip(counted, units, strict=True)
    ]
    prompts = [members[0].trajectory.prompt.id for members in units]
    return split_by_tokens(prompts, [counts[0].context for counts in counted], new, limit)


def by_kind(objectives: Sequence[Objective]) -> dict[SegmentKind, Objective]:
    """The objective of each kind of segment."""
    return {objective.kind: objective for objective in objectives}


@torch.no_grad()
def with_reference_outputs(
    policies: Policies, objectives: Sequence[Objective], batches: Sequence[Microbatch]
) -> list[Microbatch]:
    """The microbatches of this rank with what their losses compare the policy with; called by all ranks.

    One set of weights after the other, for all microbatches: a device holds one at a time.
    """
    of = by_kind(objectives)
    own = {name for batch in batches for name in of[batch.kind].frozen_policies}
    asked = {name for part in gather(own) for name in part}
    found: list[dict[FrozenPolicy, torch.Tensor]] = [{} for _ in batches]
    for name in FROZEN:
        if name not in asked:
            continue
        with policies.use(name) as policy:
            for batch, terms in zip(batches, found, strict=True):
                if name in of[batch.kind].frozen_policies:
                    terms[name] = of[batch.kind].reference_outputs(name, policy, batch)
    return [replace(batch, frozen=terms) for batch, terms in zip(batches, found, strict=True)]


def rounds(batches: Sequence[Microbatch], each: bool) -> Iterator[tuple[Task | None, Sequence[Microbatch]]]:
    """What every rank differentiates before gradients are summed: all that it has.

    ``each``: one microbatch at a time, of one task on all ranks, as often as the rank with most has one.
    """
    if not each:
        yield None, batches
        return
    counts = gather(Counter(batch.task for batch in batches))
    for task in TASKS:
        own = [batch for batch in batches if batch.task == task]
        for i in range(max(count[task] for count in counts)):
            yield task, own[i : i + 1]
