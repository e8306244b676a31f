"""Verifiable reward: a text that is not too long, and not too short."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.options import Count, Natural
from lvrpo.rewards.written import last_text
from lvrpo.types import Group, Prompt


class TextLength:
    """Minus how far a text enters the last ``buffer`` tokens before ``limit`` (DAPO, arXiv:2503.14476, eq. 13).

    r = 0 for n <= limit - buffer;  (limit - buffer - n) / buffer up to limit;  -1 beyond.  Range [-1, 0].
    Differs from the paper: a text of fewer than ``least`` tokens gets -1 too. The end token counts.
    """

    judges = ("text",)
    sides = ()

    def __init__(self, limit: Count, buffer: Natural = 0, least: Natural = 0) -> None:
        if not (limit >= 1 and 0 <= buffer <= limit and 0 <= least <= limit):
            raise InputError(
                f"text_length: limit={limit}, buffer={buffer}, least={least}: need limit >= 1, the others from 0 to it"
            )
        self.limit, self.buffer, self.least = limit, buffer, least

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                segment = last_text(trajectory)
                if segment is None:
                    failures[p, g] = "nothing was written"
                else:
                    values[p, g] = self.of(segment.tokens.numel())
        return Scores(values, failures)

    def of(self, tokens: int) -> float:
        """The score of a text of so many tokens."""
        if tokens > self.limit or tokens < self.least:
            return -1.0
        over = tokens - (self.limit - self.buffer)
        return -over / self.buffer if over > 0 else 0.0
