"""What a judge can tell: areas under the curve per kind of fact, side and number of draws, and the gate they make."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lvrpo.errors import InputError
from lvrpo.evaluation.judge_cases import JudgeCase
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Reward
from lvrpo.rewards.gate import Gate, Sensitivity, Side
from lvrpo.rewards.identity import judge_identity
from lvrpo.rewards.mutual import Mutual
from lvrpo.statistics import Interval, mean_interval

AT_ONCE = 64
"""Pairs that a reward scores in one call."""


READING = "mutual"
"""The scorer of pictures that makes the gate."""


@dataclass(frozen=True)
class Scorer:
    """A reward on trial."""

    reward: Reward
    sides: tuple[Side, ...] = ("read", "draw")
    """What it is tried on."""
    judge: Policy | None = None
    """Who judges instead of the one on trial."""


@dataclass(frozen=True)
class Judged:
    """One scorer on one kind of error."""

    scorer: str
    side: Side
    kind: str
    error: str
    """One way to err, or "" for all of the kind."""
    auc: Interval
    """Share of the pairs ranked right, a tie counting one half; scenes are resampled."""
    failed: int
    """Pairs without two scores."""


@dataclass(frozen=True)
class JudgeAudit:
    """Every scorer on every kind."""

    judge: str
    rows: tuple[Judged, ...]
    milliseconds: Mapping[str, float]
    """Per output scored, by scorer."""

    def find(self, scorer: str, side: Side, kind: str, error: str = "") -> Judged | None:
        """The row, if there is one."""
        rows = (r for r in self.rows if (r.scorer, r.side, r.kind, r.error) == (scorer, side, kind, error))
        return next(rows, None)

    def gate(self, scorers: Mapping[Side, str], draws: int, threshold: float) -> Gate:
        """The gate of one scorer for each side; raises InputError where it judged nothing of a side."""
        measured: dict[Side, dict[str, Sensitivity]] = {}
        for side, scorer in scorers.items():
            rows = [r for r in self.rows if (r.scorer, r.side, r.error) == (scorer, side, "") and r.auc.n]
            if not rows:
                raise InputError(f"scorer {scorer!r}: judged nothing of side {side!r}: there is no gate to write")
            measured[side] = {
                r.kind: Sensitivity(r.auc.score, r.auc.low if math.isfinite(r.auc.low) else None, r.auc.n) for r in rows
            }
        return Gate(self.judge, threshold, draws, measured)


def mutual_scorers(draws: Sequence[int], times: tuple[float, float] | None = None) -> dict[str, Scorer]:
    """The mutual reward: of pictures, by the reading side; of texts, by the drawing side for each number of draws."""
    by_draws = {f"{k} draws" if k > 1 else "1 draw": Scorer(Mutual(draws=k, times=times), ("draw",)) for k in draws}
    return {READING: Scorer(Mutual(), ("read",)), **by_draws}


def audit_judge(
    judge: Policy,
    cases: Sequence[JudgeCase],
    scorers: Mapping[str, Scorer],
    progress: Callable[[str, int], None] = lambda scorer, pairs: None,
) -> JudgeAudit:
    """Scores every pair with every scorer that applies to it."""
    rows: list[Judged] = []
    milliseconds: dict[str, float] = {}
    for name, scorer in scorers.items():
        tried = [c for c in cases if c.side in scorer.sides and scorer.reward.applies(c.group.prompt)]
        if not tried:
            continue
        progress(name, len(tried))
        started = time.perf_counter()
        ranked = _ranked(scorer.judge or judge, tried, scorer.reward)
        milliseconds[name] = 1000 * (time.perf_counter() - started) / (2 * len(tried))
        rows += _rows(name, tried, ranked)
    return JudgeAudit(judge_identity(judge), tuple(rows), milliseconds)


def _ranked(judge: Policy, cases: Sequence[JudgeCase], reward: Reward) -> list[float]:
    """1 where the right output scores higher, .5 for a tie, 0 where lower, nan where one of the two failed."""
    ranked: list[float] = []
    for start in range(0, len(cases), AT_ONCE):
        scores = reward.score([case.group for case in cases[start : start + AT_ONCE]], judge)
        values = torch.as_tensor(scores.values, dtype=torch.float64).clone()
        for p, g in scores.failures:
            values[p, g] = torch.nan
        right, wrong = values[:, 0], values[:, 1]
        rank = torch.where(right == wrong, 0.5, (right > wrong).double())
        ranked += torch.where((right + wrong).isfinite(), rank, torch.nan).tolist()
    return ranked


def _rows(scorer: str, cases: Sequence[JudgeCase], ranked: Sequence[float]) -> list[Judged]:
    members: dict[tuple[Side, str, str], list[int]] = {}
    for i, case in enumerate(cases):
        members.setdefault((case.side, case.kind, ""), []).append(i)
        members.setdefault((case.side, case.kind, case.error), []).append(i)
    rows = []
    for (side, kind, error), indices in members.items():
        known = [i for i in indices if not np.isnan(ranked[i])]
        auc = mean_interval([ranked[i] for i in known], [cases[i].cluster for i in known])
        rows.append(Judged(scorer, side, kind, error, auc, len(indices) - len(known)))
    return rows
