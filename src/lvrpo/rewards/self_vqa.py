"""Encoder-free reward: the model's own frozen reading side answers the questions that the prompt implies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Protocol, Self

import torch
from pydantic import AfterValidator, Field, model_validator

from lvrpo.config import Config, NonNegative
from lvrpo.data.base import world_of
from lvrpo.policies.base import Judge, require_method
from lvrpo.rewards.base import Scores, first_problem, image_problems, join_judges, probabilities
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.rewards.questions import NO_QUESTION, RENAMED_OPTIONS, QuestionConfig, QuestionGenerator
from lvrpo.types import Fact, Group, Image, Parts, Prompt

BOTH_ORDERS = "{question} Answer {first} or {second}."
"""Template for yes-no questions that a model wrote, if ``choices`` is None."""

Confidences = dict[tuple[int, int], torch.Tensor]
Failures = dict[tuple[int, int], str]
Wordings = Sequence[tuple[str, str, tuple[str, ...]]]
"""Wordings of one fact's question, each with its expected answer and the answers to choose from."""


class Reader(Protocol):
    """Answers questions about images: a policy, or another model."""

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """See ``Judge.text_logprob``."""
        ...


def _with_both_answers(template: str) -> str:
    names = ("question", "first", "second")
    try:
        template.format(**dict.fromkeys(names, ""))
        fits = all(f"{{{name}}}" in template for name in names)
    except (KeyError, IndexError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError("must hold {question}, {first} and {second} only")
    return template


Choices = Annotated[str, AfterValidator(_with_both_answers)]
"""A template that offers both answers to a yes-no question, such as BOTH_ORDERS."""


class SelfVQA(Config):
    """Mean over the prompt's facts of the judge's confidence in the right answer, given the picture alone.

    r = mean_k exp( mean-per-token log p_judge(answer_k | picture, question_k) ). Range [0, 1].
    Of a fact with ``choices`` the term is p(answer) / sum over choices of p(choice).
    No encoder is added: the judge is a frozen copy of the policy. It never sees the prompt, only its questions.

    A judge that says what is no log-prob (not finite, or above 0) of one answer masks the output.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)
    hints: ClassVar = RENAMED_OPTIONS

    choices: Choices | None = None
    """Offers both answers to a yes-no question, in both orders: a template such as "{question} Answer {first} or
    {second}." The score is then p(right) / (p(right) + p(wrong)), the mean of the two orders, so that a judge that
    prefers whatever is named first (or always says yes) gains nothing by it. Other questions are asked as they are.
    None: BOTH_ORDERS for questions that a model wrote, else the question alone."""
    both: tuple[str, str] = ("yes", "no")
    """The two answers of a yes-no question."""
    questions: QuestionConfig | None = None
    """The model that writes questions for prompts without facts (``rewards.questions``: the judge itself, an
    endpoint, or the grammar of its world; {} for its defaults); None: they do not get this reward. Of an edit,
    what should stay is asked as well: questions about the source, kept where the judge is sure of its answer there, so
    that the result has to agree with the source. A prompt for which none could be written is masked with the reason."""
    kinds: tuple[str, ...] | None = None
    """Kinds of facts that are asked; None: all."""
    paraphrases: int = Field(default=1, ge=1, le=100_000)
    """Wordings of each fact's question that are asked, where the prompt's world has them; a fact scores their
    mean."""
    bound: NonNegative = 0.0
    """Standard deviations of the wordings that are subtracted from their mean."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.bound and self.paraphrases == 1:
            raise ValueError(f"bound={self.bound}: one wording has no spread: set paraphrases to 2 or more")
        if self.both[0] == self.both[1]:
            raise ValueError(f"both={list(self.both)}: must be two different answers, such as [yes, no]")
        return self

    @cached_property
    def generator(self) -> QuestionGenerator | None:
        return None if self.questions is None else QuestionGenerator(self.questions)

    @property
    def judged_by(self) -> str:
        return join_judges(self.generator)

    def applies(self, prompt: Prompt) -> bool:
        if "image" not in prompt.output:
            return False
        return bool(self.known(prompt)) or (self.generator is not None and self.generator.applies(prompt))

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        confidences, failures = self.confidences(groups, judge, judge)
        values = torch.full((len(groups), len(groups[0])), math.nan)
        for cell, found in confidences.items():
            values[cell] = found.mean()
        return Scores(values, failures)

    def confidences(self, groups: Sequence[Group], judge: Judge, reader: Reader) -> tuple[Confidences, Failures]:
        """The reader's confidence in each right answer, by (group, member), and why some have none.

        ``judge`` splits free text; ``reader`` sees the pictures.
        """
        missing: dict[int, str] = {}
        if self.generator is not None:
            groups, missing = self.generator.with_questions(groups, judge, lambda pairs: self.confirm(pairs, reader))
        failures: Failures = {}
        asked: list[tuple[Image, Wordings]] = []
        facts_of: dict[tuple[int, int], slice] = {}
        for p, group in enumerate(groups):
            facts = self._questions(group.prompt)
            broken = image_problems(group.trajectories, reader)
            for g, (trajectory, problem) in enumerate(zip(group.trajectories, broken, strict=True)):
                image = trajectory.image
                if image is None or problem or not facts:
                    failures[p, g] = problem or missing.get(p, NO_QUESTION)
                    continue
                facts_of[p, g] = slice(len(asked), len(asked) + len(facts))
                asked += [(image, wordings) for wordings in facts]
        confidence, problems = self._ask(asked, reader)
        found: Confidences = {}
        for cell, rows in facts_of.items():
            problem = next((problem for problem in problems[rows] if problem), None)
            if problem:
                failures[cell] = problem
            else:
                found[cell] = confidence[rows]
        return found, failures

    def confirm(self, pairs: Sequence[tuple[Image, Fact]], reader: Reader) -> list[float | NoAnswer]:
        """The reader's confidence in each fact of the picture beside it, asked as facts of results are."""
        confidence, problems = self._ask([(image, (_wording(fact),)) for image, fact in pairs], reader)
        return [NoAnswer(bad) if bad else sure for sure, bad in zip(confidence.tolist(), problems, strict=True)]

    def _ask(self, asked: Sequence[tuple[Image, Wordings]], reader: Reader) -> tuple[torch.Tensor, list[str | None]]:
        """(N,) confidence in each fact of a picture, and why one has none; all in one call of the reader."""
        contexts: list[Parts] = []
        answers: list[str] = []
        counts: list[int] = []  # rows of each question: 1, those of its choices, or 2 for each of both orders
        shapes: list[int] = []  # and how many of them are one choice
        rows_of: list[slice] = []  # of each fact
        for image, wordings in asked:
            start = len(contexts)
            for question, answer, choices in wordings:
                rows, per_choice = self._requests(image, question, answer, choices)
                counts.append(len(rows))
                shapes.append(per_choice)
                contexts += [context for context, _ in rows]
                answers += [answer for _, answer in rows]
            rows_of.append(slice(start, len(contexts)))
        if not asked:
            return torch.zeros(0), []
        logprobs = require_method(reader, "text_logprob").text_logprob(contexts, answers)
        confidence, said = probabilities(logprobs).cpu(), logprobs.tolist()
        by_fact = torch.stack([_confidence(*each) for each in zip(confidence.split(counts), shapes, strict=True)])
        if self.paraphrases > 1:
            parts = by_fact.split([len(wordings) for _, wordings in asked])
            by_fact = torch.stack([part.mean() - self.bound * part.std(correction=0) for part in parts])
        return by_fact, [first_problem(said[rows]) for rows in rows_of]

    def known(self, prompt: Prompt) -> list[Fact]:
        """The facts of ``kinds``, in order."""
        return [fact for fact in prompt.facts if self.kinds is None or fact.kind in self.kinds]

    def _questions(self, prompt: Prompt) -> list[Wordings]:
        """The wordings of each fact, with the answer that each must have."""
        if self.paraphrases == 1:
            return [(_wording(fact),) for fact in self.known(prompt)]
        kept = self.known(prompt)
        every = zip(prompt.facts, world_of(prompt.world).paraphrases(prompt.facts), strict=True)
        return [
            [(question, answer, fact.choices) for question, answer in wordings[: self.paraphrases]]
            for fact, wordings in every
            if fact in kept
        ]

    def _requests(
        self, image: Image, question: str, answer: str, among: tuple[str, ...]
    ) -> tuple[list[tuple[Parts, str]], int]:
        """The rows of a question, and how many of them compete: one alone; the right choice, then the others; or right
        and wrong answer in one order, then in the other."""
        choices = self.choices
        if choices is None and self.questions is not None and self.questions.by != "grammar":
            choices = BOTH_ORDERS
        if choices is None or answer not in self.both:
            others = [choice for choice in among if choice != answer]
            return [((image, question), each) for each in (answer, *others)], 1 + len(others)
        wrong = self.both[1 - self.both.index(answer)]
        orders = (self.both, self.both[::-1])
        asked = [choices.format(question=question, first=one, second=two) for one, two in orders]
        return [((image, words), each) for words in asked for each in (answer, wrong)], 2


def _wording(fact: Fact) -> tuple[str, str, tuple[str, ...]]:
    return fact.question, fact.answer, fact.choices


def _confidence(rows: torch.Tensor, competing: int) -> torch.Tensor:
    """Probability of the right answer; among ``competing`` answers, the right one first, its share of them all, as the
    mean over the orders that they were offered in."""
    if competing == 1:
        return rows[0]
    answers = rows.view(-1, competing)
    return (answers[:, 0] / answers.sum(dim=1)).mean()
