"""Reward without ground truth: the answer that most members of the group give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.exact_answer import normalize_answer
from lvrpo.types import Group, Prompt


class Agreement:
    """1 where the text is the group's most frequent answer, else 0 (majority vote, TTRL, arXiv:2504.16084).

    Two guards hold off its known collapse, in which every question gets one answer. A group whose most frequent
    answer is not the only one, or has less than ``least`` of the votes, has no majority and is masked. And where the
    majorities of a batch are nearly all the same for a category of questions, their entropy H = - sum_a q_a log q_a
    below ``entropy_floor`` log(number of different answers given to that category), that category is masked:
    agreement there no longer says anything of the pictures. The second guard needs ``floor_groups`` groups of the
    category.

    An empty answer is masked and has no vote. Range {0, 1}.
    Differs from the paper: both guards.
    """

    judges = ("text",)

    def __init__(self, least: float = 0.5, entropy_floor: float = 0.3, floor_groups: int = 8) -> None:
        if not 0 < least <= 1:
            raise InputError(f"agreement.least={least}: must be > 0 and <= 1")
        if not 0 <= entropy_floor <= 1:
            raise InputError(f"agreement.entropy_floor={entropy_floor}: must be between 0 and 1")
        if floor_groups < 2:
            raise InputError(f"agreement.floor_groups={floor_groups}: must be >= 2")
        self.least, self.entropy_floor, self.floor_groups = least, entropy_floor, floor_groups

    def applies(self, prompt: Prompt) -> bool:
        return prompt.output == ("text",)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        answers = [[normalize_answer(t.text or "") for t in group.trajectories] for group in groups]
        majorities = [self._majority(row) for row in answers]
        collapsed = self._collapsed(groups, answers, majorities)
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        for p, (group, row, majority) in enumerate(zip(groups, answers, majorities, strict=True)):
            for g, answer in enumerate(row):
                if not answer:
                    failures[p, g] = "the answer is empty"
                elif majority is None:
                    failures[p, g] = "the group has no majority"
                elif group.prompt.category in collapsed:
                    failures[p, g] = collapsed[group.prompt.category]
                else:
                    values[p, g] = float(answer == majority)
        return Scores(values, failures)

    def _majority(self, answers: Sequence[str]) -> str | None:
        votes = Counter(answer for answer in answers if answer).most_common(2)
        if not votes or (len(votes) == 2 and votes[0][1] == votes[1][1]):
            return None
        return votes[0][0] if votes[0][1] >= self.least * sum(map(bool, answers)) else None

    def _collapsed(
        self, groups: Sequence[Group], answers: Sequence[Sequence[str]], majorities: Sequence[str | None]
    ) -> dict[str, str]:
        """The categories whose majorities are nearly all one answer, with the reason."""
        found = {}
        for category in {group.prompt.category for group in groups}:
            rows = [p for p, group in enumerate(groups) if group.prompt.category == category]
            chosen = Counter(majorities[p] for p in rows if majorities[p] is not None)
            given = {answer for p in rows for answer in answers[p] if answer}
            if chosen.total() < self.floor_groups:
                continue
            limit = self.entropy_floor * math.log(max(2, len(given)))
            if entropy(chosen) < limit:
                found[category] = f"agreement collapsed: the majorities of {category or 'all questions'} are all alike"
        return found


def entropy(counts: Counter[str | None]) -> float:
    """- sum_a q_a log q_a of relative frequencies, in nats."""
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())
