"""What the answer of a chat model says, where exactly one thing can be read from it; else why not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from lvrpo.rewards.answers import normalize_answer
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.rewards.questions import MOST_WORDS

LONGEST = 4 * MOST_WORDS
"""Words of a sentence that an answer may stand in."""

_RATING = re.compile(r"(?<![\d.\-])(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10\b)?(?!\.?\d)")
_REFUSAL = re.compile(
    r"\b(?:as an ai|language model|sorry|apolog\w+|unable|unclear|unknown|unsure|not sure|n/a)\b"
    r"|\b(?:hard|difficult|impossible) to\b"
    r"|\b(?:can ?|ca |could |did |do )not (?:(?:be )?(?:tell|say|know|judge|determine\w*|answer\w*)\b"
    r"|(?:\w+ ){0,2}?(?:to )?(?:an?|any|that|the|this|your)? ?(?:image|picture|photo)s?\b)"
    r"|\bno (?:image|picture|photo)s?\b"
)
_GARBLED = re.compile(r"\b[b-df-hj-np-tv-xz]{4,}\b|(.)\1{3}|\b(?:qwer|wert|asdf|sdfg|dfgh|fghj|ghjk|hjkl|zxcv|xcvb)")
_DENIALS = frozenset(("cannot", "neither", "never", "no", "nor", "not", "without"))
_ARTICLES = frozenset(("a", "an", "the"))
_COLOR = re.compile(
    "beige|black|blue|brown|cyan|gold|gray|green|magenta|maroon|navy|orange|pink|purple|red|silver|teal|turquoise|"
    "violet|white|yellow"
)
_PLACE = re.compile("above|behind|below|front|left|middle|right")
_SAME = {"grey": "gray", "over": "above", "top": "above", "center": "middle", "centre": "middle"}
_SAME |= dict.fromkeys(("beneath", "bottom", "under", "underneath"), "below")


def yes_or_no(answer: str, wanted: str) -> float | NoAnswer:
    """1 where an answer says yes as wanted, or no as wanted, and 0 where it says the other; it may say more.

    No answer: both words or neither, a refusal, a yes that is denied, and a long sentence in which the word does not
    stand by itself ("a table with no plates and ...").
    """
    plain = _plain(answer)
    words = re.findall(r"[a-z]+", plain)
    said = {"yes", "no"} & set(words)
    if len(said) != 1:
        return _none("both yes and no" if said else "neither yes nor no", answer)
    if _REFUSAL.search(plain):
        return _none("a refusal", answer)
    (word,) = said
    if not re.match(rf"\W*{word}\b", plain):
        if word == "yes" and _DENIALS & set(words):
            return _none("a denial", answer)
        if len(words) > MOST_WORDS and not re.search(rf"\b{word}\s*(?:[^\w\s]|$)", plain):
            return _none("neither yes nor no", answer)
    return float(word == normalize_answer(wanted))


def same_answer(answer: str, wanted: str) -> float | NoAnswer:
    """1 where an answer is the wanted one, alone or in a sentence ("The cube is red."), and 0 where it is another.

    Where a number, a color or a place is wanted, another one is another answer, and what names none or several is no
    answer. Anything else that is short counts as another answer, as nobody knows all of them. No answer: what is long
    and lacks the wanted one, holds a rival of it beside it, denies, refuses, or is no language.
    """
    words, want = _words(answer), _words(wanted)
    if want and words == want:
        return 1.0
    if _REFUSAL.search(_plain(answer)):
        return _none("a refusal", answer)
    if not words or set(words) <= {"yes", "no"} or set(want) <= _ARTICLES:
        return _none("no answer to compare", answer)
    if len(words) > LONGEST:
        return _none("too many words for an answer", answer)
    rest = _without(words, want)
    kind = next((name for name, named in _KINDS.items() if _all_of(named, want)), None)
    if _DENIALS & set(words if rest is None else rest) - ({"no"} if kind == "number" else set()):
        return _none("a denial", answer)
    found = _one_of_a_kind(words, want, kind) if kind else _in_free_words(words, want, rest)
    if found == 0 and len(words) > MOST_WORDS:
        return _none("too many words for an answer", answer)
    return _none(found, answer) if isinstance(found, str) else found


def _one_of_a_kind(words: Sequence[str], want: Sequence[str], kind: str) -> float | str:
    """Whether the numbers, colors or places that an answer names are the wanted ones; or why nobody can say."""
    found, wanted = _named(_KINDS[kind], words), _named(_KINDS[kind], want)
    if len(found) != len(wanted):
        return f"more than one {kind}" if found else f"no {kind}"
    return float(found == wanted)


def _in_free_words(words: Sequence[str], want: Sequence[str], rest: Sequence[str] | None) -> float | str:
    """Whether the wanted words occur, ``rest`` being the others; or why nobody can say."""
    if rest is None:
        return "no answer to compare" if _GARBLED.search(" ".join(words)) else 0.0
    rivals = [name for name, named in _KINDS.items() if (own := _named(named, want)) and _named(named, rest) - own]
    if rivals:
        return f"more than one {rivals[0]}"
    return "more than one answer" if {"and", "or"} & set(rest) else 1.0


def rating(answer: str) -> float | NoAnswer:
    """The one number from 0 to 10 in an answer, divided by 10."""
    if _REFUSAL.search(_plain(answer)):
        return _none("a refusal", answer)
    numbers = {float(match[1]) for match in _RATING.finditer(answer)}
    if len(numbers) != 1 or not 0 <= max(numbers) <= 10:
        return _none("no number from 0 to 10", answer)
    return numbers.pop() / 10


def _number(word: str) -> str | None:
    if word in ("no", "none", "nothing"):
        return "0"
    return word if re.fullmatch(r"[+-]?\d+(?:\.\d+)?", word) else None


def _color(word: str) -> str | None:
    word = _SAME.get(word, word)
    return word if _COLOR.fullmatch(word) else None


def _place(word: str) -> str | None:
    word = _SAME.get(word, word)
    return word if _PLACE.fullmatch(word) else None


_KINDS: dict[str, Callable[[str], str | None]] = {"number": _number, "color": _color, "place": _place}


def _named(named: Callable[[str], str | None], words: Iterable[str]) -> set[str]:
    return {name for word in words if (name := named(word)) is not None}


def _all_of(named: Callable[[str], str | None], words: Sequence[str]) -> bool:
    """Whether words are of one kind and nothing else."""
    return any(map(named, words)) and all(word == "and" or named(word) for word in words)


def _words(text: str) -> list[str]:
    return normalize_answer(_plain(text)).split()


def _without(words: Sequence[str], part: Sequence[str]) -> list[str] | None:
    """The words before and after a part; None where it does not occur."""
    for start in range(len(words) - len(part) + 1):
        if list(words[start : start + len(part)]) == list(part):
            return [*words[:start], *words[start + len(part) :]]
    return None


def _plain(text: str) -> str:
    """Lower case on one line, "n't" written out."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return re.sub(r"n['’]t\b", " not", text)


def _none(what: str, answer: str) -> NoAnswer:
    line = " ".join(answer.split())
    return NoAnswer(f"{what} in {(line if len(line) <= 60 else f'{line[:57]}...')!r}")
