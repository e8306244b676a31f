"""What a judge can tell: areas under the curve per kind of fact, of every reward that it judges."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lvrpo.audit_records import JudgeAudit, JudgeScore
from lvrpo.evaluation.judge_cases import JudgeCase
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Reward, judge_fingerprint
from lvrpo.rewards.row import RewardConfig, RewardSource
from lvrpo.statistics import mean_interval
from lvrpo.types import OutputKind

AT_ONCE = 64
"""Pairs that a reward scores in one call."""
FROM_WORDS = {"questions": {"by": "grammar"}}

REWARDS = (
    RewardConfig(name="self_vqa", options=FROM_WORDS),
    RewardConfig(name="edit_consistency", options=FROM_WORDS),
    RewardConfig(name="caption_back"),
    RewardConfig(name="knowledge", tasks=("understand",)),
)
"""What is tried unless told otherwise; ``knowledge``: how likely the judge finds a text about a picture."""


def audit_judge(
    judge: Policy,
    cases: Sequence[JudgeCase],
    sources: Sequence[RewardSource],
    progress: Callable[[str, int], None] = lambda reward, pairs: None,
) -> JudgeAudit:
    """Scores every pair with every reward that applies to it."""
    rows: list[JudgeScore] = []
    milliseconds: dict[str, float] = {}
    for source in sources:
        name, tried = source.config.title, [case for case in cases if source.scores(case.group.prompt)]
        if not tried:
            continue
        progress(name, len(tried))
        started = time.perf_counter()
        ranked = _ranked(source.judge or judge, tried, source.reward)
        milliseconds[name] = 1000 * (time.perf_counter() - started) / (2 * len(tried))
        rows += _rows(name, tried, ranked)
    return JudgeAudit(judge_fingerprint(judge), tuple(rows), milliseconds)


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


def _rows(reward: str, cases: Sequence[JudgeCase], ranked: Sequence[float]) -> list[JudgeScore]:
    members: dict[tuple[OutputKind, str, str], list[int]] = {}
    for i, case in enumerate(cases):
        members.setdefault((case.output, case.kind, ""), []).append(i)
        members.setdefault((case.output, case.kind, case.error), []).append(i)
    rows = []
    for (output, kind, error), indices in members.items():
        known = [i for i in indices if not np.isnan(ranked[i])]
        auc = mean_interval([ranked[i] for i in known], [cases[i].cluster for i in known])
        rows.append(JudgeScore(reward, output, kind, error, auc, len(indices) - len(known)))
    return rows
