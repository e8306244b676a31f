"""Data-parallel rollout and scoring: each rank samples and scores its share of the prompts; scores are gathered.

Every rank has a list of the groups of all prompts of a step; groups of other ranks have no trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from lvrpo.distributed import gather, gather_with_tensors, rank, relay_errors, world_size
from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.rewards.config import ConfiguredReward
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer
from lvrpo.rewards.table import (
    complete_texts,
    mask_batch_failures,
    require_few_failures,
    score_groups_unchecked,
)
from lvrpo.types import Group, Prompt, RewardTable

T = TypeVar("T")
DEFAULT_IMAGE_SIDE = 512
"""Pixels, assumed for images of unknown size."""


def local_rows(groups: Sequence[Group]) -> list[int]:
    """Indices of this rank's groups."""
    return [p for p, group in enumerate(groups) if group.trajectories]


def merge_ranks(local: dict[int, T]) -> dict[int, T]:
    """Gathers (small, pickled) values by row from all ranks, sorted by row."""
    found = {row: value for part in gather(local) for row, value in part.items()}
    return dict(sorted(found.items()))


def estimated_tokens(prompts: Sequence[Prompt], sampling: Sampling) -> list[float]:
    """Approximate number of tokens to sample one output per prompt: 4 characters or 16 x 16 pixels are one token.

    Without ``sampling.image_size``, an image without a source image is as large as the largest image of the prompts.
    """

    def patches(height: int, width: int) -> float:
        return height * width / 256

    images = [[patches(*part.shape[-2:]) for part in p.parts if not isinstance(part, str)] for p in prompts]
    size = sampling.image_size or (DEFAULT_IMAGE_SIDE, DEFAULT_IMAGE_SIDE)
    default = max([] if sampling.image_size else map(max, filter(None, images)), default=patches(*size))
    passes = sampling.num_steps * (1 + (sampling.guidance_scale != 1))
    costs = []
    for prompt, sources in zip(prompts, images, strict=True):
        output = {"text": sampling.max_new_tokens, "image": passes * (sources[0] if sources else default)}
        text = sum(len(part) / 4 for part in prompt.parts if isinstance(part, str))
        costs.append(text + sum(sources) + sum(output[kind] for kind in prompt.output))
    return costs


def assign_to_ranks(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Sorted item indices per rank: greedily, the most expensive item first, to the rank with the least load."""
    load, assigned = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        r = min(range(ranks), key=lambda r: (load[r], len(assigned[r])))
        load[r] += costs[i]
        assigned[r].append(i)
    return [sorted(items) for items in assigned]


class Sampler(Protocol):
    """A policy or an ``EngineSampler``."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``."""
        ...


def local_share(prompts: Sequence[Prompt], sampling: Sampling) -> list[int]:
    """Indices of the prompts that this rank samples (``assign_to_ranks``)."""
    return assign_to_ranks(estimated_tokens(prompts, sampling), world_size())[rank()]


def sample_local(sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
    """A group per prompt; this rank samples its share."""
    local = local_share(prompts, sampling)
    groups = [Group(prompt, ()) for prompt in prompts]
    with relay_errors():
        if local:
            sampled = sampler.sample([prompts[i] for i in local], sampling, [seeds[i] for i in local])
            for i, group in zip(local, sampled, strict=True):
                groups[i] = group
    return groups


def score_local(
    rewards: Sequence[ConfiguredReward],
    groups: Sequence[Group],
    judge: Policy,
    step: int = 0,
    most_failed: float | None = None,
) -> RewardTable:
    """``score_groups`` of all groups, each scored by the rank that sampled it."""
    local, table = local_rows(groups), None
    with relay_errors():
        if local:
            table = score_groups_unchecked(rewards, [groups[p] for p in local], judge, step)
    if world_size() > 1:
        table = join_tables(gather((local, table)), groups)
    if table is None:
        raise ContractError("no group has a trajectory to score: sample some")
    if any(hasattr(source.reward, "batch_failures") for source in rewards):
        texts = merge_ranks(dict(zip(local, complete_texts([groups[p] for p in local]), strict=True)))
        table = mask_batch_failures(rewards, [group.prompt for group in groups], list(texts.values()), table)
    require_few_failures(rewards, table, most_failed)
    return table


def join_tables(parts: Sequence[tuple[Sequence[int], RewardTable | None]], groups: Sequence[Group]) -> RewardTable:
    """The table of all groups from (rows, table) of each rank."""
    tables = [(rows, table) for rows, table in parts if table is not None]
    first, P = tables[0][1], len(groups)
    joined = replace(
        first,
        scores=first.scores.new_zeros(P, *first.scores.shape[1:]),
        mask=first.mask.new_zeros(P, *first.mask.shape[1:]),
        reasons={},
        tasks=tuple(group.prompt.task for group in groups),
        cut={},
    )
    for rows, table in tables:
        joined = replace_rows(joined, rows, table)
    return joined


def replace_rows(table: RewardTable, rows: Sequence[int], other: RewardTable) -> RewardTable:
    """The table with the given rows replaced by another table."""
    scores, mask = table.scores.clone(), table.mask.clone()
    scores[rows], mask[rows] = other.scores, other.mask
    reasons = {cell: reason for cell, reason in table.reasons.items() if cell[0] not in rows}
    reasons |= {(rows[p], g, k): reason for (p, g, k), reason in other.reasons.items()}
    cut = {title: values.clone() for title, values in table.cut.items()}
    for title, values in other.cut.items():
        cut.setdefault(title, values.new_zeros(table.mask.shape[:2]))[rows] = values
    return replace(table, scores=scores, mask=mask, reasons=reasons, cut=cut)


def group_successes(groups: Sequence[Group], scorer: HeldOutScorer = SUCCESS_ONLY) -> dict[int, list[float]]:
    """``HeldOutScorer.successes`` by row, of all ranks."""
    local = local_rows(groups)
    with relay_errors():
        found = scorer.successes([groups[p] for p in local])
    return merge_ranks({local[p]: row for p, row in found.items()})


def gather_groups(groups: Sequence[Group], rows: Sequence[int], members: int | None = None) -> list[Group]:
    """Groups of some rows with their trajectories, on every rank; ``members``: only the first ones of each."""
    selected = {p: Group(groups[p].prompt, groups[p].trajectories[:members]) for p in rows}
    local = {p: group for p, group in selected.items() if group.trajectories}
    for received in gather_with_tensors(local):
        selected |= {p: group for p, group in received.items() if p not in local}
    return [selected[p] for p in rows]
