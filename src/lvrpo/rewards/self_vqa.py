"""VQA reward without an encoder: the frozen policy itself answers the questions that the prompt implies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Protocol, Self

import torch
from pydantic import AfterValidator, model_validator

from lvrpo.config import Config
from lvrpo.policies.base import Judge, require_method
from lvrpo.rewards.base import Failures, SampleIndex, Scores, first_problem, join_judges, probabilities, scorable_images
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.rewards.questions import NO_QUESTION, RENAMED_OPTIONS, QuestionConfig, QuestionGenerator
from lvrpo.types import Fact, Group, Image, Parts, Prompt

BOTH_ORDERS = "{question} Answer {first} or {second}."
"""Template for yes-no questions that a model wrote, if ``choices`` is None."""

Confidences = dict[SampleIndex, torch.Tensor]


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
    """Mean over the prompt's facts of the judge's confidence in the right answer, given the image alone.

    r = mean_k exp( mean-per-token log p_judge(answer_k | image, question_k) ). Range [0, 1].
    Of a fact with ``choices`` the term is p(answer) / sum over choices of p(choice).
    No encoder is added: the judge is a frozen copy of the policy. It never sees the prompt, only its questions.

    A judge that says what is no log-prob (not finite, or above 0) of one answer masks the output.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)
    hints: ClassVar = RENAMED_OPTIONS | dict.fromkeys(("paraphrases", "bound"), "was removed: leave it out")

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

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
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
        return Scores.of(groups, {cell: found.mean() for cell, found in confidences.items()}, failures)

    def confidences(self, groups: Sequence[Group], judge: Judge, reader: Reader) -> tuple[Confidences, Failures]:
        """The reader's confidence in each right answer, by (group, member), and why some have none.

        ``judge`` splits free text; ``reader`` sees the images.
        """
        missing: dict[int, str] = {}
        if self.generator is not None:
            groups, missing = self.generator.with_questions(groups, judge, lambda pairs: self.confirm(pairs, reader))
        images, failures = scorable_images(groups, reader)
        asked: list[tuple[Image, Fact]] = []
        facts_of: dict[SampleIndex, slice] = {}
        for (p, g), image in images.items():
            facts = self.known(groups[p].prompt)
            if not facts:
                failures[p, g] = missing.get(p, NO_QUESTION)
                continue
            facts_of[p, g] = slice(len(asked), len(asked) + len(facts))
            asked += [(image, fact) for fact in facts]
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
        """The reader's confidence in each fact of the image beside it, asked as facts of results are."""
        confidence, problems = self._ask(pairs, reader)
        return [NoAnswer(bad) if bad else sure for sure, bad in zip(confidence.tolist(), problems, strict=True)]

    def _ask(self, asked: Sequence[tuple[Image, Fact]], reader: Reader) -> tuple[torch.Tensor, list[str | None]]:
        """(N,) confidence in each fact of an image, and why one has none; all in one call of the reader."""
        if not asked:
            return torch.zeros(0), []
        contexts: list[Parts] = []
        answers: list[str] = []
        counts: list[int] = []  # rows of each question: 1, those of its choices, or 2 for each of both orders
        shapes: list[int] = []  # and how many of them are one choice
        for image, fact in asked:
            rows, per_choice = self._requests(image, fact)
            counts.append(len(rows))
            shapes.append(per_choice)
            contexts += [context for context, _ in rows]
            answers += [answer for _, answer in rows]
        logprobs = require_method(reader, "text_logprob").text_logprob(contexts, answers).cpu()
        confidence = probabilities(logprobs).split(counts)
        by_fact = torch.stack([_confidence(*each) for each in zip(confidence, shapes, strict=True)])
        return by_fact, [first_problem(rows.tolist()) for rows in logprobs.split(counts)]

    def known(self, prompt: Prompt) -> list[Fact]:
        """The facts of ``kinds``, in order."""
        return [fact for fact in prompt.facts if self.kinds is None or fact.kind in self.kinds]

    def _requests(self, image: Image, fact: Fact) -> tuple[list[tuple[Parts, str]], int]:
        """The rows of a question, and how many of them compete: one alone; the right choice, then the others; or right
        and wrong answer in one order, then in the other."""
        choices, answer = self.choices, fact.answer
        if choices is None and self.questions is not None and self.questions.by != "grammar":
            choices = BOTH_ORDERS
        if choices is None or answer not in self.both:
            others = [choice for choice in fact.choices if choice != answer]
            return [((image, fact.question), each) for each in (answer, *others)], 1 + len(others)
        wrong = self.both[1 - self.both.index(answer)]
        orders = (self.both, self.both[::-1])
        asked = [choices.format(question=fact.question, first=one, second=two) for one, two in orders]
        return [((image, words), each) for words in asked for each in (answer, wrong)], 2


def _confidence(rows: torch.Tensor, competing: int) -> torch.Tensor:
    """Probability of the right answer; among ``competing`` answers, the right one first, its share of them all, as the
    mean over the orders that they were offered in."""
    if competing == 1:
        return rows[0]
    answers = rows.view(-1, competing)
    return (answers[:, 0] / answers.sum(dim=1)).mean()
