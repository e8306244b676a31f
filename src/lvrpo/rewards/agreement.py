"""Majority-vote reward without ground truth: the answer of a group that has most votes of the frozen judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lvrpo.config import Config
from lvrpo.metrics import answer_entropy
from lvrpo.policies.base import Judge, require_method
from lvrpo.rewards.base import Failures, SampleIndex, Scores, logprob_problem
from lvrpo.rewards.verifiable_text import EMPTY, normalize_answer, text_problem
from lvrpo.types import Group, Prompt

Tally = dict[str, float]
"""Votes by answer, as ``normalize_answer`` leaves it."""


class Agreement(Config):
    """1 where the text is the answer that has most votes, else 0.

    The frozen understanding side weighs the different answers a_k that the group gave to question q about image x;
    a_k has exp(mean log-prob per token) of the votes. What is learned is to say what the frozen model finds likeliest,
    whatever has become of the policy: greedy answers stay and sampled ones follow them.

    Two guards hold off the known collapse of agreement, in which every question gets one answer. A group whose first
    answer has as many votes as the second, or less than ``least`` of all, has no majority and is masked. And where the
    majorities of a batch are nearly all the same for a category of questions, their entropy H = - sum_a q_a log q_a
    below ``entropy_floor`` log(number of different answers given to that category), that category is masked:
    agreement there no longer says anything of the images. The second guard needs ``floor_groups`` groups of the
    category, of all processes together; in Ray actors, which see one group at a time, there is none.

    Where an image follows the text, the text alone is judged.

    An answer that is empty or was cut off is masked and has no vote, and so is one that the judge can say nothing of.
    Range {0, 1}.
    Differs from the paper (TTRL, arXiv:2504.16084): the judge votes, not the members; both guards.
    """

    judges: ClassVar = ("text",)
    sides: ClassVar = ("read",)
    relative: ClassVar = True

    least: float = Field(default=0.5, gt=0, le=1)
    """Share of a group's votes that a majority needs."""
    entropy_floor: float = Field(default=0.3, ge=0, le=1)
    """Least entropy of the majorities of a category, as a share of the most that its answers allow."""
    floor_groups: int = Field(default=8, ge=2, le=100_000)
    """Groups of a category from which on the entropy is checked."""

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        problems = [[text_problem(t) for t in group.trajectories] for group in groups]
        texts = [
            ["" if problem else t.text or "" for t, problem in zip(group.trajectories, row, strict=True)]
            for group, row in zip(groups, problems, strict=True)
        ]
        answers = [[normalize_answer(text) for text in row] for row in texts]
        tallies = judged_votes(groups, texts, judge)
        majorities = [self._majority(tally) for tally in tallies]
        values: dict[SampleIndex, float] = {}
        failures: Failures = {}
        for p, (row, majority) in enumerate(zip(answers, majorities, strict=True)):
            for g, answer in enumerate(row):
                if not answer:
                    failures[p, g] = problems[p][g] or EMPTY
                elif answer not in tallies[p]:
                    failures[p, g] = "the judge gave the answer no number"
                elif majority is None:
                    failures[p, g] = "the group has no majority"
                else:
                    values[p, g] = float(answer == majority)
        return Scores.of(groups, values, failures)

    def _majority(self, tally: Tally) -> str | None:
        first = max(tally, key=tally.__getitem__, default=None)
        if first is None or list(tally.values()).count(tally[first]) > 1:
            return None
        return first if tally[first] >= self.least * sum(tally.values()) else None

    def batch_failures(
        self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
    ) -> dict[int, str]:
        """The groups of categories whose majorities are nearly all one answer, with the reason."""
        answers = [[normalize_answer(text) for text in row] for row in texts]
        majorities: list[str | None] = []
        for row, own in zip(answers, scores, strict=True):
            known = [(score, answer) for answer, score in zip(row, own, strict=True) if not math.isnan(score)]
            majorities.append(max(known)[1] if known else None)  # the highest: 1, or what it was clipped to
        found = {}
        for category in {prompt.category for prompt in prompts}:
            rows = [p for p, prompt in enumerate(prompts) if prompt.category == category]
            chosen = [answer for p in rows if (answer := majorities[p]) is not None]
            given = {answer for p in rows for answer in answers[p] if answer}
            limit = self.entropy_floor * math.log(max(2, len(given)))
            if len(chosen) >= self.floor_groups and answer_entropy(chosen) * math.log(2) < limit:
                reason = f"agreement collapsed: the majorities of {category or 'all questions'} are all alike"
                found |= dict.fromkeys(rows, reason)
        return found


def judged_votes(groups: Sequence[Group], texts: Sequence[Sequence[str]], judge: Judge) -> list[Tally]:
    """The judge's votes for the different answers of each group: exp(mean log-prob per token), summed over spellings.

    An answer whose log-prob is none (not finite, or above 0) has no votes and is left out.
    """
    asked = [(p, text) for p, row in enumerate(texts) for text in dict.fromkeys(row) if normalize_answer(text)]
    tallies: list[Tally] = [{} for _ in groups]
    if not asked:
        return tallies
    contexts = [groups[p].prompt.parts for p, _ in asked]
    found = require_method(judge, "text_logprob").text_logprob(contexts, [text for _, text in asked])
    for (p, text), logprob in zip(asked, found.tolist(), strict=True):
        if logprob_problem(logprob) is None:
            answer = normalize_answer(text)
            tallies[p][answer] = tallies[p].get(answer, 0.0) + math.exp(logprob)
    return tallies
