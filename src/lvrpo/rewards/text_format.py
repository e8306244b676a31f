"""Verifiable reward: the text has the form that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from lvrpo.errors import InputError
from lvrpo.patterns import compile_pattern, matches_whole
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.written import CutOff, check_cut_off, score_texts
from lvrpo.types import Group, Prompt

FORMS = {
    "think_answer": r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*"
    r"<answer>(?:(?!</?think>|</?answer>).)+</answer>\s*",
    "boxed": r"(?:(?!\\boxed).)*\\boxed\{(?:(?!\\boxed).)+\}(?:(?!\\boxed).)*",
    "one_line": r"[^\n]*\S[^\n]*",
}
"""Forms by name; anything else is a regular expression."""


class TextFormat:
    """1 where the whole text matches the form, else 0. Range {0, 1}.

    ``form``: think_answer (<think>...</think> <answer>...</answer>, each once), boxed (exactly one), one_line, or a
    regular expression, in which a dot also matches the end of a line. By itself it is satisfied by empty talk: give
    it a small weight beside a reward of the answer.
    """

    judges = ("text",)
    sides = ()

    def __init__(self, form: str = "think_answer", cut_off: CutOff = "score") -> None:
        self.cut_off: CutOff = check_cut_off("text_format", cut_off)
        self.pattern = FORMS.get(form, form)
        try:
            compile_pattern(self.pattern)
        except InputError as error:
            raise InputError(f"text_format.form={form!r}: {error}: use one, or {', '.join(FORMS)}") from None

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        return score_texts(groups, self.cut_off, lambda text, prompt: float(matches_whole(self.pattern, text)))
