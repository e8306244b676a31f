"""Sequence rules of a unified model: who sees whom, which expert, which rope id (BAGEL, arXiv 2505.14683).

A row of a batch is a list of spans. Inside one row, query i may look at key j if j comes no later than i, or both stand
in the same image, unless j belongs to a noisy image that is not i's own. Text takes one rope id per token; all tokens
of an image, its two markers included, share one id; after an image the id advances by 1, after a noisy one not at all.
The drawing expert owns the latent tokens (noisy or clean); the reading expert owns everything else, markers included.

Letters: B rows, L tokens of the longest row, S tokens already in the cache, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

SpanKind = Literal["text", "read", "clean", "noise", "dropped"]
"""text; a picture for the reading side; a clean latent picture for the drawing side; a picture being drawn; a picture
left out in training, which has no tokens but keeps its rope id."""


@dataclass(frozen=True)
class Span:
    """One segment of a row; for the three picture kinds ``length`` counts the two markers too."""

    kind: SpanKind
    length: int


@dataclass(frozen=True)
class RowLayout:
    """Everything that the rules say about one row; arrays over its tokens."""

    drawing: np.ndarray
    """bool (l,): tokens of the drawing expert."""
    rope_ids: np.ndarray
    """int64 (l,): rope ids relative to the row's start."""
    visible: np.ndarray
    """bool (l, l): visible[i, j] if query i may look at key j."""
    rope_advance: int
    """What the row adds to the rope id of whatever follows."""


@lru_cache(maxsize=4096)
def row_layout(spans: tuple[Span, ...]) -> RowLayout:
    """Applies the sequence rules to one row."""
    length = sum(span.length for span in spans)
    drawing = np.zeros(length, dtype=bool)
    rope_ids = np.zeros(length, dtype=np.int64)
    visible = np.tril(np.ones((length, length), dtype=bool))
    start, rope = 0, 0
    for span in spans:
        stop = start + span.length
        inside = slice(start, stop)
        if span.kind == "text":
            rope_ids[inside] = rope + np.arange(span.length)
            rope += span.length
        else:
            rope_ids[inside] = rope
            visible[inside, inside] = True
            drawing[start + 1 : stop - 1] = span.kind in ("clean", "noise")
            if span.kind == "noise":
                visible[stop:, inside] = False
            else:
                rope += 1
        start = stop
    return RowLayout(drawing, rope_ids, visible, rope)


@dataclass(frozen=True)
class Packing:
    """Index tensors of a batch of rows; tokens travel as two blocks, reading (Nr, D), drawing (Nd, D), in row order."""

    batch_size: int
    length: int
    lengths: torch.Tensor
    """int64 (B,)."""
    grid_source: torch.Tensor
    """int64 (B * L,): for every grid cell its row in cat(reading, drawing); padding points at row 0."""
    reading_cells: torch.Tensor
    """int64 (Nr,): the grid cell of every reading token."""
    drawing_cells: torch.Tensor
    """int64 (Nd,)."""
    rope_ids: torch.Tensor
    """int64 (B, L): relative to each row's start."""
    visible: torch.Tensor
    """bool (B, L, L); a padding query sees itself alone."""
    rope_advance: torch.Tensor
    """int64 (B,)."""


def pack(rows: Sequence[tuple[Span, ...]], device: torch.device) -> Packing:
    """Lays a batch of rows out on a (B, L) grid, padding at the end of the shorter ones."""
    return _pack(tuple(rows), device)


def forget_packings() -> None:
    """Empties the memory of ``pack``: what was laid out without memory behind it must not be met again."""
    _pack.cache_clear()


@lru_cache(maxsize=256)
def _pack(rows: tuple[tuple[Span, ...], ...], device: torch.device) -> Packing:
    layouts = [row_layout(row) for row in rows]
    lengths = np.array([len(layout.rope_ids) for layout in layouts], dtype=np.int64)
    batch_size, length = len(rows), int(lengths.max())
    drawing = np.zeros((batch_size, length), dtype=bool)
    valid = np.arange(length) < lengths[:, None]
    rope_ids = np.zeros((batch_size, length), dtype=np.int64)
    visible = np.zeros((batch_size, length, length), dtype=bool)
    visible[:, np.arange(length), np.arange(length)] = True
    for b, layout in enumerate(layouts):
        n = lengths[b]
        drawing[b, :n] = layout.drawing
        rope_ids[b, :n] = layout.rope_ids
        visible[b, :n, :n] = layout.visible
    reading_cells = np.flatnonzero((valid & ~drawing).ravel())
    drawing_cells = np.flatnonzero(drawing.ravel())
    grid_source = np.zeros(batch_size * length, dtype=np.int64)
    grid_source[reading_cells] = np.arange(len(reading_cells))
    grid_source[drawing_cells] = len(reading_cells) + np.arange(len(drawing_cells))

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Packing(
        batch_size=batch_size,
        length=length,
        lengths=tensor(lengths),
        grid_source=tensor(grid_source),
        reading_cells=tensor(reading_cells),
        drawing_cells=tensor(drawing_cells),
        rope_ids=tensor(rope_ids),
        visible=tensor(visible),
        rope_advance=tensor(np.array([layout.rope_advance for layout in layouts], dtype=np.int64)),
    )
