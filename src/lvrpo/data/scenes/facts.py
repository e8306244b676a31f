"""Facts: the statements of a text about an image, as atomic questions with answers and as data for the verifier."""

from __future__ import annotations

import re
from dataclasses import replace

from lvrpo.data.scenes import grammar
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
from lvrpo.data.scenes.objects import COLORS, GROUNDS, Scene, SceneObject
from lvrpo.types import Fact


def _named(m: Mention) -> dict[str, str]:
    return {"shape": m.shape} | ({"color": m.color} if m.color else {})


def total(count: int) -> Fact:
    """The total number of objects."""
    return Fact("total", grammar.ask_count(), NUMBER_WORDS[count], {"type": "total", "count": count})


def exists(m: Mention, present: bool = True, cell: tuple[int, int] | None = None, kind: str = "exists") -> Fact:
    """An object exists (in ``cell`` if given), or none does."""
    check = {"type": "exists", **_named(m), "present": present}
    if cell is not None:
        check |= {"row": cell[0], "col": cell[1]}
    return Fact(kind, grammar.ask_exists(m), "yes" if present else "no", check)


def color(m: Mention) -> Fact:
    """The objects of a shape have a color."""
    check = {"type": "color", "shape": m.shape, "color": m.color}
    return Fact("color", grammar.ask_color(m.without_color()), str(m.color), check)


def count(m: Mention) -> Fact:
    """The number of objects of a shape (and color)."""
    check = {"type": "count", **_named(m), "count": m.count}
    return Fact("count", grammar.ask_count(m.shape, m.color), NUMBER_WORDS[m.count], check)


def relation(a: Mention, b: Mention, name: str) -> Fact:
    """``a`` is left of (right of, above, below) ``b``."""
    check = {"type": "relation", "a": _named(a), "b": _named(b), "relation": name}
    return Fact("position", grammar.ask_relation(a, b, name), "yes", check)


def edge(reference: Mention, o: SceneObject, name: str) -> Fact:
    """An object is at an edge of the image."""
    check = {"type": "edge", "shape": o.shape, "color": o.color, "edge": name}
    return Fact("position", grammar.ask_edge(reference, name), "yes", check)


def digit(value: str) -> Fact:
    """The digit in the image is ``value``."""
    return Fact("digit", grammar.ASK_DIGIT, value, {"type": "count", "shape": value, "count": 1})


def unchanged(o: SceneObject, ground: str) -> Fact:
    """An object that an edit does not concern is still there, in its cell, on the same ground."""
    kept = {"shape": o.shape, "color": o.color, "row": o.row, "col": o.col}
    check = {"type": "unchanged", "ground": ground, "objects": [kept]}
    return Fact("unchanged", grammar.ask_exists(grammar.mention(o)), "yes", check)


def place(m: Mention, name: str) -> Fact:
    """An object is in a quadrant."""
    check = {"type": "place", **_named(m), "place": name}
    return Fact("position", grammar.ask_where(m), name, check)


def ground(name: str) -> Fact:
    """The color of the ground."""
    return Fact("ground", grammar.ASK_GROUND, name, {"type": "ground", "ground": name})


def caption_facts(caption: Caption) -> tuple[Fact, ...]:
    """Everything that a caption says: existence, color, count, digit, relation, place, ground, and always the total."""
    facts: list[Fact] = []
    mentions = caption.mentions
    for m in mentions:
        if m.count > 1:
            facts.append(count(m))
            continue
        facts.append(digit(m.shape) if m.is_digit else exists(m.without_color()))
        if m.color is not None:
            facts.append(color(Mention("digit", m.color) if m.is_digit else m))
    if caption.relation is not None:
        facts.append(relation(mentions[0].without_color(), mentions[1].without_color(), caption.relation))
    if caption.place is not None:
        facts.append(place(mentions[0].without_color(), caption.place))
    if caption.ground is not None:
        facts.append(ground(caption.ground))
    return (*facts, total(sum(m.count for m in mentions)))


def bystander_facts(source: Scene, changed: SceneObject | None) -> tuple[Fact, ...]:
    """One ``unchanged`` fact per object of the source but ``changed``."""
    return tuple(unchanged(o, source.ground) for o in source.objects if o is not changed)


# --- the facts that a caption or an instruction implies, from its words alone ---


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
    """The facts that must hold of an image drawn for a caption, or edited by an instruction; () for another text."""
    caption = read_caption(text)
    if caption is not None:
        return caption_facts(caption)
    for pattern in (_RECOLOR, _ADD, _REMOVE, _MOVE, _REPLACE):
        found = pattern.fullmatch(text)
        if found is not None:
            return _edited(pattern, Mention(found["shape"], found["color"]), found.groupdict())
    return ()


def _edited(pattern: re.Pattern[str], m: Mention, found: dict[str, str]) -> tuple[Fact, ...]:
    if pattern is _RECOLOR:
        new = replace(m, color=found["new"])
        return (color(new) if m.color is None else exists(new, kind="color"),)
    if pattern is _ADD:
        return (exists(m),)
    if pattern is _REMOVE:
        return (exists(m, present=False),)
    if pattern is _MOVE:
        return (Fact("position", grammar.ask_edge(m, found["edge"]), "yes"),)
    return (exists(replace(m, shape=found["new"]), kind="shape"), exists(m, present=False))


def unchanged_questions_of_text(instruction: str) -> tuple[Fact, ...]:
    """Questions about what an edit leaves unchanged, in both forms, for every shape that the instruction does not name.

    Whoever sees the source keeps the answers that hold of it.
    """
    named = set(instruction.split())
    return tuple(
        Fact("unchanged", grammar.ask_exists(Mention(shape)), answer)
        for shape in SHAPES
        if shape not in named
        for answer in ("yes", "no")
    )


# --- other wordings of questions ---


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
    """A question about an image in an order of words that no row of training has; KeyError for another question.

    >>> paraphrased("what color is the circle ?")
    'the circle is what color ?'
    """
    for pattern, reworded in _REWORDED:
        if re.fullmatch(pattern, question):
            return re.sub(pattern, reworded, question)
    raise KeyError(question)
