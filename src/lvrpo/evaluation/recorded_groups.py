"""The recorded groups of a run: scores, advantages and traits of its rollouts, read back for the audits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from lvrpo.algorithms.advantages import NormalizeChoice
from lvrpo.audit_records import Window
from lvrpo.config import read_yaml
from lvrpo.errors import InputError
from lvrpo.reading import structure_errors
from lvrpo.training.rollout_log import TRAITS, RolloutRecord, has_records, read_controls, read_steps, read_validations
from lvrpo.training.run_directory import CONFIG, RunDirectory

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
