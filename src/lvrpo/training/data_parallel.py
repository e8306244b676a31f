"""A step on several ranks: each samples and scores its share of the prompts, and all have the table of all scores.

The groups of a step are a list over all its prompts on every rank; those of other ranks have no trajectories. With one
process every group is this one's, and nothing here changes a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from lvrpo.distributed import gather, gather_with_tensors, rank, relay_errors, world_size
from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.rewards.row import RewardSource
from lvrpo.rewards.success import has_success, successes
from lvrpo.rewards.table import require_few_failures, score_groups_unchecked
from lvrpo.types import Group, Prompt, RewardTable

T = TypeVar("T")
SIDE = 512
"""In pixels, assumed of drawings whose size nothing tells."""


def local_rows(groups: Sequence[Group]) -> list[int]:
    """Where this rank's groups are."""
    return [p for p, group in enumerate(groups) if group.trajectories]


def merge_ranks(own: dict[int, T]) -> dict[int, T]:
    """The values of all ranks by row, in the order of rows; small ones, which are sent."""
    found = {row: value for part in gather(own) for row, value in part.items()}
    return dict(sorted(found.items()))


def estimated_tokens(prompts: Sequence[Prompt], sampling: Sampling) -> list[float]:
    """About how many tokens go through a policy to sample one output of each: 4 characters or 16 x 16 pixels make one.

    A drawing without a source is as large as the largest picture of the prompts, where ``sampling`` does not say.
    """

    def patches(height: int, width: int) -> float:
        return height * width / 256

    pictures = [[patches(*part.shape[-2:]) for part in p.parts if not isinstance(part, str)] for p in prompts]
    size = sampling.image_size or (SIDE, SIDE)
    alone = max([] if sampling.image_size else map(max, filter(None, pictures)), default=patches(*size))
    passes = sampling.num_steps * (1 + (sampling.guidance_scale != 1))
    costs = []
    for prompt, own in zip(prompts, pictures, strict=True):
        made = {"text": sampling.max_new_tokens, "image": passes * (own[0] if own else alone)}
        words = sum(len(part) / 4 for part in prompt.parts if isinstance(part, str))
        costs.append(words + sum(own) + sum(made[kind] for kind in prompt.output))
    return costs


def shares(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Which items each rank takes, in their order: the dearest first, each to the rank that has least so far."""
    load, taken = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        r = min(range(ranks), key=lambda r: (load[r], len(taken[r])))
        load[r] += costs[i]
        taken[r].append(i)
    return [sorted(own) for own in taken]


class Samples(Protocol):
    """A policy, or an engine that has its weights."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``Policy.sample``."""
        ...


def sample_local(policy: Samples, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
    """A group per prompt; this rank samples its share (``shares``)."""
    own = shares(estimated_tokens(prompts, sampling), world_size())[rank()]
    groups = [Group(prompt, ()) for prompt in prompts]
    with relay_errors():
        if own:
            sampled = policy.sample([prompts[i] for i in own], sampling, [seeds[i] for i in own])
            for i, group in zip(own, sampled, strict=True):
                groups[i] = group
    return groups


def score_local(
    rewards: Sequence[RewardSource],
    groups: Sequence[Group],
    judge: Policy,
    step: int = 0,
    most_failed: float | None = None,
) -> RewardTable:
    """``score_groups`` of all groups, each scored by the rank that has it."""
    own, table = local_rows(groups), None
    with relay_errors():
        if own:
            table = score_groups_unchecked(rewards, [groups[p] for p in own], judge, step)
    if world_size() > 1:
        table = join_tables(gather((own, table)), groups)
    if table is None:
        raise ContractError("no group has a trajectory to score: sample some")
    require_few_failures(rewards, table, most_failed)
    return table


def join_tables(parts: Sequence[tuple[Sequence[int], RewardTable | None]], groups: Sequence[Group]) -> RewardTable:
    """One table of all groups from those of the ranks; each part with the rows that it is of."""
    known = [(rows, table) for rows, table in parts if table is not None]
    first, P = known[0][1], len(groups)
    empty = replace(
        first,
        scores=first.scores.new_zeros(P, *first.scores.shape[1:]),
        mask=first.mask.new_zeros(P, *first.mask.shape[1:]),
        reasons={},
        tasks=tuple(group.prompt.task for group in groups),
        noise={},
        cut={},
    )
    for rows, table in known:
        empty = with_rows(empty, rows, table)
    return empty


def with_rows(table: RewardTable, rows: Sequence[int], other: RewardTable) -> RewardTable:
    """The table with the groups of another one in the given rows."""
    scores, mask = table.scores.clone(), table.mask.clone()
    scores[rows], mask[rows] = other.scores, other.mask
    reasons = {cell: reason for cell, reason in table.reasons.items() if cell[0] not in rows}
    reasons |= {(rows[p], g, k): reason for (p, g, k), reason in other.reasons.items()}
    columns: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("noise", "cut"):  # two mappings of (P, G) tensors
        columns[name] = {title: values.clone() for title, values in getattr(table, name).items()}
        for title, values in getattr(other, name).items():
            unknown = torch.nan if name == "noise" else False
            columns[name].setdefault(title, values.new_full(table.mask.shape[:2], unknown))[rows] = values
    return replace(table, scores=scores, mask=mask, reasons=reasons, noise=columns["noise"], cut=columns["cut"])


def group_successes(groups: Sequence[Group]) -> dict[int, list[float]]:
    """By row, for groups where right and wrong can be told, 1.0 or 0.0 per member; of all ranks."""
    own = [p for p in local_rows(groups) if has_success(groups[p].prompt)]
    found: list[list[float]] = []
    with relay_errors():
        if own:
            found = successes([groups[p] for p in own])
    return merge_ranks(dict(zip(own, found, strict=True)))


def gather_groups(groups: Sequence[Group], rows: Sequence[int], members: int | None = None) -> list[Group]:
    """Groups of some rows with their trajectories, on every rank; ``members``: the first few of each."""
    cut = {p: Group(groups[p].prompt, groups[p].trajectories[:members]) for p in rows}
    own = {p: group for p, group in cut.items() if group.trajectories}
    for received in gather_with_tensors(own):
        cut |= {p: group for p, group in received.items() if p not in own}
    return [cut[p] for p in rows]
