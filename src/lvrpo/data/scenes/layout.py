"""Random scenes for each category, within a split."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lvrpo.data.scenes.grammar import RELATIONS, Mention, clear_relation
from lvrpo.data.scenes.objects import (
    COLORS,
    GROUNDS,
    HELD_OUT,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    digit_indices,
)

T = TypeVar("T")

SEEN_PAIRS = tuple((c, s) for s in SHAPES for c in COLORS if (c, s) not in HELD_OUT)
HELD_OUT_PAIRS = tuple(sorted(HELD_OUT))
_SEEN_COLORS = {s: tuple(c for c in COLORS if (c, s) not in HELD_OUT) for s in SHAPES}


@dataclass(frozen=True)
class Description:
    """A scene with the words that describe it in full."""

    mentions: tuple[Mention, ...]
    relation: str | None
    scene: Scene


class Layout:
    """Draws scenes of one split from one random stream; with ``held_out`` each shows a held-out combination."""

    def __init__(self, rng: random.Random, split: Split, grid: int = 4, held_out: bool = False) -> None:
        self.rng, self.split, self.grid, self.held_out = rng, split, grid, held_out

    def until(self, build: Callable[[], T | None], scene_of: Callable[[T], Scene], attempts: int = 2000) -> T:
        """Calls ``build`` until its scene belongs to the split and shows (or not) a held-out combination."""
        for _ in range(attempts):
            built = build()
            if built is not None and self.belongs(scene_of(built)):
                return built
        raise RuntimeError(f"no scene of split {self.split!r} in {attempts} attempts")

    def belongs(self, scene: Scene) -> bool:
        """Whether a scene is one of this split and of this kind of combination."""
        return scene.held_out() == self.held_out and scene.split() == self.split

    def ground(self) -> str:
        return self.rng.choice(GROUNDS)

    def cells(self, count: int) -> list[tuple[int, int]]:
        """Distinct cells (row, col) in random order."""
        return [divmod(c, self.grid) for c in self.rng.sample(range(self.grid * self.grid), count)]

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """(color, shape) pairs with distinct shapes and distinct colors; the first is held out if asked for."""
        first = self.rng.choice(HELD_OUT_PAIRS if self.held_out else SEEN_PAIRS)
        chosen = [first]
        while len(chosen) < count:
            pair = self.rng.choice(SEEN_PAIRS)
            if all(pair[0] != c and pair[1] != s for c, s in chosen):
                chosen.append(pair)
        self.rng.shuffle(chosen)
        return chosen

    def color_of(self, shape: str) -> str:
        """A color that training may show on a shape."""
        return self.rng.choice(_SEEN_COLORS[shape])

    def digit(self, value: int, cell: tuple[int, int]) -> SceneObject:
        """A handwritten digit of this split."""
        sample = self.rng.choice(digit_indices(self.split)[value])
        return SceneObject(str(value), self.rng.choice(COLORS), *cell, sample)

    def objects(self, count: int) -> Scene:
        """Up to 5 objects of distinct shapes and colors."""
        pairs, cells = self.pairs(count), self.cells(count)
        return Scene(self.ground(), tuple(SceneObject(s, c, *cell) for (c, s), cell in zip(pairs, cells, strict=True)))

    def describe(self, category: str) -> Description:
        """A fully described scene of a generation category. Raises KeyError for another name."""
        build = {
            "single_object": lambda: self._plain(1, False),
            "two_object": lambda: self._plain(2, False),
            "colors": lambda: self._plain(1, True),
            "color_attr": lambda: self._plain(2, True),
            "counting": self.alike,
            "position": self._related,
            "digits": self.one_digit,
        }[category]
        return self.until(build, lambda d: d.scene)

    def _plain(self, count: int, colored: bool) -> Description:
        scene = self.objects(count)
        return Description(tuple(Mention(o.shape, o.color if colored else None) for o in scene.objects), None, scene)

    def alike(self) -> Description:
        """Two to five alike objects: of one color that is told, or of any colors that are not."""
        count = self.rng.randint(2, MAX_OBJECTS)
        colored = self.held_out or self.rng.random() < 0.5
        ((color, shape),) = self.pairs(1)
        one_color = colored or self.rng.random() < 0.5
        colors = [color if one_color or i == 0 else self.color_of(shape) for i in range(count)]
        placed = zip(colors, self.cells(count), strict=True)
        objects = tuple(SceneObject(shape, c, *cell) for c, cell in placed)
        return Description((Mention(shape, color if colored else None, count),), None, Scene(self.ground(), objects))

    def _related(self) -> Description | None:
        relation = self.rng.choice(RELATIONS)
        scene = self.objects(2)
        a, b = scene.objects
        if clear_relation(a.cell, b.cell) != relation:
            return None
        colored = self.held_out or self.rng.random() < 0.5
        return Description(tuple(Mention(o.shape, o.color if colored else None) for o in (a, b)), relation, scene)

    def one_digit(self) -> Description:
        """One handwritten digit, its color told or not."""
        value = self.rng.randrange(10)
        o = self.digit(value, self.cells(1)[0])
        color = o.color if self.rng.random() < 0.5 else None
        return Description((Mention(o.shape, color),), None, Scene(self.ground(), (o,)))

    def digits(self, values: tuple[int, ...]) -> Scene:
        """A picture of these handwritten digits alone."""
        placed = zip(values, self.cells(len(values)), strict=True)
        return Scene(self.ground(), tuple(self.digit(v, cell) for v, cell in placed))

    def to_ask(self, digit: bool) -> Scene:
        """A picture to ask about: one to five objects, some of them alike, with one handwritten digit if asked for."""
        rng, room = self.rng, MAX_OBJECTS - digit
        if rng.random() < 0.5:
            count = rng.randint(1, min(4, room))
            chosen = self.pairs(count)
        else:
            same = rng.randint(2, room)
            others = rng.randint(0, room - same)
            (color, shape), *rest = self.pairs(1 + others)
            one_color = rng.random() < 0.6
            chosen = [(color, shape), *rest]
            chosen += [(color if one_color else self.color_of(shape), shape) for _ in range(same - 1)]
        cells = self.cells(len(chosen) + digit)
        objects = [SceneObject(s, c, *cell) for (c, s), cell in zip(chosen, cells, strict=False)]
        if digit:
            objects.append(self.digit(rng.randrange(10), cells[-1]))
        return Scene(self.ground(), tuple(objects))
