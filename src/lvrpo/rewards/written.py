"""What rewards of texts share: the text to be scored, and what happens to one that was cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from lvrpo.errors import InputError
from lvrpo.rewards.base import Scores
from lvrpo.types import Group, Prompt, TextSegment, Trajectory

CutOff = Literal["mask", "score"]
"""Of a text that met the length limit: no score, or that of what there is."""

WAS_CUT = "the text was cut off at the length limit"
EMPTY = "the answer is empty"


def check_cut_off(name: str, cut_off: CutOff) -> CutOff:
    """``cut_off`` itself; raises InputError for anything else."""
    if cut_off not in get_args(CutOff):
        raise InputError(f"{name}.cut_off={cut_off!r}: unknown: use {', '.join(get_args(CutOff))}")
    return cut_off


def last_text(trajectory: Trajectory) -> TextSegment | None:
    """The last text of a trajectory."""
    return next((s for s in reversed(trajectory.segments) if isinstance(s, TextSegment)), None)


def was_cut(trajectory: Trajectory) -> bool:
    """Whether the last text of a trajectory met the length limit."""
    segment = last_text(trajectory)
    return segment is not None and not segment.ended


def text_problem(trajectory: Trajectory, empty: str = EMPTY) -> str | None:
    """Why the last text of a trajectory cannot be judged: it is empty, or was cut off; None where it can."""
    segment = last_text(trajectory)
    if segment is None or not segment.text.strip():
        return empty
    return None if segment.ended else WAS_CUT


def score_texts(groups: Sequence[Group], cut_off: CutOff, rule: Callable[[str, Prompt], float]) -> Scores:
    """A rule applied to the last text of every trajectory."""
    values = torch.full((len(groups), len(groups[0])), math.nan)
    failures: dict[tuple[int, int], str] = {}
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group.trajectories):
            segment = last_text(trajectory)
            if segment is None:
                failures[p, g] = "nothing was written"
            elif cut_off == "mask" and not segment.ended:
                failures[p, g] = WAS_CUT
            else:
                try:
                    values[p, g] = rule(segment.text, group.prompt)
                except TimeoutError as error:  # of a rule that comes from data
                    failures[p, g] = str(error)
                except (ValueError, ArithmeticError, RecursionError) as error:  # such as a number of 5,000 digits
                    failures[p, g] = f"the rule failed: {error}"
    return Scores(values, failures)
