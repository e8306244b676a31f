"""Validation: a held-out set of every task, scored every few steps; keeps the best weights and acts on a fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lvrpo.distributed import relay_errors
from lvrpo.policies.base import Sampling
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer
from lvrpo.sampling import derive_seed
from lvrpo.training import rollout_log
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import local_rows, merge_ranks, sample_local
from lvrpo.training.health import ENTROPY, answer_entropies
from lvrpo.training.policies import Policies
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import TrainState, ValidationState
from lvrpo.types import Group, Prompt, Task

Verdict = Literal["best", "kept", "fallen", "blind"]
"""blind: there are no held-out rows, so the last weights are kept."""

Z = 3.0
"""Half width of the interval in standard errors. A run compares several tasks at every look with the best of the looks
before, so 1.96 calls a policy that never changes fallen in two runs of three; 3 does in a few of a hundred."""


ACTIONS: Mapping[Verdict, str] = {
    "best": "kept best",
    "kept": "none",
    "blind": "no held-out rows: kept the last weights",
}
"""What a row of metrics says of a look after which nothing is done."""


@dataclass(frozen=True)
class ValidationReport:
    """One validation."""

    means: Mapping[Task, float]
    verdict: Verdict
    fallen: tuple[Task, ...]
    """Tasks whose paired difference to the best lies below 0 with its whole interval."""
    scores: Mapping[Task, Sequence[float]] = field(default_factory=dict)
    """Of every held-out prompt, in their order."""
    entropies: Mapping[str, float] = field(default_factory=dict)
    """Of the answers to each form of questions."""

    def row(self) -> dict[str, float]:
        """For the metrics."""
        means = {f"validation/{task}": mean for task, mean in self.means.items()}
        return means | {f"{ENTROPY}{form}": bits for form, bits in self.entropies.items()}


class Validator:
    """Scores the held-out prompts and compares with the best so far, prompt by prompt."""

    def __init__(
        self, prompts: Mapping[Task, Sequence[Prompt]], config: TrainConfig, scorer: HeldOutScorer = SUCCESS_ONLY
    ) -> None:
        self.scorer = scorer
        self.prompts: dict[Task, list[Prompt]] = {task: list(rows) for task, rows in prompts.items() if rows}
        self.asks_judge = any(scorer.metric(p) == "reward" for rows in self.prompts.values() for p in rows)
        self.config = config
        rollout = config.rollout
        self.sampling = Sampling(
            group_size=1,
            temperature=0.0,
            max_new_tokens=rollout.max_new_tokens,
            num_steps=rollout.num_steps,
            timestep_shift=rollout.timestep_shift,
            solver=rollout.solver,
            image_size=rollout.image_size,
            image_temperature=rollout.image_temperature,
            choice_temperature=rollout.choice_temperature,
        )

    def score(self, policies: Policies) -> dict[Task, list[float]]:
        """The score of every held-out prompt under the averaged weights, nan where it failed; always the same noise.

        The reference scores for rewards, where right and wrong cannot be told.
        """
        return self._scores(self._sample(policies), policies)

    def _scores(self, outputs: Mapping[Task, Sequence[Group]], policies: Policies) -> dict[Task, list[float]]:
        found: dict[Task, list[float]] = {}
        with policies.use("reference") if self.asks_judge else nullcontext() as judge:
            for task, groups in outputs.items():
                own = local_rows(groups)
                rows: list[list[float]] = []
                with relay_errors():
                    if own:
                        rows = self.scorer.scores([groups[p] for p in own], judge)
                found[task] = [row[0] for row in merge_ranks(dict(zip(own, rows, strict=True))).values()]
        return found

    def _sample(self, policies: Policies) -> dict[Task, list[Group]]:
        """One output for every held-out prompt; every rank samples its share."""
        out: dict[Task, list[Group]] = {}
        with policies.use("ema") as policy:
            for task, rows in self.prompts.items():
                seeds = [derive_seed(self.config.seed, "guard", prompt.id) for prompt in rows]
                out[task] = sample_local(policy, rows, self.sampling, seeds)
        return out

    def validate(self, policies: Policies, state: ValidationState, step: int) -> ValidationReport:
        """Scores the averaged weights and remembers them when they are the best so far, up to noise, and no task has
        fallen."""
        outputs = self._sample(policies)
        report = self._compare(self._scores(outputs, policies), state, step)
        groups = [group for row in outputs.values() for group in row]
        texts = merge_ranks({p: groups[p].trajectories[0].text for p in local_rows(groups)})
        return replace(report, entropies=answer_entropies([group.prompt for group in groups], list(texts.values())))

    def _compare(self, scores: dict[Task, list[float]], state: ValidationState, step: int) -> ValidationReport:
        means: dict[Task, float] = {task: _mean(scores[task]) for task in self.prompts}
        if not self.prompts:
            state.best_step = step
            return ValidationReport(means, "blind", ())
        if not state.best_scores:
            state.best_step, state.best_scores, state.top = step, scores, _mean(list(means.values()))
            return ValidationReport(means, "best", (), scores)
        fallen: tuple[Task, ...] = tuple(task for task in self.prompts if fell(scores[task], state.best_scores[task]))
        if fallen:
            return ValidationReport(means, "fallen", fallen, scores)
        top = max(state.top, float(np.mean([_mean(state.best_scores[task]) for task in self.prompts])))
        mean = float(np.mean(list(means.values())))
        if mean >= top - self._noise(scores):
            state.best_step, state.best_scores, state.top = step, scores, max(top, mean)
            return ValidationReport(means, "best", (), scores)
        return ValidationReport(means, "kept", (), scores)

    def _noise(self, scores: Mapping[Task, Sequence[float]]) -> float:
        """Standard error of the mean of tasks: of two looks that differ by less, the later one counts as the best."""
        kept = [_finite(row) for row in scores.values()]
        return sum(float(np.var(row)) / len(row) for row in kept if len(row)) ** 0.5 / len(scores)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _mean(values: Sequence[float]) -> float:
    """Of those that did not fail; nan where all did."""
    kept = _finite(values)
    return float(np.mean(kept)) if len(kept) else float("nan")


def fell(now: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the mean paired difference is below 0 with its whole interval of ``Z`` standard errors."""
    difference = _finite(np.asarray(now) - np.asarray(before))
    if len(difference) < 2:
        return False
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return float(difference.mean()) + Z * error < 0


# --- what follows a look ---


def apply_validation(
    config: TrainConfig, run: RunDirectory, state: TrainState, report: ValidationReport, row: dict[str, Any]
) -> bool:
    """What follows from a validation; returns whether the run stops."""
    rollout_log.write_validation(run, state.step, report.scores, config.validation.every)
    row |= report.row()
    if report.verdict != "fallen":
        row["validation/action"] = ACTIONS[report.verdict]
        return False
    fallen = ", ".join(report.fallen)
    if config.validation.action == "warn":
        row["validation/action"] = f"warned: {fallen} fell"
        return False
    if config.validation.action == "stop" or state.validation.rollbacks >= config.validation.max_rollbacks:
        row["validation/action"] = f"stopped: {fallen} fell"
        return True
    roll_back(config, run, state, state.validation.best_step)
    row["validation/action"] = f"rolled back to step {state.validation.best_step}: {fallen} fell"
    return False


def roll_back(config: TrainConfig, run: RunDirectory, state: TrainState, step: int) -> None:
    """The weights of a checkpoint, at lower learning rates; steps and seconds go on."""
    at, rollbacks, scale, seconds = state.step, state.validation.rollbacks + 1, state.validation.lr_scale, state.seconds
    state.load(run.checkpoint_dir(step))
    state.step, state.seconds = at, seconds
    state.validation.rollbacks, state.validation.lr_scale = rollbacks, scale * config.validation.rollback_lr


def check_overoptimization(
    config: TrainConfig, run: RunDirectory, state: TrainState, validator: Validator, row: dict[str, Any]
) -> bool:
    """Whether the run stops because a trained reward and its held-out scorer went apart (``Overoptimization``).

    If so the weights to keep are those of the step at which the watched scorer was highest.
    """
    watched = state.overoptimization
    if watched is None:
        return False
    found = watched.validate(state.step, -(-config.steps // config.validation.every), config.validation.every)
    if found is None:
        watched.remember(state.step)
    if not validator.prompts:  # nothing else tells which weights are best
        state.validation.best_step = watched.best_step
    if found is None:
        return False
    words, best = watched.message(state.step, *found), watched.best_step
    if watched.config.action == "warn":
        row["overoptimization/action"] = f"warned: {words}"
        return False
    state.validation.best_step = best  # validation's prompts are too few to tell: it kept later weights
    if watched.config.action == "stop" or state.validation.rollbacks >= config.validation.max_rollbacks:
        row["overoptimization/action"] = f"stopped, step {best} is kept: {words}"
        return True
    roll_back(config, run, state, best)
    row["overoptimization/action"] = f"rolled back to step {best}: {words}"
    return False
