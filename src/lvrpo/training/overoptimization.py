"""Reward over-optimization: a trained reward goes on rising while a held-out scorer of the same outputs falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.statistics import Divergence, divergence
from lvrpo.types import Group, RewardTable, Task

SUCCESS = "success"
"""Whether an output is right as a whole, where somebody can tell."""


class OveroptimizationConfig(Config):
    """What is watched for over-optimization, and what follows."""

    reward: str
    """Label of a trained reward."""
    watch: str
    """Label of a reward of weight 0, which may have a judge of its own; or success: right as a whole."""
    window: int = Field(default=10, ge=1)
    """Steps that are compared with as many earlier ones, at every validation."""
    error: float = Field(default=0.05, gt=0, lt=1)
    """Chance that a run in which the two stay together is stopped at all, at most."""
    action: Literal["stop", "rollback", "warn"] = "stop"
    """rollback: to the best checkpoint, by ``validation.max_rollbacks`` and ``validation.rollback_lr``."""


@dataclass
class Overoptimization:
    """Means of the groups of every step so far; a mutable part of the state of a run."""

    config: OveroptimizationConfig
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    """By task, (N, 4): steps done, trained reward, watched scorer and category of each group that has both."""
    categories: list[str] = field(default_factory=list)
    """Of prompts, in the order of their numbers in ``means``."""
    best_step: int = 0
    best_watched: float = float("-inf")
    """The highest mean of the watched scorer over a window, and the step at its end."""

    def add(self, step: int, groups: Sequence[Group], table: RewardTable, right: Mapping[int, Sequence[float]]) -> None:
        """Takes in the groups of a step; ``step``: steps done, this one included.

        ``right``: by row, which members are right as a whole (``group_successes``).
        """
        reward = _group_means(table, self.config.reward)
        if self.config.watch == SUCCESS:
            watched = torch.full((len(groups),), torch.nan)
            if right:
                watched[list(right)] = torch.tensor(list(right.values())).mean(dim=1)
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

    def validate(self, step: int, looks: int, every: int) -> tuple[Task | str, Divergence] | None:
        """The worst divergence of the last window from an earlier one, over all tasks; None where there is none.

        Parts are compared within categories of prompts, which differ more than a policy changes.
        ``looks``: how many there will be in the run, ``every`` so many steps. Intervals have confidence 1 - error / all
        comparisons that the run can make (Bonferroni).
        """
        size, tasks = self.config.window, len(self.means)
        comparisons = tasks * sum(max(0, look * every // size - 1) for look in range(1, looks + 1))
        confidence = 1 - self.config.error / max(1, comparisons)
        found: list[tuple[str, Divergence]] = []
        for task, means in self.means.items():
            parts = [part.numpy() for part in self._parts(means, step)]
            labels = [part[:, 3].tolist() for part in parts]
            worst = divergence(
                [part[:, 1] for part in parts], [part[:, 2] for part in parts], confidence, strata=(labels, labels)
            )
            if worst is not None:
                found.append((task, worst))
        return min(found, key=lambda each: each[1].scorer.score, default=None)

    def remember(self, step: int) -> bool:
        """Notes the step if the watched scorer has never been as high over a window; returns whether."""
        last = [(means, self._parts(means, step)[-1]) for means in self.means.values()]
        scores = [watched_level(means, part) for means, part in last if len(part)]
        if not scores or sum(scores) / len(scores) < self.best_watched:
            return False
        self.best_step, self.best_watched = step, sum(scores) / len(scores)
        return True

    def _parts(self, means: torch.Tensor, step: int) -> list[torch.Tensor]:
        """The groups of the last window, and of as many whole ones before as there are; in their order."""
        size = self.config.window
        ends = list(range(step, size - 1, -size))[::-1] or [step]
        return [means[(means[:, 0] > end - size) & (means[:, 0] <= end)] for end in ends]

    def message(self, step: int, task: str, found: Divergence) -> str:
        """What was seen, in one sentence."""
        rose, fell = found.reward.score, -found.scorer.score
        return f"{task}: {self.config.reward} rose by {rose:.3f} while {self.config.watch} fell by {fell:.3f}"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        best = {"best_step": self.best_step, "best_watched": self.best_watched}
        return {"means": dict(self.means), "categories": list(self.categories), **best}

    def load(self, tree: Mapping[str, Any]) -> None:
        """Puts back what ``state`` gave; raises InputError for the state of a version without categories."""
        if "categories" not in tree:
            raise InputError(
                "validation.overoptimization: the run began with a version that compared without categories: start anew"
            )
        self.means, self.categories = dict(tree["means"]), list(tree["categories"])
        self.best_step, self.best_watched = tree["best_step"], tree["best_watched"]


def watched_level(means: torch.Tensor, part: torch.Tensor) -> float:
    """Mean of the watched scorer over a part of all groups, as if categories had the shares that they have in all."""
    overall = means[:, 2].mean()
    offsets = {c: means[means[:, 3] == c, 2].mean() - overall for c in means[:, 3].unique().tolist()}
    return float((part[:, 2] - torch.stack([offsets[c] for c in part[:, 3].tolist()])).mean())


def _group_means(table: RewardTable, name: str) -> torch.Tensor:
    """(P,): the mean over the valid members, nan where none is."""
    k = table.names.index(name)
    mask = table.mask[..., k]
    return torch.where(mask, table.scores[..., k], 0.0).sum(dim=1) / mask.sum(dim=1)
