"""Encoder-free reward: the frozen model says which of two outputs fits better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lvrpo.algorithms import win_rate
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.drawn import problem_of
from lvrpo.rewards.options import Count
from lvrpo.rewards.written import text_problem
from lvrpo.types import Group, Part, Parts, Prompt, Trajectory


@dataclass(frozen=True)
class Match:
    """Two members of a group; the smaller index is named first in the first order."""

    group: int
    one: int
    two: int


class Preference:
    """The share of its comparisons inside the group that an output wins (win rate, Pref-GRPO, arXiv:2508.20751).

    The frozen model is asked which of two drawings (or of two answers to the prompt's picture) fits the prompt better,
    "first" or "second", in both orders. An output wins where both orders agree on it; where they disagree, the answer
    depends on the order alone, and the pair is a tie. Equal texts are a tie without being asked. Range [0, 1].

    ``opponents``: how many others each member meets, a circle of neighbours, so that every member plays as often (odd
    numbers are rounded up); None for all. ``question``: what is asked after the two outputs, with ``{prompt}``;
    ``labels``: the two answers that are compared; both in words that the judge can read. An output of which there is
    nothing to compare (a text that is empty or was cut off) is masked and plays no one.

    Differs from the paper: the judge is the policy's own frozen copy; both orders are asked; not all pairs are played.
    """

    sides = ("read",)
    relative = True

    def __init__(
        self,
        question: str = "Which fits better: {prompt} Answer first or second.",
        labels: tuple[str, str] = ("first", "second"),
        opponents: Count | None = 4,
    ) -> None:
        if "{prompt}" not in question or question.replace("{prompt}", "").count("{"):
            raise InputError(f"preference.question={question!r}: must hold {{prompt}} and no other name in braces")
        if len(labels) != 2 or labels[0] == labels[1]:
            raise InputError(f"preference.labels={labels}: must be two different answers")
        if opponents is not None and opponents < 1:
            raise InputError(f"preference.opponents={opponents}: must be >= 1, or null for all")
        self.question, self.labels, self.opponents = question, (labels[0], labels[1]), opponents

    def applies(self, prompt: Prompt) -> bool:
        return prompt.output != ("text", "image") and any(isinstance(part, str) for part in prompt.parts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        P, G = len(groups), len(groups[0])
        wins, played = torch.full((P, G, G), 0.5), torch.zeros(P, G, G, dtype=torch.bool)
        failures = {
            (p, g): problem
            for p, group in enumerate(groups)
            for g, trajectory in enumerate(group.trajectories)
            if (problem := _problem(trajectory, judge))
        }
        asked: list[Match] = []
        contexts: list[Parts] = []
        for match in self._matches(P, G, failures):
            one, two = (groups[match.group].trajectories[i] for i in (match.one, match.two))
            played[match.group, match.one, match.two] = played[match.group, match.two, match.one] = True
            if one.image is None and one.text == two.text:
                continue
            asked.append(match)
            contexts += [self._context(one, two), self._context(two, one)]
        if asked:
            for match, score in zip(asked, self._compare(contexts, judge), strict=True):
                p, one, two = match.group, match.one, match.two
                wins[p, one, two], wins[p, two, one] = score, 1 - score
                played[p, one, two] = played[p, two, one] = math.isfinite(score)
        values = win_rate(wins, played)
        for p, g in values.isnan().nonzero().tolist():
            failures.setdefault((p, g), "no comparison with another member could be made")
        return Scores(values, failures)

    def _compare(self, contexts: Sequence[Parts], judge: Policy) -> list[float]:
        """For every match 1 where both orders choose the first member, 0 where both choose the second, else .5."""
        rows = [context for context in contexts for _ in self.labels]
        try:
            logprobs = judge.text_logprob(rows, [label for _ in contexts for label in self.labels]).cpu()
        except InputError as error:
            self._require_words(judge, error)
            raise
        margin = logprobs.view(-1, 2, 2)  # (match, order, label)
        first = margin[:, :, 0] - margin[:, :, 1]  # > 0: what is named first is better
        one, two = first[:, 0], -first[:, 1]
        agreed = torch.where((one > 0) & (two > 0), 1.0, torch.where((one < 0) & (two < 0), 0.0, 0.5))
        return torch.where((one + two).isfinite(), agreed, torch.nan).tolist()

    def _require_words(self, judge: Policy, error: InputError) -> None:
        """Raises InputError where the judge cannot read the words that are this reward's own."""
        own = " ".join([self.question.replace("{prompt}", ""), *self.labels])
        try:
            judge.text_logprob([(own,)], [self.labels[0]])
        except InputError:
            raise InputError(
                f"preference: the judge cannot read its question or its labels {list(self.labels)} ({error}): say both "
                "in the judge's words, such as options: {question: '{prompt}', labels: [yes, no]}"
            ) from None

    def _context(self, one: Trajectory, two: Trajectory) -> Parts:
        prompt = one.prompt
        words = " ".join(part for part in prompt.parts if isinstance(part, str))
        shown: list[Part] = [part for part in prompt.parts if not isinstance(part, str)]
        question = self.question.format(prompt=words)
        if one.image is not None and two.image is not None:
            return (*shown, one.image, two.image, question)
        return (*shown, str(one.text), str(two.text), question)

    def _matches(self, P: int, G: int, failures: dict[tuple[int, int], str]) -> Iterator[Match]:
        for p in range(P):
            present = [g for g in range(G) if (p, g) not in failures]
            n = len(present)
            reach = n - 1 if self.opponents is None else min(self.opponents, n - 1)
            met: set[tuple[int, int]] = set()
            for step in range(1, n):
                for i in range(n):
                    pair = tuple(sorted((present[i], present[(i + step) % n])))
                    if pair not in met and 2 * step <= reach + 1:
                        met.add((pair[0], pair[1]))
                        yield Match(p, pair[0], pair[1])


def _problem(trajectory: Trajectory, judge: Policy) -> str | None:
    """Why an output cannot be compared with any other."""
    if "image" in trajectory.prompt.output:
        return problem_of(trajectory, judge)
    return text_problem(trajectory, "there is nothing to compare")
