"""Which form a question of the built-in world has: its words without what they name."""

from __future__ import annotations

from collections.abc import Mapping

from lvrpo.data.scenes.grammar import EDGES, NUMBER_WORDS, PLURAL, RELATION_PHRASE, normalize
from lvrpo.data.scenes.objects import COLORS, DIGITS, GROUNDS, SHAPES

_ONE_OF: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("COLOR", (*COLORS, *GROUNDS)),
    ("THING", (*SHAPES, *PLURAL.values(), "object", *(f"digit {d}" for d in DIGITS))),
    ("NUMBER", NUMBER_WORDS),
    ("DIGIT", DIGITS),
)
_PLACEHOLDERS: Mapping[str, str] = {word: name for name, words in _ONE_OF for word in words}


def question_form(text: str) -> str:
    """The text with placeholders for what it names, so that questions of one form differ in content alone.

    >>> question_form("are there more circles than stars ?")
    'are there more THING than THING ?'
    >>> question_form("is the red circle left of the 7 ?")
    'is the THING RELATION the THING ?'

    Objects and digits become THING, a color before them included; other colors COLOR, counts NUMBER, relations
    RELATION, edges EDGE. "an" is read as "a".
    """
    words = ["a" if word == "an" else _PLACEHOLDERS.get(word, word) for word in normalize(text).split()]
    form = " ".join("THING" if word == "DIGIT" else word for word in words)
    form = form.replace("the digit THING", "a THING").replace("COLOR THING", "THING")
    for relation in RELATION_PHRASE.values():
        form = form.replace(f" {relation} the THING", " RELATION the THING")
    for edge in EDGES:
        form = form.replace(f"the {edge} edge", "the EDGE edge")
    return form


__all__ = ["question_form"]
