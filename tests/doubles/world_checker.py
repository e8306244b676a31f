"""A renderer and a checker made from docs/concepts/world.md alone: nothing of lvrpo is imported here."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "concepts" / "world.md").read_text()
DIGIT = "0123456789"
NUMBERS = ("zero", "one", "two", "three", "four", "five")


# --- the tables of the page ---


@cache
def tables() -> list[tuple[list[str], list[list[str]]]]:
    """(heads, rows) of every table, in order."""
    found: list[tuple[list[str], list[list[str]]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        lines = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in block.splitlines()]
        found.append((lines[0], lines[2:]))
    return found


def table(*heads: str) -> list[list[str]]:
    """The rows of the first table with these heads."""
    return next(rows for found, rows in tables() if found == list(heads))


def rgb(name: str) -> dict[str, np.ndarray]:
    return {row[0]: np.array([float(x) for x in row[1:]]) for row in table(name, "red", "green", "blue")}


COLORS, GROUNDS = rgb("color"), rgb("ground")
HELD_OUT = {tuple(p.split()) for p in re.findall(r"\*\*Held-out combinations\*\*: (.*?)\.", PAGE)[0].split(", ")}


# --- drawing ---


def polygon(row: str) -> list[tuple[float, float]]:
    """The corners of a row of the table of shapes; circle and star are formulas with the numbers that the row gives."""
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", row)]
    turn = [2 * math.pi * k for k in range(64)]
    if row.startswith("64"):
        (r, _) = numbers
        return [(r * math.cos(a / 64), r * math.sin(a / 64)) for a in turn]
    if row.startswith("10"):
        down, far, near = numbers
        radii = (far, near)
        return [
            (radii[k % 2] * math.sin(a / 10), down - radii[k % 2] * math.cos(a / 10)) for k, a in enumerate(turn[:10])
        ]
    return [(float(x), float(y)) for x, y in re.findall(r"\((\S+), (\S+)\)", row)]


def mask(corners: list[tuple[float, float]]) -> np.ndarray:
    """(8, 8): the share of the sample points of each pixel that lie inside."""
    alpha = np.zeros((8, 8))
    for i in range(128):
        y = (i + 0.5) / 64 - 1
        crossings = []
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 > y) != (y1 > y):
                crossings.append(x0 + (x1 - x0) * (y - y0) / (y1 - y0))
        for j in range(128):
            x = (j + 0.5) / 64 - 1
            alpha[i // 16, j // 16] += sum(x < c for c in crossings) % 2
    return alpha / 256


@cache
def masks() -> dict[str, np.ndarray]:
    return {name: mask(polygon(row)) for name, row in table("shape", "corners (x, y)")}


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data.reshape(-1, 8, 8) / 16, data.target


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    row: int
    col: int
    sample: int = -1


def draw(ground: str, things: list[Thing], cells: int = 4) -> np.ndarray:
    image = np.tile(GROUNDS[ground][:, None, None], (1, 8 * cells, 8 * cells))
    for o in things:
        alpha = masks()[o.shape] if o.sample < 0 else digits()[0][o.sample]
        at = np.s_[:, 8 * o.row : 8 * o.row + 8, 8 * o.col : 8 * o.col + 8]
        image[at] += alpha * (COLORS[o.color] - GROUNDS[ground])[:, None, None]
    return image


# --- reading exact images ---


def see(image: np.ndarray) -> tuple[str, list[Thing]]:
    """The ground and the objects of an image that follows the page exactly."""
    corner = np.median(image.reshape(3, -1), axis=1)
    ground = min(GROUNDS, key=lambda g: np.abs(GROUNDS[g] - corner).max())
    rows, cols = image.shape[1] // 8, image.shape[2] // 8
    cells = image.reshape(3, rows, 8, cols, 8).transpose(1, 3, 0, 2, 4) - GROUNDS[ground][:, None, None]
    found = [
        see_cell(cells[r, c], ground, r, c)
        for r in range(rows)
        for c in range(cols)
        if np.abs(cells[r, c]).max() > 1e-4
    ]
    return ground, found


def see_cell(delta: np.ndarray, ground: str, row: int, col: int) -> Thing:
    """The object whose color and mask give these differences to the ground."""
    for color, value in COLORS.items():
        v = value - GROUNDS[ground]
        alpha = np.tensordot(v, delta, 1) / (v @ v)
        if np.abs(alpha * v[:, None, None] - delta).max() < 1e-4:
            for shape, known in masks().items():
                if np.abs(known - alpha).max() < 1e-4:
                    return Thing(shape, color, row, col)
            sample = int(np.abs(digits()[0] - alpha).max((1, 2)).argmin())
            assert np.abs(digits()[0][sample] - alpha).max() < 1e-4
            return Thing(str(digits()[1][sample]), color, row, col, sample)
    raise AssertionError("no object of the page looks so")


# --- texts ---

SHAPES = tuple(name for name, _ in table("shape", "corners (x, y)"))
PLURALS = {("crosses" if shape == "cross" else f"{shape}s"): shape for shape in SHAPES} | {"objects": "object"}
RELATIONS = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
Mention = tuple[int, str, str]
"""Count, color (any) and shape."""


def mention(words: str) -> Mention:
    *before, noun = words.split()
    count = next((NUMBERS.index(w) for w in before if w in NUMBERS), 1)
    return count, next((w for w in before if w in COLORS), "any"), PLURALS.get(noun, noun)


@dataclass(frozen=True)
class Caption:
    mentions: list[Mention]
    relation: str | None
    place: str | None
    ground: str | None

    def key(self) -> str:
        said, relation = [f"{n} {color} {shape}" for n, color, shape in self.mentions], self.relation
        if relation in ("right", "below"):
            said, relation = said[::-1], {"right": "left", "below": "above"}[relation]
        elif relation is None:
            said = sorted(said)
        return " | ".join([*said, f"{relation} {self.place} {self.ground}"])

    def held_out(self) -> bool:
        return any((color, shape) in HELD_OUT for _, color, shape in self.mentions)

    def means(self, ground: str, things: list[Thing]) -> bool:
        """Whether an image is right."""
        right = len(things) == sum(n for n, _, _ in self.mentions) and self.ground in (None, ground)
        for n, color, shape in self.mentions:
            same = [o for o in things if o.shape == shape]
            if n > 1:
                right &= sum(color in ("any", o.color) for o in same) == n
                continue
            right &= len(same) == 1 if shape in DIGIT else bool(same)
            alike = [o for o in things if o.shape in DIGIT] if shape in DIGIT else same
            right &= color == "any" or all(o.color == color for o in alike)
            right &= self.place is None or any(quadrant(o) == self.place for o in same)
        if self.relation is not None:
            first, second = ([o for o in things if o.shape == shape] for _, _, shape in self.mentions)
            right &= any(stands(a, b, self.relation) for a in first for b in second)
        return right


def caption(text: str) -> Caption:
    text = re.sub(r"^(draw a picture of|draw|a picture of|there is|there are|a picture with) ", "", text)
    ground = re.search(r" on a (\w+) ground$", text)
    text = re.sub(r" on a \w+ ground$", "", text)
    place = re.search(r" at the (\w+ \w+)$", text)
    text = re.sub(r" at the \w+ \w+$", "", text)
    parts = re.split(rf" ({'|'.join(RELATIONS)}|and) ", text)
    relation = RELATIONS.get(parts[1]) if len(parts) > 1 else None
    return Caption([mention(p) for p in parts[::2]], relation, place and place[1], ground and ground[1])


def quadrant(o: Thing) -> str:
    return f"{'top' if o.row < 2 else 'bottom'} {'left' if o.col < 2 else 'right'}"


def stands(a: Thing, b: Thing, relation: str) -> bool:
    return {"left": a.col < b.col, "right": a.col > b.col, "above": a.row < b.row, "below": a.row > b.row}[relation]


def at_edge(o: Thing, edge: str) -> bool:
    return {"left": o.col == 0, "right": o.col == 3, "top": o.row == 0, "bottom": o.row == 3}[edge]


def noun(o: Thing, words: str) -> bool:
    """Whether words such as "red circle", "digit" or "objects" name an object."""
    _, color, shape = mention(words)
    return color in ("any", o.color) and (shape in ("object", o.shape) or (shape == "digit" and o.shape in DIGIT))


def answer(question: str, ground: str, things: list[Thing]) -> str:
    """The answer of a question; fails where the page says that it is not asked."""
    for pattern, name in (
        (r"what color is the ground \?", "ground"),
        (r"what color (?:is|are) the (.+) \?", "color"),
        (r"what shape (?:is|are) the (.+) \?", "shape"),
        (r"how many (.+) are there \?", "count"),
        (r"is there an? (.+) \?", "exists"),
        (r"where is the (\S+) relative to the (\S+) \?", "relative"),
        (r"where is the (\S+) \?", "where"),
        (rf"is the (\S+) ({'|'.join(RELATIONS)}) the (\S+) \?", "relation"),
        (r"is the (\S+) at the (\w+) edge \?", "edge"),
        (r"what digit is there \?", "digit"),
        (r"what is the sum \?", "sum"),
        (r"which digit is (larger|smaller) \?", "order"),
        (r"are there more (\w+) than (\w+) \?", "more"),
    ):
        found = re.fullmatch(pattern, question)
        if found:
            return answer_of(name, list(found.groups()), ground, things)
    raise AssertionError(question)


def answer_of(form: str, said: list[str], ground: str, things: list[Thing]) -> str:
    named = [[o for o in things if noun(o, words)] for words in said]
    values = [int(o.shape) for o in things if o.shape in DIGIT]
    match form:
        case "ground":
            return ground
        case "color" | "shape":
            (value,) = {getattr(o, form) for o in named[0]}  # one of two fields, by name
            return value
        case "count":
            return NUMBERS[len(named[0])]
        case "exists":
            return yes(bool(named[0]))
        case "where":
            (o,) = named[0]
            return quadrant(o)
        case "relative" | "relation":
            (a,), (b,) = named[0], named[-1]
            rows, cols = a.row - b.row, a.col - b.col
            assert abs(rows) != abs(cols)
            along = ("left" if cols < 0 else "right") if abs(cols) > abs(rows) else "above" if rows < 0 else "below"
            return along if form == "relative" else yes(RELATIONS[said[1]] == along)
        case "edge":
            (o,) = named[0]
            return yes(at_edge(o, said[1]))
        case "digit":
            (value,) = values
            return str(value)
        case "sum":
            return str(sum(values))
        case "order":
            return str(max(values) if said[0] == "larger" else min(values))
        case _:
            assert len(named[0]) != len(named[1])
            return yes(len(named[0]) > len(named[1]))


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def obeys(instruction: str, source: tuple[str, list[Thing]], target: tuple[str, list[Thing]]) -> bool:
    """Whether an edit is right."""
    (ground, before), (after_ground, after) = source, target
    verb, words = instruction.split(" ", 1)
    place = None
    if verb == "add":
        _, color, shape = mention(words)
        good = any((o.color, o.shape) == (color, shape) for o in after)
        return good and after_ground == ground and len(after) == len(before) + 1 and kept(before, after)
    name, _, how = {
        "make": words.rpartition(" "),
        "remove": (words, "", ""),
        "move": words.partition(" to the "),
        "replace": words.partition(" with "),
    }[verb]
    (o,) = [o for o in before if noun(o, name.removeprefix("the "))]
    place = (o.row, o.col)
    there = next((p for p in after if (p.row, p.col) == place), None)
    good = {
        "make": lambda: there is not None and (there.shape, there.color) == (o.shape, how),
        "remove": lambda: not any(noun(p, name.removeprefix("the ")) for p in after),
        "move": lambda: any((p.shape, p.color) == (o.shape, o.color) and at_edge(p, how) for p in after),
        "replace": lambda: there is not None and (there.shape, there.color) == (mention(how)[2], o.color),
    }[verb]()
    fewer = verb == "remove"
    others = [p for p in before if p is not o]
    return good and after_ground == ground and len(after) == len(before) - fewer and kept(others, after)


def kept(others: list[Thing], after: list[Thing]) -> bool:
    return {(o.shape, o.color, o.row, o.col) for o in others} <= {(o.shape, o.color, o.row, o.col) for o in after}


# --- splits ---


def split(string: str, train: int, validation: int) -> str:
    b = zlib.crc32(string.encode("utf-8")) % 1000
    return "train" if b < train else "validation" if b < validation else "test"


def scene_key(ground: str, things: list[Thing]) -> str:
    return f"{ground}|{';'.join(sorted(f'{o.shape},{o.color},{o.row},{o.col},{o.sample}' for o in things))}"


def scene_split(ground: str, things: list[Thing]) -> str:
    return split(scene_key(ground, things), 800, 900)


def split_of_text(key: str, held_out: bool = False) -> str:
    return split(f"text {key}", 0, 300) if held_out else split(f"text {key}", 700, 800)


def reasoning_key(text: str, things: list[Thing]) -> str:
    written = re.findall(r"\d", text)
    shown = [o.shape for o in things if o.shape in DIGIT]
    if "more" in text:
        shapes = [o.shape for o in things]
        (many, few) = sorted(set(shapes), key=shapes.count, reverse=True)
        return f"more {many} {shapes.count(many)} {few} {shapes.count(few)}"
    name = "order" if "larger" in text or "smaller" in text else "sum"
    return " ".join([name, *sorted(written or shown)])
