"""Encoder-free reward: the model's own frozen reading side is asked the questions that the prompt implies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvrpo.data.scenes.paraphrases import paraphrases
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.gate import read_gate
from lvrpo.rewards.identity import judge_identity
from lvrpo.types import Fact, Group, Image, Parts, Prompt


class OwnVQA:
    """Mean over the prompt's facts of the judge's confidence in the right answer, given the picture alone.

    r = mean_k exp( mean-per-token log p_judge(answer_k | picture, question_k) ). Range [0, 1].
    No encoder is added: the judge is a frozen copy of the policy. It never sees the prompt, only its questions.

    ``choices`` offers both answers to a yes-no question, in both orders: a template such as
    "{question} Answer {first} or {second}." The score is then p(right) / (p(right) + p(wrong)), the mean of the two
    orders, so that a judge that prefers whatever is named first (or always says yes) gains nothing by it. Other
    questions are asked as they are. ``paraphrases``: so many wordings of each fact's question are asked, where the
    built-in world has them, and the fact scores their mean minus ``bound`` times their standard deviation: an ensemble
    that one odd reading does not sway. ``gate``: facts of kinds that the judge cannot tell are not asked
    (``lvrpo audit --judge MODEL --gate FILE``).
    """

    judges = ("image",)

    def __init__(
        self,
        choices: str | None = None,
        gate: str | None = None,
        both: tuple[str, str] = ("yes", "no"),
        paraphrases: int = 1,
        bound: float = 0.0,
    ) -> None:
        if not isinstance(paraphrases, int) or paraphrases < 1:
            raise InputError(f"own_vqa.paraphrases={paraphrases!r}: must be a whole number >= 1")
        if not 0 <= bound < float("inf"):
            raise InputError(f"own_vqa.bound={bound!r}: must be a number >= 0")
        if bound and paraphrases == 1:
            raise InputError(f"own_vqa.bound={bound}: one wording has no spread: set paraphrases to 2 or more")
        self.paraphrases, self.bound = paraphrases, bound
        if choices is not None:
            try:
                named = all(choices.format(question="q", first=f, second=s) for f, s in (both, both[::-1]))
            except (KeyError, IndexError, ValueError):
                named = False
            if not named or not all("{" + name + "}" in choices for name in ("question", "first", "second")):
                raise InputError(f"own_vqa.choices={choices!r}: must hold {{question}}, {{first}} and {{second}} only")
        if len(both) != 2 or both[0] == both[1]:
            raise InputError(f"own_vqa.both={both}: must be two different answers, such as [yes, no]")
        self.choices, self.both = choices, (both[0], both[1])
        self.gate = None if gate is None else read_gate(gate)

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and bool(self._facts(prompt))

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        if self.gate is not None:
            self.gate.require(judge_identity(judge))
        contexts: list[Parts] = []
        answers: list[str] = []
        counts: list[int] = []  # rows of each question: 1, or 4 where both orders ask for both answers
        wordings: list[int] = []  # of each fact
        facts_of: list[int] = []
        for group in groups:
            for trajectory in group.trajectories:
                image = trajectory.image
                assert image is not None
                facts = self._questions(group.prompt)
                facts_of.append(len(facts))
                for questions in facts:
                    wordings.append(len(questions))
                    for question, answer in questions:
                        asked = self._asked(image, question, answer)
                        counts.append(len(asked))
                        contexts += [context for context, _ in asked]
                        answers += [answer for _, answer in asked]
        confidence = judge.text_logprob(contexts, answers).exp().cpu()
        by_question = torch.stack([_confidence(rows) for rows in confidence.split(counts)])
        by_fact = by_question
        if self.paraphrases > 1:
            parts = by_question.split(wordings)
            by_fact = torch.stack([part.mean() - self.bound * part.std(correction=0) for part in parts])
        values = torch.stack([part.mean() for part in by_fact.split(facts_of)])
        return Scores(values.view(len(groups), -1))

    def _facts(self, prompt: Prompt) -> list[Fact]:
        return [fact for fact in prompt.facts if self.gate is None or self.gate.admits("read", fact.kind)]

    def _questions(self, prompt: Prompt) -> list[tuple[tuple[str, str], ...]]:
        """The wordings of each fact, with the answer that each must have."""
        if self.paraphrases == 1:
            return [((fact.question, fact.answer),) for fact in self._facts(prompt)]
        kept = self._facts(prompt)
        every = zip(prompt.facts, paraphrases(prompt.facts), strict=True)
        return [wordings[: self.paraphrases] for fact, wordings in every if fact in kept]

    def _asked(self, image: Image, question: str, answer: str) -> list[tuple[Parts, str]]:
        """One row; or right and wrong answer in one order, then in the other."""
        if self.choices is None or answer not in self.both:
            return [((image, question), answer)]
        wrong = self.both[1 - self.both.index(answer)]
        orders = (self.both, self.both[::-1])
        asked = [self.choices.format(question=question, first=one, second=two) for one, two in orders]
        return [((image, words), each) for words in asked for each in (answer, wrong)]


def _confidence(rows: torch.Tensor) -> torch.Tensor:
    """Probability of the right answer; with rows (right, wrong) of each order, the mean of its shares."""
    if len(rows) == 1:
        return rows[0]
    right, wrong = rows[0::2], rows[1::2]
    return (right / (right + wrong)).mean()
