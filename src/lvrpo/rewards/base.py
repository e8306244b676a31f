"""What a reward is, and what rewards of drawings and of judges share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch

from lvrpo.policies.base import Policy
from lvrpo.types import Group, Prompt, Trajectory

Side = Literal["read", "draw"]
"""read: the reading side judges, by log-probs of texts; draw: the drawing side, by log-probs of pictures."""
SIDES: tuple[Side, ...] = get_args(Side)
ROUNDING = 1e-3
"""What a log-prob may lie above 0."""


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


# --- whether there is something to judge, and whether what a judge said is a log-prob ---


def problem_of(trajectory: Trajectory, judge: object = None) -> str | None:
    """Why the last picture of a trajectory cannot be judged; None where it can.

    ``judge``: who will read it; a policy may read pictures of one size only.
    """
    image = trajectory.image
    if image is None:
        return "nothing was drawn"
    side = getattr(judge, "image_size", None)  # a judge that is no policy reads any size
    if side is not None and tuple(image.shape[1:]) != (side, side):
        return f"a picture of {image.shape[2]} x {image.shape[1]}: the judge reads {side} x {side}"
    return None if image.isfinite().all() else "the picture holds values that are no numbers"


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
