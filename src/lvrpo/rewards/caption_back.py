"""Cycle-consistency reward: the frozen model captions the image, and the caption is compared with the prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lvrpo.config import Config
from lvrpo.policies.base import Judge, Sampling
from lvrpo.rewards.base import SampleIndex, Scores, scorable_images
from lvrpo.rewards.verifiable_text import TRUNCATED, text_problem
from lvrpo.sampling import derive_seed
from lvrpo.types import Group, Prompt


class CaptionBack(Config):
    """F1 of the words of the judge's description of the image with the words of the prompt.

    F1 = 2 |c n p| / (|c| + |p|) over multisets of words, of the greedy description. An output whose description is
    empty or was cut off at ``max_new_tokens`` is masked. Range [0, 1].
    Words alone are compared: an order of words ("left of") counts only by the word itself, and another word of the same
    meaning not at all. It needs only that the judge can describe.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)
    hints: ClassVar = {"samples": "was removed: one greedy description is compared"}

    instruction: str = "describe the picture"
    """The request to the judge."""
    max_new_tokens: int = Field(default=24, ge=1, le=100_000)
    """Longest caption, in tokens."""
    ignore: tuple[str, ...] = ("a", "an", "the", "draw", "picture", "of", "and", "there", "is", "are")
    """Words that are not compared."""

    def applies(self, prompt: Prompt) -> bool:
        return prompt.output == ("image",) and prompt.task == "generate" and bool(self._words(prompt.text))

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        images, failures = scorable_images(groups, judge)
        found: dict[SampleIndex, float] = {}
        asked = [
            Prompt(f"{groups[p].prompt.id}/described/{g}", "understand", (image, self.instruction), ("text",))
            for (p, g), image in images.items()
        ]
        seeds = [derive_seed(groups[p].trajectories[g].seed, "caption back") for p, g in images]
        sampling = Sampling(1, 0.0, self.max_new_tokens)
        for (p, g), described in zip(images, judge.sample(asked, sampling, seeds) if asked else (), strict=True):
            (said,) = described.trajectories
            problem = text_problem(said)
            if problem is None:
                found[p, g] = word_f1(self._words(said.text), self._words(groups[p].prompt.text))
            elif problem == TRUNCATED:
                failures[p, g] = f"the judge's description was cut off at {self.max_new_tokens} tokens"
            else:
                failures[p, g] = "the judge described nothing"
        return Scores.of(groups, found, failures)

    def _words(self, text: str | None) -> Counter[str]:
        return Counter(word for word in re.findall(r"\w+", (text or "").lower()) if word not in self.ignore)


def word_f1(given: Counter[str], wanted: Counter[str]) -> float:
    """2 |a n b| / (|a| + |b|) of two multisets; 0 where both are empty."""
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 0.0
