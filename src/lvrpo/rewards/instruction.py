"""The published instruction reward: 1 where every constraint of the prompt is kept, else 0."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from lvrpo.config import Config
from lvrpo.data.schema import TextRules
from lvrpo.errors import InputError
from lvrpo.patterns import matches_whole
from lvrpo.policies.base import Policy
from lvrpo.rewards.answers import FORMS, CutOff, score_texts
from lvrpo.rewards.base import Scores, Side
from lvrpo.rewards.external import OWN, ExternalVLM, ReaderSource, folder_identity
from lvrpo.rewards.identity import judged_by
from lvrpo.rewards.own_vqa import Choices, Failures, OwnVQA, Reader
from lvrpo.rewards.questions import SplitConfig
from lvrpo.rewards.scene_facts import fact_table, unverifiable
from lvrpo.types import Fact, Group, Prompt


class Instruction(Config):
    """Binary satisfaction of constraints (LVRPO, arXiv:2603.27693, the term r_ins). Range {0, 1}.

    The constraints of a drawing are the prompt's facts. Those of a text are rules: ``rules`` for every text, and those
    of a prompt's own row over them.

    Differs from the paper: no rule of the paper's is known to us beyond its kinds.
    """

    judges: ClassVar = ("image",)

    by: Literal["vqa", "verifier"] = "vqa"
    """vqa: each fact is asked of the reader, and kept where the confidence in the right answer is above ``above``;
    verifier: checked exactly, for pictures of a world that has a verifier."""
    kinds: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Only facts of these kinds, such as [count, total, color]; None: all."""
    above: float = Field(default=0.5, ge=0, lt=1)
    source: ReaderSource = OWN
    """Who reads: a local folder of a model of ``transformers`` that reads pictures, or "own"."""
    choices: Choices | None = None
    """As that of ``own_vqa``."""
    split: SplitConfig | None = None
    """As that of ``own_vqa``."""
    rules: dict[str, Any] | None = None
    """Of every text (``lvrpo.data.schema.TextRules``): length, form, words that must occur or must not."""
    cut_off: CutOff = "mask"
    device: str = "auto"
    """Where the model of ``source`` runs."""
    _vqa: OwnVQA

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.by == "verifier" and (self.source != OWN or self.choices or self.split is not None):
            raise ValueError("by=verifier: asks no questions: leave out source, choices and split")
        try:
            text_rules(self.rules or {}, "rules")
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._vqa = OwnVQA(choices=self.choices, split=self.split, kinds=self.kinds)

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("read",) if self.by == "vqa" and self.source == OWN else ()

    @cached_property
    def judged_by(self) -> str:
        return judged_by("" if self.source == OWN else folder_identity(Path(self.source)), self._vqa)

    @cached_property
    def _reader(self) -> Reader | None:
        """None: the judge reads. Loaded when it is first asked."""
        return None if self.source == OWN else ExternalVLM(self.source, self.device)

    def applies(self, prompt: Prompt) -> bool:
        if "image" not in prompt.output:
            return bool(self.rules or prompt.rules)
        if self.by == "vqa":
            return self._vqa.applies(prompt)
        return bool(self._facts(prompt)) and all(fact.check for fact in prompt.facts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: Failures = {}
        drawn = [p for p, group in enumerate(groups) if "image" in group.prompt.output]
        written = [p for p in range(len(groups)) if p not in drawn]
        for places, score in ((drawn, self._drawings), (written, self._texts)):
            if places:
                scores = score([groups[p] for p in places], judge)
                values[places] = scores.values
                failures |= {(places[i], g): reason for (i, g), reason in scores.failures.items()}
        return Scores(values, failures)

    def _drawings(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        if self.by == "vqa":
            found, failures = self._vqa.confidences(groups, judge, self._reader or judge)
            for cell, confidences in found.items():
                # nan is no answer, not a wrong one
                values[cell] = float((confidences > self.above).all()) if confidences.isfinite().all() else math.nan
            return Scores(values, failures)
        failures, readable = {}, []
        for p, group in enumerate(groups):
            problems = [unverifiable(trajectory) for trajectory in group.trajectories]
            failures |= {(p, g): problem for g, problem in enumerate(problems) if problem}
            kept = (t for t, problem in zip(group.trajectories, problems, strict=True) if not problem)
            readable.append(Group(group.prompt, tuple(kept)))
        results = iter(fact_table(readable))
        for p, group in enumerate(readable):
            counted = [self._counts(fact) for fact in group.prompt.facts]
            for trajectory in group.trajectories:
                holds = [held for held, counts in zip(next(results), counted, strict=True) if counts]
                values[p, trajectory.member] = float(all(holds))
        return Scores(values, failures)

    def _texts(self, groups: Sequence[Group], judge: Policy) -> Scores:
        def rule(text: str, prompt: Prompt) -> float:
            return float(
                keeps_to(text, text_rules((self.rules or {}) | dict(prompt.rules), f"prompt {prompt.id!r}: rules"))
            )

        return score_texts(groups, self.cut_off, rule)

    def _counts(self, fact: Fact) -> bool:
        return self.kinds is None or fact.kind in self.kinds

    def _facts(self, prompt: Prompt) -> list[Fact]:
        return [fact for fact in prompt.facts if self._counts(fact)]


def text_rules(fields: Mapping[str, Any], where: str) -> TextRules:
    """The rules; raises InputError, one line that begins with ``where``."""
    try:
        return TextRules.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        rule = "unknown rule" if unknown else first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{where}{'.' if name else ''}{name}: {rule}: the rules are {', '.join(TextRules.model_fields)}"
        ) from None


def keeps_to(text: str, rules: TextRules) -> bool:
    """Whether a text keeps to every rule."""
    count = len(text.split())
    if count < rules.min_words or (rules.max_words is not None and count > rules.max_words):
        return False
    if rules.form is not None and not matches_whole(FORMS.get(rules.form, rules.form), text):
        return False
    return all(_occurs(phrase, text) for phrase in rules.include) and not any(
        _occurs(phrase, text) for phrase in rules.exclude
    )


def _occurs(phrase: str, text: str) -> bool:
    """As whole words, in any case and spacing."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None
