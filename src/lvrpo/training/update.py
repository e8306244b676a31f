"""One joint update: text and drawing segments of all tasks, one optimizer step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lvrpo.policies.base import Policy
from lvrpo.policies.mot.batching import cut
from lvrpo.sampling import derive_seed
from lvrpo.training.best_of import BestDrawing, BestText
from lvrpo.training.dpo import FlowDPO, TextDPO
from lvrpo.training.flow import NFT, FlowConfig, FlowGRPO, FlowObjective
from lvrpo.training.gradients import TaskGradients
from lvrpo.training.limits import LimitsConfig
from lvrpo.training.objective import KINDS, Advantages, Batch, Member, Metrics, Objective, Policies
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.text import TextConfig, TextObjective, TokenObjective, anchored
from lvrpo.types import SEGMENT_KINDS, TASKS, Group, SegmentKind, Task

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

TEXT_OBJECTIVES: Mapping[str, type[TextObjective]] = {
    "clip": TokenObjective,
    "gspo": TokenObjective,
    "cispo": TokenObjective,
    "dpo": TextDPO,
    "best_of": BestText,
}
"""What trains text, image tokens and masked ones, by the ``kind`` of their sections."""

FLOW_OBJECTIVES: Mapping[str, type[FlowObjective]] = {
    "nft": NFT,
    "grpo": FlowGRPO,
    "dpo": FlowDPO,
    "best_of": BestDrawing,
}
"""What trains flows, by ``flow.kind``."""


def objectives_of(config: TrainConfig, writes: Sequence[SegmentKind]) -> list[Objective]:
    """How each kind of segment that the policy writes is trained; a kind of weight 0 is not."""
    objectives: list[Objective] = [
        FLOW_OBJECTIVES[section.kind](section)
        if isinstance(section, FlowConfig)
        else TEXT_OBJECTIVES[section.kind](section, config.rollout.max_new_tokens, kind)
        for kind, section in config.sections(writes).items()
    ]
    return [objective for objective in objectives if objective.weight]


def asks_for_old(config: TrainConfig, writes: Sequence[SegmentKind]) -> bool:
    """Whether an objective samples with the short average of the live weights."""
    return any(objective.samples_with == "old" for objective in objectives_of(config, writes))


def update(
    policies: Policies,
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int,
    kinds: Sequence[SegmentKind] = SEGMENT_KINDS,
    apart: TaskGradients | None = None,
) -> Metrics:
    """Accumulates the gradients of the given kinds of segments of all tasks; the caller steps the optimizers.

    ``apart`` tells the tasks' gradients apart, and mixes them as configured; None: they are summed.
    """
    metrics = Metrics()
    objectives = [o for o in objectives_of(config, policies.live.writes) if o.kind in kinds]
    for task in TASKS:
        rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
        weight = config.task_weights.get(task, 1.0)
        if not rows or weight == 0:
            continue
        task_groups = [groups[p] for p in rows]
        A = {kind: advantages[kind].rows(rows) for kind in KINDS}
        signal = (A["text"].values != 0) | (A["image"].values != 0)
        metrics.add(f"signal/{task}", signal.any(dim=1).float().mean())
        for objective in objectives:
            chosen = objective.choose(task_groups, A[objective.output])
            for members in parts(chosen, objective, policies.live, config.limits):
                share = objective.size(members) / objective.size(chosen)
                loss = objective.loss(Batch(policies, task, step, members, share, metrics))
                (weight * objective.weight * share * loss).backward()
                if apart is not None:
                    apart.take(task)
    if apart is not None:
        apart.give_back(config.gradient_mixing, derive_seed(config.seed, "gradient mixing", step))
    return metrics


def take_steps(
    policies: Policies,
    optimizers: Sequence[Optimizers],
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int,
    lr_scale: float = 1.0,
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
            metrics.include(update(policies, part, A, config, step, kinds, apart))
            for expert, norm in optimizer.step(step, lr * lr_scale).items():
                metrics.add(f"grad_norm/{expert}", norm)
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
