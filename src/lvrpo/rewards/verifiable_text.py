"""Verifiable rewards of texts: right answer, number, choice or formula, form, length; and their common code."""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from lvrpo.config import Config, Natural, NonNegative
from lvrpo.errors import InputError
from lvrpo.patterns import compile_pattern, full_match
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Scores, score_each
from lvrpo.types import Group, Prompt, TextSegment, Trajectory

CutOff = Literal["mask", "score"]
"""Handling of a text that reached the length limit: no score, or the score of the truncated text."""

TRUNCATED = "the text was cut off at the length limit"
EMPTY = "the answer is empty"
NO_TEXT = "nothing was written"


def last_text(trajectory: Trajectory) -> TextSegment | None:
    """The last text of a trajectory."""
    return next((s for s in reversed(trajectory.segments) if isinstance(s, TextSegment)), None)


def _is_truncated(trajectory: Trajectory) -> bool:
    """Whether the last text of a trajectory met the length limit."""
    segment = last_text(trajectory)
    return segment is not None and not segment.ended


def text_problem(trajectory: Trajectory, empty: str = EMPTY) -> str | None:
    """The reason why the last text of a trajectory cannot be scored: empty, or truncated; None if it can."""
    segment = last_text(trajectory)
    if segment is None or not segment.text.strip():
        return empty
    return None if segment.ended else TRUNCATED


def score_texts(groups: Sequence[Group], cut_off: CutOff, rule: Callable[[str, Prompt], float]) -> Scores:
    """A rule applied to the last text of every trajectory."""

    def score(trajectory: Trajectory) -> float | str:
        segment = last_text(trajectory)
        if segment is None:
            return NO_TEXT
        if cut_off == "mask" and not segment.ended:
            return TRUNCATED
        try:
            return rule(segment.text, trajectory.prompt)
        except TimeoutError as error:  # of a rule that comes from data
            return str(error)
        except (ValueError, ArithmeticError, RecursionError) as error:  # such as a number of 5,000 digits
            return f"the rule failed: {error}"

    return score_each(groups, score)


class TextRule(Config):
    """A rule that is applied to the last text of every trajectory."""

    judges: ClassVar = ("text",)
    sides: ClassVar = ()

    cut_off: CutOff = "mask"
    """mask: a text that met the length limit has no score; score: it is scored as it stands."""

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output and prompt.answer is not None

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        return score_texts(groups, self.cut_off, self.rule)

    @abstractmethod
    def rule(self, text: str, prompt: Prompt) -> float:
        """The score of a text."""


# --- exact_answer ---


_SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_SMALL)}
"""zero to twelve, in digits."""


class ExactAnswer(Config):
    """1 where the text equals the prompt's answer after ``normalize_answer``, else 0. Range {0, 1}."""

    judges: ClassVar = ("text",)
    sides: ClassVar = ()

    thoughts: bool = True
    """Whether a text that is followed by an image is scored too."""
    cut_off: CutOff = "score"
    """score: a text that met the length limit is not the answer and gets 0, as an answer that never ends would
    otherwise be free; mask: it has no score."""

    def applies(self, prompt: Prompt) -> bool:
        scored = "text" in prompt.output if self.thoughts else prompt.output == ("text",)
        return prompt.answer is not None and scored

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        masked = self.cut_off == "mask"
        return score_each(groups, lambda t: TRUNCATED if masked and _is_truncated(t) else float(is_right_answer(t)))


def is_right_answer(trajectory: Trajectory) -> bool:
    """Whether the text is the prompt's answer, and ended."""
    return not _is_truncated(trajectory) and answers_match(trajectory.text or "", trajectory.prompt.answer or "")


def answers_match(given: str, right: str) -> bool:
    """Whether two answers are the same after normalisation, or, if both are signs alone ("<"), letter for letter."""
    one, two = normalize_answer(given), normalize_answer(right)
    if one or two:
        return one == two
    signs, wanted = (unicodedata.normalize("NFKC", text).split() for text in (given, right))
    return signs == wanted


@lru_cache(maxsize=8192)  # the same short answers come in every step
def normalize_answer(text: str) -> str:
    """Case, width, articles, surrounding punctuation and number words do not matter: "The  Three." is "3".

    An article that stands alone is the answer itself: choice "A" is not the empty text.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("−", "-")
    text = re.sub(r"[^\w\s.+\-/%]", lambda sign: sign[0] if _is_part_of_letter(sign[0]) else " ", text)
    words = [word for word in (word.rstrip(".") for word in text.split()) if word]
    words = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(_plain_number(NUMBER_WORDS.get(word, word)) for word in words)


def _is_part_of_letter(sign: str) -> bool:
    """Whether it is a vowel sign or an accent, as in Hindi and Thai, of which ``\\w`` takes the letter alone."""
    return unicodedata.category(sign) in ("Mn", "Mc") and not "\ufe00" <= sign <= "\ufe0f"  # variants of emoji


def _plain_number(word: str) -> str:
    """07 is 7 and 3.50 is 3.5; anything else is itself."""
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?", word):
        return word
    sign = "-" if word.startswith("-") else ""
    whole, _, fraction = word.lstrip("+-").partition(".")
    fraction = fraction.rstrip("0")
    plain = (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return plain if plain == "0" else sign + plain


# --- numeric ---


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)])[-−+])?(?<![\w.])(?:(?P<top>{_DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}}))?)"
    rf"(?:\s*/\s*(?P<bottom>\d+))?(?P<percent>\s*%)?(?!\w)",
    re.IGNORECASE,
)


class Numeric(TextRule):
    """1 where the last number of the text is the answer's within the tolerance, else 0. Range {0, 1}.

    |given - right| <= max(absolute, relative |right|). Numbers are exact: 1,234.5, 3/4, 12 %, 2e3, -7, and the words
    zero to twelve; "12 %" is 0.12, and equals a right answer of 12 where that one is written without a percent sign. A
    text without a number is wrong, not masked. It applies where the right answer is a number.
    """

    relative: float = Field(default=0.0, ge=0, lt=1)
    """Tolerance as a share of the right answer."""
    absolute: NonNegative = 0.0
    """Tolerance in units of the answer."""

    def applies(self, prompt: Prompt) -> bool:
        return super().applies(prompt) and last_number(prompt.answer or "") is not None

    def rule(self, text: str, prompt: Prompt) -> float:
        return float(self.matches(text, prompt.answer or ""))

    def matches(self, given: str, right: str) -> bool:
        """Whether the last numbers of two texts agree."""
        one, two = _last_number(given), last_number(right)
        if one is None or two is None:
            return False
        number, is_percent = one
        if is_percent and "%" not in right:
            return self._close(number, two) or self._close(number * 100, two)
        return self._close(number, two)

    def _close(self, given: Fraction, right: Fraction) -> bool:
        relative, absolute = Fraction(str(self.relative)), Fraction(str(self.absolute))
        return abs(given - right) <= max(absolute, relative * abs(right))


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None without one. A division by zero is no number."""
    found = _last_number(text)
    return None if found is None else found[0]


def _last_number(text: str) -> tuple[Fraction, bool] | None:
    """``last_number``, and whether it has a percent sign."""
    found: tuple[int, Fraction, bool] | None = None
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
        found = match.start(), value, match["percent"] is not None
    for match in re.finditer(r"[a-z]+", text.lower()):
        if match[0] in NUMBER_WORDS and (found is None or match.start() > found[0]):
            found = match.start(), Fraction(NUMBER_WORDS[match[0]]), False
    return None if found is None else found[1:]


# --- multiple_choice ---


_OPTION = re.compile(r"(?:^|\s)\(?([A-J])[.):]\s+(.+?)(?=\s+\(?[A-J][.):]\s|\s*$)", re.MULTILINE)
_SAID = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}"),
    re.compile(
        r"(?:answer|choice|option)\W{0,3}(?:is|:|=)?\s*\**\(?([A-Ja-j])\b(?!['’]|\s+(?!(?:because|since|as|due)\b)\w)\)?",
        re.IGNORECASE,
    ),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?:^|\n)\s*\**([A-J])\**[.):]"),
    re.compile(r"^\W*([A-Ja-j])\W*$"),
    re.compile(r"(?<![\w'’])([B-HJ])(?![\w'’])"),
)
"""Ways to name an option, the plainest first; a bare "A" or "I" inside a sentence is a word."""


class MultipleChoice(TextRule):
    """1 where the text chooses the option that the prompt's answer names, else 0. Range {0, 1}.

    The answer is a letter from A to J. A text names an option by ``\\boxed{B}``, "answer: B", "(B)", "B." or the letter
    alone, the last one counting, or by repeating what one option of the prompt says. A text that names none, or that in
    the plainest way it uses names nothing final, is wrong.
    """

    def applies(self, prompt: Prompt) -> bool:
        return super().applies(prompt) and _letter(prompt.answer or "") is not None

    def rule(self, text: str, prompt: Prompt) -> float:
        return float(chosen(text, options_of(prompt)) == _letter(prompt.answer or ""))


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


# --- boxed ---


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


class Boxed(TextRule):
    r"""1 where the content of the last ``\boxed{}`` is the prompt's answer, else 0. Range {0, 1}.

    A text without a box is wrong, not masked, because the prompt requests it. The reference may be boxed or not.
    """

    compare: Literal["plain", "math_verify"] = "plain"
    r"""plain: equal as exact numbers (1/2, \frac{1}{2} and 0.5 are the same) or as formulas without spacing.
    math_verify: equal as mathematics, sets and intervals included; needs ``pip install 'lvrpo[math]'``."""
    _same: Callable[[str, str], bool] = PrivateAttr()

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._same = same_formula if self.compare == "plain" else _math_verify()

    def rule(self, text: str, prompt: Prompt) -> float:
        given = last_boxed(text)
        right = last_boxed(prompt.answer or "") or prompt.answer or ""
        return float(given is not None and self._same(given, right))


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
    one, two = _plain_formula(given), _plain_formula(right)
    if one == two:
        return bool(one)
    numbers = [_number(formula) for formula in (one, two)]
    return numbers[0] is not None and numbers[0] == numbers[1]


def _plain_formula(formula: str) -> str:
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


# --- text_format ---


FORMS = {
    "think_answer": r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*"
    r"<answer>(?:(?!</?think>|</?answer>).)+</answer>\s*",
    "boxed": r"(?:(?!\\boxed).)*\\boxed\{(?:(?!\\boxed).)+\}(?:(?!\\boxed).)*",
    "one_line": r"[^\n]*\S[^\n]*",
}
"""Forms by name; anything else is a regular expression."""


class TextFormat(TextRule):
    """1 where the whole text matches the form, else 0. Range {0, 1}.

    By itself it is satisfied by any text of that form: give it a small weight beside a reward of the answer.
    """

    form: str = "think_answer"
    """think_answer (<think>...</think> <answer>...</answer>, each once), boxed (exactly one), one_line, or a regular
    expression, in which a dot also matches the end of a line."""
    cut_off: CutOff = "score"
    """mask: a text that met the length limit has no score; score: it is scored as it stands."""

    @field_validator("form")
    @classmethod
    def _is_an_expression(cls, form: str) -> str:
        try:
            compile_pattern(FORMS.get(form, form))
        except InputError as error:
            raise ValueError(f"{error}: use one, or {', '.join(FORMS)}") from None
        return form

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def rule(self, text: str, prompt: Prompt) -> float:
        return float(full_match(FORMS.get(self.form, self.form), text))


# --- text_length ---


class TextLength(Config):
    """Minus how far a text enters the last ``buffer`` tokens before ``limit`` (DAPO, arXiv:2503.14476, eq. 13).

    r = 0 for n <= limit - buffer;  (limit - buffer - n) / buffer up to limit;  -1 beyond.  Range [-1, 0].
    Differs from the paper: a text of fewer than ``least`` tokens gets -1 too. The end token counts.
    """

    judges: ClassVar = ("text",)
    sides: ClassVar = ()

    limit: int = Field(ge=1, le=100_000)
    """Tokens from which on the score is -1."""
    buffer: Natural = 0
    """Tokens before the limit over which the score falls from 0."""
    least: Natural = 0
    """Tokens that a text must have."""

    @model_validator(mode="after")
    def _within_the_limit(self) -> Self:
        if max(self.buffer, self.least) > self.limit:
            raise ValueError(f"buffer={self.buffer}, least={self.least}: must not be above limit={self.limit}")
        return self

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        return score_each(
            groups, lambda t: NO_TEXT if (s := last_text(t)) is None else self.length_score(s.tokens.numel())
        )

    def length_score(self, tokens: int) -> float:
        """The score of a text of ``tokens`` tokens."""
        if tokens > self.limit or tokens < self.least:
            return -1.0
        over = tokens - (self.limit - self.buffer)
        return -over / self.buffer if over > 0 else 0.0
