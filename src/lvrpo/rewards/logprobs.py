"""Log-probs that a judge says: which of them are none, and the probabilities of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

ROUNDING = 1e-3
"""What a log-prob may lie above 0."""


def no_logprob(value: float) -> str | None:
    """Why what a judge said is no log-prob of a text; None where it is one."""
    return None if math.isfinite(value) and value <= ROUNDING else f"the judge gave {value:g} for a log-prob"


def first_problem(logprobs: Iterable[float]) -> str | None:
    """``no_logprob`` of the first one that is none."""
    return next((problem for value in logprobs if (problem := no_logprob(value))), None)


def probabilities(logprobs: torch.Tensor) -> torch.Tensor:
    """exp(log-prob), in [0, 1]; nan where ``no_logprob``: neither -inf nor + 3 is a sure judge, but a broken one."""
    known = logprobs.isfinite() & (logprobs <= ROUNDING)
    return torch.where(known, logprobs.clamp(max=0).exp(), math.nan)
