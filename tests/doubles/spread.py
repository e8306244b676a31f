"""A reward without a meaning that differs in every group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lvrpo.rewards.base import Scores
from lvrpo.types import Group, Prompt


class Spread:
    """Scores by the seed of an output."""

    sides = ()

    def applies(self, prompt: Prompt) -> bool:
        return True

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        return Scores(torch.tensor([[t.seed % 7 / 6 for t in group.trajectories] for group in groups]))
