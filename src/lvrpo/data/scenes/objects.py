"""The components of a scene: color table, shapes, real handwritten digits, grounds, and ``Scene``.

An image is ``size`` x ``size`` pixels, a grid of 8-pixel cells with at most one object per cell. Every object is an
8 x 8 alpha mask (a drawn shape or a scanned digit) in one color on the ground:
pixel = ground + alpha * (color - ground).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from lvrpo.types import Image, Split

SPLITS: tuple[Split, ...] = get_args(Split)

CELL = 8
"""Side of a cell in pixels."""
DEFAULT_SIZE = 32
"""Default side of an image in pixels."""
DIGIT_SCANS = Path(str(resources.files("lvrpo"))) / "assets" / "digits" / "digits.npz"
"""Scans of digits, described in the README of their folder."""
MAX_OBJECTS = 5
"""The most objects that a scene of the grammar has."""

COLOR: Mapping[str, tuple[float, float, float]] = {
    "red": (0.84, 0.06, 0.10),
    "orange": (1.00, 0.46, 0.00),
    "yellow": (0.98, 0.92, 0.12),
    "green": (0.10, 0.62, 0.18),
    "cyan": (0.10, 0.82, 0.90),
    "blue": (0.10, 0.20, 0.88),
    "purple": (0.50, 0.12, 0.62),
    "pink": (1.00, 0.50, 0.80),
}
"""RGB in [0, 1] of the eight colors."""

GROUND: Mapping[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.05, 0.05, 0.05),
}
"""RGB in [0, 1] of the three plain grounds."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
DIGITS = tuple("0123456789")
COLORS = tuple(COLOR)
GROUNDS = tuple(GROUND)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("cyan", "diamond"),
    }
)
"""(color, shape) pairs never seen together in training: 6 of 48, one per shape, six different colors."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object in one cell."""

    shape: str
    """One of ``SHAPES``, or "0" .. "9" for a handwritten digit."""
    color: str
    row: int
    col: int
    sample: int = -1
    """Index into the handwritten samples; -1 for a shape."""

    @property
    def is_digit(self) -> bool:
        """Whether it is a handwritten digit."""
        return self.sample >= 0

    @property
    def cell(self) -> tuple[int, int]:
        """(row, col)."""
        return self.row, self.col


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of an image."""

    ground: str
    objects: tuple[SceneObject, ...]

    @property
    def content(self) -> str:
        """The content, independent of the order of the objects."""
        objects = ";".join(sorted(f"{o.shape},{o.color},{o.row},{o.col},{o.sample}" for o in self.objects))
        return f"{self.ground}|{objects}"

    def with_object(self, old: SceneObject, new: SceneObject) -> Scene:
        """The scene with one object in the place of another."""
        return replace(self, objects=tuple(new if o is old else o for o in self.objects))

    def split(self) -> Split:
        """The split that this scene belongs to: 80 / 10 / 10 by a hash of its content."""
        return _bucket(self.content, 800, 900)

    def held_out(self) -> bool:
        """Whether it shows a combination that training never sees."""
        return any((o.color, o.shape) in HELD_OUT for o in self.objects)


def text_split(content: str, held_out: bool = False) -> Split:
    """The split of what a text says, by a hash: 70 / 10 / 20; with a held-out combination 0 / 30 / 70.

    ``content`` is the same for all wordings of one thing, so that no split has a paraphrase of another's text.
    """
    return _bucket(f"text {content}", 0, 300) if held_out else _bucket(f"text {content}", 700, 800)


def _bucket(key: str, train: int, validation: int) -> Split:
    """The split of a hash in thousandths: lowest ``train``, then ``validation``, then test."""
    bucket = zlib.crc32(key.encode()) % 1000
    return "train" if bucket < train else "validation" if bucket < validation else "test"


def _polygon(points: list[tuple[float, float]], supersample: int = 16) -> np.ndarray:
    """Anti-aliased alpha (8, 8) of a polygon with (x, y) corners in cell units [-1, 1], y down, even-odd rule."""
    steps = (np.arange(CELL * supersample) + 0.5) / (CELL * supersample) * 2 - 1
    x, y = np.meshgrid(steps, steps)
    inside = np.zeros_like(x, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside.reshape(CELL, supersample, CELL, supersample).mean((1, 3)).astype(np.float32)


@cache
def shape_masks() -> Mapping[str, np.ndarray]:
    """Alpha of each shape: name -> float32 (8, 8) in [0, 1]."""
    turn = 2 * np.pi
    circle = [(0.86 * np.cos(turn * k / 64), 0.86 * np.sin(turn * k / 64)) for k in range(64)]
    star = [
        (
            (1.05, 0.42)[k % 2] * float(np.sin(turn * k / 10)),
            0.08 - (1.05, 0.42)[k % 2] * float(np.cos(turn * k / 10)),
        )
        for k in range(10)
    ]
    a, b = 1.0, 0.25
    cross = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
    return {
        "circle": _polygon(circle),
        "square": _polygon([(-0.93, -0.93), (0.93, -0.93), (0.93, 0.93), (-0.93, 0.93)]),
        "triangle": _polygon([(0.0, -0.95), (0.97, 0.85), (-0.97, 0.85)]),
        "star": _polygon(star),
        "diamond": _polygon([(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)]),
        "cross": _polygon(cross),
    }


@cache
def digit_samples() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits (UCI, doi:10.24432/C50P49): alpha float32 (1797, 8, 8) in [0, 1], and labels (1797,)."""
    with np.load(DIGIT_SCANS, allow_pickle=False) as digits:
        return (digits["images"] / 16).astype(np.float32), digits["labels"].astype(np.int64)


@cache
def digit_indices(split: Split) -> tuple[tuple[int, ...], ...]:
    """For each digit 0..9, the handwritten samples of a split; the splits are disjoint by sample."""
    _, labels = digit_samples()
    rows = [[i for i in np.flatnonzero(labels == d) if _bucket(f"digit {i}", 800, 900) == split] for d in range(10)]
    return tuple(tuple(int(i) for i in row) for row in rows)


# --- scene -> image, cells -> pixels ---


@lru_cache(maxsize=65536)
def _block(ground: str, color: str, shape: str, sample: int) -> np.ndarray:
    alpha = digit_samples()[0][sample] if sample >= 0 else shape_masks()[shape]
    g, c = (np.asarray(rgb, dtype=np.float32)[:, None, None] for rgb in (GROUND[ground], COLOR[color]))
    return g + alpha * (c - g)


def render(scene: Scene, size: int = DEFAULT_SIZE) -> Image:
    """Draws a scene: float32 (3, size, size) in [0, 1], deterministic.

    Raises ValueError when ``size`` is not a multiple of 8 or an object lies outside the grid.
    """
    if size % CELL:
        raise ValueError(f"size={size} is not a multiple of {CELL}")
    image = np.empty((3, size, size), dtype=np.float32)
    image[:] = np.asarray(GROUND[scene.ground], dtype=np.float32)[:, None, None]
    for o in scene.objects:
        top, left = o.row * CELL, o.col * CELL
        if not (0 <= top < size and 0 <= left < size):
            raise ValueError(f"{o} lies outside an image of {size} pixels")
        image[:, top : top + CELL, left : left + CELL] = _block(scene.ground, o.color, o.shape, o.sample)
    return torch.from_numpy(image)


def crowded(index: int, size: int = DEFAULT_SIZE) -> Image:
    """An image with an object in every cell but one, of any shape or training digit in any color, for tokenizers.

    No text goes with it, and it shows the held-out combinations too: a tokenizer without tiles for them could not
    draw them, whoever asks. Differs from scenes, which have ``MAX_OBJECTS`` at most.
    """
    rng, side = random.Random(f"crowded {index}"), size // CELL
    digits = digit_indices("train")
    objects = []
    for cell in range(1, side * side):
        color, at = rng.choice(COLORS), divmod(cell, side)
        if rng.random() < 0.6:
            digit = rng.randrange(10)
            objects.append(SceneObject(DIGITS[digit], color, *at, sample=rng.choice(digits[digit])))
        else:
            objects.append(SceneObject(rng.choice(SHAPES), color, *at))
    return render(Scene(rng.choice(GROUNDS), tuple(objects)), size)


def cells_mask(cells: Iterable[tuple[int, int]], size: int = DEFAULT_SIZE) -> torch.Tensor:
    """The pixels of cells (row, col): bool (size, size)."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    for row, col in cells:
        mask[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL] = True
    return mask
