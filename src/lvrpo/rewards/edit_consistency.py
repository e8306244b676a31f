"""Edits: something changed, and the rest stayed, measured on pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.drawn import problem_of
from lvrpo.types import Group, Image, Prompt


class EditConsistency:
    """Nearness of the unedited part to the source, and 0 for an edit that changed nothing.

    d_j = root mean square difference of patch j of ``patch`` x ``patch`` pixels;  the edited region is unknown and
    taken to be the ``edited`` share of patches that changed most;  stay = exp(- mean_j d_j / scale) over the others;
    changed = min(1, max_j d_j / moved);  r = changed stay.  Range [0, 1].

    It sees whether the source was kept, not whether the instruction was obeyed: put it beside a reward that does
    (``own_vqa`` or ``mutual`` on the facts of the edit). An edit of more than the share loses; one that touches less
    may damage a little for free. The source is the last picture of the prompt; a result of another size is masked.
    """

    judges = ("image",)

    def __init__(self, patch: int = 8, edited: float = 0.25, scale: float = 0.1, moved: float = 0.1) -> None:
        if patch < 1 or not 0 <= edited < 1 or not scale > 0 or not moved > 0:
            raise InputError(
                f"edit_consistency: patch={patch}, edited={edited}, scale={scale}, moved={moved}: need patch >= 1, "
                "0 <= edited < 1, scale > 0 and moved > 0"
            )
        self.patch, self.edited, self.scale, self.moved = patch, edited, scale, moved

    def applies(self, prompt: Prompt) -> bool:
        return prompt.task == "edit" and any(not isinstance(part, str) for part in prompt.parts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        for p, group in enumerate(groups):
            source = [part for part in group.prompt.parts if not isinstance(part, str)][-1]
            for g, trajectory in enumerate(group.trajectories):
                image = trajectory.image
                problem = problem_of(trajectory)
                if image is None or problem:
                    failures[p, g] = str(problem)
                elif image.shape != source.shape:
                    failures[p, g] = f"a picture of {tuple(image.shape)} for a source of {tuple(source.shape)}"
                else:
                    values[p, g] = self.of(source, image)
        return Scores(values, failures)

    def of(self, source: Image, result: Image) -> float:
        """The score of one edit."""
        squares = (result - source).square().mean(dim=0)[None, None]
        d = functional.avg_pool2d(squares, self.patch, ceil_mode=True).sqrt().flatten()
        kept = d.sort().values[: max(1, round(len(d) * (1 - self.edited)))]
        return min(1.0, float(d.max()) / self.moved) * math.exp(-float(kept.mean()) / self.scale)
