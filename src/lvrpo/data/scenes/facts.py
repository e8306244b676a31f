"""Facts: what a text says of a picture, as atomic questions with answers and as data for the verifier."""

from __future__ import annotations

from lvrpo.data.scenes import grammar
from lvrpo.data.scenes.grammar import NUMBER_WORDS, Caption, Mention
from lvrpo.data.scenes.objects import Scene, SceneObject
from lvrpo.types import Fact


def _named(m: Mention) -> dict[str, str]:
    return {"shape": m.shape} | ({"color": m.color} if m.color else {})


def total(count: int) -> Fact:
    """How many objects there are in all."""
    return Fact("total", grammar.ask_count(), NUMBER_WORDS[count], {"type": "total", "count": count})


def exists(m: Mention, present: bool = True, cell: tuple[int, int] | None = None, kind: str = "exists") -> Fact:
    """That an object is there (in ``cell`` if given), or that none is."""
    check = {"type": "exists", **_named(m), "present": present}
    if cell is not None:
        check |= {"row": cell[0], "col": cell[1]}
    return Fact(kind, grammar.ask_exists(m), "yes" if present else "no", check)


def color(m: Mention) -> Fact:
    """That the objects of a shape have a color."""
    check = {"type": "color", "shape": m.shape, "color": m.color}
    return Fact("color", grammar.ask_color(m.without_color()), str(m.color), check)


def count(m: Mention) -> Fact:
    """How many objects of a shape (and color) there are."""
    check = {"type": "count", **_named(m), "count": m.count}
    return Fact("count", grammar.ask_count(m.shape, m.color), NUMBER_WORDS[m.count], check)


def relation(a: Mention, b: Mention, name: str) -> Fact:
    """That ``a`` is left of (right of, above, below) ``b``."""
    check = {"type": "relation", "a": _named(a), "b": _named(b), "relation": name}
    return Fact("position", grammar.ask_relation(a, b, name), "yes", check)


def edge(reference: Mention, o: SceneObject, name: str) -> Fact:
    """That an object lies at an edge of the picture."""
    check = {"type": "edge", "shape": o.shape, "color": o.color, "edge": name}
    return Fact("position", grammar.ask_edge(reference, name), "yes", check)


def digit(value: str) -> Fact:
    """That the digit drawn is ``value``."""
    return Fact("digit", grammar.ASK_DIGIT, value, {"type": "count", "shape": value, "count": 1})


def unchanged(o: SceneObject, ground: str) -> Fact:
    """That a bystander of an edit is still there, in its cell, on the same ground."""
    kept = {"shape": o.shape, "color": o.color, "row": o.row, "col": o.col}
    check = {"type": "unchanged", "ground": ground, "objects": [kept]}
    return Fact("unchanged", grammar.ask_exists(grammar.mention(o)), "yes", check)


def place(m: Mention, name: str) -> Fact:
    """That an object lies in a quadrant."""
    check = {"type": "place", **_named(m), "place": name}
    return Fact("position", grammar.ask_where(m), name, check)


def ground(name: str) -> Fact:
    """The color of the ground."""
    return Fact("ground", grammar.ASK_GROUND, name, {"type": "ground", "ground": name})


def of_caption(caption: Caption) -> tuple[Fact, ...]:
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


def of_bystanders(source: Scene, changed: SceneObject | None) -> tuple[Fact, ...]:
    """One ``unchanged`` fact per object of the source but ``changed``."""
    return tuple(unchanged(o, source.ground) for o in source.objects if o is not changed)
