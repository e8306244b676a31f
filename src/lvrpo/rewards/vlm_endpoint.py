"""A chat model that sees pictures judges from behind an OpenAI-compatible address."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator

from lvrpo.config import Config
from lvrpo.policies.base import Policy
from lvrpo.rewards.answer_reading import rating, same_answer, yes_or_no
from lvrpo.rewards.answers import normalize_answer, text_problem
from lvrpo.rewards.base import Scores, problem_of
from lvrpo.rewards.endpoint import ChatEndpoint, EndpointConfig, NoAnswer
from lvrpo.rewards.identity import judged_by
from lvrpo.rewards.questions import SplitConfig, Splitter, words_of
from lvrpo.types import Fact, Group, Image, OutputKind, Parts, Prompt, Trajectory

Ask = Literal["questions", "yes_no", "rating"]

TEMPLATES: Mapping[Ask, str] = {
    "questions": "{question} Answer with yes, no, a number, or one or two words, and nothing else.",
    "yes_no": "Does this picture show exactly what was asked for: {prompt}? Answer yes or no.",
    "rating": "From 0 (nothing of it) to 10 (everything, and well drawn): how well does this picture show what was "
    "asked for: {prompt}? Answer with the number alone.",
}
FIELDS: Mapping[Ask, str] = {"questions": "question", "yes_no": "prompt", "rating": "prompt"}


class VLMEndpoint(Config):
    """Answers of a model that is no part of the policy. Range [0, 1].

    An edit is shown with its source first (but for questions, which are about the result).

    What cannot be read as an answer, an answer that is empty or was cut off, and a request that failed after all its
    tries are masked with the reason (``rewards.endpoint``). One question without an answer masks the output.
    """

    sides: ClassVar = ()

    endpoint: EndpointConfig
    ask: Ask = "questions"
    """questions: share of the prompt's facts whose question it answers rightly from the drawing alone (what counts as
    an answer: ``rewards.answer_reading``). yes_no: 1 for yes, 0 for no. rating: a number from 0 to 10, divided by
    10."""
    template: str | None = None
    """What is asked after the picture: with {question}, or with {prompt}; one that also holds {answer} makes it a judge
    of texts, shown the pictures of the prompt. None: that of TEMPLATES."""
    split: SplitConfig | None = None
    """Makes questions of free text (see ``own_vqa``); what should stay of an edit is kept where this model says so of
    the source."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        field = FIELDS[self.ask]
        if f"{{{field}}}" not in self._template:
            raise ValueError(f"template={self._template!r}: must hold {{{field}}} for ask={self.ask}")
        if self.split is not None and self.ask != "questions":
            raise ValueError(f"split: has no effect with ask={self.ask}: leave it out, or ask questions")
        if self._of_text and self.ask == "questions":
            raise ValueError("template: {answer} goes with ask=yes_no or ask=rating")
        return self

    @property
    def judges(self) -> tuple[OutputKind, ...]:
        return ("text",) if self._of_text else ("image",)

    @cached_property
    def judged_by(self) -> str:
        return judged_by(self._client.identity, self._splitter)

    @property
    def _template(self) -> str:
        return TEMPLATES[self.ask] if self.template is None else self.template

    @property
    def _of_text(self) -> bool:
        return "{answer}" in self._template

    @cached_property
    def _client(self) -> ChatEndpoint:
        return ChatEndpoint(self.endpoint)

    @cached_property
    def _splitter(self) -> Splitter | None:
        return None if self.split is None else Splitter(self.split)

    def applies(self, prompt: Prompt) -> bool:
        if self._of_text:
            return prompt.output == ("text",) and bool(words_of(prompt))
        if "image" not in prompt.output:
            return False
        if self.ask != "questions":
            return bool(words_of(prompt))
        return bool(prompt.facts) or (self._splitter is not None and self._splitter.applies(prompt))

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        missing: dict[int, str] = {}
        if self._splitter is not None:
            groups, missing = self._splitter.with_questions(groups, judge, self._confirm)
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        rows: list[Parts] = []
        right: list[str] = []
        cells: list[tuple[int, int]] = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                problem = missing.get(p) or self._problem(trajectory)
                if problem:
                    failures[p, g] = problem
                    continue
                asked = self._asked(trajectory)
                rows += [row for row, _ in asked]
                right += [answer for _, answer in asked]
                cells += [(p, g)] * len(asked)
        found: dict[tuple[int, int], list[float]] = {}
        for cell, answer, wanted in zip(cells, self._client.ask(rows), right, strict=True):
            value = answer if isinstance(answer, NoAnswer) else self.read(answer, wanted)
            if isinstance(value, NoAnswer):
                failures.setdefault(cell, value.reason)
            else:
                found.setdefault(cell, []).append(value)
        for cell, terms in found.items():
            if cell not in failures:
                values[cell] = sum(terms) / len(terms)
        return Scores(values, failures)

    def read(self, answer: str, wanted: str = "") -> float | NoAnswer:
        """The number that an answer stands for; ``wanted``: the right one of a question."""
        if self.ask == "rating":
            return rating(answer)
        if self.ask == "yes_no":
            return yes_or_no(answer, "yes")
        return (yes_or_no if normalize_answer(wanted) in ("yes", "no") else same_answer)(answer, wanted)

    def _confirm(self, pairs: Sequence[tuple[Image, Fact]]) -> list[float | NoAnswer]:
        """1 where its answer about a picture is that of the fact, 0 where it is another."""
        answers = self._client.ask([self._question(image, fact) for image, fact in pairs])
        rows = zip(pairs, answers, strict=True)
        return [a if isinstance(a, NoAnswer) else self.read(a, fact.answer) for (_, fact), a in rows]

    def _question(self, image: Image, fact: Fact) -> Parts:
        return (image, self._template.replace("{question}", fact.question))

    def _problem(self, trajectory: Trajectory) -> str | None:
        if self._of_text:
            return text_problem(trajectory)
        return problem_of(trajectory)

    def _asked(self, trajectory: Trajectory) -> list[tuple[Parts, str]]:
        prompt = trajectory.prompt
        shown = [part for part in prompt.parts if not isinstance(part, str)]
        if self._of_text:
            words = self._template.replace("{prompt}", words_of(prompt)).replace("{answer}", trajectory.text or "")
            return [((*shown, words), "")]
        assert trajectory.image is not None
        if self.ask == "questions":
            return [(self._question(trajectory.image, fact), fact.answer) for fact in prompt.facts]
        return [((*shown, trajectory.image, self._template.replace("{prompt}", words_of(prompt))), "")]
