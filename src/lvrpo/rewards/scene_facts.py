"""Verifiable reward: the verifier of the prompt's world reads the picture and checks the prompt's facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from lvrpo.config import Config
from lvrpo.data.worlds import world_of
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores, problem_of
from lvrpo.types import Fact, Group, Prompt, Trajectory


class SceneFacts(Config):
    """Facts of the prompt that the picture shows. Range [0, 1]."""

    judges: ClassVar = ("image",)
    sides: ClassVar = ()

    mode: Literal["fraction", "gated", "all", "mixed"] = "fraction"
    """fraction: the share that holds; trained alone it is hacked: a picture full of objects shows whatever is asked.
    gated: the share that holds, halved where the number of objects is wrong, so that filling the picture never pays.
    all: 1 if every one holds, else 0. mixed: the mean of fraction and all."""

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and bool(prompt.facts) and all(fact.check for fact in prompt.facts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        results = iter(fact_table(groups))
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                holds, problem = next(results), unverifiable(trajectory)
                if problem:
                    failures[p, g] = problem
                else:
                    values[p, g] = self._value(group.prompt.facts, holds)
        return Scores(values, failures)

    def _value(self, facts: Sequence[Fact], holds: Sequence[bool]) -> float:
        fraction, everything = sum(holds) / len(holds), float(all(holds))
        if self.mode == "fraction":
            return fraction
        if self.mode == "all":
            return everything
        if self.mode == "mixed":
            return (fraction + everything) / 2
        counted = all(held for fact, held in zip(facts, holds, strict=True) if fact.kind in ("total", "count"))
        return fraction if counted else fraction / 2


_last: tuple[list[Trajectory], list[list[bool]]] = ([], [])


def fact_table(groups: Sequence[Group]) -> list[list[bool]]:
    """For every trajectory, in order, which facts of its prompt hold of its last picture; none of one that nobody can
    read.

    The last result is kept: several rewards and the metrics ask about the very same trajectories.
    """
    global _last
    trajectories = [t for group in groups for t in group.trajectories]
    known, results = _last
    if len(known) == len(trajectories) and all(a is b for a, b in zip(known, trajectories, strict=True)):
        return results
    results = [[False] * len(t.prompt.facts) for t in trajectories]
    alike: dict[tuple[str, torch.Size], list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        if trajectory.image is not None and unverifiable(trajectory) is None:
            alike.setdefault((trajectory.prompt.world, trajectory.image.shape), []).append(i)
    for (world, _), places in alike.items():
        images = [image for i in places if (image := trajectories[i].image) is not None]
        facts = [trajectories[i].prompt.facts for i in places]
        for i, held in zip(places, world_of(world).holds(facts, images), strict=True):
            results[i] = [bool(one) for _, one in zip(trajectories[i].prompt.facts, held, strict=True)]
    _last = (trajectories, results)
    return results


def unverifiable(trajectory: Trajectory) -> str | None:
    """Why the verifier cannot read the last picture of a trajectory; None where it can."""
    image, problem = trajectory.image, problem_of(trajectory)
    if image is None or problem:
        return problem
    return world_of(trajectory.prompt.world).unreadable(image)
