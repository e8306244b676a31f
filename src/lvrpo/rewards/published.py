"""The three terms of the published reward (LVRPO, arXiv:2603.27693): semantic, instruction and knowledge."""

from __future__ import annotations

import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, ValidationError, model_validator
from torch.nn import functional

from lvrpo.config import Config, Natural
from lvrpo.data.rows import TextRules
from lvrpo.errors import InputError
from lvrpo.patterns import full_match
from lvrpo.policies.base import Judge, require_method
from lvrpo.rewards.base import (
    Failures,
    Scores,
    Side,
    join_judges,
    logprob_problem,
    probabilities,
    scorable_images,
)
from lvrpo.rewards.external import (
    OWN,
    Embedded,
    EncoderSource,
    ExternalVLM,
    ImageTextEncoder,
    ReaderSource,
    folder_fingerprint,
)
from lvrpo.rewards.questions import RENAMED_OPTIONS, QuestionConfig
from lvrpo.rewards.self_vqa import Choices, Reader, SelfVQA
from lvrpo.rewards.verifiable_image import score_facts
from lvrpo.rewards.verifiable_text import FORMS, CutOff, score_texts, text_problem
from lvrpo.types import Fact, Group, Prompt

# --- semantic ---


class Semantic(Config):
    """Cosine of image and text (LVRPO, arXiv:2603.27693, the term r_sem). Range [-1, 1].

        global:  r = cos(image, text)
        dense:   r = mean over words w of the mean of the ``top`` largest cos(w, patch_n)

    A model that was never trained to match embeddings orders images only a little better than chance in this way
    (docs/reference/rewards.md has the numbers): ``self_vqa`` asks the same understanding side and hears much more.

    Of texts written about an image this term is one number for the whole group: it does not apply to them and says so
    once. It does not apply to edits, whose instruction describes no image.

    Differs from the paper: the own source; ``top`` above 1; the paper leaves open how patches and words enter the
    common space (here: see ``rewards.external``).
    """

    judges: ClassVar = ("image",)

    form: Literal["dense", "global"] = "dense"
    """dense: of each word with its most similar patches; global: of the mean states of text and image."""
    top: int = Field(default=4, ge=1, le=100_000)
    """1 is the published maximum, which one patch can satisfy; a number above that of patches is all of them."""
    source: EncoderSource = OWN
    """"own": the frozen understanding side of the policy, no encoder being added: states of image and text, each read
    alone, their mean for the global form. Or a local folder of a SigLIP or SigLIP 2 of ``transformers``, the published
    choice, or of a CLIP: with ``form`` global, CLIPScore or PickScore (``pip install 'lvrpo[external]'``)."""
    layer: Natural = 1
    """Layers of the policy after which its states are taken; 0: what goes into the transformer."""
    lead_ins: tuple[str, ...] = ("draw ", "a picture of ")
    """Beginnings that are no part of what a prompt describes."""
    device: str = "auto"
    """Device of the ``source`` model."""
    _warned: bool = False

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("read",) if self.source == OWN else ()

    @cached_property
    def judged_by(self) -> str:
        return "" if self.source == OWN else folder_fingerprint(Path(self.source))

    @cached_property
    def _encoder(self) -> ImageTextEncoder | None:
        """None: the judge embeds. Loaded when it is first asked."""
        return None if self.source == OWN else ImageTextEncoder(self.source, self.device)

    def applies(self, prompt: Prompt) -> bool:
        if "image" in prompt.output:
            return prompt.task != "edit" and bool(prompt.text)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"semantic: of texts (task {prompt.task}) it is one number for the whole group, and masked: set tasks",
                stacklevel=2,
            )
        return False

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        images, failures = scorable_images(groups, judge if self.source == OWN else None)
        if not images:
            return Scores.of(groups, {}, failures)
        texts = [self._text(group.prompt) for group in groups]
        if self._encoder is None:
            states = [Embedded(s.mean(dim=0), s) for s in self._own([*texts, *images.values()], judge)]
            of_text, of_image = states[: len(texts)], states[len(texts) :]
        else:
            of_text, of_image = self._encoder.texts(texts), self._encoder.images(list(images.values()))
        of_cell = zip(images, of_image, strict=True)
        return Scores.of(groups, {(p, g): self.similarity(of_text[p], each) for (p, g), each in of_cell}, failures)

    def similarity(self, text: Embedded, image: Embedded) -> float:
        """The score of one image."""
        if self.form == "global":
            return float(functional.cosine_similarity(text.whole, image.whole, dim=0))
        similar = functional.normalize(text.parts, dim=-1) @ functional.normalize(image.parts, dim=-1).T
        return float(similar.topk(min(self.top, similar.shape[1]), dim=1).values.mean())

    def _own(self, parts: Sequence[str | torch.Tensor], judge: Judge) -> list[torch.Tensor]:
        found = require_method(judge, "hidden_states").hidden_states(parts, self.layer)
        return [states.float().cpu() for states in found]

    def _text(self, prompt: Prompt) -> str:
        words = prompt.text
        for lead_in in self.lead_ins:
            words = words.removeprefix(lead_in)
        return words


# --- instruction ---


class _Asks(Config):
    """A term that asks a reader the questions of ``SelfVQA``."""

    judges: ClassVar = ("image",)
    hints: ClassVar = RENAMED_OPTIONS

    source: ReaderSource = OWN
    """The reader: "own", the policy's frozen understanding side; or a local folder of a vision-language model of
    ``transformers``, as in the paper (``pip install 'lvrpo[external]'``)."""
    choices: Choices | None = None
    """See ``choices`` of ``self_vqa``."""
    questions: QuestionConfig | None = None
    """See ``questions`` of ``self_vqa``."""
    device: str = "auto"
    """Device of the ``source`` model."""
    _vqa: SelfVQA = PrivateAttr()

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._vqa = SelfVQA(choices=self.choices, questions=self.questions)

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("read",) if self.source == OWN else ()

    @cached_property
    def judged_by(self) -> str:
        return join_judges("" if self.source == OWN else folder_fingerprint(Path(self.source)), self._vqa)

    @cached_property
    def _reader(self) -> Reader | None:
        """None: the judge reads. Loaded when it is first asked."""
        return None if self.source == OWN else ExternalVLM(self.source, self.device)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
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

    @abstractmethod
    def _drawings(self, groups: Sequence[Group], judge: Judge) -> Scores:
        """The scores of groups of images."""

    @abstractmethod
    def _texts(self, groups: Sequence[Group], judge: Judge) -> Scores:
        """The scores of groups of texts."""


class Instruction(_Asks):
    """Binary satisfaction of constraints (LVRPO, arXiv:2603.27693, the term r_ins). Range {0, 1}.

    The constraints of an image are the prompt's facts. Those of a text are rules: ``rules`` for every text, and those
    of a prompt's own row over them.

    Differs from the paper: no rule of the paper's is known to us beyond its kinds.
    """

    by: Literal["vqa", "verifier"] = "vqa"
    """vqa: each fact is asked of the reader, and kept where the confidence in the right answer is above ``above``;
    verifier: checked exactly, for images of a world that has a verifier."""
    kinds: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Only facts of these kinds, such as [count, total, color]; None: all."""
    above: float = Field(default=0.5, ge=0, lt=1)
    """vqa: a fact holds where the confidence in its answer exceeds this."""
    rules: dict[str, Any] | None = None
    """Rules for every text (``lvrpo.data.rows.TextRules``): length, form, words that must occur or must not."""
    cut_off: CutOff = "mask"
    """mask: a text that met the length limit has no score; score: it is scored as it stands."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.by == "verifier" and (self.source != OWN or self.choices or self.questions is not None):
            raise ValueError("by=verifier: asks no questions: leave out source, choices and questions")
        try:
            text_rules(self.rules or {}, "rules")
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._vqa = SelfVQA(choices=self.choices, questions=self.questions, kinds=self.kinds)

    @property
    def sides(self) -> tuple[Side, ...]:
        return super().sides if self.by == "vqa" else ()

    def applies(self, prompt: Prompt) -> bool:
        if "image" not in prompt.output:
            return bool(self.rules or prompt.rules)
        if self.by == "vqa":
            return self._vqa.applies(prompt)
        return bool(self._vqa.known(prompt)) and all(fact.check for fact in prompt.facts)

    def _drawings(self, groups: Sequence[Group], judge: Judge) -> Scores:
        if self.by == "verifier":
            return score_facts(groups, self._all_hold)
        found, failures = self._vqa.confidences(groups, judge, self._reader or judge)
        # nan is no answer, not a wrong one
        values = {cell: float((c > self.above).all()) for cell, c in found.items() if c.isfinite().all()}
        return Scores.of(groups, values, failures)

    def _texts(self, groups: Sequence[Group], judge: Judge) -> Scores:
        def rule(text: str, prompt: Prompt) -> float:
            return float(
                follows_rules(text, text_rules((self.rules or {}) | dict(prompt.rules), f"prompt {prompt.id!r}: rules"))
            )

        return score_texts(groups, self.cut_off, rule)

    def _all_hold(self, facts: Sequence[Fact], holds: Sequence[bool]) -> float:
        pairs = zip(facts, holds, strict=True)
        return float(all(held for fact, held in pairs if self.kinds is None or fact.kind in self.kinds))


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


def follows_rules(text: str, rules: TextRules) -> bool:
    """Whether a text keeps to every rule."""
    count = len(text.split())
    if count < rules.min_words or (rules.max_words is not None and count > rules.max_words):
        return False
    if rules.form is not None and not full_match(FORMS.get(rules.form, rules.form), text):
        return False
    return all(_occurs(phrase, text) for phrase in rules.include) and not any(
        _occurs(phrase, text) for phrase in rules.exclude
    )


def _occurs(phrase: str, text: str) -> bool:
    """Whether it occurs as whole words, ignoring case and spacing."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


# --- knowledge ---


class Knowledge(_Asks):
    """Answers of a model of visual questions (LVRPO, arXiv:2603.27693, the term r_kn). Range [0, 1].

    Of an image: its mean confidence in the right answers to the prompt's questions, as ``self_vqa`` has it. Of a text
    about images: its confidence in that text as the answer, exp(mean log-prob per token).

    With the own source, the confidence in texts rewards what the policy says anyway: where answers are known,
    ``exact_answer`` is the better teacher. A text that is empty or was cut off is masked.
    """

    def applies(self, prompt: Prompt) -> bool:
        if "image" in prompt.output:
            return self._vqa.applies(prompt)
        return bool(prompt.images)

    def _drawings(self, groups: Sequence[Group], judge: Judge) -> Scores:
        found, failures = self._vqa.confidences(groups, judge, self._reader or judge)
        return Scores.of(groups, {cell: confidences.mean() for cell, confidences in found.items()}, failures)

    def _texts(self, groups: Sequence[Group], judge: Judge) -> Scores:
        cells = {(p, g): t for p, group in enumerate(groups) for g, t in enumerate(group.trajectories)}
        failures = {cell: problem for cell, t in cells.items() if (problem := text_problem(t))}
        asked = {cell: t for cell, t in cells.items() if cell not in failures}
        if not asked:
            return Scores.of(groups, {}, failures)
        contexts, texts = [t.prompt.parts for t in asked.values()], [t.text or "" for t in asked.values()]
        logprobs = require_method(self._reader or judge, "text_logprob").text_logprob(contexts, texts)
        found = dict(zip(asked, probabilities(logprobs).cpu(), strict=True))
        problems = {cell: logprob_problem(one) for cell, one in zip(asked, logprobs.tolist(), strict=True)}
        return Scores.of(groups, found, failures | {cell: why for cell, why in problems.items() if why})
