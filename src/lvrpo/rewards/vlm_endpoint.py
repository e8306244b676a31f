"""A chat model that sees pictures judges from behind an OpenAI-compatible address."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from lvrpo.config import parse_section
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.answer_reading import rating, same_answer, yes_or_no
from lvrpo.rewards.answers import normalize_answer, text_problem
from lvrpo.rewards.base import Scores, problem_of
from lvrpo.rewards.endpoint import ChatEndpoint, EndpointConfig, NoAnswer
from lvrpo.rewards.identity import judged_by
from lvrpo.rewards.questions import Splitter, words_of
from lvrpo.types import Fact, Group, Image, OutputKind, Parts, Prompt, Trajectory

Ask = Literal["questions", "yes_no", "rating"]

TEMPLATES: Mapping[Ask, str] = {
    "questions": "{question} Answer with yes, no, a number, or one or two words, and nothing else.",
    "yes_no": "Does this picture show exactly what was asked for: {prompt}? Answer yes or no.",
    "rating": "From 0 (nothing of it) to 10 (everything, and well drawn): how well does this picture show what was "
    "asked for: {prompt}? Answer with the number alone.",
}
FIELDS: Mapping[Ask, str] = {"questions": "question", "yes_no": "prompt", "rating": "prompt"}


class VLMEndpoint:
    """Answers of a model that is no part of the policy. Range [0, 1].

    questions: share of the prompt's facts whose question it answers rightly from the drawing alone (what counts as an
    answer: ``rewards.answer_reading``); ``split`` makes questions of free text (see ``own_vqa``; what should stay of an
    edit is kept where this model says so of the source). yes_no: 1 for yes, 0
    for no. rating: a number from 0 to 10, divided by 10.
    ``template`` is what is asked after the picture: with {question}, or with {prompt}; one that also holds {answer}
    makes it a judge of texts, shown the pictures of the prompt. An edit is shown with its source first (but for
    questions, which are about the result).

    What cannot be read as an answer, an answer that is empty or was cut off, and a request that failed after all its
    tries are masked with the reason (``rewards.endpoint``). One question without an answer masks the output.
    """

    sides = ()

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        ask: Ask = "questions",
        template: str | None = None,
        split: Mapping[str, Any] | None = None,
    ) -> None:
        if ask not in get_args(Ask):
            raise InputError(f"vlm_endpoint.ask={ask!r}: unknown: use {', '.join(get_args(Ask))}")
        self.ask: Ask = ask
        self.template = TEMPLATES[ask] if template is None else template
        field = FIELDS[ask]
        if "{" + field + "}" not in self.template:
            raise InputError(f"vlm_endpoint.template={self.template!r}: must hold {{{field}}} for ask={ask}")
        if split is not None and ask != "questions":
            raise InputError(f"vlm_endpoint.split: has no effect with ask={ask}: leave it out, or ask questions")
        self.of_text = "{answer}" in self.template
        if self.of_text and ask == "questions":
            raise InputError("vlm_endpoint.template: {answer} goes with ask=yes_no or ask=rating")
        self.judges: tuple[OutputKind, ...] = ("text",) if self.of_text else ("image",)
        self.splitter = None if split is None else Splitter.read(split, "vlm_endpoint.split")
        self.endpoint = ChatEndpoint(parse_section(EndpointConfig, endpoint, "vlm_endpoint.endpoint"))
        self.judged_by = judged_by(self.endpoint.identity, self.splitter)

    def applies(self, prompt: Prompt) -> bool:
        if self.of_text:
            return prompt.output == ("text",) and bool(words_of(prompt))
        if "image" not in prompt.output:
            return False
        if self.ask != "questions":
            return bool(words_of(prompt))
        return bool(prompt.facts) or (self.splitter is not None and self.splitter.applies(prompt))

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        missing: dict[int, str] = {}
        if self.splitter is not None:
            groups, missing = self.splitter.with_questions(groups, judge, self._confirm)
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
        for cell, answer, wanted in zip(cells, self.endpoint.ask(rows), right, strict=True):
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
        answers = self.endpoint.ask([self._question(image, fact) for image, fact in pairs])
        rows = zip(pairs, answers, strict=True)
        return [a if isinstance(a, NoAnswer) else self.read(a, fact.answer) for (_, fact), a in rows]

    def _question(self, image: Image, fact: Fact) -> Parts:
        return (image, self.template.replace("{question}", fact.question))

    def _problem(self, trajectory: Trajectory) -> str | None:
        if self.of_text:
            return text_problem(trajectory)
        return problem_of(trajectory)

    def _asked(self, trajectory: Trajectory) -> list[tuple[Parts, str]]:
        prompt = trajectory.prompt
        shown = [part for part in prompt.parts if not isinstance(part, str)]
        if self.of_text:
            words = self.template.replace("{prompt}", words_of(prompt)).replace("{answer}", trajectory.text or "")
            return [((*shown, words), "")]
        assert trajectory.image is not None
        if self.ask == "questions":
            return [(self._question(trajectory.image, fact), fact.answer) for fact in prompt.facts]
        return [((*shown, trajectory.image, self.template.replace("{prompt}", words_of(prompt))), "")]
