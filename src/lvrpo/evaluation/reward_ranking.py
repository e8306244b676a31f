"""Ranking quality of rewards against ground truth within groups, for a run or for a model's own samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from lvrpo.audit_records import Ranking, RankingChange, RewardRanking, SampleAudit, SampleQuality, Window
from lvrpo.data.scenes import CATEGORIES, ScenePrompts, ScenesConfig, Split
from lvrpo.evaluation.recorded_groups import SUCCESS, VERIFIER, Array
from lvrpo.evaluation.suite import cluster_of
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.row import RewardConfig, RewardSource
from lvrpo.rewards.success import successes
from lvrpo.rewards.table import NOT_APPLICABLE, score_groups
from lvrpo.sampling import derive_seed
from lvrpo.statistics import Interval, mean_interval, seeds_interval, welch_difference
from lvrpo.types import TASKS, Group, TaskKind

BOOTSTRAP_LIMIT = 5000
"""Above this number of groups, Student's t replaces the bootstrap."""


def rank_rewards(
    scorers: Mapping[str, Array],
    verifiers: Sequence[str],
    category: NDArray[np.str_],
    step: NDArray[np.int64] | None = None,
    windows: Sequence[Window] = (),
    clusters: Sequence[Hashable] | None = None,
) -> tuple[RewardRanking, ...]:
    """The ranking of every reward of a task except the verifier; () without ground truth.

    ``scorers``: scores (N, G) by name, including ``SUCCESS``. ``verifiers``: rewards that grade by ground truth; the
    first that was scored is used, and ``SUCCESS`` where it does not apply. ``category`` and ``step``: (N,).
    ``clusters``: resampling units of the bootstrap, such as the picture of a prompt.
    """
    rewards = {name: scores for name, scores in scorers.items() if name != SUCCESS}
    if SUCCESS not in scorers:
        return ()
    title, grades = SUCCESS, scorers[SUCCESS]
    for name in verifiers:
        if name in rewards:
            own = rewards.pop(name)
            applies = np.isfinite(own).any(axis=1, keepdims=True)
            title, grades = name if applies.all() else f"{name}, {SUCCESS}", np.where(applies, own, grades)
            break
    success = scorers[SUCCESS]

    def ranked(name: str, scores: Array) -> RewardRanking:
        rank, auc = rank_correlations(scores, grades), group_auc(scores, success)
        units = np.arange(len(scores)) if clusters is None else np.unique(np.array(clusters), return_inverse=True)[1]

        def ranking(rows: NDArray[np.bool_]) -> Ranking:
            differ = _varying_groups(scores[rows], grades[rows])
            return Ranking(
                _mean(rank[rows], units[rows], lowest=-1.0),
                _mean(auc[rows], units[rows], lowest=0.0),
                silent=int((~differ[0] & differ[1]).sum()),
                alike=int((~differ[1] & _both_scored(scores[rows], grades[rows]).any(axis=1)).sum()),
            )

        along = None
        if step is not None and len(windows) > 1:
            first, last = ((step >= w.first) & (step <= w.last) for w in (windows[0], windows[-1]))
            along = RankingChange(ranking(first), ranking(last), *(_change(x[first], x[last]) for x in (rank, auc)))
        both = _both_scored(scores, success)
        return RewardRanking(
            name=name,
            verifier=title,
            is_success=bool(both.any() and np.array_equal(scores[both], success[both])),
            whole=ranking(np.ones(len(scores), dtype=np.bool_)),
            categories={c: ranking(category == c) for c in dict.fromkeys(category[both.any(axis=1)].tolist()) if c},
            along=along,
        )

    return tuple(ranked(name, scores) for name, scores in rewards.items())


def rank_correlations(one: Array, other: Array) -> NDArray[np.float64]:
    """(N, G) twice to (N,): Spearman's correlation of each group, over members that have both; ties share their mean
    rank. nan where one of the two is constant."""
    a, b = (_centered(ranks) for ranks in _ranks(one, other))
    spread = (a**2).sum(axis=1) * (b**2).sum(axis=1)
    return np.where(spread > 0, (a * b).sum(axis=1) / np.sqrt(np.where(spread > 0, spread, 1.0)), np.nan)


def group_auc(scores: Array, success: Array) -> NDArray[np.float64]:
    """(N, G) twice to (N,): the share of the pairs of a right and a wrong member in which the right one scores higher,
    a tie one half (the area under the curve, Mann and Whitney's U). nan where there is no such pair."""
    both = _both_scored(scores, success)
    ranks = _ranks(scores, success)[0]
    right, wrong = both & (success > 0.5), both & (success <= 0.5)
    n, m = right.sum(axis=1), wrong.sum(axis=1)
    above = np.where(right, ranks, 0.0).sum(axis=1) - n * (n + 1) / 2
    return np.where(n * m > 0, above / np.maximum(n * m, 1), np.nan)


def _varying_groups(one: Array, other: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) for each: whether members that have both differ in it."""
    a, b = ((_centered(ranks) != 0).any(axis=1) for ranks in _ranks(one, other))
    return a, b


def _both_scored(one: Array, other: Array) -> NDArray[np.bool_]:
    """(N, G): which members have both."""
    return np.isfinite(one) & np.isfinite(other)


# --- inside ---


def _ranks(one: Array, other: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ranks from 1 inside each group over the members that have both, nan for the others."""
    both = _both_scored(one, other)
    if not both.size:
        return np.full(one.shape, np.nan), np.full(other.shape, np.nan)
    a, b = (scipy.stats.rankdata(np.where(both, x, np.nan), axis=1, nan_policy="omit") for x in (one, other))
    return a, b


def _centered(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks minus their mean; 0 for members without one."""
    count = np.isfinite(ranks).sum(axis=1, keepdims=True)
    return np.where(np.isfinite(ranks), ranks - (count + 1) / 2, 0.0)


def _change(first: NDArray[np.float64], last: NDArray[np.float64]) -> Interval:
    return welch_difference(first[np.isfinite(first)], last[np.isfinite(last)])


def _mean(values: NDArray[np.float64], units: NDArray[np.int64], lowest: float) -> Interval:
    """Mean over groups of values in [``lowest``, 1]: identical values get Wilson's interval."""
    kept = np.isfinite(values)
    if kept.sum() > BOOTSTRAP_LIMIT:
        return seeds_interval(values[kept])
    found = mean_interval((values[kept] - lowest) / (1 - lowest), units[kept].tolist())
    score, low, high = (lowest + (1 - lowest) * x for x in (found.score, found.low, found.high))
    return Interval(score, low, high, found.n)


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
    split: Split = "validation",
    progress: Callable[[str, int], None] = lambda task, prompts: None,
) -> dict[TaskKind, list[Group]]:
    """Samples groups of ``GROUP_SIZE`` on ``per_category`` prompts of every category; deterministic.

    ``size``: side of the pictures in pixels. Sampling parameters are the policy's defaults, text at temperature 1.
    """
    source = ScenePrompts(ScenesConfig(size=size), split, seed)
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
    sources: Sequence[RewardSource],
    progress: Callable[[str, str], None] = lambda task, reward: None,
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
            progress(task, name)
            scores, applies = _scores(source, own, judge)
            if applies.any():
                scorers[name], missing[name] = scores, float(np.isnan(scores[applies]).mean())
        category = np.array([group.prompt.category for group in own], dtype=np.str_)
        clusters = [cluster_of(group.prompt) for group in own]
        validity = rank_rewards({**scorers, SUCCESS: success}, verifiers, category, clusters=clusters)
        tasks[task] = SampleQuality(len(own), float(success.mean()), missing, validity)
    return SampleAudit(judge_fingerprint(judge), judge_fingerprint(model), tasks)


def _scores(source: RewardSource, groups: Sequence[Group], judge: Policy) -> tuple[Array, np.ndarray]:
    """(N, G) scores, nan where there is none, and (N,) whether the reward applies."""
    scores, applies = [], []
    for start in range(0, len(groups), BATCH_SIZE):
        table = score_groups([source], groups[start : start + BATCH_SIZE], judge)
        scores.append(torch.where(table.mask, table.scores, torch.nan)[..., 0].numpy())
        applies += [table.reasons.get((p, 0, 0)) != NOT_APPLICABLE for p in range(len(table.tasks))]
    return np.concatenate(scores), np.array(applies)
