"""The questions that a caption or an instruction of this world implies, from its words alone.

What a larger model is asked to write for itself (``rewards.questions``): no scene, no answer key is looked at.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lvrpo.data.scenes import facts, grammar
from lvrpo.data.scenes.grammar import (
    NUMBER_WORDS,
    PLACES,
    PLURAL,
    RELATION_PHRASE,
    SHAPES,
    WORDINGS,
    Caption,
    Mention,
)
from lvrpo.data.scenes.objects import COLORS, GROUNDS
from lvrpo.types import Fact

_SINGULAR = {plural: single for single, plural in PLURAL.items()}
_COLOR = f"(?P<color>{'|'.join(COLORS)})"
_MENTION = re.compile(rf"(?:(?:an?|the digit|{'|'.join(NUMBER_WORDS[2:])}) )(?:{_COLOR} )?(?P<noun>\w+)")
_CAPTION = re.compile(
    rf"(?P<said>.+?)(?: at the (?P<place>{'|'.join(PLACES)}))?(?: on a (?P<ground>{'|'.join(GROUNDS)}) ground)?"
)
_PHRASES = {phrase: name for name, phrase in RELATION_PHRASE.items()}
_JOINT = re.compile(rf" (and|{'|'.join(_PHRASES)}) ")


def read_caption(text: str) -> Caption | None:
    """The caption that a text is, in any of the trained wordings; None for another text.

    >>> read_caption("draw two red circles on a black ground")
    Caption(mentions=(Mention(shape='circle', color='red', count=2),), relation=None, place=None, ground='black')
    """
    for opening in (wording.removesuffix("{}") for wording in reversed(WORDINGS)):
        if text.startswith(opening):
            text = text.removeprefix(opening)
            break
    found = _CAPTION.fullmatch(text)
    if found is None:
        return None
    said, *rest = _JOINT.split(found["said"])
    mentions = [_mention(part) for part in (said, *rest[1::2])]
    known = tuple(m for m in mentions if m is not None)
    relations = {_PHRASES[joint] for joint in rest[::2] if joint in _PHRASES}
    if len(known) < len(mentions) or len(relations) > 1:
        return None
    return Caption(known, relations.pop() if relations else None, found["place"], found["ground"])


def _mention(words: str) -> Mention | None:
    found = _MENTION.fullmatch(words)
    if found is None:
        return None
    noun = _SINGULAR.get(found["noun"], found["noun"])
    count = next((n for n, word in enumerate(NUMBER_WORDS) if words.startswith(f"{word} ")), 1)
    return Mention(noun, found["color"], count) if noun in (*SHAPES, *grammar.DIGITS) else None


_REFERENCE = rf"(?:{_COLOR} )?(?P<shape>{'|'.join(SHAPES)})"
_RECOLOR = re.compile(rf"make the {_REFERENCE} (?P<new>{'|'.join(COLORS)})")
_ADD = re.compile(rf"add an? {_REFERENCE}")
_REMOVE = re.compile(rf"remove the {_REFERENCE}")
_MOVE = re.compile(rf"move the {_REFERENCE} to the (?P<edge>{'|'.join(grammar.EDGES)})")
_REPLACE = re.compile(rf"replace the {_REFERENCE} with an? (?P<new>{'|'.join(SHAPES)})")


def questions_of_text(text: str) -> tuple[Fact, ...]:
    """The facts that must hold of a picture drawn for a caption, or edited by an instruction; () for another text."""
    caption = read_caption(text)
    if caption is not None:
        return facts.of_caption(caption)
    for pattern in (_RECOLOR, _ADD, _REMOVE, _MOVE, _REPLACE):
        found = pattern.fullmatch(text)
        if found is not None:
            return _edited(pattern, Mention(found["shape"], found["color"]), found.groupdict())
    return ()


def _edited(pattern: re.Pattern[str], m: Mention, found: dict[str, str]) -> tuple[Fact, ...]:
    if pattern is _RECOLOR:
        new = replace(m, color=found["new"])
        return (facts.color(new) if m.color is None else facts.exists(new, kind="color"),)
    if pattern is _ADD:
        return (facts.exists(m),)
    if pattern is _REMOVE:
        return (facts.exists(m, present=False),)
    if pattern is _MOVE:
        return (Fact("position", grammar.ask_edge(m, found["edge"]), "yes"),)
    return (facts.exists(replace(m, shape=found["new"]), kind="shape"), facts.exists(m, present=False))


def questions_of_the_rest(instruction: str) -> tuple[Fact, ...]:
    """What an edit leaves as it is, asked both ways of every shape that the instruction does not name.

    Whoever sees the source keeps the answers that hold of it.
    """
    named = set(instruction.split())
    return tuple(
        Fact("unchanged", grammar.ask_exists(Mention(shape)), answer)
        for shape in SHAPES
        if shape not in named
        for answer in ("yes", "no")
    )
