"""Regular expressions from data, matched with a timeout because backtracking can take exponential time."""

from __future__ import annotations

from functools import lru_cache

import regex

from lvrpo.errors import InputError

MAX_PATTERN_LENGTH = 1000
"""Characters."""
TIMEOUT_S = 1.0
"""Per text; usual matches take about a millisecond."""


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Compiles an expression with DOTALL; raises InputError if it is too long or invalid."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise InputError(f"a regular expression of {len(pattern)} characters: {MAX_PATTERN_LENGTH} are allowed")
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"no regular expression ({error})") from None


def full_match(pattern: str, text: str) -> bool:
    """Whether the pattern matches the whole text; raises TimeoutError after ``TIMEOUT_S``."""
    try:
        return compile_pattern(pattern).fullmatch(text, timeout=TIMEOUT_S) is not None
    except TimeoutError:
        raise TimeoutError(f"the form took more than {TIMEOUT_S:g} s to match: write a simpler expression") from None
