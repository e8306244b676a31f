"""Verifiable reward: the number that a text ends on is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.exact_answer import NUMBER_WORDS
from lvrpo.rewards.options import Amount, Below1
from lvrpo.rewards.written import CutOff, check_cut_off, score_texts
from lvrpo.types import Group, Prompt

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)])[-−+])?(?<![\w.])(?:(?P<top>{_DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}}))?)"
    rf"(?:\s*/\s*(?P<bottom>\d+))?(?P<percent>\s*%)?(?!\w)",
    re.IGNORECASE,
)


class Numeric:
    """1 where the last number of the text is the answer's within the tolerance, else 0. Range {0, 1}.

    |given - right| <= max(absolute, relative |right|). Numbers are exact: 1,234.5, 3/4, 12 %, 2e3, -7, and the words
    zero to twelve; "12 %" is 0.12, and equals a right answer of 12 where that one is written without a percent sign. A
    text without a number is wrong, not masked. It applies where the right answer is a number.
    """

    judges = ("text",)
    sides = ()

    def __init__(self, relative: Below1 = 0.0, absolute: Amount = 0.0, cut_off: CutOff = "mask") -> None:
        if not (0 <= relative < 1 and 0 <= absolute < float("inf")):
            raise InputError(f"numeric.relative={relative}, absolute={absolute}: need 0 <= relative < 1, absolute >= 0")
        self.relative, self.absolute = Fraction(str(relative)), Fraction(str(absolute))
        self.cut_off: CutOff = check_cut_off("numeric", cut_off)

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output and prompt.answer is not None and last_number(prompt.answer) is not None

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        return score_texts(groups, self.cut_off, lambda text, prompt: float(self.matches(text, prompt.answer or "")))

    def matches(self, given: str, right: str) -> bool:
        """Whether the last numbers of two texts agree."""
        one, two = last_number(given), last_number(right)
        if one is None or two is None:
            return False
        if "%" in given and "%" not in right:
            return self._close(one, two) or self._close(one * 100, two)
        return self._close(one, two)

    def _close(self, given: Fraction, right: Fraction) -> bool:
        return abs(given - right) <= max(self.absolute, self.relative * abs(right))


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None without one. A division by zero is no number."""
    found: tuple[int, Fraction] | None = None
    for match in _NUMBER.finditer(text):
        value = Fraction(match["top"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
        if match["bottom"] is not None:
            if int(match["bottom"]) == 0:
                continue
            value /= int(match["bottom"])
        if match["percent"]:
            value /= 100
        if match["sign"] in ("-", "−"):
            value = -value
        found = match.start(), value
    for match in re.finditer(r"[a-z]+", text.lower()):
        if match[0] in NUMBER_WORDS and (found is None or match.start() > found[0]):
            found = match.start(), Fraction(NUMBER_WORDS[match[0]])
    return None if found is None else found[1]
