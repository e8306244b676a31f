"""Detection of reward over-optimization: a trained reward rises while a held-out scorer of the same outputs falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.statistics import Divergence, divergence
from lvrpo.types import Group, RewardTable, TaskKind

SUCCESS = "success"
"""Value of ``watch`` for the verified success of outputs."""


class OveroptimizationConfig(Config):
    """The over-optimization detector and its action."""

    reward: str
    """Label of a trained reward."""
    watch: str
    """Label of a reward of weight 0, which may have its own judge; or success: verified success."""
    window: int = Field(default=10, ge=1)
    """Steps per window; at every validation the last window is compared with earlier ones."""
    error: float = Field(default=0.05, gt=0, lt=1)
    """Upper bound of the probability of a false alarm over the whole run."""
    action: Literal["stop", "rollback", "warn"] = "stop"
    """rollback: to the best checkpoint, as ``validation.action`` says."""


@dataclass
class Overoptimization:
    """The detector with the group means of all steps so far; a mutable part of the state of a run."""

    config: OveroptimizationConfig
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per task, (N, 4): step, trained reward, watched scorer and category index of each group that has both scores."""
    categories: list[str] = field(default_factory=list)
    """Prompt categories by their index in ``means``."""
    best_step: int = 0
    """Last step of the window with the highest mean of the watched scorer."""
    best_watched: float = float("-inf")
    """The watched scorer's mean at the best step."""

    def add(
        self, step: int, groups: Sequence[Group], table: RewardTable, successes: Mapping[int, Sequence[float]]
    ) -> None:
        """Adds the groups of a step; ``step``: steps done, including this one; ``successes``: ``group_successes``."""
        reward = _group_means(table, self.config.reward)
        if self.config.watch == SUCCESS:
            watched = torch.full((len(groups),), torch.nan)
            if successes:
                watched[list(successes)] = torch.tensor(list(successes.values())).mean(dim=1)
        else:
            watched = _group_means(table, self.config.watch)
        for group in groups:
            if group.prompt.category not in self.categories:
                self.categories.append(group.prompt.category)
        category = torch.tensor([float(self.categories.index(group.prompt.category)) for group in groups])
        for task in dict.fromkeys(table.tasks):
            rows = torch.tensor([name == task for name in table.tasks]) & reward.isfinite() & watched.isfinite()
            new = torch.stack([torch.full_like(reward, step), reward, watched, category], dim=1)[rows]
            self.means[task] = torch.cat([self.means.get(task, new[:0]), new])

    def detect(self, step: int, num_validations: int, every: int) -> tuple[TaskKind | str, Divergence] | None:
        """The largest divergence of the last window from an earlier one, over all tasks; None if there is none.

        Windows are compared within prompt categories, whose means differ more than a policy changes.
        ``num_validations``: number of calls in the run, one every ``every`` steps. The confidence is 1 - error / number
        of comparisons in the run (Bonferroni).
        """
        size, tasks = self.config.window, len(self.means)
        comparisons = tasks * sum(max(0, i * every // size - 1) for i in range(1, num_validations + 1))
        confidence = 1 - self.config.error / max(1, comparisons)
        found: list[tuple[str, Divergence]] = []
        for task, means in self.means.items():
            windows = [window.numpy() for window in self._windows(means, step)]
            rewards, scores = [window[:, 1] for window in windows], [window[:, 2] for window in windows]
            categories = [window[:, 3].tolist() for window in windows]
            largest = divergence(rewards, scores, confidence, strata=(categories, categories))
            if largest is not None:
                found.append((task, largest))
        return min(found, key=lambda entry: entry[1].scorer.score, default=None)

    def update_best(self, step: int) -> bool:
        """Updates the best step if the watched scorer of the last window is the highest so far; returns whether."""
        last = [(means, self._windows(means, step)[-1]) for means in self.means.values()]
        scores = [stratified_mean(means, window) for means, window in last if len(window)]
        if not scores or sum(scores) / len(scores) < self.best_watched:
            return False
        self.best_step, self.best_watched = step, sum(scores) / len(scores)
        return True

    def _windows(self, means: torch.Tensor, step: int) -> list[torch.Tensor]:
        """The last window and all complete ones before it, in order."""
        size = self.config.window
        ends = list(range(step, size - 1, -size))[::-1] or [step]
        return [means[(means[:, 0] > end - size) & (means[:, 0] <= end)] for end in ends]

    def message(self, step: int, task: str, found: Divergence) -> str:
        """One sentence for the metrics."""
        rose, fell = found.reward.score, -found.scorer.score
        return f"{task}: {self.config.reward} rose by {rose:.3f} while {self.config.watch} fell by {fell:.3f}"

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        best = {"best_step": self.best_step, "best_watched": self.best_watched}
        return {"means": dict(self.means), "categories": list(self.categories), **best}

    def load(self, tree: Mapping[str, Any]) -> None:
        """Restores ``state``; raises InputError for the state of a version without categories."""
        if "categories" not in tree:
            raise InputError(
                "validation.overoptimization: the run began with a version that compared without categories: start anew"
            )
        self.means, self.categories = dict(tree["means"]), list(tree["categories"])
        self.best_step, self.best_watched = tree["best_step"], tree["best_watched"]


def stratified_mean(means: torch.Tensor, part: torch.Tensor) -> float:
    """Mean of the watched scorer over ``part``, adjusted to the category shares of all groups."""
    overall = means[:, 2].mean()
    offsets = {c: means[means[:, 3] == c, 2].mean() - overall for c in means[:, 3].unique().tolist()}
    return float((part[:, 2] - torch.stack([offsets[c] for c in part[:, 3].tolist()])).mean())


def _group_means(table: RewardTable, name: str) -> torch.Tensor:
    """Mean over the valid members, (P,); nan without one."""
    k = table.names.index(name)
    mask = table.mask[..., k]
    return torch.where(mask, table.scores[..., k], 0.0).sum(dim=1) / mask.sum(dim=1)
