r"""Verifiable reward: what stands in the last \boxed{} is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.numeric import last_number
from lvrpo.rewards.written import CutOff, check_cut_off, score_texts
from lvrpo.types import Group, Prompt

Compare = Literal["plain", "math_verify"]

_PLAIN = (
    (r"\\(?:left|right|,|;|!|displaystyle)(?![a-zA-Z])|\$|\\\$|~", ""),
    (r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}", r"\1"),
    (r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)"),
    (r"\\[dt]?frac(\d)(\d)", r"(\1)/(\2)"),
    (r"\\%", "%"),
    (r"\\(?:cdot|times)(?![a-zA-Z])", "*"),
    (r"\s+", ""),
    (r"(?<![\w)])\((-?[\d.]+)\)", r"\1"),
    (r"/\((-?[\d.]+)\)", r"/\1"),
    (r"\.$", ""),
)


class Boxed:
    r"""1 where the content of the last ``\boxed{}`` is the prompt's answer, else 0. Range {0, 1}.

    plain: equal as exact numbers (1/2, \frac{1}{2} and 0.5 are the same) or as formulas without spacing.
    math_verify: equal as mathematics, sets and intervals included; needs ``pip install 'lvrpo[math]'``.
    A text without a box is wrong, not masked: the box was asked for. The answer may be boxed or not.
    """

    judges = ("text",)
    sides = ()

    def __init__(self, compare: Compare = "plain", cut_off: CutOff = "mask") -> None:
        if compare not in get_args(Compare):
            raise InputError(f"boxed.compare={compare!r}: unknown: use {', '.join(get_args(Compare))}")
        self.cut_off: CutOff = check_cut_off("boxed", cut_off)
        self.same = same_formula if compare == "plain" else _math_verify()

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output and prompt.answer is not None

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        def rule(text: str, prompt: Prompt) -> float:
            given = last_boxed(text)
            right = last_boxed(prompt.answer or "") or prompt.answer or ""
            return float(given is not None and self.same(given, right))

        return score_texts(groups, self.cut_off, rule)


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` with its braces balanced; None without a whole one."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for at in range(match.end(), len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                return text[match.end() : at]
    return None


def same_formula(given: str, right: str) -> bool:
    """Whether two formulas are the same number, or the same but for spacing."""
    one, two = plain_formula(given), plain_formula(right)
    if one == two:
        return bool(one)
    numbers = [_number(formula) for formula in (one, two)]
    return numbers[0] is not None and numbers[0] == numbers[1]


def plain_formula(formula: str) -> str:
    """Without spacing, sizes and text marks; fractions with a slash."""
    for pattern, plain in _PLAIN:
        formula = re.sub(pattern, plain, formula)
    return formula


def _number(formula: str) -> Fraction | None:
    whole = re.fullmatch(r"[-+−]?[\d.,]+(?:e[-+]?\d+)?(?:/\d+)?%?", formula, re.IGNORECASE)
    return last_number(formula) if whole else None


def _math_verify() -> Any:
    """(given, right) -> bool. Any: the package is optional."""
    try:
        from math_verify import parse, verify  # type: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise InputError("boxed.compare=math_verify: needs the package: pip install 'lvrpo[math]'") from None

    def same(given: str, right: str) -> bool:
        one, two = (parse(f"\\boxed{{{formula}}}") for formula in (right, given))
        return same_formula(given, right) or bool(verify(one, two))

    return same
