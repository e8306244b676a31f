"""One joint update: text and drawing segments of all tasks, one optimizer step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lvrpo.policies.base import Policy
from lvrpo.sampling import derive_seed
from lvrpo.training.gradients import TaskGradients
from lvrpo.training.methods import objectives_of
from lvrpo.training.objective import KINDS, Advantages, Metrics, Policies
from lvrpo.training.optimizer import Stepping
from lvrpo.training.team import ALONE, Team
from lvrpo.training.text import TextConfig, anchored
from lvrpo.training.work import Work, backward, hands
from lvrpo.types import SEGMENT_KINDS, TASKS, Group, SegmentKind, Task

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig


def update(
    policies: Policies,
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int,
    kinds: Sequence[SegmentKind] = SEGMENT_KINDS,
    apart: TaskGradients | None = None,
    team: Team = ALONE,
) -> Metrics:
    """Accumulates the gradients of the given kinds of segments of all tasks; the caller steps the optimizers.

    ``apart`` tells the tasks' gradients apart, and mixes them as configured; None: they are summed, and everybody in
    the ``team`` replays a part of the members.
    """
    metrics = Metrics()
    dealt: list[list[Work]] = [[] for _ in range(team.size if apart is None else 1)]
    objectives = [o for o in objectives_of(config, policies.live.writes) if o.kind in kinds]
    for task in TASKS:
        rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
        if not rows or config.task_weights.get(task, 1.0) == 0:
            continue
        task_groups = [groups[p] for p in rows]
        A = {kind: advantages[kind].rows(rows) for kind in KINDS}
        signal = (A["text"].values != 0) | (A["image"].values != 0)
        metrics.add(f"signal/{task}", signal.any(dim=1).float().mean())
        for objective in objectives:
            chosen = objective.choose(task_groups, A[objective.output])
            more = hands(task, chosen, objective, policies.live, config.limits, len(dealt))
            dealt = [own + new for own, new in zip(dealt, more, strict=True)]
    if apart is None:
        metrics.include(team.differentiate(policies, config, dealt, step))
        return metrics
    for work in dealt[0]:
        backward(policies, config, work, step, metrics)
        apart.take(work.task)
    apart.give_back(config.gradient_mixing, derive_seed(config.seed, "gradient mixing", step))
    return metrics


def take_steps(
    policies: Policies,
    optimizers: Sequence[Stepping],
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int,
    lr_scale: float = 1.0,
    team: Team = ALONE,
) -> Metrics:
    """The optimizer steps of one rollout: one, unless ``mini_updates`` or different learning rates ask for more."""
    sections = config.sections(policies.live.writes)
    capped: list[SegmentKind] = [
        kind for kind, s in sections.items() if isinstance(s, TextConfig) and s.importance_cap is not None
    ]
    if capped:
        groups = anchored(policies.live, groups, capped)
    metrics = Metrics()
    for part, A in deal(groups, advantages, config.mini_updates):
        apart = told_apart(policies.live, config, step)
        for (kinds, lr), optimizer in zip(config.phases(policies.live.writes), optimizers, strict=True):
            metrics.include(update(policies, part, A, config, step, kinds, apart, team))
            for expert, norm in optimizer.step(step, lr * lr_scale).items():
                metrics.add(f"grad_norm/{expert}", norm)
            team.moved("live")
        if apart is not None and audits(config, step):
            apart.report(metrics)
    return metrics


def audits(config: TrainConfig, step: int) -> bool:
    """Whether the tasks' gradients are compared at this step."""
    return bool(config.gradient_audit.every) and step % config.gradient_audit.every == 0


def told_apart(policy: Policy, config: TrainConfig, step: int) -> TaskGradients | None:
    """Empty accounts for the tasks' gradients; None where a step neither compares nor mixes them."""
    return TaskGradients(policy) if audits(config, step) or config.gradient_mixing != "sum" else None


def deal(groups: Sequence[Group], advantages: Advantages, parts: int) -> Iterator[tuple[list[Group], Advantages]]:
    """The groups in so many parts; those of each task are dealt in turn."""
    if parts == 1:
        yield list(groups), advantages
        return
    seen: Counter[Task] = Counter()
    hands: list[list[int]] = [[] for _ in range(parts)]
    for p, group in enumerate(groups):
        hands[seen[group.prompt.task] % parts].append(p)
        seen[group.prompt.task] += 1
    for rows in hands:
        if rows:
            yield [groups[p] for p in rows], {kind: advantages[kind].rows(rows) for kind in KINDS}
