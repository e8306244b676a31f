"""Verifiable reward: the text output is the right answer."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import torch

from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.written import WAS_CUT, CutOff, check_cut_off, was_cut
from lvrpo.types import Group, Prompt, Trajectory

_SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_SMALL)}
"""zero to twelve, in digits."""


class ExactAnswer:
    """1 where the text equals the prompt's answer after ``normalize_answer``, else 0. Range {0, 1}.

    ``thoughts``: whether a text that a drawing follows is scored too. ``cut_off``: what did not end within the length
    limit is not the answer: score gives it 0, whatever its words (masked, an answer that never ends would be free);
    mask gives it no score.
    """

    judges = ("text",)
    sides = ()

    def __init__(self, thoughts: bool = True, cut_off: CutOff = "score") -> None:
        self.thoughts = thoughts
        self.cut_off: CutOff = check_cut_off("exact_answer", cut_off)

    def applies(self, prompt: Prompt) -> bool:
        scored = "text" in prompt.output if self.thoughts else prompt.output == ("text",)
        return prompt.answer is not None and scored

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.tensor([[float(answers_rightly(t)) for t in group.trajectories] for group in groups])
        failures: dict[tuple[int, int], str] = {}
        for p, group in enumerate(groups if self.cut_off == "mask" else ()):
            for g, trajectory in enumerate(group.trajectories):
                if was_cut(trajectory):
                    values[p, g], failures[p, g] = math.nan, WAS_CUT
        return Scores(values, failures)


def answers_rightly(trajectory: Trajectory) -> bool:
    """Whether the text is the prompt's answer, and ended."""
    return not was_cut(trajectory) and answers_match(trajectory.text or "", trajectory.prompt.answer or "")


def answers_match(given: str, right: str) -> bool:
    """Whether two answers are the same after normalisation."""
    return normalize_answer(given) == normalize_answer(right)


@lru_cache(maxsize=8192)  # the same short answers come in every step
def normalize_answer(text: str) -> str:
    """Case, width, articles, surrounding punctuation and number words do not matter: "The  Three." is "3".

    An article that stands alone is the answer itself: choice "A" is not the empty text.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[^\w\s.+\-/%]", " ", text)
    words = [word for word in (word.rstrip(".") for word in text.split()) if word]
    words = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(_plain_number(NUMBER_WORDS.get(word, word)) for word in words)


def _plain_number(word: str) -> str:
    """07 is 7 and 3.50 is 3.5; anything else is itself."""
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?", word):
        return word
    sign = "-" if word.startswith("-") else ""
    whole, _, fraction = word.lstrip("+-").partition(".")
    fraction = fraction.rstrip("0")
    plain = (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return plain if plain == "0" else sign + plain
