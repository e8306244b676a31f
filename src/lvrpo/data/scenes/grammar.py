"""The language of the world: lower-case words of a closed vocabulary, separated by spaces.

Digits are written "0" .. "9"; counts of objects are number words, "one" .. "five". Punctuation is a word of its own
("?", "+"), and ``normalize`` turns what a person types into this form.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lvrpo.data.scenes.objects import (
    COLORS,
    DIGITS,
    GROUNDS,
    HELD_OUT,
    MAX_OBJECTS,
    SHAPES,
    SceneObject,
    Split,
    text_split,
)

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
RELATIONS = ("left", "right", "above", "below")
RELATION_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
PLACES = ("top left", "top right", "bottom left", "bottom right")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
EDGES = ("left", "right", "top", "bottom")
PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES} | {"object": "objects"}
DESCRIBE = "describe the picture"
"""The prompt of a caption."""

_FUNCTION_WORDS = (
    "? + a add above an and are at below bottom color describe digit draw edge ground how is larger left make "
    "many more move no object objects of on picture relative remove replace right shape smaller sum than the there to "
    "top what where which with yes"
)
VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        set(_FUNCTION_WORDS.split())
        | set(COLORS)
        | set(GROUNDS)
        | set(SHAPES)
        | set(PLURAL.values())
        | set(DIGITS)
        | set(NUMBER_WORDS[1 : MAX_OBJECTS + 1])
    )
)
"""Every word of every text of this world, sorted."""

ANSWERS = (("yes", "no"), COLORS, SHAPES, DIGITS, NUMBER_WORDS[1 : MAX_OBJECTS + 1], PLACES, GROUNDS, RELATIONS)
"""The possible answers of each kind."""

GENERATE = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "digits")
UNDERSTAND = ("color", "count", "shape", "exists", "position", "digit")
EDIT = ("recolor", "add", "remove", "move", "replace")
REASON = ("sum", "compare", "draw_answer")


def other(rng: random.Random, options: Sequence[str], value: str) -> str:
    """One of the options that is not the value."""
    return rng.choice([option for option in options if option != value])


def normalize(text: str) -> str:
    """A person's text in the form of the grammar: lower case, punctuation split off, commas and full stops dropped.

    >>> normalize("What color is the Circle?")
    'what color is the circle ?'
    """
    return " ".join(re.findall(r"[a-z]+|[0-9]|[?+]", text.lower()))


@dataclass(frozen=True, slots=True)
class Mention:
    """The description of an object, or of ``count`` equal objects, in a text."""

    shape: str
    """A shape, a digit "0" .. "9", or "object"."""
    color: str | None = None
    count: int = 1

    @property
    def is_digit(self) -> bool:
        """Whether it names a handwritten digit."""
        return self.shape in DIGITS

    @property
    def bare(self) -> str:
        """Without article: "red circle", or "red circles" if several."""
        noun = self.shape if self.count == 1 else PLURAL[self.shape]
        return noun if self.color is None else f"{self.color} {noun}"

    @property
    def phrase(self) -> str:
        """The phrase with article or number: "a red circle", "three circles", "the digit 7"."""
        if self.count > 1:
            return f"{NUMBER_WORDS[self.count]} {self.bare}"
        if self.is_digit and self.color is None:
            return f"the digit {self.shape}"
        return f"{article(self.bare)} {self.bare}"

    def without_color(self) -> Mention:
        """The same without its color."""
        return replace(self, color=None)


def mention(o: SceneObject) -> Mention:
    """The full mention of one object."""
    return Mention(o.shape, o.color)


def article(words: str) -> str:
    """The indefinite article of a phrase."""
    return "an" if words.startswith(("orange", "object", "8")) else "a"


WORDINGS = ("{}", "draw {}", "a picture of {}")
"""Templates that turn a caption into a prompt."""
PARAPHRASED_WORDINGS = ("draw a picture of {}", "there {be} {}", "a picture with {}")
"""Wordings that no split but the paraphrased tests has."""


@dataclass(frozen=True, slots=True)
class Caption:
    """The content of a caption: an image of it shows exactly these objects."""

    mentions: tuple[Mention, ...]
    relation: str | None = None
    """Position of the first of two objects relative to the second: one of ``RELATIONS``."""
    place: str | None = None
    """The quadrant of the only object: one of ``PLACES``."""
    ground: str | None = None

    def text(self, wording: str = WORDINGS[0]) -> str:
        """The caption in words: "a red circle left of a star on a black ground"."""
        joint = f" {RELATION_PHRASE[self.relation]} " if self.relation else " and "
        said = joint.join(m.phrase for m in self.mentions)
        if self.place is not None:
            said += f" at the {self.place}"
        if self.ground is not None:
            said += f" on a {self.ground} ground"
        return wording.format(said, be="is" if self.mentions[0].count == 1 else "are")

    @property
    def content(self) -> str:
        """The same for all wordings and orders of mentions: "a left of b" is "b right of a"."""
        named = [f"{m.count} {m.color or 'any'} {m.shape}" for m in self.mentions]
        relation = self.relation
        if relation in ("right", "below"):
            named, relation = named[::-1], OPPOSITE[relation]
        elif relation is None:
            named = sorted(named)
        return " | ".join([*named, f"{relation} {self.place} {self.ground}"])

    @property
    def held_out(self) -> bool:
        """Whether it names a combination that training never sees."""
        return any((m.color, m.shape) in HELD_OUT for m in self.mentions)

    @property
    def split(self) -> Split:
        """The split that its text belongs to."""
        return text_split(self.content, self.held_out)


def ask_color(m: Mention) -> str:
    """ "what color is the circle ?", in the plural if there are several."""
    return f"what color {'is' if m.count == 1 else 'are'} the {m.bare} ?"


ASK_GROUND = "what color is the ground ?"


def ask_shape(color: str, several: bool = False) -> str:
    """ "what shape is the red object ?", in the plural if there are several."""
    return f"what shape are the {color} objects ?" if several else f"what shape is the {color} object ?"


def ask_count(shape: str = "object", color: str | None = None) -> str:
    """ "how many red circles are there ?" """
    return f"how many {Mention(shape, color, 2).bare} are there ?"


def ask_exists(m: Mention) -> str:
    """ "is there a red circle ?" """
    return f"is there {article(m.bare)} {m.bare} ?"


def ask_relation(a: Mention, b: Mention, relation: str) -> str:
    """ "is the circle left of the star ?" """
    return f"is the {a.bare} {RELATION_PHRASE[relation]} the {b.bare} ?"


def ask_relative(a: Mention, b: Mention) -> str:
    """ "where is the circle relative to the star ?": left, right, above or below."""
    return f"where is the {a.bare} relative to the {b.bare} ?"


def ask_where(m: Mention) -> str:
    """ "where is the circle ?": top left, top right, bottom left or bottom right."""
    return f"where is the {m.bare} ?"


def ask_edge(m: Mention, edge: str) -> str:
    """ "is the circle at the left edge ?" """
    return f"is the {m.bare} at the {edge} edge ?"


ASK_DIGIT = "what digit is there ?"
ASK_SUM = "what is the sum ?"
ASK_LARGER = "which digit is larger ?"
ASK_SMALLER = "which digit is smaller ?"


def ask_more(a: str, b: str) -> str:
    """ "are there more circles than stars ?" """
    return f"are there more {PLURAL[a]} than {PLURAL[b]} ?"


def place(row: int, col: int, grid: int) -> str | None:
    """The quadrant of a cell, "top left" .. "bottom right"; None on the middle line of an odd grid."""
    if grid % 2 and grid // 2 in (row, col):
        return None
    return f"{'top' if row < grid / 2 else 'bottom'} {'left' if col < grid / 2 else 'right'}"


def clear_relation(a: tuple[int, int], b: tuple[int, int]) -> str | None:
    """The relation of cell ``a`` (row, col) to ``b`` along the axis on which they differ more; None on a tie."""
    rows, cols = a[0] - b[0], a[1] - b[1]
    if abs(rows) == abs(cols):
        return None
    if abs(cols) > abs(rows):
        return "left" if cols < 0 else "right"
    return "above" if rows < 0 else "below"
