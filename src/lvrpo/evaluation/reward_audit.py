"""The reward audit of a run: variance shares of the advantages, drift, over-optimization, missing scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lvrpo.algorithms import (
    advantage_parts,
    gdpo_advantages,
    group_correlation,
    group_relative_advantages,
    normalize_rewards,
    variance_shares,
)
from lvrpo.audit_records import (
    Alarms,
    Change,
    Correlation,
    GroupAudit,
    MissingScores,
    Overoptimization,
    RewardAudit,
    ScorerAudit,
    Series,
    Window,
)
from lvrpo.evaluation.recorded_groups import (
    AdvantageSettings,
    Array,
    RecordedGroups,
    RecordedRun,
    Validations,
    group_means,
    in_window,
    read_recorded_run,
    split_windows,
)
from lvrpo.evaluation.reward_ranking import group_auc, rank_rewards
from lvrpo.statistics import Interval, comparable, divergence, welch_difference
from lvrpo.training.advantages import complete_members, win_rates
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import TASKS

AUDIT = "audit.json"
EDGE = 0.01
"""A constant group is all best (all worst) within this fraction of the scorer's range from its maximum (minimum)."""
MAX_POINTS = 400
"""Maximum number of points of a curve; longer ones are binned."""


def audit_rewards(record: RecordedRun) -> RewardAudit:
    """The audit of every task, and the alarms."""
    groups, controls = record.groups, record.controls
    windows = split_windows(groups.step)
    tasks: dict[str, GroupAudit] = {}
    for task in [*(t for t in TASKS if t in groups.task), *sorted(set(groups.task) - set(TASKS))]:
        base = None if controls is None else controls.select(controls.task == task)
        own = groups.select(groups.task == task)
        tasks[str(task)] = _audit_task(own, base, windows, record.settings, record.verifiers)
    steps = np.unique(groups.step)
    return RewardAudit(
        formula=record.settings.kind,
        other_formula="summed" if record.settings.per_reward else "gdpo",
        steps=Window(int(steps[0]), int(steps[-1])),
        recorded=len(steps),
        windows=windows,
        tasks=tasks,
        alarms=detect_overoptimization(record, windows),
    )


def _audit_task(
    groups: RecordedGroups,
    controls: RecordedGroups | None,
    windows: Sequence[Window],
    settings: AdvantageSettings,
    verifiers: Sequence[str] = (),
) -> GroupAudit:
    """The audit of one task, to which all groups belong."""
    names, *_, weights = groups.trained_rewards()
    shares, rest, with_signal, share_series = _advantage_shares(groups, settings)
    others = dict(zip(names, _other_formula_shares(groups, settings), strict=True))
    weight_shares = (weights**2 / (weights**2).sum(dim=1, keepdim=True)).nanmean(dim=0)
    configured = dict(zip(names, weight_shares.tolist(), strict=True))
    scorers, base = groups.scorers(), {} if controls is None else controls.scorers()
    traits = groups.output_traits()
    weight_of = dict(zip(groups.names, groups.weights.mean(axis=0).tolist(), strict=True))
    audits = [
        ScorerAudit(
            name=name,
            weight=weight_of.get(name),
            mean=_mean_change(groups, values, windows, controls, base.get(name)),
            share=shares.get(name),
            configured_share=configured.get(name),
            other_share=others.get(name),
            missing=_missing(groups, name),
            **_constant(values, settings.std_floor)[0],
            correlations={n: _correlation(values, v) for n, v in {**scorers, **traits}.items() if n != name},
        )
        for name, values in scorers.items()
    ]
    validity = rank_rewards(scorers, verifiers, groups.category, groups.step, windows)
    judged = [found.name for found in validity if not found.is_success]
    drift, base_drift = groups.drift_traits(), {} if controls is None else controls.drift_traits()
    series = {f"share/{name}": points for name, points in share_series.items()}
    series |= {
        f"constant/{name}": by_step(groups.step, _constant(values, settings.std_floor)[1])
        for name, values in scorers.items()
        if name in shares
    }
    series |= _auc_series(groups, judged)
    series |= {name: by_step(groups.step, group_means(values)) for name, values in drift.items()}
    control_series = {} if controls is None else _auc_series(controls, [name for name in judged if name in base])
    if controls is not None:
        control_series |= {n: by_step(controls.step, group_means(v)) for n, v in base_drift.items()}
    return GroupAudit(
        groups=len(groups.step),
        with_signal=with_signal,
        rest=rest,
        scorers=tuple(audits),
        validity=validity,
        drift={name: _mean_change(groups, v, windows, controls, base_drift.get(name)) for name, v in drift.items()},
        series=series,
        control_series=control_series,
    )


def _advantage_shares(
    groups: RecordedGroups, settings: AdvantageSettings
) -> tuple[dict[str, float], float, float, Series]:
    """Variance shares of the advantages by reward, the remainder, the share of groups with signal, and curves."""
    names, scores, mask, weights = groups.trained_rewards()
    if settings.kind == "win_rate":
        scores, mask = win_rates(scores, mask, settings.std_floor)
    normalization = "reward" if settings.per_reward else "sum"
    parts = advantage_parts(
        scores,
        mask,
        weights,
        normalization=normalization,
        std_floor=settings.std_floor,
        normalize=groups.reward_normalizations(names),
        batches=torch.from_numpy(groups.step),
    )
    found = variance_shares(parts, torch.from_numpy(groups.advantages), _members(mask, settings.per_reward))
    total = found.total.sum()
    shares = dict(zip(names, found.pooled().tolist(), strict=True))
    series = {
        name: by_step(groups.step, found.by_reward[:, k].numpy(), found.total.numpy()) for k, name in enumerate(names)
    }
    return shares, float(found.rest.sum() / total), float((found.total > 0).float().mean()), series


def _other_formula_shares(groups: RecordedGroups, settings: AdvantageSettings) -> list[float]:
    """Variance shares of the trained rewards under the other advantage formula, on the same scores."""
    names, scores, mask, weights = groups.trained_rewards()
    floor = settings.std_floor
    scales, steps = groups.reward_normalizations(names), torch.from_numpy(groups.step)
    if settings.per_reward:
        scaled = normalize_rewards(scores, mask, steps, scales, std_floor=floor)
        total = torch.where(mask, scaled * weights[:, None], 0.0).sum(dim=2)
        advantages = group_relative_advantages(total, _members(mask, False), std_floor=floor)
    else:
        advantages = gdpo_advantages(scores, mask, weights, steps, std_floor=floor, normalize=scales)
    if settings.clamp is not None:
        advantages = advantages.clamp(-settings.clamp, settings.clamp)
    normalization = "sum" if settings.per_reward else "reward"
    parts = advantage_parts(
        scores, mask, weights, normalization=normalization, std_floor=floor, normalize=scales, batches=steps
    )
    return variance_shares(parts, advantages, _members(mask, not settings.per_reward)).pooled().tolist()


def _mean_change(
    groups: RecordedGroups,
    values: Array,
    windows: Sequence[Window],
    controls: RecordedGroups | None,
    base: Array | None,
) -> Change:
    """Mean of a scorer or trait in the first and in the last window, with groups as units."""
    means = group_means(values)
    first, last = (in_window(groups.step, means, window) for window in (windows[0], windows[-1]))
    control = float("nan")
    if controls is not None and base is not None:
        control = _mean(in_window(controls.step, group_means(base), windows[-1]))
    difference = welch_difference(first, last) if len(windows) > 1 else welch_difference([], [])
    return Change(_mean(first), _mean(last), difference, control)


def by_step(
    step: NDArray[np.int64], values: NDArray[Any], weights: NDArray[Any] | None = None
) -> list[tuple[float, float]]:
    """(step, sum of values / sum of weights); weights: 1 by default. Steps without values are left out."""
    valid = np.isfinite(values)
    steps, place = np.unique(step[valid], return_inverse=True)
    size = -(-len(steps) // MAX_POINTS) or 1
    bins = place // size
    sums = np.bincount(bins, values[valid])
    counts = np.bincount(bins, None if weights is None else weights[valid])
    middles = [float(part.mean()) for part in np.split(steps, range(size, len(steps), size))] if len(steps) else []
    return [(at, float(s / n)) for at, s, n in zip(middles, sums, counts, strict=True) if n > 0]


def write_audit(run: Path) -> RewardAudit:
    """Audits a run and writes ``audit.json`` into its directory."""
    audit = audit_rewards(read_recorded_run(run))
    RunDirectory(run).write_json(AUDIT, asdict(audit))
    return audit


# --- inside ---


def _members(mask: torch.Tensor, per_reward: bool) -> torch.Tensor:
    """The members that have an advantage: those with any score, or with all scores that apply to their group."""
    return mask.any(dim=2) if per_reward else complete_members(mask)


def _auc_series(groups: RecordedGroups, names: Sequence[str]) -> Series:
    """AUC of right against wrong members, by step."""
    scorers = groups.scorers()
    return {f"auc/{name}": by_step(groups.step, group_auc(scorers[name], groups.success)) for name in names}


def _missing(groups: RecordedGroups, name: str) -> float:
    if name not in groups.names:
        return 0.0
    k = groups.names.index(name)
    return float(np.isnan(groups.scores[groups.applies[:, k], :, k]).mean())


def _constant(values: Array, std_floor: float) -> tuple[dict[str, float], Array]:
    """Shares of groups: constant, and so at the top, at the bottom; and per group 1, 0, or nan without scores.

    Shares are nan where every score failed.
    """
    scored = np.isfinite(values).any(axis=1)
    if not scored.any():
        return dict.fromkeys(("constant", "all_best", "all_worst"), np.nan), np.full(len(values), np.nan, np.float32)
    rows = values[scored]
    low, high = np.nanmin(rows), np.nanmax(rows)
    above = rows - np.nanmin(rows, axis=1, keepdims=True)  # equal scores then have a std of exactly 0
    constant = np.nanstd(above, axis=1) <= std_floor
    edge = EDGE * (high - low)
    mean = np.nanmean(rows, axis=1)
    group_means = np.full(len(values), np.nan, dtype=np.float32)
    group_means[scored] = constant
    varied = high > low  # a scorer that never varies has no range
    ends = {
        "all_best": constant & varied & (mean >= high - edge),
        "all_worst": constant & varied & (mean <= low + edge),
    }
    return {name: float(x.mean()) for name, x in {"constant": constant, **ends}.items()}, group_means


def _correlation(one: Array, other: Array) -> Correlation:
    x, y = torch.from_numpy(np.ascontiguousarray(one)), torch.from_numpy(np.ascontiguousarray(other))
    return Correlation(*group_correlation(x, y, x.isfinite() & y.isfinite()))


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


VALIDATION = "validation"
"""Scorer name of the validation prompts."""
Labels = Sequence[str]

ERROR = 0.05
"""Upper bound of the family-wise error rate: the chance of any alarm in a run without change."""


@dataclass(frozen=True)
class RewardScorerPair:
    """A trained reward and a held-out scorer, by window of the run."""

    task: str
    reward: str
    scorer: str
    rewards: Sequence[Array]
    """Means of groups."""
    scores: Sequence[Array]
    """Means of groups, or scores of the validation prompts in fixed order."""
    paired: bool
    """Whether the scores of two windows are of the same prompts."""
    strata: tuple[Sequence[Labels], Sequence[Labels]]
    """Category of every value of ``rewards`` and of ``scores``; unused for paired scores."""


def detect_overoptimization(record: RecordedRun, windows: Sequence[Window]) -> Alarms:
    """Compares every earlier window with the last, for every trained reward and held-out scorer of a task.

    An alarm: the interval of the reward's change lies above 0 and that of the scorer's below 0. The intervals (Welch's
    t over group means, within categories of prompts; Student's t over the paired validation prompts) have confidence
    1 - .05 / comparisons (Bonferroni). Rewards with too many missing scores are reported as well.
    """
    groups = record.groups
    same: list[tuple[str, str, str]] = []
    pairs = [
        pair
        for task in dict.fromkeys(groups.task.tolist())
        for pair in _pairs(task, groups.select(groups.task == task), record.validations, windows, same)
    ]
    comparisons = sum(len(comparable(pair.rewards, pair.scores)) for pair in pairs)
    confidence = 1 - ERROR / max(1, comparisons)
    found = [alarm for pair in pairs if (alarm := _largest_divergence(pair, windows, confidence)) is not None]
    return Alarms(tuple(found), comparisons, confidence, tuple(same), tuple(_missing_scores(record, windows)))


def _missing_scores(record: RecordedRun, windows: Sequence[Window]) -> Iterator[MissingScores]:
    groups = record.groups
    whole = Window(int(groups.step.min()), int(groups.step.max()))
    for task in dict.fromkeys(groups.task.tolist()):
        for k, name in enumerate(groups.names):
            for window in (whole, windows[-1]):
                rows = (groups.task == task) & groups.applies[:, k]
                rows &= (groups.step >= window.first) & (groups.step <= window.last)
                share = float(np.isnan(groups.scores[rows, :, k]).mean()) if rows.any() else 0.0
                limit = record.max_failed.get(name, 1.0)
                if share > limit:
                    words = (
                        f"{task}: {share:.0%} of the scores of {name} failed in steps {window.first} to {window.last}, "
                        f"{limit:.0%} may"
                    )
                    yield MissingScores(task, name, share, words)
                    break


def _largest_divergence(
    pair: RewardScorerPair, windows: Sequence[Window], confidence: float
) -> Overoptimization | None:
    found = divergence(pair.rewards, pair.scores, confidence, pair.paired, pair.strata)
    if found is None:
        return None
    before, after, reward, scorer = windows[found.part], windows[-1], found.reward, found.scorer
    words = _describe(pair, before, after, reward, scorer)
    return Overoptimization(pair.task, pair.reward, pair.scorer, before, after, reward, scorer, words)


def _pairs(
    task: str,
    groups: RecordedGroups,
    validations: Validations,
    windows: Sequence[Window],
    same: list[tuple[str, str, str]],
) -> Iterator[RewardScorerPair]:
    """The pairs of one task; pairs with equal scores for every output are added to ``same``."""
    scorers = groups.scorers()
    trained = groups.trained_rewards()[0]
    held_out = {name: values for name, values in scorers.items() if name not in trained}
    validation = _validation_scores(validations, task, windows)
    for reward in trained:
        rewards, of_rewards = _window_means(groups, scorers[reward], windows)
        for name, values in held_out.items():
            if np.array_equal(values, scorers[reward], equal_nan=True):
                same.append((task, reward, name))
            else:
                scores, of_scores = _window_means(groups, values, windows)
                yield RewardScorerPair(task, reward, name, rewards, scores, False, (of_rewards, of_scores))
        if validation is not None:
            yield RewardScorerPair(task, reward, VALIDATION, rewards, validation, True, (of_rewards, ()))


def _window_means(groups: RecordedGroups, values: Array, windows: Sequence[Window]) -> tuple[list[Array], list[Labels]]:
    """Group means of each window, and the categories of their prompts."""
    means = group_means(values)
    finite = np.isfinite(means)
    return [in_window(groups.step, means, window) for window in windows], [
        groups.category[finite & (groups.step >= window.first) & (groups.step <= window.last)].tolist()
        for window in windows
    ]


def _validation_scores(validations: Validations, task: str, windows: Sequence[Window]) -> list[Array] | None:
    """The last validation of each window, empty where there is none; the first and last window are open-ended."""
    kept: list[tuple[int, Array]] = [(step, by_task[task]) for step, by_task in validations if task in by_task]
    if not kept:
        return None
    # paired prompt by prompt: only prompts that every validation scored
    scored = np.isfinite(np.stack([scores for _, scores in kept])).all(axis=0)
    parts: list[Array] = [np.zeros(0, dtype=np.float32) for _ in windows]
    for step, scores in kept:
        place = next((i for i, window in enumerate(windows) if step <= window.last), len(windows) - 1)
        parts[place] = scores[scored]
    return parts


def _describe(pair: RewardScorerPair, before: Window, after: Window, reward: Interval, scorer: Interval) -> str:
    held_out = "validation's held-out score" if pair.scorer == VALIDATION else pair.scorer
    return (
        f"{pair.task}: {pair.reward} rose by {_format_change(reward)} while {held_out} fell by "
        f"{_format_change(scorer)}, from steps {before.first} to {before.last} to steps {after.first} to {after.last}"
    )


def _format_change(change: Interval) -> str:
    ends = sorted((abs(change.low), abs(change.high)))
    return f"{abs(change.score):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
