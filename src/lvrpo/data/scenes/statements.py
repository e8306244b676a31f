"""A question and its answer as what a caption would say: what the drawing side, trained on captions, can judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lvrpo.data.scenes import grammar
from lvrpo.data.scenes.grammar import PLURAL, RELATION_PHRASE, article


@dataclass(frozen=True, slots=True)
class Statement:
    """What an answer claims of the picture."""

    text: str
    """The claim: "a red circle"."""
    known: str = ""
    """What the question says by itself: "a circle"; nothing for most yes-no questions."""
    denied: bool = False
    """Whether the answer says that ``text`` does not hold."""


_SINGULAR = {plural: single for single, plural in PLURAL.items()}
_PHRASES = "|".join(RELATION_PHRASE.values())


def statement(question: str, answer: str) -> Statement | None:
    """The claim of an answer to a question of the grammar; None for any other question.

    The answer may be any text: a wrong kind of answer makes a claim that no picture fits. Questions that a caption
    cannot answer (sums, comparisons) have none.

    >>> statement("what color is the circle ?", "red")
    Statement(text='a red circle', known='a circle', denied=False)
    """
    question = " ".join(question.lower().replace("?", " ? ").split())
    answer = " ".join(answer.split())
    for pattern, build in _FORMS.items():
        found = re.fullmatch(pattern, question)
        if found:
            return build(*found.groups(), answer)
    return None


def _one(words: str) -> str:
    return f"{article(words)} {words}"


def _counted(noun: str, answer: str) -> Statement:
    *color, plural = noun.split()
    if answer == "one":
        return Statement(_one(" ".join([*color, _SINGULAR.get(plural, plural)])), noun)
    return Statement(f"{answer} {noun}", noun)


def _yes_or_no(text: str, known: str, answer: str) -> Statement:
    """Anything but a denial is read as yes, as the verbs of the grammar have it; other words stay in the claim."""
    if answer.lower() in ("yes", "no"):
        return Statement(text, known, denied=answer.lower() == "no")
    return Statement(f"{text} {answer}", known)


def _placed(a: str, b: str, answer: str) -> Statement:
    phrase: str = RELATION_PHRASE.get(answer, answer)
    return Statement(_related(a, b, phrase), f"{_one(a)} and {_one(b)}")


def _related(a: str, b: str, phrase: str) -> str:
    return f"{_one(a)} {phrase} {_one(b)}"


_FORMS: Mapping[str, Callable[..., Statement]] = {
    re.escape(grammar.DESCRIBE): lambda answer: Statement(answer),
    r"what color is the (.+) \?": lambda noun, answer: Statement(_one(f"{answer} {noun}"), _one(noun)),
    r"what color are the (.+) \?": lambda noun, answer: Statement(f"{answer} {noun}", noun),
    r"what shape is the (\w+) object \?": lambda color, answer: Statement(
        _one(f"{color} {answer}"), _one(f"{color} object")
    ),
    r"what shape are the (\w+) objects \?": lambda color, answer: Statement(
        f"{color} {PLURAL.get(answer, answer)}", f"{color} objects"
    ),
    r"how many (.+) are there \?": _counted,
    r"is there an? (.+) \?": lambda noun, answer: _yes_or_no(_one(noun), "", answer),
    rf"is the (.+) ({_PHRASES}) the (.+) \?": lambda a, phrase, b, answer: _yes_or_no(
        _related(a, b, phrase), f"{_one(a)} and {_one(b)}", answer
    ),
    r"where is the (.+) relative to the (.+) \?": _placed,
    r"where is the (.+) \?": lambda noun, answer: Statement(f"{_one(noun)} at the {answer}", _one(noun)),
    r"is the (.+) at the (\w+) edge \?": lambda noun, edge, answer: _yes_or_no(
        f"{_one(noun)} at the {edge} edge", _one(noun), answer
    ),
    re.escape(grammar.ASK_DIGIT): lambda answer: Statement(f"the digit {answer}"),
}
