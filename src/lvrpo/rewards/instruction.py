"""The published instruction reward: 1 where every constraint of the prompt is kept, else 0."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError

from lvrpo.data.schema import TextRules
from lvrpo.errors import InputError
from lvrpo.patterns import matches_whole
from lvrpo.policies.base import Policy
from lvrpo.rewards.answers import FORMS, CutOff, check_cut_off, score_texts
from lvrpo.rewards.base import Scores, Side
from lvrpo.rewards.external import OWN, ExternalVLM, check_reader, folder_identity, once
from lvrpo.rewards.identity import judged_by
from lvrpo.rewards.options import Below1
from lvrpo.rewards.own_vqa import Failures, OwnVQA
from lvrpo.rewards.scene_facts import fact_table, unverifiable
from lvrpo.types import Fact, Group, Prompt

By = Literal["vqa", "verifier"]


class Instruction:
    """Binary satisfaction of constraints (LVRPO, arXiv:2603.27693, the term r_ins). Range {0, 1}.

    Of a drawing, the constraints are the prompt's facts (of ``kinds``, such as [count, total, color]; all of them
    without). by vqa: each is asked of the reader, and kept where the confidence in the right answer is above
    ``above``; options as those of ``own_vqa``, ``source`` a local folder of a model of ``transformers`` that reads
    pictures, or "own". by verifier: checked exactly, for pictures of the built-in world.

    Of a text, they are rules (``lvrpo.data.schema.TextRules``: length, form, words that must occur or must not), those
    of ``rules`` for every text and those of a prompt's own row over them. A text that was cut off at the length limit
    is masked, or scored with ``cut_off: score``.

    Differs from the paper: no rule of the paper's is known to us beyond its kinds.
    """

    judges = ("image",)

    def __init__(
        self,
        by: By = "vqa",
        kinds: Sequence[str] | None = None,
        above: Below1 = 0.5,
        source: str = OWN,
        choices: str | None = None,
        split: Mapping[str, Any] | None = None,
        rules: Mapping[str, Any] | None = None,
        cut_off: CutOff = "mask",
        device: str = "auto",
    ) -> None:
        if by not in get_args(By):
            raise InputError(f"instruction.by={by!r}: unknown: use {', '.join(get_args(By))}")
        if by == "verifier" and (source != OWN or choices or split is not None):
            raise InputError("instruction.by=verifier: asks no questions: leave out source, choices and split")
        if not 0 <= above < 1:
            raise InputError(f"instruction.above={above}: must be at least 0 and below 1")
        if kinds is not None and (isinstance(kinds, str) or not kinds):
            raise InputError(f"instruction.kinds={kinds!r}: must be a list of kinds, such as [count, color]")
        self.by, self.kinds, self.above = by, None if kinds is None else frozenset(kinds), above
        self.vqa = OwnVQA(choices=choices, split=split, kinds=kinds)
        self.sides: tuple[Side, ...] = ("read",) if by == "vqa" and source == OWN else ()
        self.judged_by, self.reader = self.vqa.judged_by, None
        if source != OWN:
            self.judged_by = judged_by(folder_identity(check_reader(source)), self.vqa)
            self.reader = once(lambda: ExternalVLM(source, device))
        self.rules = dict(rules or {})
        text_rules(self.rules, "instruction.rules")
        self.cut_off: CutOff = check_cut_off("instruction", cut_off)

    def applies(self, prompt: Prompt) -> bool:
        if "image" not in prompt.output:
            return bool(self.rules or prompt.rules)
        if self.by == "vqa":
            return self.vqa.applies(prompt)
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
            found, failures = self.vqa.confidences(groups, judge, judge if self.reader is None else self.reader())
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
            return float(keeps_to(text, text_rules(self.rules | dict(prompt.rules), f"prompt {prompt.id!r}: rules")))

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
