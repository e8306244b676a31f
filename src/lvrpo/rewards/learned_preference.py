"""Encoder-free reward: what people preferred, learned as a head on the model's own frozen reading side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.drawn import problem_of
from lvrpo.rewards.preference_head import PreferenceHead, features_of
from lvrpo.types import Group, Parts, Prompt


class LearnedPreference:
    """Score of a head that ``lvrpo fit-preference`` fitted: differences are log-odds of being preferred.

        r(y) = w . phi(y),  p(y_1 preferred over y_2) = sigmoid(r(y_1) - r(y_2))   (Bradley and Terry, 1952),

    phi the states of the frozen reading side over the prompt (of a drawing) or over the answer. It applies to the tasks
    of the pairs that the head was fitted on, and refuses a judge whose weights are not those it was fitted on.

    ``head``: the folder that ``lvrpo fit-preference`` wrote. Range: any number; about +- 5.
    Raises InputError for a folder without a head, and for another judge.
    """

    sides = ("read",)

    def __init__(self, head: str) -> None:
        self.head = PreferenceHead.load(head)
        self.judged_by = self.head.identity
        drawn = any(task in ("generate", "edit") for task in self.head.tasks)
        written = any(task in ("understand", "reason") for task in self.head.tasks)
        self.judges = (*(["text"] if written else []), *(["image"] if drawn else []))

    def applies(self, prompt: Prompt) -> bool:
        return prompt.task in self.head.tasks and len(prompt.output) == 1

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        self.head.require(judge)
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        cells: list[tuple[int, int]] = []
        cases: list[tuple[Parts, str]] = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                drawn = "image" in group.prompt.output
                case = (problem_of(trajectory, judge) if drawn else None) or self.head.reading.case(trajectory)
                if isinstance(case, str):
                    failures[p, g] = case
                else:
                    cells.append((p, g))
                    cases.append(case)
        if cases:
            for cell, score in zip(cells, self.head.score(features_of(judge, cases)), strict=True):
                values[cell] = score
        return Scores(values, failures)
