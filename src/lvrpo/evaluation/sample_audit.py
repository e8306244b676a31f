"""Audit of rewards on the own samples of a model: groups are sampled, scored and compared with ground truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lvrpo.audit_records import SampleAudit, SampleQuality
from lvrpo.data.scenes import CATEGORIES, ScenePrompts, ScenesConfig
from lvrpo.evaluation.items import cluster_of
from lvrpo.evaluation.recorded_groups import SUCCESS, VERIFIER, Array
from lvrpo.evaluation.reward_ranking import rank_rewards
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.success import successes
from lvrpo.rewards.table import NOT_APPLICABLE, score_groups
from lvrpo.sampling import derive_seed
from lvrpo.types import TASKS, Group, TaskKind

GROUP_SIZE = 8
BATCH_SIZE = 64
"""Groups of a task sampled and scored together, as in a training step: the reward ``agreement`` compares them."""

REWARDS = (
    RewardConfig(name="self_vqa"),
    RewardConfig(name="agreement"),
    RewardConfig(name="caption_back"),
    RewardConfig(name="edit_consistency"),
)
"""Rewards that need no model but the policy; edit_consistency reads pixels too."""
VERIFIER_REWARD = RewardConfig(name=VERIFIER, options={"mode": "gated"})
"""Grades by ground truth; ``SUCCESS`` where it does not apply."""


def sample_groups(
    policy: Policy,
    per_category: int,
    seed: int = 0,
    *,
    size: int,
    progress: Callable[[str, int], None] = lambda task, prompts: None,
) -> dict[TaskKind, list[Group]]:
    """Samples groups of ``GROUP_SIZE`` on ``per_category`` prompts of every category; deterministic.

    ``size``: side of the images in pixels. Sampling parameters are the policy's defaults, text at temperature 1.
    """
    source = ScenePrompts(ScenesConfig(size=size), "validation", seed)
    found: dict[TaskKind, list[Group]] = {}
    for task in TASKS:
        prompts = source.prompts(task, per_category * len(CATEGORIES[task]))
        progress(task, len(prompts))
        sampling = replace(policy.default_sampling(task), group_size=GROUP_SIZE)
        if policy.image_size is None:
            sampling = replace(sampling, image_size=(size, size))
        found[task] = []
        for start in range(0, len(prompts), BATCH_SIZE):
            chunk = prompts[start : start + BATCH_SIZE]
            seeds = [derive_seed(seed, "own samples", prompt.id) for prompt in chunk]
            found[task] += policy.sample(chunk, sampling, seeds)
    return found


def audit_samples(
    judge: Policy,
    model: Policy,
    groups: Mapping[TaskKind, Sequence[Group]],
    sources: Sequence[ConfiguredReward],
) -> SampleAudit:
    """Scores the groups of ``model`` with every reward; the first ``VERIFIER`` among them grades."""
    verifiers = [source.config.title for source in sources if source.config.name == VERIFIER]
    tasks: dict[TaskKind, SampleQuality] = {}
    for task, own in groups.items():
        success = np.array(successes(own), dtype=np.float32)
        scorers: dict[str, Array] = {}
        missing: dict[str, float] = {}
        for source in sources:
            name = source.config.title
            scores, applies = _scores(source, own, judge)
            if applies.any():
                scorers[name], missing[name] = scores, float(np.isnan(scores[applies]).mean())
        category = np.array([group.prompt.category for group in own], dtype=np.str_)
        clusters = [cluster_of(group.prompt) for group in own]
        validity = rank_rewards({**scorers, SUCCESS: success}, verifiers, category, clusters=clusters)
        tasks[task] = SampleQuality(len(own), float(success.mean()), missing, validity)
    return SampleAudit(judge_fingerprint(judge), judge_fingerprint(model), tasks)


def _scores(source: ConfiguredReward, groups: Sequence[Group], judge: Policy) -> tuple[Array, np.ndarray]:
    """(N, G) scores, nan where there is none, and (N,) whether the reward applies."""
    scores, applies = [], []
    for start in range(0, len(groups), BATCH_SIZE):
        table = score_groups([source], groups[start : start + BATCH_SIZE], judge)
        scores.append(torch.where(table.mask, table.scores, torch.nan)[..., 0].numpy())
        applies += [table.reasons.get((p, 0, 0)) != NOT_APPLICABLE for p in range(len(table.tasks))]
    return np.concatenate(scores), np.array(applies)
