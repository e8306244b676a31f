"""Consistency of edits: the right change, and nothing else, by the frozen model's answers and by pixels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch.nn import functional

from lvrpo.config import Config
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Failures, SampleIndex, Scores, Side, scorable_images
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.rewards.questions import (
    MIN_CONFIDENCE,
    RENAMED_OPTIONS,
    UNCHANGED,
    QuestionConfig,
    keep_confirmed,
    with_facts,
)
from lvrpo.rewards.self_vqa import Choices, Confidences, SelfVQA
from lvrpo.types import Fact, Group, Image, Prompt

GUESSED_SHARE = 0.25
"""Share of the patches that an edit may change if its region is unknown."""


class EditConsistency(Config):
    """Whether an edit changed what it should and kept the rest. Range [0, 1].

        r = changed stayed,
        changed = min(1, max_j d_j(R) / moved) mean_k c_k,    c_k: questions about what should be,
        stayed  = exp(- mean_j d_j(not R) / scale) mean_k c_k,    c_k: questions about what should stay,

    with d_j(M) the root mean square difference to the source over the pixels of patch j (``patch`` x ``patch``) that
    lie in M, the mean over patches weighted by how many those are, and c_k the frozen understanding side's confidence
    in the right answer, given the result. A factor of which there is nothing to ask, or nothing to measure, is 1.

    R, where the edit may change the image, is the prompt's ``edited`` (the built-in world knows it from its scenes,
    rows have a field ``edited``). Only where nothing is known it is guessed, as the share ``edited`` of the patches
    that changed most: an edit of more than that share then loses, and one that touches less may damage a little for
    free.

    What is asked are the prompt's facts, those of the kind ``unchanged`` being about what should stay. Questions about
    what should stay are asked of the source too, and count only where the judge is ``sure`` of their answer there: what
    counts is then whether the result agrees with the source. Where none of them is left, the output is masked with the
    reason.

    The source is the last image of the prompt; a result of another size is masked, and so is what the judge gives no
    number for.
    """

    judges: ClassVar = ("image",)
    hints: ClassVar = RENAMED_OPTIONS

    patch: int = Field(default=8, ge=1, le=100_000)
    """Side of a patch in pixels."""
    edited: float | None = Field(default=None, ge=0, lt=1)
    """Share of the patches that an edit may change, where the prompt does not say which; None: a quarter, and one
    warning says so."""
    scale: float = Field(default=0.1, gt=0)
    """Mean difference outside the region at which *stayed* is 1 / e."""
    moved: float = Field(default=0.1, gt=0)
    """Difference of a patch from which on it counts as changed in full."""
    ask: bool = True
    """false: only pixels are compared, without a judge."""
    sure: float | None = Field(default=None, ge=0, lt=1)
    """Confidence that the judge must have in an answer about the source; None: .75."""
    choices: Choices | None = None
    """See ``choices`` of ``self_vqa``."""
    questions: QuestionConfig | None = None
    """See ``questions`` of ``self_vqa``: edits of free text get questions of both kinds."""
    _vqa: SelfVQA | None = PrivateAttr()
    _warned: bool = False

    @model_validator(mode="after")
    def _questions_are_asked(self) -> Self:
        if not self.ask and not (self.sure is self.choices is self.questions is None):
            raise ValueError("ask=false: asks no questions: leave out sure, choices and questions")
        return self

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._vqa = SelfVQA(choices=self.choices, questions=self.questions) if self.ask else None

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("read",) if self.ask else ()

    @property
    def judged_by(self) -> str:
        return "" if self._vqa is None else self._vqa.judged_by

    def applies(self, prompt: Prompt) -> bool:
        return prompt.task == "edit" and bool(prompt.images)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        self._say_what_is_guessed(groups)
        images, failures = scorable_images(groups)
        scores: dict[SampleIndex, float] = {}
        for (p, g), image in images.items():
            source, region = groups[p].prompt.images[-1], groups[p].prompt.edited
            if image.shape != source.shape:
                failures[p, g] = f"an image of {tuple(image.shape)} for a source of {tuple(source.shape)}"
            elif region is not None and region.shape != source.shape[1:]:
                failures[p, g] = f"a region of {tuple(region.shape)} for a source of {tuple(source.shape)}"
            else:
                scores[p, g] = self.pixel_score(source, image, region)
        if self._vqa is not None:
            found, missing = self._ask(self._vqa, groups, judge)
            scores = {cell: score * found.get(cell, 1.0) for cell, score in scores.items()}
            failures = missing | failures
        return Scores.of(groups, scores, failures)

    @property
    def _guessed_share(self) -> float:
        return GUESSED_SHARE if self.edited is None else self.edited

    def pixel_score(self, source: Image, result: Image, region: torch.Tensor | None = None) -> float:
        """The score of one edit by its pixels alone; ``region``: bool (height, width), where it may change."""
        squares = (result - source).square().mean(dim=0)
        if region is None:
            d, _ = self._patches(squares, torch.ones_like(squares, dtype=torch.bool))
            kept = d.sort().values[: max(1, round(len(d) * (1 - self._guessed_share)))]
            return min(1.0, float(d.max()) / self.moved) * math.exp(-float(kept.mean()) / self.scale)
        inside, _ = self._patches(squares, region)
        outside, weights = self._patches(squares, ~region)
        changed = min(1.0, float(inside.max()) / self.moved) if len(inside) else 1.0
        damage = float((weights * outside).sum() / weights.sum()) if len(outside) else 0.0
        return changed * math.exp(-damage / self.scale)

    def _patches(self, squares: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) root mean of the squares (H, W) in each patch over the pixels ``among``, and the share that those are.

        Patches without such a pixel are left out.
        """
        pixels = among.to(squares)
        summed, share = (
            functional.avg_pool2d(x[None, None], self.patch, ceil_mode=True).flatten()
            for x in (squares * pixels, pixels)
        )
        has = share > 0
        return (summed[has] / share[has]).sqrt(), share[has]

    def _ask(self, vqa: SelfVQA, groups: Sequence[Group], judge: Judge) -> tuple[dict[SampleIndex, float], Failures]:
        """The product of the two means of confidences where something is asked, and why it has no answer."""

        def confirm(pairs: Sequence[tuple[Image, Fact]]) -> list[float | NoAnswer]:
            return vqa.confirm(pairs, judge)

        reasons: dict[int, str] = {}
        given = [p for p, group in enumerate(groups) if group.prompt.facts]
        cases = [(groups[p].prompt.images[-1], tuple(vqa.known(groups[p].prompt))) for p in given]
        asked = list(groups)
        if vqa.generator is not None:
            asked, reasons = vqa.generator.with_questions(groups, judge, confirm)
        for p, facts in zip(
            given, keep_confirmed(cases, confirm, MIN_CONFIDENCE if self.sure is None else self.sure), strict=True
        ):
            if isinstance(facts, NoAnswer):
                reasons[p], facts = facts.reason, ()
            asked[p] = with_facts(asked[p], facts)
        places = [p for p, group in enumerate(asked) if vqa.known(group.prompt)]
        found: Confidences = {}
        failures: Failures = {(p, g): reason for p, reason in reasons.items() for g in range(len(groups[p]))}
        if places:
            found, unanswered = vqa.confidences([asked[p] for p in places], judge, judge)
            failures |= {(places[i], g): reason for (i, g), reason in unanswered.items()}
        products = {}
        for (i, g), confidence in found.items():
            p = places[i]
            stays = torch.tensor([fact.kind == UNCHANGED for fact in vqa.known(asked[p].prompt)])
            parts = [part.mean() for part in (confidence[~stays], confidence[stays]) if len(part)]
            products[p, g] = float(torch.stack(parts).prod())
        return products, failures

    def _say_what_is_guessed(self, groups: Sequence[Group]) -> None:
        guessed = [group.prompt.id for group in groups if group.prompt.edited is None]
        if guessed and self.edited is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"edit_consistency: where the edit may change the source is not known of {len(guessed)} of "
                f"{len(groups)} prompts (first {guessed[0]}): taken to be the {GUESSED_SHARE:.0%} of patches that "
                "changed most; rows say it in the field 'edited'",
                stacklevel=2,
            )
