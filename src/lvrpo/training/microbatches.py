"""Minibatches and microbatches: how the groups of a rollout are split for forward and backward passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.distributed import gather
from lvrpo.policies.base import Policy, require_method
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
from lvrpo.types import TASKS, Group, SegmentKind, TaskKind

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig


class LimitsConfig(Config):
    """Batch limits, which change results by rounding only. Tokens are those of images, texts and prompts; a prompt that
    several members share counts once."""

    hints: ClassVar[Mapping[str, str]] = {"backward_members": "is called {section}.microbatch_size"}

    forward_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass without gradient (sampling, judging). None: the policy's default (BAGEL: 32768). The tiny
    policy always uses batches of 512 rows."""
    backward_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass with gradient, over all trained steps and guidance branches."""
    microbatch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass with gradient, each at ``flow.timesteps_per_sample`` times; eight times as many texts.
    None, and no ``backward_tokens``: 192, which suits small policies."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: a third more time, a fraction of the memory. Recorded sampling steps of
    images are recomputed one at a time, for twice the time."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.backward_tokens is not None and self.microbatch_size is not None:
            raise ValueError(
                f"limits.backward_tokens={self.backward_tokens} and limits.microbatch_size={self.microbatch_size}: "
                "two limits of one thing: give one of them"
            )
        return self

    def apply(self, policy: Policy) -> None:
        """Applies the limits to a policy."""
        if self.forward_tokens is not None or hasattr(policy, "limit_tokens"):  # optional
            require_method(policy, "limit_tokens").limit_tokens(self.forward_tokens)
        if self.gradient_checkpointing or hasattr(policy, "checkpoint_gradients"):
            require_method(policy, "checkpoint_gradients").checkpoint_gradients(self.gradient_checkpointing)


def minibatches(
    groups: Sequence[Group], advantages: Advantages, count: int
) -> Iterator[tuple[list[Group], Advantages]]:
    """The groups of a rollout in ``count`` minibatches, with the groups of every task distributed round-robin."""
    if count == 1:
        yield list(groups), advantages
        return
    seen: Counter[TaskKind] = Counter()
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
    """The microbatches of this rank: the members that each objective selects, by task.

    Logs the share of all groups with a non-zero advantage as ``signal/TASK``.
    """
    chosen: list[tuple[TaskKind, Objective, list[Member]]] = []
    for task in TASKS:
        rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
        if not rows or config.task_weights.get(task, 1.0) == 0:
            continue
        signal = (advantages["text"].values[rows] != 0) | (advantages["image"].values[rows] != 0)
        metrics.add(f"signal/{task}", signal.any(dim=1).float().mean())
        local = [p for p in rows if groups[p].trajectories]
        A = {kind: advantages[kind].rows(local) for kind in KINDS}
        for objective in objectives:
            members = objective.select_members([groups[p] for p in local], A[objective.output]) if local else []
            chosen.append((task, objective, members))
    sizes = gather([objective.size(members) for _, objective, members in chosen])
    found: list[Microbatch] = []
    for (task, objective, members), *of_ranks in zip(chosen, *sizes, strict=True):
        weight = config.task_weights.get(task, 1.0) * objective.weight
        for part in split(members, objective, policy, config.limits):
            share = objective.size(part) / sum(of_ranks)
            found.append(Microbatch(task, objective.kind, step, part, share, weight * share))
    return found


def split(
    chosen: Sequence[Member], objective: Objective, policy: Policy, limits: LimitsConfig
) -> Iterator[Sequence[Member]]:
    """The chosen members in microbatches within the limits; units of ``objective.unit`` members are not split.

    Images of different sizes are in different microbatches.
    """
    by_size: dict[object, list[Sequence[Member]]] = {}
    for start in range(0, len(chosen), objective.unit):
        unit = chosen[start : start + objective.unit]
        image = unit[0].trajectory.image if objective.output == "image" else None
        by_size.setdefault(None if image is None else image.shape, []).append(unit)
    for units in by_size.values():
        if limits.backward_tokens is None:
            count = max(1, objective.max_members(limits.microbatch_size) // objective.unit)
            cuts = [list(range(i, min(i + count, len(units)))) for i in range(0, len(units), count)]
        else:
            cuts = cut_by_tokens(units, objective, policy, limits.backward_tokens)
        for indices in cuts:
            yield [member for i in indices for member in units[i]]


def cut_by_tokens(
    units: Sequence[Sequence[Member]], objective: Objective, policy: Policy, limit: int
) -> list[list[int]]:
    """Indices of the units of each microbatch of at most ``limit`` tokens."""
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
    """The microbatches of this rank with the outputs of the frozen policies that their losses need; collective.

    Loops over weight sets, then microbatches, as a device holds one set at a time.
    """
    of = by_kind(objectives)
    local = {name for batch in batches for name in of[batch.kind].frozen_policies}
    needed = {name for part in gather(local) for name in part}
    outputs: list[dict[FrozenPolicy, torch.Tensor]] = [{} for _ in batches]
    for name in FROZEN:
        if name not in needed:
            continue
        with policies.use(name) as policy:
            for batch, by_policy in zip(batches, outputs, strict=True):
                if name in of[batch.kind].frozen_policies:
                    by_policy[name] = of[batch.kind].reference_outputs(name, policy, batch)
    return [replace(batch, frozen=by_policy) for batch, by_policy in zip(batches, outputs, strict=True)]


def reduction_rounds(
    batches: Sequence[Microbatch], per_microbatch: bool
) -> Iterator[tuple[TaskKind | None, Sequence[Microbatch]]]:
    """The microbatches of this rank between two gradient reductions: all of them, in one round.

    ``per_microbatch``: one microbatch per round, of the same task on all ranks; ranks with fewer get empty rounds.
    """
    if not per_microbatch:
        yield None, batches
        return
    counts = gather(Counter(batch.task for batch in batches))
    for task in TASKS:
        local = [batch for batch in batches if batch.task == task]
        for i in range(max(count[task] for count in counts)):
            yield task, local[i : i + 1]
