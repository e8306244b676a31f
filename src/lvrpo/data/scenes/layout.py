"""Random scenes for each category, within a split."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from lvrpo.data.scenes.grammar import PLACES, RELATIONS, Caption, Mention, clear_relation, place
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
SCENE_ATTEMPTS = 3000
"""Attempts to draw a scene for a caption before the caption is given up; the rarest one takes about fifty."""
_SEEN_COLORS = {s: tuple(c for c in COLORS if (c, s) not in HELD_OUT) for s in SHAPES}


@dataclass(frozen=True)
class Description:
    """A scene with a caption that holds of it and leaves no object out."""

    caption: Caption
    scene: Scene


class Layout:
    """Draws scenes of one split from one random stream; with ``held_out`` each shows a held-out combination."""

    def __init__(self, rng: random.Random, split: Split, grid: int = 4, held_out: bool = False) -> None:
        self.rng, self.split, self.grid, self.held_out = rng, split, grid, held_out

    def retry(self, build: Callable[[], T | None], scene_of: Callable[[T], Scene], attempts: int = 20000) -> T:
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
        """(color, shape) pairs with distinct shapes and distinct colors; optionally the first is held out."""
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

    def digit(self, value: int, cell: tuple[int, int], color: str | None = None) -> SceneObject:
        """A handwritten digit of this split, of any color if none is given."""
        sample = self.rng.choice(digit_indices(self.split)[value])
        return SceneObject(str(value), color or self.rng.choice(COLORS), *cell, sample)

    def one_digit(self) -> Scene:
        """An image of one handwritten digit."""
        return self.digits((self.rng.randrange(10),))

    def shape_and_digit(self) -> Scene:
        """An image of a shape and a handwritten digit."""
        ((color, shape),) = self.pairs(1)
        first, second = self.cells(2)
        return Scene(self.ground(), (SceneObject(shape, color, *first), self.digit(self.rng.randrange(10), second)))

    def alike(self) -> Scene:
        """Two to five objects of one shape."""
        m = self._several()
        return next(scene for scene in iter(lambda: self._scene_of(Caption((m,))), None))

    def objects(self, count: int) -> Scene:
        """Up to 5 objects of distinct shapes and colors."""
        pairs, cells = self.pairs(count), self.cells(count)
        return Scene(self.ground(), tuple(SceneObject(s, c, *cell) for (c, s), cell in zip(pairs, cells, strict=True)))

    def describe(self, category: str) -> Description:
        """A caption of a generation category and a scene that it holds of, both of the split.

        Raises KeyError for another name.
        """
        build = {
            "single_object": lambda: Caption(self._mentions(1, False), place=self._place()),
            "two_object": lambda: Caption(self._two()),
            "colors": lambda: Caption(self._mentions(1, True), place=self._place()),
            "color_attr": lambda: Caption(self._mentions(2, True)),
            "counting": lambda: Caption((self._several(),)),
            "position": lambda: Caption(
                self._mentions(2, self.held_out or self.rng.random() < 0.5), self.rng.choice(RELATIONS)
            ),
            "digits": lambda: Caption((self._any_digit(),), place=self._place()),
        }[category]
        return self.described(lambda: replace(build(), ground=self.ground() if self.rng.random() < 0.5 else None))

    def described(self, build: Callable[[], Caption]) -> Description:
        """The first caption of the split that has a scene, with it.

        Outside training the scene may be of any split: the text is what is asked, and of some texts there are few. A
        text of four scenes, such as "a red circle at the top left on a white ground", may have none of the train split;
        the next caption is then drawn.
        """
        while True:
            caption = next(c for c in iter(build, None) if c.split == self.split and c.held_out == self.held_out)
            for _ in range(SCENE_ATTEMPTS):
                scene = self._scene_of(caption)
                if scene is None or scene.held_out() != self.held_out:
                    continue
                if self.split != "train" or scene.split() == "train":
                    return Description(caption, scene)

    def _place(self) -> str | None:
        return self.rng.choice(PLACES) if self.rng.random() < 0.5 else None

    def _mentions(self, count: int, colored: bool) -> tuple[Mention, ...]:
        return tuple(Mention(shape, color if colored else None) for color, shape in self.pairs(count))

    def _any_digit(self) -> Mention:
        color = self.rng.choice(COLORS) if self.rng.random() < 0.5 else None
        return Mention(str(self.rng.randrange(10)), color)

    def _two(self) -> tuple[Mention, ...]:
        """Two shapes, or a shape and a digit, without colors."""
        if self.rng.random() < 0.5:
            return self._mentions(2, False)
        both = [*self._mentions(1, False), Mention(str(self.rng.randrange(10)))]
        self.rng.shuffle(both)
        return tuple(both)

    def _several(self) -> Mention:
        colored = self.held_out or self.rng.random() < 0.5
        ((color, shape),) = self.pairs(1)
        return Mention(shape, color if colored else None, self.rng.randint(2, MAX_OBJECTS))

    def _scene_of(self, caption: Caption) -> Scene | None:
        """A scene that the caption may describe; None where the objects came to stand otherwise."""
        mentions, cells = caption.mentions, self.cells(sum(m.count for m in caption.mentions))
        if caption.place is not None and place(*cells[0], self.grid) != caption.place:
            return None
        if caption.relation is not None and clear_relation(*cells[:2]) != caption.relation:
            return None
        colors = [color for m in mentions for color in self._colors(m)]
        if len(mentions) > 1 and len(set(colors)) < len(colors):
            return None
        shapes = [m.shape for m in mentions for _ in range(m.count)]
        objects = tuple(
            self.digit(int(shape), cell, color) if shape.isdecimal() else SceneObject(shape, color, *cell)
            for shape, color, cell in zip(shapes, colors, cells, strict=True)
        )
        return Scene(caption.ground or self.ground(), objects)

    def _colors(self, m: Mention) -> list[str]:
        """Colors for the objects of a description: its own, or random ones, equal for all in half of the scenes."""
        if m.color is not None:
            return [m.color] * m.count
        any_color = (lambda: self.rng.choice(COLORS)) if m.is_digit else (lambda: self.color_of(m.shape))
        if m.count > 1 and self.rng.random() < 0.5:
            return [any_color()] * m.count
        return [any_color() for _ in range(m.count)]

    def digits(self, values: tuple[int, ...]) -> Scene:
        """An image of these handwritten digits alone."""
        placed = zip(values, self.cells(len(values)), strict=True)
        return Scene(self.ground(), tuple(self.digit(v, cell) for v, cell in placed))

    def question_scene(self, digit: bool) -> Scene:
        """An image for questions: one to five objects, some of them equal, optionally one handwritten digit."""
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
