"""Verifiable reward of the built-in world: the exact verifier reads the picture and checks the prompt's facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from lvrpo.data.scenes import verifier
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.types import Fact, Group, Prompt, Trajectory

Mode = Literal["fraction", "gated", "all", "mixed"]


class SceneFacts:
    """Facts of the prompt that the picture shows. Range [0, 1].

    fraction: the share that holds; trained alone it is hacked: a picture full of objects shows whatever is asked.
    gated: the share that holds, halved where the number of objects is wrong, so that filling the picture never pays.
    all: 1 if every one holds, else 0. mixed: the mean of fraction and all.
    """

    judges = ("image",)

    def __init__(self, mode: Mode = "fraction") -> None:
        if mode not in get_args(Mode):
            raise InputError(f"scene_facts.mode={mode!r}: unknown: use {', '.join(get_args(Mode))}")
        self.mode = mode

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and bool(prompt.facts) and all(fact.check for fact in prompt.facts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        results = iter(fact_table(groups))
        return Scores(
            torch.tensor([[self._value(g.prompt.facts, next(results)) for _ in g.trajectories] for g in groups])
        )

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
    """For every trajectory, in order, which facts of its prompt hold of its last picture.

    The last result is kept: several rewards and the metrics ask about the very same trajectories.
    """
    global _last
    trajectories = [t for group in groups for t in group.trajectories]
    known, results = _last
    if len(known) == len(trajectories) and all(a is b for a, b in zip(known, trajectories, strict=True)):
        return results
    images = [t.image for t in trajectories]
    readings = verifier.read([image for image in images if image is not None])
    results = [verifier.fact_results(t.prompt.facts, r) for t, r in zip(trajectories, readings, strict=True)]
    _last = (trajectories, results)
    return results
