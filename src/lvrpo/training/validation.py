"""Validation on held-out prompts of every task: model selection, and the action if a task regresses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lvrpo.distributed import relay_errors
from lvrpo.errors import ContractError
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer
from lvrpo.rewards.table import MOST_FAILED
from lvrpo.sampling import derive_seed
from lvrpo.training import rollout_log
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import local_rows, merge_ranks, sample_local
from lvrpo.training.health import ENTROPY, answer_entropies
from lvrpo.training.policies import Policies
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import TrainState, ValidationState
from lvrpo.types import Group, Prompt, TaskKind

Verdict = Literal["best", "kept", "regressed", "no_data"]
"""no_data: there are no held-out prompts, so the last weights are the best."""

Z = 3.0
"""Half width of the interval in standard errors. A run compares several tasks at every validation with the best so far,
so with 1.96 two of three runs without any change would have a regression; with 3 a few percent do."""

MAX_ROLLBACKS = 3
"""A run stops when one more would follow."""
ROLLBACK_LR = 0.5
"""Factor on the learning rates after each rollback."""

ACTIONS: Mapping[Verdict, str] = {
    "best": "kept best",
    "kept": "none",
    "no_data": "no held-out rows: kept the last weights",
}
"""Metric ``validation/action`` for verdicts without an action."""


@dataclass(frozen=True)
class ValidationReport:
    """The result of one validation."""

    means: Mapping[TaskKind, float]
    verdict: Verdict
    regressed: tuple[TaskKind, ...]
    """Tasks whose paired difference to the best or the initial weights is significantly below 0."""
    scores: Mapping[TaskKind, Sequence[float]] = field(default_factory=dict)
    """Scores of all held-out prompts, in order."""
    entropies: Mapping[str, float] = field(default_factory=dict)
    """Answer entropy by form of questions."""

    def row(self) -> dict[str, float]:
        """The row for the metrics."""
        means = {f"validation/{task}": mean for task, mean in self.means.items()}
        missing = {task: float(np.mean(~np.isfinite(row))) for task, row in self.scores.items()}
        failed = {f"validation_failed/{task}": share for task, share in missing.items() if share}
        return means | failed | {f"{ENTROPY}{form}": bits for form, bits in self.entropies.items()}


class Validator:
    """Scores the held-out prompts and compares them, paired, with the best weights so far."""

    def __init__(
        self, prompts: Mapping[TaskKind, Sequence[Prompt]], config: TrainConfig, scorer: HeldOutScorer = SUCCESS_ONLY
    ) -> None:
        self.scorer = scorer
        self.prompts: dict[TaskKind, list[Prompt]] = {task: list(rows) for task, rows in prompts.items() if rows}
        self.uses_judge = any(scorer.metric(p) == "reward" for rows in self.prompts.values() for p in rows)
        self.config = config
        self.sampling = config.rollout.held_out_sampling()

    def score(self, policies: Policies) -> dict[TaskKind, list[float]]:
        """The score of every held-out prompt under the EMA weights, with fixed seeds; nan if it failed.

        Prompts without verifiable success are scored by rewards, with the reference as judge.
        """
        return self._scores(self._sample(policies), policies)

    def _scores(self, outputs: Mapping[TaskKind, Sequence[Group]], policies: Policies) -> dict[TaskKind, list[float]]:
        found: dict[TaskKind, list[float]] = {}
        with policies.use("reference") if self.uses_judge else nullcontext() as judge:
            for task, groups in outputs.items():
                local = local_rows(groups)
                mine: dict[int, tuple[float, str]] = {}
                with relay_errors():
                    if local:
                        rows, reasons = self.scorer.scores([groups[p] for p in local], judge)
                        mine = {p: (rows[i][0], reasons.get(i, "")) for i, p in enumerate(local)}
                scored = list(merge_ranks(mine).values())
                self._require_scores(task, scored)
                found[task] = [score for score, _ in scored]
        return found

    def _require_scores(self, task: TaskKind, scored: Sequence[tuple[float, str]]) -> None:
        """Raises ContractError where a rule of success failed on too many outputs of all ranks, or nothing has a score.

        A mean of the few that are left would choose the weights.
        """
        prompts = self.prompts[task]
        of_rule = [one for one, prompt in zip(scored, prompts, strict=True) if self.scorer.metric(prompt) == "success"]
        for limit, words, each in ((MOST_FAILED, "more than half", of_rule), (1, "all", scored)):
            failed = Counter(why for score, why in each if not math.isfinite(score))
            if failed.total() > limit * len(each) or 0 < failed.total() == len(each):
                why, times = failed.most_common(1)[0]
                raise ContractError(
                    f"validation of {task}: {failed.total()} of {len(each)} outputs, {words}, have no score; "
                    f"most often ({times}): {why}: correct what scores them"
                )

    def _sample(self, policies: Policies) -> dict[TaskKind, list[Group]]:
        """One output for every held-out prompt; every rank samples its share."""
        out: dict[TaskKind, list[Group]] = {}
        with policies.use("ema") as policy:
            for task, rows in self.prompts.items():
                seeds = [derive_seed(self.config.seed, "guard", prompt.id) for prompt in rows]
                out[task] = sample_local(policy, rows, self.sampling, seeds)
        return out

    def validate(self, policies: Policies, state: ValidationState, step: int) -> ValidationReport:
        """Scores the EMA weights; updates the best step unless a task regressed or the mean is worse beyond noise.

        A task is compared with the initial weights too: in steps within noise the best weights can lose it altogether.
        """
        outputs = self._sample(policies)
        report = self._compare(self._scores(outputs, policies), state, step)
        groups = [group for row in outputs.values() for group in row]
        texts = merge_ranks({p: groups[p].trajectories[0].text for p in local_rows(groups)})
        return replace(report, entropies=answer_entropies([group.prompt for group in groups], list(texts.values())))

    def _compare(self, scores: dict[TaskKind, list[float]], state: ValidationState, step: int) -> ValidationReport:
        means: dict[TaskKind, float] = {task: _mean(scores[task]) for task in self.prompts}
        if not self.prompts:
            state.best_step = step
            return ValidationReport(means, "no_data", ())
        if not state.best_scores:
            state.best_step, state.best_scores, state.top = step, scores, _mean(list(means.values()))
            state.initial_scores = scores
            return ValidationReport(means, "best", (), scores)
        anchors = [state.best_scores, state.initial_scores or state.best_scores]
        regressed: tuple[TaskKind, ...] = tuple(
            task for task in self.prompts if any(has_regressed(scores[task], before[task]) for before in anchors)
        )
        if regressed:
            return ValidationReport(means, "regressed", regressed, scores)
        top = max(state.top, float(np.mean([_mean(state.best_scores[task]) for task in self.prompts])))
        mean = float(np.mean(list(means.values())))
        if mean >= top - self._noise(scores):
            state.best_step, state.best_scores, state.top = step, scores, max(top, mean)
            return ValidationReport(means, "best", (), scores)
        return ValidationReport(means, "kept", (), scores)

    def _noise(self, scores: Mapping[TaskKind, Sequence[float]]) -> float:
        """Standard error of the mean over tasks; of two validations that differ by less, the later counts as best."""
        finite = [_finite(row) for row in scores.values()]
        return sum(float(np.var(row)) / len(row) for row in finite if len(row)) ** 0.5 / len(scores)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; nan if there are none."""
    finite = _finite(values)
    return float(np.mean(finite)) if len(finite) else float("nan")


def has_regressed(now: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the mean paired difference is more than ``Z`` standard errors below 0."""
    difference = _finite(np.asarray(now) - np.asarray(before))
    if len(difference) < 2:
        return False
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return float(difference.mean()) + Z * error < 0


# --- actions ---


def apply_validation(
    config: TrainConfig, run: RunDirectory, state: TrainState, report: ValidationReport, row: dict[str, Any]
) -> bool:
    """Logs a validation and takes the configured action if a task regressed; returns whether the run stops."""
    rollout_log.write_validation(run, state.step, report.scores, config.validation.every)
    row |= report.row()
    if report.verdict != "regressed":
        row["validation/action"] = ACTIONS[report.verdict]
        return False
    regressed = ", ".join(report.regressed)
    if config.validation.action == "warn":
        row["validation/action"] = f"warned: {regressed} fell"
        return False
    if config.validation.action == "stop" or state.validation.rollbacks >= MAX_ROLLBACKS:
        row["validation/action"] = f"stopped: {regressed} fell"
        return True
    roll_back(config, run, state, state.validation.best_step)
    row["validation/action"] = f"rolled back to step {state.validation.best_step}: {regressed} fell"
    return False


def roll_back(config: TrainConfig, run: RunDirectory, state: TrainState, step: int) -> None:
    """Loads a checkpoint, from now on the best, and lowers the learning rates; step and time counters continue."""
    rollbacks, scale = state.validation.rollbacks + 1, state.validation.lr_scale
    current_step, seconds = state.step, state.seconds
    state.load(run.checkpoint_dir(step))
    state.step, state.seconds = current_step, seconds
    state.validation.rollbacks, state.validation.lr_scale = rollbacks, scale * ROLLBACK_LR
    state.validation.best_step = step  # what was the best at that step may be deleted by now


def check_overoptimization(
    config: TrainConfig, run: RunDirectory, state: TrainState, validator: Validator, row: dict[str, Any]
) -> bool:
    """Runs the over-optimization detector and takes its action; returns whether the run stops.

    After a detection the best step is the one with the highest watched scorer.
    """
    detector = state.overoptimization
    if detector is None:
        return False
    found = detector.detect(state.step, -(-config.steps // config.validation.every), config.validation.every)
    if found is None:
        detector.update_best(state.step)
    if not validator.prompts:  # no other criterion
        state.validation.best_step = detector.best_step
    if found is None:
        return False
    message, best = detector.message(state.step, *found), detector.best_step
    if detector.config.action == "warn":
        row["overoptimization/action"] = f"warned: {message}"
        return False
    state.validation.best_step = best  # validation has too few prompts to detect it and chose later weights
    if detector.config.action == "stop" or state.validation.rollbacks >= MAX_ROLLBACKS:
        row["overoptimization/action"] = f"stopped, step {best} is kept: {message}"
        return True
    roll_back(config, run, state, best)
    row["overoptimization/action"] = f"rolled back to step {best}: {message}"
    return False
