"""Ranking quality of rewards against ground truth within groups, for a run or for a model's own samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import cast

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from lvrpo.algorithms.advantages import NormalizeChoice
from lvrpo.audit_records import Ranking, RankingChange, RewardRanking, SampleAudit, SampleQuality, Window
from lvrpo.config import read_yaml
from lvrpo.data.scenes import CATEGORIES, ScenePrompts, ScenesConfig
from lvrpo.errors import InputError
from lvrpo.evaluation.suite import cluster_of
from lvrpo.policies.base import Policy
from lvrpo.reading import structure_errors
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.row import RewardConfig, RewardSource
from lvrpo.rewards.success import successes
from lvrpo.rewards.table import NOT_APPLICABLE, score_groups
from lvrpo.sampling import derive_seed
from lvrpo.statistics import Interval, mean_interval, seeds_interval, welch_difference
from lvrpo.training.rollout_log import TRAITS, RolloutRecord, has_records, read_controls, read_steps, read_validations
from lvrpo.training.run_directory import CONFIG, RunDirectory
from lvrpo.types import TASKS, Group, TaskKind

SUCCESS = "success"
"""Scorer: whether an output is right as a whole, where that is verifiable. Never a trained reward."""
VERIFIER = "scene_facts"
"""The reward that grades outputs by ground truth, where a run scores it."""
WINDOWS = 5
"""Windows of equal length that a run is split into; the first and the last are compared."""

Array = NDArray[np.float32]
Validations = Sequence[tuple[int, Mapping[str, Array]]]
"""(step, scores of the held-out prompts by task)."""


@dataclass(frozen=True)
class AdvantageSettings:
    """The keys of the configuration's ``advantages`` section that the audit needs."""

    kind: str = "gdpo"
    std_floor: float = 0.01
    clamp: float | None = None

    @property
    def per_reward(self) -> bool:
        """Whether each reward is normalized before they are summed."""
        return self.kind == "gdpo"


@dataclass(frozen=True)
class RecordedGroups:
    """The groups of many steps, concatenated: N groups of G members, with K rewards."""

    names: tuple[str, ...]
    weights: Array
    """(N, K): of the step that a group belongs to."""
    step: NDArray[np.int64]
    """(N,)"""
    task: NDArray[np.str_]
    """(N,)"""
    category: NDArray[np.str_]
    """(N,): of the prompt; "" where it has none, or the record is of an older version."""
    scores: Array
    """(N, G, K)"""
    applies: NDArray[np.bool_]
    """(N, K)"""
    judged: NDArray[np.bool_]
    """(N, K)"""
    success: Array
    """(N, G)"""
    traits: Array
    """(N, G, 6)"""
    text_diversity: Array
    """(N,)"""
    picture_diversity: Array
    """(N,)"""
    advantages: Array
    """(N, G)"""
    normalize: tuple[str, ...] = ()
    """K choices of ``rewards.normalize``, "" where ``advantages.kind`` decides; empty: that for all."""

    @classmethod
    def join(cls, records: Iterable[RolloutRecord]) -> RecordedGroups | None:
        """Concatenates records; None if there are none. Raises InputError if their rewards differ."""
        rows = list(records)
        if not rows:
            return None
        for row in rows:
            if row.names != rows[0].names or row.scores.shape[1:] != rows[0].scores.shape[1:]:
                raise InputError(
                    f"scores of step {row.step}: other rewards or another group size than at step {rows[0].step}: "
                    "audit runs of one configuration"
                )
        joined = {
            name: np.concatenate([getattr(row, name) for row in rows])  # the fields of both classes
            for name in (f.name for f in fields(cls))
            if name not in ("names", "weights", "step", "task", "category", "normalize")
        }
        weights = np.concatenate([np.broadcast_to(row.weights, (len(row.tasks), len(row.names))) for row in rows])
        step = np.concatenate([np.full(len(row.tasks), row.step) for row in rows])
        task = np.concatenate([np.array(row.tasks, dtype=np.str_) for row in rows])
        category = np.concatenate([np.array(row.categories or [""] * len(row.tasks), dtype=np.str_) for row in rows])
        return cls(rows[0].names, weights, step, task, category, **joined, normalize=rows[0].normalize)

    def select(self, rows: NDArray[np.bool_]) -> RecordedGroups:
        """The groups where ``rows`` is True."""
        group_means = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("names", "normalize")
        }
        return replace(self, **group_means)

    def scorers(self) -> dict[str, Array]:
        """(N, G) by name, nan where there is none: rewards that apply to any of the groups, and ``SUCCESS``."""
        found = {name: self.scores[:, :, k] for k, name in enumerate(self.names) if self.applies[:, k].any()}
        if np.isfinite(self.success).any():
            found.setdefault(SUCCESS, self.success)
        return found

    def output_traits(self) -> dict[str, Array]:
        """(N, G) by name: traits of an output that a reward may depend on spuriously."""
        traits = dict(zip(TRAITS, np.moveaxis(self.traits, 2, 0), strict=True))
        colors = np.mean([traits[name] for name in ("red", "green", "blue")], axis=0)
        found = {"tokens": traits["tokens"], "brightness": colors, "contrast": traits["contrast"]}
        return {name: values for name, values in found.items() if np.isfinite(values).any()}

    def drift_traits(self) -> dict[str, Array]:
        """(N,) or (N, G) by name: traits, and the diversity inside groups."""
        found = dict(zip(TRAITS, np.moveaxis(self.traits, 2, 0), strict=True))
        found |= {"text_diversity": self.text_diversity, "picture_diversity": self.picture_diversity}
        return {name: values for name, values in found.items() if np.isfinite(values).any()}

    def trained_rewards(self) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Names, scores (N, G, K'), mask and weights (N, K') of the rewards that are trained in, and apply to, any
        group. The mask is True where a score enters the advantages.
        """
        counts = self.applies & (self.weights > 0)
        kept = [k for k in range(len(self.names)) if counts[:, k].any()]
        scores, weights = torch.from_numpy(self.scores[:, :, kept]), torch.from_numpy(self.weights[:, kept])
        mask = scores.isfinite() & torch.from_numpy(self.judged[:, None, kept]) & (weights > 0)[:, None]
        return [self.names[k] for k in kept], scores, mask, weights

    def reward_normalizations(self, names: Sequence[str]) -> list[NormalizeChoice | None]:
        """The choice of each reward that has a scale of its own."""
        choices = dict(zip(self.names, self.normalize or ("",) * len(self.names), strict=True))
        return [cast("NormalizeChoice | None", choices[name] or None) for name in names]


@dataclass(frozen=True)
class RecordedRun:
    """Everything that the audit of a run reads."""

    groups: RecordedGroups
    controls: RecordedGroups | None
    validations: Validations
    settings: AdvantageSettings
    verifiers: tuple[str, ...] = ()
    """The rewards that grade outputs by ground truth; held-out ones first."""
    max_failed: Mapping[str, float] = field(default_factory=dict)
    """Per reward, the share of its scores that may fail; 1 where absent."""


def read_recorded_run(run: Path) -> RecordedRun:
    """Reads ``scores/`` and the advantage settings; raises InputError where there are no scores."""
    RunDirectory.read(run)
    if not has_records(run):
        raise InputError(
            f"{run}: holds no scores of training steps: lvrpo train and lvrpo quickstart keep them in scores/; "
            "pretraining and older runs have none"
        )
    config = read_yaml(run / CONFIG)
    with structure_errors(str(run / CONFIG)):
        section = config.get("advantages") or {}
        known = {f.name: section[f.name] for f in fields(AdvantageSettings) if section.get(f.name) is not None}
        rewards = [(row.get("label") or row["name"], row) for row in config.get("rewards") or ()]
        default = (config.get("health") or {}).get("max_failed", 1.0)  # runs of older versions have none
        shares = {title: default if row.get("max_failed") is None else row["max_failed"] for title, row in rewards}
    groups = RecordedGroups.join(read_steps(run))
    assert groups is not None
    graded = [(title, row.get("weight") != 0) for title, row in rewards if row.get("name") == VERIFIER]
    titles = tuple(title for title, _ in sorted(graded, key=lambda pair: pair[1]))
    controls, validations = RecordedGroups.join(read_controls(run)), list(read_validations(run))
    return RecordedRun(groups, controls, validations, AdvantageSettings(**known), titles, shares)


def split_windows(step: NDArray[np.int64]) -> tuple[Window, ...]:
    """Splits the recorded steps into ``WINDOWS`` windows of nearly equal size; fewer where there are fewer steps."""
    steps = np.unique(step)
    parts = np.array_split(steps, min(WINDOWS, len(steps)))
    return tuple(Window(int(part[0]), int(part[-1])) for part in parts)


def group_means(values: Array) -> Array:
    """(N, G) or (N,) to (N,): the mean of the members that have a value, nan where none has."""
    if values.ndim == 1:
        return values
    valid = np.isfinite(values)
    count = valid.sum(axis=1)
    return np.where(count > 0, np.where(valid, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def in_window(step: NDArray[np.int64], values: Array, window: Window) -> Array:
    """The finite values of groups whose step lies in the window."""
    return values[(step >= window.first) & (step <= window.last) & np.isfinite(values)]


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
            differ = [(_centered(ranks) != 0).any(axis=1) for ranks in _ranks(scores[rows], grades[rows])]
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
    progress: Callable[[str, int], None] = lambda task, prompts: None,
) -> dict[TaskKind, list[Group]]:
    """Samples groups of ``GROUP_SIZE`` on ``per_category`` prompts of every category; deterministic.

    ``size``: side of the pictures in pixels. Sampling parameters are the policy's defaults, text at temperature 1.
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
    sources: Sequence[RewardSource],
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


def _scores(source: RewardSource, groups: Sequence[Group], judge: Policy) -> tuple[Array, np.ndarray]:
    """(N, G) scores, nan where there is none, and (N,) whether the reward applies."""
    scores, applies = [], []
    for start in range(0, len(groups), BATCH_SIZE):
        table = score_groups([source], groups[start : start + BATCH_SIZE], judge)
        scores.append(torch.where(table.mask, table.scores, torch.nan)[..., 0].numpy())
        applies += [table.reasons.get((p, 0, 0)) != NOT_APPLICABLE for p in range(len(table.tasks))]
    return np.concatenate(scores), np.array(applies)
