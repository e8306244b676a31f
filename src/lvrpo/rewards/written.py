"""What rules on texts share: the text to be scored, and what happens to one that was cut off."""

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


def check_cut_off(name: str, cut_off: CutOff) -> CutOff:
    """``cut_off`` itself; raises InputError for anything else."""
    if cut_off not in get_args(CutOff):
        raise InputError(f"{name}.cut_off={cut_off!r}: unknown: use {', '.join(get_args(CutOff))}")
    return cut_off


def last_text(trajectory: Trajectory) -> TextSegment | None:
    """The last text of a trajectory."""
    return next((s for s in reversed(trajectory.segments) if isinstance(s, TextSegment)), None)


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
                failures[p, g] = "the text was cut off at the length limit"
            else:
                values[p, g] = rule(segment.text, group.prompt)
    return Scores(values, failures)
