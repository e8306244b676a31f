"""Other questions that ask for the same fact, so that a judge is not taken at its word for one wording."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lvrpo.data.scenes import grammar
from lvrpo.data.scenes.grammar import NUMBER_WORDS, OPPOSITE, Mention
from lvrpo.data.worlds import Asked
from lvrpo.types import Fact


def paraphrases(facts: Sequence[Fact]) -> list[tuple[Asked, ...]]:
    """For every fact its own question first, then others with the answers that they must have if the facts hold.

    Only what the facts say is used: a count of one, for example, follows from "there is a circle" only where the total
    leaves room for no other. A fact of another world, or of which nothing else can be asked, has its question alone.

    >>> from lvrpo.data.scenes import facts
    >>> paraphrases([facts.digit("7")])
    [(('what digit is there ?', '7'), ('is there a 7 ?', 'yes'))]
    """
    closed = _is_closed(facts)
    out = []
    for fact in facts:
        asked = [(fact.question, fact.answer), *_others(fact, facts, closed)]
        out.append(tuple(dict.fromkeys(asked)))
    return out


_REWORDED = (
    (r"what (color|shape) (is|are) (.+) \?", r"\3 \2 what \1 ?"),
    (r"how many (.+) are there \?", r"there are how many \1 ?"),
    (r"is there (.+) \?", r"\1 is there ?"),
    (r"where is (.+) relative to (.+) \?", r"relative to \2 where is \1 ?"),
    (r"where is (.+) \?", r"\1 is where ?"),
    (r"is (.+?) ((?:left of|right of|above|below|at) .+) \?", r"\1 is \2 ?"),
    (r"what digit is there \?", r"there is what digit ?"),
)


def paraphrased(question: str) -> str:
    """A question about a picture in an order of words that no row of training has; KeyError for another question.

    >>> paraphrased("what color is the circle ?")
    'the circle is what color ?'
    """
    for pattern, reworded in _REWORDED:
        if re.fullmatch(pattern, question):
            return re.sub(pattern, reworded, question)
    raise KeyError(question)


def _others(fact: Fact, facts: Sequence[Fact], closed: bool) -> list[Asked]:
    check = fact.check
    match check.get("type"):
        case "relation":
            return _relations(check)
        case "color":
            shape, color = str(check["shape"]), str(check["color"])
            asked = [(grammar.ask_exists(Mention(shape, color)), "yes")] if shape != "digit" else []
            return asked + (_counted(shape, color, 1) + _shaped(shape, color, facts) if closed and asked else [])
        case "exists" if check.get("present") and closed and "row" not in check:
            shape, color = str(check["shape"]), check.get("color")
            return _counted(shape, color, 1) if shape not in grammar.DIGITS else []
        case "count" if str(check["shape"]) in grammar.DIGITS:
            return [(grammar.ask_exists(Mention(str(check["shape"]))), "yes")]
        case "count":
            return _several(check)
    return []


def _relations(check: Mapping[str, Any]) -> list[Asked]:
    """Any: the check of a fact, JSON values."""
    a, b = (Mention(check[name]["shape"], check[name].get("color")) for name in ("a", "b"))
    name, opposite = check["relation"], OPPOSITE[check["relation"]]
    return [
        (grammar.ask_relation(b, a, opposite), "yes"),
        (grammar.ask_relative(a, b), name),
        (grammar.ask_relation(a, b, opposite), "no"),
    ]


def _counted(shape: str, color: str | None, count: int) -> list[Asked]:
    return [(grammar.ask_count(shape, color), NUMBER_WORDS[count])]


def _shaped(shape: str, color: str, facts: Sequence[Fact]) -> list[Asked]:
    """What the object of a color is, if only one thing has it."""
    alike = [f for f in facts if f.check.get("color") == color and f.check.get("type") in ("color", "count", "exists")]
    return [(grammar.ask_shape(color), shape)] if len(alike) == 1 else []


def _several(check: Mapping[str, Any]) -> list[Asked]:
    """Any: the check of a fact, JSON values."""
    shape, color, count = str(check["shape"]), check.get("color"), int(check["count"])
    if color is None or count < 2 or shape == "object":
        return []
    return [(grammar.ask_exists(Mention(shape, color)), "yes")]


def _is_closed(facts: Sequence[Fact]) -> bool:
    """Whether the facts name every object, each of a shape of its own: then each is there as often as they say."""
    totals = [int(f.check["count"]) for f in facts if f.check.get("type") == "total"]
    named: list[tuple[str, int]] = []
    for fact in facts:
        check = fact.check
        if check.get("type") == "exists" and check.get("present"):
            named.append((str(check["shape"]), 1))
        elif check.get("type") == "count":
            named.append((str(check["shape"]), int(check["count"])))
    shapes = [shape for shape, _ in named]
    return bool(totals) and sum(n for _, n in named) == totals[0] and len(shapes) == len(set(shapes))
