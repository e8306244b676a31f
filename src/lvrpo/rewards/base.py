"""What a reward is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch

from lvrpo.policies.base import Policy
from lvrpo.types import Group, Prompt

Side = Literal["read", "draw"]
"""read: the reading side judges, by log-probs of texts; draw: the drawing side, by log-probs of pictures."""
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Scores:
    """The scores that one reward gave to groups of equal size."""

    values: torch.Tensor
    """float32 (P, G)."""
    failures: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Why a score is missing, by (group, member); the value there is never used."""
    noise: torch.Tensor | None = None
    """float32 (P, G): variance that a score owes to the draws of its estimate, once what all members of the group share
    is taken away; nan where it was not estimated. None: the reward leaves nothing to chance."""


class Reward(Protocol):
    """Scores outputs. The table calls it only with groups that it applies to.

    An attribute ``judges``, ("text",), ("image",) or both, says which segments of a trajectory that thinks, then draws
    it is about; without it, both. An attribute ``sides``, of "read" and "draw", says which sides of the judge score for
    it: () for rules and for models that others run; without it, both. A run watches and renews its judge by it. An
    attribute ``judged_by`` names whoever judges beside the frozen policy: a model behind an address, a folder; it
    stands in every row of rewards and must hold no key. An attribute ``relative``, true, says that scores only compare
    the members of a group: held-out outputs, which have no siblings, are not scored by it.
    """

    def applies(self, prompt: Prompt) -> bool:
        """Whether outputs of this prompt can be scored."""
        ...

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        """Scores every member; ``judge`` is a frozen policy, never the one that is trained."""
        ...
