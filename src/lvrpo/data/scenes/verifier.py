"""The verifier: an exact parser of images of this world.

Objects sit in cells, so an image is read cell by cell. With g the ground (median color) and D (64, 3) the cell minus
g, an object is a rank-one term D = a v^T: a its alpha mask, v = color - g. For every known mask a (6 shapes, 1797
handwritten digits) the explained share of the cell's energy is |a^T D|^2 / (|a|^2 |D|^2); the noise, seen in the median
cell (so at most half of the cells may be occupied), is taken off the energy first. The best shape competes with the
vote of the nearest digits; the color is the entry of the table nearest to v = a^T D / |a|^2. A cell with energy that no
object explains, in a color that no entry matches, or between two digits is *unreadable*: it counts neither as an object
nor as empty, and the total of such an image cannot be confirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from lvrpo.data.scenes.facts import questions_of_text, unchanged_questions_of_text
from lvrpo.data.scenes.grammar import place
from lvrpo.data.scenes.objects import (
    CELL,
    COLOR,
    COLORS,
    DIGITS,
    GROUND,
    GROUNDS,
    SHAPES,
    digit_samples,
    shape_masks,
)
from lvrpo.types import Fact, Image

GROUND_TOLERANCE = 0.12
"""Largest distance (Euclidean, RGB) of the median color to a ground."""
STRENGTH = (0.75, 1.15)
"""Accepted range of an object's contrast: color = ground + strength * (entry - ground)."""
COLOR_TOLERANCE = 0.15
"""Largest distance (Euclidean, RGB) of an object's color to its entry of the table at the best strength."""
COLOR_MARGIN = 0.85
"""The nearest color must be closer than this share of the distance to the second nearest."""
SHAPE_SCORE = 0.90
"""Least explained share of the energy of a shape."""
SHAPE_MARGIN = 0.06
"""The minimum margin in explained energy between the best and the second shape."""
NOISE_SLACK = 0.25
"""Least scores are lowered by this times the ratio of noise to the energy of the cell, by 0.1 at most."""
DIGIT_SCORE = 0.78
"""Least explained share of the energy of a digit by its nearest handwritten sample."""
DIGIT_VOTE = 0.55
"""Least share of the winning digit in the vote of the nearest samples."""
EMPTY_ENERGY = 0.45
"""A cell with less energy (sum over pixels and channels of squared differences to the ground) is empty."""
MAX_NOISE = 0.22
"""Standard deviation per value above which nothing of an image is readable."""
NOISE_SPREAD = 0.5
"""Maximum relative excess of an empty noisy cell's energy over that of the median cell."""
NEIGHBORS = 12
VOTE_TEMPERATURE = 0.02


@dataclass(frozen=True, slots=True)
class SeenObject:
    """One object read from an image."""

    shape: str
    """One of ``SHAPES``, or "0" .. "9"."""
    color: str
    row: int
    col: int
    score: float = 1.0
    """Explained share of the cell's energy."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The content that was recognized in an image."""

    ground: str | None
    """None when the image has no plain ground of the table."""
    objects: tuple[SeenObject, ...]
    unreadable: tuple[tuple[int, int], ...]
    """Cells (row, col) that are neither empty nor an object."""
    grid: tuple[int, int]
    """Rows and columns of cells."""

    @property
    def clean(self) -> bool:
        """Whether every cell was read and the ground is known."""
        return self.ground is not None and not self.unreadable


class Verifier:
    """Reads images with a set of digit templates; ``read`` below uses one with all handwritten samples."""

    def __init__(self, samples: Sequence[int] | None = None) -> None:
        """``samples``: the handwritten samples to use as templates; None for all."""
        alphas, labels = digit_samples()
        chosen = np.arange(len(labels)) if samples is None else np.asarray(samples)
        shapes = np.stack([shape_masks()[s] for s in SHAPES])
        masks = np.concatenate([shapes, alphas[chosen]]).reshape(-1, CELL * CELL)
        self._norms = np.linalg.norm(masks, axis=1)
        self._units = np.ascontiguousarray(masks / self._norms[:, None])
        self._labels = labels[chosen]
        self._colors = np.asarray([COLOR[c] for c in COLORS], dtype=np.float32)
        self._grounds = np.asarray([GROUND[g] for g in GROUNDS], dtype=np.float32)

    def read(self, images: Sequence[Image] | torch.Tensor) -> list[Reading]:
        """Reads images (B, 3, H, W) or a list of (3, H, W), H and W multiples of 8, values clamped to [0, 1].

        Raises ValueError for another shape. Images with values that are not finite, or all noise, are
        unreadable everywhere.
        """
        if len(images) == 0:
            return []
        batch = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
        if batch.ndim != 4 or batch.shape[1] != 3 or batch.shape[2] % CELL or batch.shape[3] % CELL:
            raise ValueError(f"images of shape {tuple(batch.shape)}: need (batch, 3, 8 rows, 8 columns)")
        pixels = batch.detach().to("cpu", torch.float32).numpy()
        return [r for start in range(0, len(pixels), 256) for r in self._read(pixels[start : start + 256])]

    def _read(self, pixels: np.ndarray) -> list[Reading]:
        B, _, H, W = pixels.shape
        rows, cols = H // CELL, W // CELL
        finite = np.asarray([np.isfinite(image).all() for image in pixels])
        pixels = np.clip(np.nan_to_num(pixels), 0, 1)
        flat = pixels.reshape(B, 3, -1)
        median = np.median(flat, axis=2)
        ground_distance = np.linalg.norm(median[:, None] - self._grounds, axis=2)
        cells = pixels.reshape(B, 3, rows, CELL, cols, CELL).transpose(0, 2, 4, 3, 5, 1)
        delta = cells.reshape(B, rows * cols, CELL * CELL, 3) - median[:, None, None]
        raw_energy = (delta**2).sum((2, 3))
        noise_energy = np.median(raw_energy, axis=1)
        readable = [bool(f) for f in finite & (noise_energy < 3 * CELL * CELL * MAX_NOISE**2)]
        energy = raw_energy - noise_energy[:, None]
        variance = noise_energy / (CELL * CELL)
        occupied = np.argwhere(energy > EMPTY_ENERGY + NOISE_SPREAD * noise_energy[:, None])
        objects: list[list[SeenObject]] = [[] for _ in range(B)]
        unreadable: list[list[tuple[int, int]]] = [[] for _ in range(B)]
        for start in range(0, len(occupied), 512):
            chunk = occupied[start : start + 512]
            b, c = chunk.T
            names, colors, scores = self._classify(delta[b, c], energy[b, c], variance[b], median[b])
            for i, (image, cell) in enumerate(chunk.tolist()):
                row, col = divmod(cell, cols)
                if names[i] is None:
                    unreadable[image].append((row, col))
                else:
                    objects[image].append(SeenObject(names[i], COLORS[colors[i]], row, col, float(scores[i])))
        everywhere = tuple((r, c) for r in range(rows) for c in range(cols))
        readings = []
        for i in range(B):
            if not readable[i]:
                readings.append(Reading(None, (), everywhere, (rows, cols)))
                continue
            nearest = int(ground_distance[i].argmin())
            ground = GROUNDS[nearest] if ground_distance[i, nearest] < GROUND_TOLERANCE else None
            readings.append(Reading(ground, tuple(objects[i]), tuple(unreadable[i]), (rows, cols)))
        return readings

    def _classify(
        self, delta: np.ndarray, energy: np.ndarray, variance: np.ndarray, median: np.ndarray
    ) -> tuple[list[Any], np.ndarray, np.ndarray]:
        """Name (None where unreadable), color index and score of n cells: delta (n, 64, 3), the others (n, ...)."""
        n, S = len(delta), len(SHAPES)
        projected = (delta.transpose(0, 2, 1).reshape(n * 3, -1) @ self._units.T).reshape(n, 3, -1)
        explained = (projected**2).sum(1) - variance[:, None]
        scores = explained / np.maximum(energy, 1e-6)[:, None]
        shape = scores[:, :S].argmax(1)
        k = min(NEIGHBORS, len(self._labels))
        digits = scores[:, S:]
        near = np.argpartition(digits, -k, axis=1)[:, -k:]
        near_scores = np.take_along_axis(digits, near, axis=1)
        best_digit = near[np.arange(n), near_scores.argmax(1)]
        weights = np.exp((near_scores - near_scores.max(1, keepdims=True)) / VOTE_TEMPERATURE)
        votes = np.zeros((n, 10), dtype=np.float32)
        np.add.at(votes, (np.arange(n)[:, None], self._labels[near]), weights)
        votes /= votes.sum(1, keepdims=True)
        digit, digit_score = votes.argmax(1), near_scores.max(1)
        shape_score = scores[np.arange(n), shape]
        is_shape = shape_score >= digit_score
        template = np.where(is_shape, shape, S + best_digit)
        v = projected[np.arange(n), :, template] / self._norms[template][:, None]
        u = self._colors - median[:, None]
        strength = np.clip((v[:, None] * u).sum(2) / np.maximum((u**2).sum(2), 1e-6), *STRENGTH)
        distance = np.linalg.norm(v[:, None] - strength[:, :, None] * u, axis=2)
        order = np.sort(distance, axis=1)
        good_color = (order[:, 0] < COLOR_TOLERANCE) & (order[:, 0] < COLOR_MARGIN * order[:, 1])
        slack = np.minimum(NOISE_SLACK * CELL * CELL * variance / np.maximum(energy, 1e-6), 0.1)
        margin = shape_score - np.partition(scores[:, :S], -2, axis=1)[:, -2]
        good_shape = (shape_score >= SHAPE_SCORE - slack) & (margin >= SHAPE_MARGIN - slack)
        good_digit = (digit_score >= DIGIT_SCORE - slack) & (votes.max(1) >= DIGIT_VOTE)
        good = good_color & np.where(is_shape, good_shape, good_digit)
        names = [None if not good[i] else SHAPES[shape[i]] if is_shape[i] else DIGITS[digit[i]] for i in range(n)]
        return names, distance.argmin(1), np.where(is_shape, shape_score, digit_score)


@cache
def _default_verifier() -> Verifier:
    """The verifier with all handwritten samples as templates."""
    return Verifier()


def read(images: Sequence[Image] | torch.Tensor) -> list[Reading]:
    """Reads images (B, 3, H, W), or a list of them, with the default verifier."""
    return _default_verifier().read(images)


def _matches(reading: Reading, check: Mapping[str, Any]) -> list[SeenObject]:
    shape, color = check.get("shape"), check.get("color")
    return [
        o
        for o in reading.objects
        if (shape is None or o.shape == shape or (shape == "digit" and o.shape in DIGITS))
        and (color is None or o.color == color)
        and check.get("row", o.row) == o.row
        and check.get("col", o.col) == o.col
    ]


def _on_edge(o: SeenObject, edge: str, grid: tuple[int, int]) -> bool:
    return {"left": o.col == 0, "right": o.col == grid[1] - 1, "top": o.row == 0, "bottom": o.row == grid[0] - 1}[edge]


def _relation_holds(a: SeenObject, b: SeenObject, relation: str) -> bool:
    """Whether ``a`` is left (right, above, below) of ``b``, by cells."""
    return {"left": a.col < b.col, "right": a.col > b.col, "above": a.row < b.row, "below": a.row > b.row}[relation]


def holds(check: Mapping[str, Any], reading: Reading) -> bool:
    """Whether a ``Fact.check`` holds of an image.

    ``type`` is one of: exists (shape, color, row, col, each optional; ``present`` false to demand absence), count
    (shape, color, count), color (every object of ``shape`` has ``color``, and there is one), relation (a, b, relation:
    some a is in that relation to some b), edge (shape, color, edge), place (shape, color, place), ground (ground),
    total (count), unchanged (objects, ground).
    Absence and totals cannot be confirmed while a cell is unreadable. Raises ValueError for another type.
    """
    kind = check.get("type")
    if kind == "exists":
        found = bool(_matches(reading, check))
        return found if check.get("present", True) else reading.clean and not found
    if kind == "count":
        return len(_matches(reading, check)) == check["count"]
    if kind == "color":
        same = _matches(reading, {"shape": check["shape"]})
        return bool(same) and all(o.color == check["color"] for o in same)
    if kind == "relation":
        first, second = _matches(reading, check["a"]), _matches(reading, check["b"])
        return any(_relation_holds(a, b, check["relation"]) for a in first for b in second)
    if kind == "edge":
        return any(_on_edge(o, check["edge"], reading.grid) for o in _matches(reading, check))
    if kind == "place":
        return any(place(o.row, o.col, reading.grid[0]) == check["place"] for o in _matches(reading, check))
    if kind == "ground":
        return reading.ground == check["ground"]
    if kind == "total":
        return reading.clean and len(reading.objects) == check["count"]
    if kind == "unchanged":
        return reading.ground == check["ground"] and all(_matches(reading, o) for o in check["objects"])
    raise ValueError(f"unknown type {kind!r} of a check")


def fact_results(facts: Iterable[Fact], reading: Reading) -> list[bool]:
    """One verdict per fact."""
    return [holds(fact.check, reading) for fact in facts]


def verify(facts: Iterable[Fact], reading: Reading) -> bool:
    """Whether an image shows everything that the facts say."""
    return all(fact_results(facts, reading))


# --- the world as rewards see it ---


class SceneWorld:
    """Grammar and verifier of the scenes; see ``lvrpo.data.base.World``."""

    def questions(self, text: str) -> tuple[Fact, ...]:
        return questions_of_text(text)

    def unchanged_questions(self, instruction: str) -> tuple[Fact, ...]:
        return unchanged_questions_of_text(instruction)

    def unreadable(self, image: Image) -> str | None:
        height, width = image.shape[1:]
        if height % CELL or width % CELL:
            return f"an image of {width} x {height}: the verifier reads multiples of {CELL}"
        return None

    def holds(self, facts: Sequence[Sequence[Fact]], images: Sequence[Image]) -> list[list[bool]]:
        return [fact_results(of, reading) for of, reading in zip(facts, read(images), strict=True)]
