"""Metrics of the rewards of a step: means, clipped shares and failures by task, for ``metrics.jsonl``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from lvrpo.types import RewardTable

MAX_REASON_LENGTH = 200
"""Characters of a logged reason."""


def reward_means(prefix: str, table: RewardTable, successes: Mapping[int, Sequence[float]]) -> dict[str, float | str]:
    """Mean, clipped share and failures of every reward per task, and the success rate.

    ``successes``: by row of the table (``group_successes``).
    """
    out: dict[str, float | str] = {}
    for task in dict.fromkeys(table.tasks):
        rows = [p for p, name in enumerate(table.tasks) if name == task]
        success = torch.tensor([successes[p] for p in rows if p in successes])
        if (known := success[success.isfinite()]).numel():
            out[f"{prefix}/{task}/success"] = float(known.mean())
        if len(known) < success.numel():
            out[f"{prefix}_failed/{task}/success"] = 1 - len(known) / success.numel()
        for k, name in enumerate(table.names):
            valid = table.mask[rows, :, k]
            if valid.any():
                out[f"{prefix}/{task}/{name}"] = float(table.scores[rows, :, k][valid].mean())
            if name in table.cut and valid.any():
                out[f"{prefix}_cut/{task}/{name}"] = float(table.cut[name][rows][valid].float().mean())
            out |= failed_scores(prefix, table, rows, k)
    return out


def failed_scores(prefix: str, table: RewardTable, rows: Sequence[int], k: int) -> dict[str, float | str]:
    """The share of failed scores of one reward in rows of one task and the most common reason; {} without failures."""
    G = table.mask.shape[1]
    failed = Counter(
        reason.removeprefix("failed: ")
        for p in rows
        for g in range(G)
        if (reason := table.reasons.get((p, g, k), "")).startswith("failed: ")
    )
    if not failed:
        return {}
    where = f"{table.tasks[rows[0]]}/{table.names[k]}"
    share = failed.total() / (failed.total() + int(table.mask[rows, :, k].sum()))
    return {f"{prefix}_failed/{where}": share, f"{prefix}_failed_why/{where}": one_line(failed.most_common(1)[0][0])}


def mask_reasons(table: RewardTable, p: int, g: int) -> dict[str, str]:
    """The reasons of a member's missing scores, by reward."""
    return {
        name: one_line(table.reasons.get((p, g, k), "unknown"))
        for k, name in enumerate(table.names)
        if not bool(table.mask[p, g, k])
    }


def one_line(reason: str) -> str:
    """A reason as one line of valid UTF-8 and limited length."""
    line = " ".join(reason.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= MAX_REASON_LENGTH else f"{line[: MAX_REASON_LENGTH - 3]}..."
