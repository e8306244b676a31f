"""Regular expressions that come from data: matched with a limit of time, since some need longer than anybody waits."""

from __future__ import annotations

from functools import lru_cache

import regex

from lvrpo.errors import InputError

MOST_CHARACTERS = 1000
"""Of an expression."""
TIMEOUT_S = 1.0
"""For one text. What matches in time at all does so in thousandths of it."""


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """The expression, in which a dot also matches the end of a line; raises InputError with the rule and the remedy."""
    if len(pattern) > MOST_CHARACTERS:
        raise InputError(f"a regular expression of {len(pattern)} characters: {MOST_CHARACTERS} are allowed")
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"no regular expression ({error})") from None


def matches_whole(pattern: str, text: str) -> bool:
    """Whether the whole text has the form; raises TimeoutError, with the reason, where that takes too long to say."""
    try:
        return compile_pattern(pattern).fullmatch(text, timeout=TIMEOUT_S) is not None
    except TimeoutError:
        raise TimeoutError(f"the form took more than {TIMEOUT_S:g} s to match: write a simpler expression") from None
