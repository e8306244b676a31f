"""What rewards make of a model's own outputs, against the truth: before any training, or of a trained run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lvrpo.audit_records import SampleAudit, TaskSamples
from lvrpo.data.scenes import CATEGORIES, ScenePrompts, ScenesConfig, Split
from lvrpo.evaluation.recorded_groups import SUCCESS, VERIFIER, Array
from lvrpo.evaluation.reward_validity import audit_validity
from lvrpo.evaluation.suite import cluster_of
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.row import RewardConfig, RewardSource
from lvrpo.rewards.success import successes
from lvrpo.rewards.table import NOT_APPLICABLE, score_groups
from lvrpo.sampling import derive_seed
from lvrpo.types import TASKS, Group, Task

GROUP_SIZE = 8
AT_ONCE = 64
"""Groups of a task that are sampled and scored together, as in a training step: agreement compares them."""

REWARDS = (
    RewardConfig(name="self_vqa"),
    RewardConfig(name="agreement"),
    RewardConfig(name="caption_back"),
    RewardConfig(name="edit_consistency"),
)
"""Rewards that need nobody but the model; edit_consistency reads pixels too."""
YARDSTICK = RewardConfig(name=VERIFIER, options={"mode": "gated"})
"""Who grades; ``SUCCESS`` where it does not apply."""


def sample_groups(
    policy: Policy,
    per_category: int,
    seed: int = 0,
    *,
    size: int,
    split: Split = "validation",
    progress: Callable[[str, int], None] = lambda task, prompts: None,
) -> dict[Task, list[Group]]:
    """Groups of ``GROUP_SIZE`` on so many prompts of every category, a function of policy and arguments.

    ``size``: side of the pictures asked about. Drawn and written as the policy does by default, text at temperature 1.
    """
    source = ScenePrompts(ScenesConfig(size=size), split, seed)
    found: dict[Task, list[Group]] = {}
    for task in TASKS:
        prompts = source.prompts(task, per_category * len(CATEGORIES[task]))
        progress(task, len(prompts))
        sampling = replace(policy.default_sampling(task), group_size=GROUP_SIZE)
        if policy.image_size is None:
            sampling = replace(sampling, image_size=(size, size))
        found[task] = []
        for start in range(0, len(prompts), AT_ONCE):
            chunk = prompts[start : start + AT_ONCE]
            seeds = [derive_seed(seed, "own samples", prompt.id) for prompt in chunk]
            found[task] += policy.sample(chunk, sampling, seeds)
    return found


def audit_samples(
    judge: Policy,
    model: Policy,
    groups: Mapping[Task, Sequence[Group]],
    sources: Sequence[RewardSource],
    progress: Callable[[str, str], None] = lambda task, reward: None,
) -> SampleAudit:
    """Scores the groups of ``model`` with every reward; the first ``VERIFIER`` among them grades."""
    verifiers = [source.config.title for source in sources if source.config.name == VERIFIER]
    tasks: dict[Task, TaskSamples] = {}
    for task, own in groups.items():
        success = np.array(successes(own), dtype=np.float32)
        scorers: dict[str, Array] = {}
        missing: dict[str, float] = {}
        for source in sources:
            name = source.config.title
            progress(task, name)
            scores, applies = _scores(source, own, judge)
            if applies.any():
                scorers[name], missing[name] = scores, float(np.isnan(scores[applies]).mean())
        category = np.array([group.prompt.category for group in own], dtype=np.str_)
        clusters = [cluster_of(group.prompt) for group in own]
        validity = audit_validity({**scorers, SUCCESS: success}, verifiers, category, clusters=clusters)
        tasks[task] = TaskSamples(len(own), float(success.mean()), missing, validity)
    return SampleAudit(judge_fingerprint(judge), judge_fingerprint(model), tasks)


def _scores(source: RewardSource, groups: Sequence[Group], judge: Policy) -> tuple[Array, np.ndarray]:
    """(N, G) scores, nan where there is none, and (N,) whether the reward applies."""
    scores, applies = [], []
    for start in range(0, len(groups), AT_ONCE):
        table = score_groups([source], groups[start : start + AT_ONCE], judge)
        scores.append(torch.where(table.mask, table.scores, torch.nan)[..., 0].numpy())
        applies += [table.reasons.get((p, 0, 0)) != NOT_APPLICABLE for p in range(len(table.tasks))]
    return np.concatenate(scores), np.array(applies)
