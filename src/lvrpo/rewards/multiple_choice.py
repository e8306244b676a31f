"""Verifiable reward: the text chooses the right option."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.exact_answer import normalize_answer
from lvrpo.rewards.written import CutOff, check_cut_off, score_texts
from lvrpo.types import Group, Prompt

_OPTION = re.compile(r"(?:^|\s)\(?([A-J])[.):]\s+(.+?)(?=\s+\(?[A-J][.):]\s|\s*$)", re.MULTILINE)
_SAID = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}"),
    re.compile(r"(?:answer|choice|option)\W{0,3}(?:is|:|=)?\s*\**\(?([A-Ja-j])\b(?!['’]|\s+\w)\)?", re.IGNORECASE),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?:^|\n)\s*\**([A-J])\**[.):]"),
    re.compile(r"^\W*([A-Ja-j])\W*$"),
    re.compile(r"(?<![\w'’])([B-HJ])(?![\w'’])"),
)
"""Ways to name an option, the plainest first; a bare "A" or "I" inside a sentence is a word."""


class MultipleChoice:
    """1 where the text chooses the option that the prompt's answer names, else 0. Range {0, 1}.

    The answer is a letter from A to J. A text names an option by ``\\boxed{B}``, "answer: B", "(B)", "B." or the letter
    alone, the last one counting, or by repeating what one option of the prompt says. A text that names none, or that in
    the plainest way it uses names nothing final, is wrong.
    """

    judges = ("text",)
    sides = ()

    def __init__(self, cut_off: CutOff = "mask") -> None:
        self.cut_off: CutOff = check_cut_off("multiple_choice", cut_off)

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output and prompt.answer is not None and _letter(prompt.answer) is not None

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        options = {group.prompt.id: options_of(group.prompt) for group in groups}

        def rule(text: str, prompt: Prompt) -> float:
            return float(chosen(text, options[prompt.id]) == _letter(prompt.answer or ""))

        return score_texts(groups, self.cut_off, rule)


def options_of(prompt: Prompt) -> dict[str, str]:
    """The options that the prompt lists, by letter; empty where it lists none."""
    words = "\n".join(part for part in prompt.parts if isinstance(part, str))
    return {letter: normalize_answer(text) for letter, text in _OPTION.findall(words)}


def chosen(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text chooses, or None."""
    said = normalize_answer(text)
    same = [letter for letter, option in options.items() if option == said]
    if len(same) == 1:
        return same[0]
    for pattern in _SAID:
        found = pattern.findall(text)
        if found:
            return found[-1].upper()
    return None


def _letter(answer: str) -> str | None:
    found = re.fullmatch(r"\W*([A-Ja-j])\W*", answer)
    return found[1].upper() if found else None
