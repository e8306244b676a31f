"""The guard: a held-out set of every task, scored every few steps; keeps the best weights and acts on a fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lvrpo.policies.base import Policy, Sampling
from lvrpo.rewards.success import successes
from lvrpo.sampling import derive_seed
from lvrpo.training.config import TrainConfig
from lvrpo.training.state import GuardState
from lvrpo.types import Prompt, Task

Verdict = Literal["best", "kept", "fallen"]

Z = 3.0
"""Half width of the interval in standard errors. A run compares several tasks at every look with the best of the looks
before, so 1.96 calls a policy that never changes fallen in two runs of three; 3 does in a few of a hundred."""


@dataclass(frozen=True)
class GuardReport:
    """One look of the guard."""

    means: Mapping[Task, float]
    verdict: Verdict
    fallen: tuple[Task, ...]
    """Tasks whose paired difference to the best lies below 0 with its whole interval."""
    scores: Mapping[Task, Sequence[float]] = field(default_factory=dict)
    """Of every held-out prompt, in their order."""


class Guard:
    """Scores the held-out prompts and compares with the best so far, prompt by prompt."""

    def __init__(self, prompts: Mapping[Task, Sequence[Prompt]], config: TrainConfig) -> None:
        self.prompts: dict[Task, list[Prompt]] = {task: list(rows) for task, rows in prompts.items() if rows}
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
        )

    def score(self, policy: Policy) -> dict[Task, list[float]]:
        """Right or wrong for every held-out prompt; the same noise at every look."""
        out: dict[Task, list[float]] = {}
        for task, rows in self.prompts.items():
            seeds = [derive_seed(self.config.seed, "guard", prompt.id) for prompt in rows]
            out[task] = [row[0] for row in successes(policy.sample(rows, self.sampling, seeds))]
        return out

    def look(self, policy: Policy, state: GuardState, step: int) -> GuardReport:
        """Scores ``policy`` and remembers it when it is the best so far, up to noise, and no task has fallen."""
        scores = self.score(policy)
        means: dict[Task, float] = {task: float(np.mean(scores[task])) for task in self.prompts}
        if not self.prompts or not state.best_scores:
            state.best_step, state.best_scores = step, scores
            return GuardReport(means, "best", (), scores)
        fallen: tuple[Task, ...] = tuple(task for task in self.prompts if fell(scores[task], state.best_scores[task]))
        if fallen:
            return GuardReport(means, "fallen", fallen, scores)
        top = max(state.top, float(np.mean([np.mean(state.best_scores[task]) for task in self.prompts])))
        mean = float(np.mean(list(means.values())))
        if mean >= top - self._noise(scores):
            state.best_step, state.best_scores, state.top = step, scores, max(top, mean)
            return GuardReport(means, "best", (), scores)
        return GuardReport(means, "kept", (), scores)

    def _noise(self, scores: Mapping[Task, Sequence[float]]) -> float:
        """Standard error of the mean of tasks: of two looks that differ by less, the later one counts as the best."""
        return sum(float(np.var(row)) / len(row) for row in scores.values()) ** 0.5 / len(scores)


def fell(now: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the mean paired difference is below 0 with its whole interval of ``Z`` standard errors."""
    difference = np.asarray(now) - np.asarray(before)
    if len(difference) < 2:
        return False
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return float(difference.mean()) + Z * error < 0
