"""Encoder-free reward: the frozen model describes the drawing, and the description is compared with the prompt."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from lvrpo.config import Config
from lvrpo.policies.base import Judge, Sampling
from lvrpo.rewards.base import Scores, image_problem
from lvrpo.rewards.verifiable_text import TRUNCATED, text_problem
from lvrpo.sampling import derive_seed
from lvrpo.types import Group, Prompt


class CaptionBack(Config):
    """F1 of the words of the judge's description of the drawing with the words of the prompt.

    F1 = 2 |c n p| / (|c| + |p|) over multisets of words, the mean over ``samples`` descriptions; greedy with one
    sample. A description that is empty or was cut off at ``max_new_tokens`` does not count; an output with no other is
    masked. Range [0, 1].
    Words alone are compared: an order of words ("left of") counts only by the word itself, and another word of the same
    meaning not at all. It needs only that the judge can describe.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)

    instruction: str = "describe the picture"
    """The request to the judge."""
    samples: int = Field(default=1, ge=1, le=100_000)
    """Descriptions per drawing."""
    max_new_tokens: int = Field(default=24, ge=1, le=100_000)
    """Longest caption, in tokens."""
    ignore: tuple[str, ...] = ("a", "an", "the", "draw", "picture", "of", "and", "there", "is", "are")
    """Words that are not compared."""

    def applies(self, prompt: Prompt) -> bool:
        return prompt.output == ("image",) and prompt.task == "generate" and bool(self._words(prompt.text))

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        asked: list[Prompt] = []
        seeds: list[int] = []
        cells: list[tuple[int, int]] = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                image, problem = trajectory.image, image_problem(trajectory, judge)
                if image is None or problem:
                    failures[p, g] = str(problem)
                    continue
                key = f"{group.prompt.id}/described/{g}"
                asked.append(Prompt(key, "understand", (image, self.instruction), ("text",)))
                seeds.append(derive_seed(trajectory.seed, "caption back"))
                cells.append((p, g))
        temperature = 0.0 if self.samples == 1 else 1.0
        sampling = Sampling(self.samples, temperature, self.max_new_tokens)
        for (p, g), described in zip(cells, judge.sample(asked, sampling, seeds) if asked else (), strict=True):
            wanted = self._words(groups[p].prompt.text)
            problems = [text_problem(t) for t in described.trajectories]
            found = [self._words(t.text) for t, bad in zip(described.trajectories, problems, strict=True) if not bad]
            if found:
                values[p, g] = sum(word_f1(words, wanted) for words in found) / len(found)
            elif TRUNCATED in problems:
                failures[p, g] = f"the judge's description was cut off at {self.max_new_tokens} tokens"
            else:
                failures[p, g] = "the judge described nothing"
        return Scores(values, failures)

    def _words(self, text: str | None) -> Counter[str]:
        return Counter(word for word in re.findall(r"\w+", (text or "").lower()) if word not in self.ignore)


def word_f1(given: Counter[str], wanted: Counter[str]) -> float:
    """2 |a n b| / (|a| + |b|) of two multisets; 0 where both are empty."""
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 0.0
