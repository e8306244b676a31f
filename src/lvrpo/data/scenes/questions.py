"""Questions about an image, with their answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lvrpo.data.scenes import grammar
from lvrpo.data.scenes.grammar import EDGES, NUMBER_WORDS, OPPOSITE, PLURAL, RELATION_PHRASE, Mention, normalize
from lvrpo.data.scenes.objects import COLORS, DIGITS, GROUNDS, HELD_OUT, SHAPES, Scene, SceneObject


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the grammar with its right answer."""

    text: str
    answer: str


def _groups(scene: Scene, by: str) -> dict[str, list[SceneObject]]:
    groups: dict[str, list[SceneObject]] = {}
    for o in scene.objects:
        groups.setdefault(o.shape if by == "shape" else o.color, []).append(o)
    return groups


def _alone(scene: Scene) -> list[SceneObject]:
    """Objects that their shape singles out."""
    return [group[0] for group in _groups(scene, "shape").values() if len(group) == 1]


@dataclass(frozen=True, slots=True)
class QuestionChoice:
    """Selects a question of a category; forms, and the two answers of a form, occur equally often."""

    form: int
    """Index of the form, modulo the number of forms of the category."""
    yes: bool
    """The answer, where it is yes or no."""


def _color(scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice) -> Question | None:
    if wanted.form % 6 == 0:
        return Question(grammar.ASK_GROUND, scene.ground)
    groups = [g for s, g in _groups(scene, "shape").items() if len({o.color for o in g}) == 1]
    groups = [g for g in groups if len(g) == 1 or not g[0].is_digit]
    if not groups:
        return None
    group = rng.choice(groups)
    lone_digit = group[0].is_digit and sum(o.is_digit for o in scene.objects) == 1
    shape = "digit" if lone_digit and rng.random() < 0.5 else group[0].shape
    return Question(grammar.ask_color(Mention(shape, None, len(group))), group[0].color)


def _count(scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice) -> Question | None:
    """One of the scene's counts: numbers above one first, each that the scene offers equally likely."""
    counts: dict[tuple[str, str | None], int] = {("object", None): len(scene.objects)}
    for o in scene.objects:
        named = [("object", o.color)] if o.is_digit else [("object", o.color), (o.shape, None), (o.shape, o.color)]
        for name in named:
            counts[name] = counts.get(name, 0) + 1
    numbers = sorted(set(counts.values()))
    several = [n for n in numbers if n > 1]
    number = rng.choice(several if several and rng.random() < 0.8 else numbers)
    shape, color = rng.choice([name for name, count in counts.items() if count == number])
    return Question(grammar.ask_count(shape, color), NUMBER_WORDS[number])


def _shape(scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice) -> Question | None:
    groups = [g for g in _groups(scene, "color").values() if len({o.shape for o in g}) == 1 and not g[0].is_digit]
    if not groups:
        return None
    group = rng.choice(groups)
    return Question(grammar.ask_shape(group[0].color, len(group) > 1), group[0].shape)


def _exists(scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice) -> Question | None:
    o = rng.choice(scene.objects)
    colored = wanted.form % 5 < 3
    if wanted.yes:
        return Question(grammar.ask_exists(Mention(o.shape, o.color if colored else None)), "yes")
    kinds = DIGITS if o.is_digit else SHAPES
    if not colored:
        absent = [s for s in kinds if all(p.shape != s for p in scene.objects)]
        return Question(grammar.ask_exists(Mention(rng.choice(absent))), "no")
    there = {(p.color, p.shape) for p in scene.objects}
    options = [(c, o.shape) for c in COLORS] if rng.random() < 0.5 else [(o.color, s) for s in kinds]
    options = [pair for pair in options if pair not in there and (pair not in HELD_OUT or scene.held_out())]
    if not options:
        return None
    color, shape = rng.choice(options)
    return Question(grammar.ask_exists(Mention(shape, color)), "no")


def _position(scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice) -> Question | None:
    alone = _alone(scene)
    rng.shuffle(alone)
    pairs = [(a, b) for a in alone for b in alone if a is not b and grammar.clear_relation(a.cell, b.cell)]
    form = ("where", "relative", "relation", "edge")[wanted.form % 4]
    if form == "where":
        placed = [(o, place) for o in alone if (place := grammar.place(o.row, o.col, grid))]
        return Question(grammar.ask_where(Mention(placed[0][0].shape)), placed[0][1]) if placed else None
    if form == "edge":
        edges = [(o, e) for o in alone for e in EDGES if _at_edge(o, e, grid) == wanted.yes]
        if not edges:
            return None
        o, edge = rng.choice(edges)
        return Question(grammar.ask_edge(Mention(o.shape), edge), "yes" if wanted.yes else "no")
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    relation = grammar.clear_relation(a.cell, b.cell)
    assert relation is not None
    if form == "relative":
        return Question(grammar.ask_relative(Mention(a.shape), Mention(b.shape)), relation)
    asked = relation if wanted.yes else OPPOSITE[relation]
    return Question(grammar.ask_relation(Mention(a.shape), Mention(b.shape), asked), "yes" if wanted.yes else "no")


def _at_edge(o: SceneObject, edge: str, grid: int) -> bool:
    return {"left": o.col == 0, "right": o.col == grid - 1, "top": o.row == 0, "bottom": o.row == grid - 1}[edge]


def _digit(scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice) -> Question | None:
    digits = [o for o in scene.objects if o.is_digit]
    return Question(grammar.ASK_DIGIT, digits[0].shape) if len(digits) == 1 else None


_ASK: Mapping[str, Callable[[Scene, random.Random, int, QuestionChoice], Question | None]] = {
    "color": _color,
    "count": _count,
    "shape": _shape,
    "exists": _exists,
    "position": _position,
    "digit": _digit,
}


def ask(
    category: str, scene: Scene, rng: random.Random, grid: int, wanted: QuestionChoice | None = None, attempts: int = 12
) -> Question | None:
    """A question of an understanding category, or None where the scene has no unambiguous one.

    ``wanted``: which one; None: any.
    """
    for _ in range(attempts):
        each = wanted or QuestionChoice(rng.randrange(60), rng.random() < 0.5)
        question = _ASK[category](scene, rng, grid, each)
        if question is not None:
            return question
    return None


def balanced_choice(number: int, salt: str) -> QuestionChoice:
    """The choice for the ``number``-th question of a category: each pair of questions has one form and both answers."""
    pair, second = divmod(number, 2)
    return QuestionChoice(pair, (zlib.crc32(f"{salt} {pair}".encode()) + second) % 2 == 0)


def larger(scene: Scene) -> Question:
    """Which of the two digits of a scene is larger."""
    return Question(grammar.ASK_LARGER, str(max(int(o.shape) for o in scene.objects)))


def smaller(scene: Scene) -> Question:
    """Which of the two digits of a scene is smaller."""
    return Question(grammar.ASK_SMALLER, str(min(int(o.shape) for o in scene.objects)))


def sum_of(scene: Scene) -> Question:
    """The sum of the digits of a scene."""
    return Question(grammar.ASK_SUM, str(sum(int(o.shape) for o in scene.objects)))


def more(scene: Scene, a: str, b: str) -> Question:
    """Whether shape ``a`` is more frequent than ``b``."""
    first, second = (sum(o.shape == s for o in scene.objects) for s in (a, b))
    return Question(grammar.ask_more(a, b), "yes" if first > second else "no")


# --- which form a question has: its words without what they name ---


_ONE_OF: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("COLOR", (*COLORS, *GROUNDS)),
    ("THING", (*SHAPES, *PLURAL.values(), "object", *(f"digit {d}" for d in DIGITS))),
    ("NUMBER", NUMBER_WORDS),
    ("DIGIT", DIGITS),
)
_PLACEHOLDERS: Mapping[str, str] = {word: name for name, words in _ONE_OF for word in words}


def question_form(text: str) -> str:
    """The text with placeholders for objects and values, so that questions of one form become equal.

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
