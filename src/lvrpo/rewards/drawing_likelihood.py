"""Encoder-free reward: the drawing side as judge of drawings, the other direction of an ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.drawn import problem_of
from lvrpo.rewards.mutual import estimate_noise
from lvrpo.rewards.options import Count
from lvrpo.sampling import derive_seed
from lvrpo.types import Group, Image, Parts, Prompt


class DrawingLikelihood:
    """How much more likely the frozen drawing side finds a drawing with its prompt than without.

        r(x) = log p_draw(x | prompt) - log p_draw(x | no text),   nats per picture.

    The same pointwise mutual information as ``mutual`` estimates by the reading side; of whole prompts the weaker judge
    (area under the curve at 8 draws .90 against .98 on the shipped base), of edits the better one (.93 against .57), so
    of use beside the reading side in ``lower_bound``, and as a watched reward. All members of a group are judged under
    the same noise at the same times, a function of the group's seed; the variance left goes into ``Scores.noise``.

    ``draws``: noise draws per picture, each two passes of the drawing side. Raises InputError for less than one.
    """

    judges = ("image",)
    sides = ("draw",)

    def __init__(self, draws: Count = 2) -> None:
        if not isinstance(draws, int) or draws < 1:
            raise InputError(f"drawing_likelihood.draws={draws!r}: must be a whole number >= 1")
        self.draws = draws

    def applies(self, prompt: Prompt) -> bool:
        return prompt.output == ("image",) and any(isinstance(part, str) and part.strip() for part in prompt.parts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        shape = (len(groups), len(groups[0]))
        values, noise = torch.full(shape, math.nan), torch.full(shape, math.nan)
        failures: dict[tuple[int, int], str] = {}
        cells: list[tuple[int, int]] = []
        contexts: list[Parts] = []
        images: list[Image] = []
        seeds: list[int] = []
        for p, group in enumerate(groups):
            seed = derive_seed(group.trajectories[0].seed, "drawing likelihood")
            parts = group.prompt.parts
            wordless = tuple(part for part in parts if not isinstance(part, str))
            for g, trajectory in enumerate(group.trajectories):
                image, problem = trajectory.image, problem_of(trajectory, judge)
                if image is None or problem:
                    failures[p, g] = str(problem)
                    continue
                cells.append((p, g))
                contexts += [parts, wordless]
                images += [image] * 2
                seeds += [seed] * 2
        if not cells:
            return Scores(values, failures, noise)
        found = judge.image_logprob(contexts, images, self.draws, seeds).detach().cpu()
        pmi = found[0::2] - found[1::2]  # (cells, draws)
        for cell, draws in zip(cells, pmi, strict=True):
            values[cell] = draws.mean()
        for p in dict.fromkeys(p for p, _ in cells):
            rows = [i for i, cell in enumerate(cells) if cell[0] == p]
            noise[p, [cells[i][1] for i in rows]] = estimate_noise(pmi[rows])
        return Scores(values, failures, noise)
