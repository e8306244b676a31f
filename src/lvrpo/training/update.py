"""One joint update: text and drawing segments of all tasks, one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lvrpo.training.flow import FLOW_OBJECTIVES
from lvrpo.training.objective import KINDS, Advantages, Batch, Member, Metrics, Objective, Policies
from lvrpo.training.text import TokenObjective
from lvrpo.types import TASKS, Group

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig


def objectives_of(config: TrainConfig) -> list[Objective]:
    """How each kind of segment is trained; a kind of weight 0 is not."""
    objectives: list[Objective] = [TokenObjective(config.text), FLOW_OBJECTIVES[config.flow.kind](config.flow)]
    return [objective for objective in objectives if objective.weight]


def update(
    policies: Policies, groups: Sequence[Group], advantages: Advantages, config: TrainConfig, step: int
) -> Metrics:
    """Accumulates the gradients of all segments of all tasks; the caller steps the optimizers."""
    metrics = Metrics()
    objectives = objectives_of(config)
    for task in TASKS:
        rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
        weight = config.task_weights.get(task, 1.0)
        if not rows or weight == 0:
            continue
        task_groups = [groups[p] for p in rows]
        A = {kind: advantages[kind][rows] for kind in KINDS}
        signal = (A["text"] != 0) | (A["image"] != 0)
        metrics.add(f"signal/{task}", signal.any(dim=1).float().mean())
        for objective in objectives:
            chosen = objective.choose(task_groups, A[objective.kind])
            for members in _parts(chosen, objective):
                share = objective.size(members) / objective.size(chosen)
                loss = objective.loss(Batch(policies, task, step, members, share, metrics))
                (weight * objective.weight * share * loss).backward()
    return metrics


def _parts(chosen: Sequence[Member], objective: Objective) -> Iterator[Sequence[Member]]:
    """The chosen members, as many at a time as are replayed at once; what belongs together stays so."""
    size = max(1, objective.rows_at_once // objective.unit) * objective.unit
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]
