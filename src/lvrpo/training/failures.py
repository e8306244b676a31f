"""Scores that failed: how many of a step, and why, for the files of a run; and steps that failed altogether."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lvrpo.errors import LostProcessError, LvrpoError
from lvrpo.types import RewardTable

if TYPE_CHECKING:
    from lvrpo.training.run_directory import RunDirectory
    from lvrpo.training.state import RunState

LONGEST = 200
"""Characters of a reason that are kept."""


def failed_scores(prefix: str, table: RewardTable, rows: Sequence[int], k: int) -> dict[str, float | str]:
    """Of one reward in rows of one task: the share of its scores that failed and the commonest reason; {} for none."""
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
    return {f"{prefix}_failed/{where}": share, f"{prefix}_failed_why/{where}": shown(failed.most_common(1)[0][0])}


@contextmanager
def saved_if_it_fails(run: RunDirectory, state: RunState) -> Iterator[None]:
    """What fails before a step has changed anything leaves a checkpoint of the steps that are done.

    An error of lvrpo's own says so. Nothing is written where another process is lost, or the disk does not let it.
    """
    try:
        yield
    except LostProcessError:
        raise
    except Exception as error:
        with suppress(Exception):  # the first error is the one to tell
            if state.step and not run.checkpoint_dir(state.step).is_dir():
                state.save(run)
        if state.step and isinstance(error, LvrpoError) and run.checkpoint_dir(state.step).is_dir():
            went_on = f"{error}; step {state.step} is saved: go on with lvrpo train --resume {run.path}"
            raise type(error)(went_on) from error
        raise


def masked(table: RewardTable, p: int, g: int) -> dict[str, str]:
    """Why a member has no score, by reward."""
    return {
        name: shown(table.reasons.get((p, g, k), "unknown"))
        for k, name in enumerate(table.names)
        if not bool(table.mask[p, g, k])
    }


def shown(reason: str) -> str:
    """One line of bounded length that any file can hold."""
    line = " ".join(reason.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
