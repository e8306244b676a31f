"""Sequence rules of a unified model: who sees whom, which expert, which rope id (BAGEL, arXiv 2505.14683).

A row of a batch is a list of spans. Inside one row, query i may look at key j if j comes no later than i, or both stand
in the same image, unless j belongs to a noisy image, or an option, that is not i's own. Text takes one rope id per
token; all tokens of an image, its two markers included, share one id; after an image the id advances by 1, after a
noisy one or an option not at all. The drawing expert owns the latent tokens (noisy or clean); the reading expert owns
everything else, markers included.

Letters: B rows, L tokens of the longest row, S tokens already in the cache, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch

SpanKind = Literal["text", "option", "read", "clean", "noise", "dropped"]
"""text; a text that is scored beside others after the same context; a picture for the reading side; a clean latent
picture for the drawing side; a picture being drawn; a picture left out in training, which has no tokens but keeps its
rope id."""
UNSEEN: tuple[SpanKind, ...] = ("option", "noise")
"""What comes after one of these neither sees it nor is moved by it."""


@dataclass(frozen=True)
class Span:
    """One segment of a row; for the picture kinds ``length`` counts the two markers too."""

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
    """bool (l, l): visible[i, j] if query i may look at key j; (0, 0) where it was not asked for."""
    rope_advance: int
    """What the row adds to the rope id of whatever follows."""


def row_layout(spans: tuple[Span, ...], mask: bool = True) -> RowLayout:
    """Applies the sequence rules to one row; without ``mask``, all but who sees whom."""
    length = sum(span.length for span in spans)
    drawing = np.zeros(length, dtype=bool)
    rope_ids = np.zeros(length, dtype=np.int64)
    visible = np.tril(np.ones((length, length), dtype=bool)) if mask else np.zeros((0, 0), dtype=bool)
    start, rope = 0, 0
    for span in spans:
        stop = start + span.length
        inside = slice(start, stop)
        if span.kind in ("text", "option"):
            rope_ids[inside] = rope + np.arange(span.length)
            rope += span.length if span.kind == "text" else 0
        else:
            rope_ids[inside] = rope
            drawing[start + 1 : stop - 1] = span.kind in ("clean", "noise")
            rope += span.kind != "noise"
            if mask:
                visible[inside, inside] = True
        if mask and span.kind in UNSEEN:
            visible[stop:, inside] = False
        start = stop
    return RowLayout(drawing, rope_ids, visible, rope)


@dataclass(frozen=True)
class Packing:
    """Index tensors of a batch of rows; tokens travel as two blocks, reading (Nr, D), drawing (Nd, D), in row order."""

    rows: tuple[tuple[Span, ...], ...]
    row_lengths: tuple[int, ...]
    """Tokens of every row."""
    length: int
    lengths: torch.Tensor
    """int64 (B,): ``row_lengths`` on the device."""
    grid_source: torch.Tensor
    """int64 (B * L,): for every grid cell its row in cat(reading, drawing); padding points at row 0."""
    reading_cells: torch.Tensor
    """int64 (Nr,): the grid cell of every reading token."""
    drawing_cells: torch.Tensor
    """int64 (Nd,)."""
    rope_ids: torch.Tensor
    """int64 (B, L): relative to each row's start."""
    visible: torch.Tensor | None
    """bool (B, L, L); a padding query sees itself alone. None where it would have more than ``MASK_CELLS`` cells: who
    sees whom is then read from ``rows``."""
    rope_advance: torch.Tensor
    """int64 (B,)."""

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


MASK_CELLS = 1 << 24
"""A mask of more cells is never built: one row of 4096 tokens, or sixteen of 1024."""
KEPT_BYTES = 64 << 20
"""Layouts that come again are kept up to so many bytes, the last ones used."""
_Key = tuple[tuple[tuple[Span, ...], ...], torch.device]


class _Kept:
    """Packings by what they were made of."""

    def __init__(self) -> None:
        self.packings: OrderedDict[_Key, Packing] = OrderedDict()
        self.bytes = 0

    def get(self, key: _Key) -> Packing | None:
        if key in self.packings:
            self.packings.move_to_end(key)
        return self.packings.get(key)

    def put(self, key: _Key, packing: Packing) -> None:
        """Keeps a packing of a quarter of the bytes at most, at the cost of those not used for longest."""
        if packing.bytes > KEPT_BYTES // 4:
            return
        self.packings[key] = packing
        self.bytes += packing.bytes
        while self.bytes > KEPT_BYTES:
            self.bytes -= self.packings.popitem(last=False)[1].bytes

    def clear(self) -> None:
        self.packings.clear()
        self.bytes = 0


_kept = _Kept()


def pack(rows: Sequence[tuple[Span, ...]], device: torch.device) -> Packing:
    """Lays a batch of rows out on a (B, L) grid, padding at the end of the shorter ones."""
    key = tuple(rows), device
    packing = _kept.get(key)
    if packing is None:
        packing = _pack(*key)
        _kept.put(key, packing)
    return packing


def forget_packings() -> None:
    """Empties what ``pack`` keeps."""
    _kept.clear()


def _pack(rows: tuple[tuple[Span, ...], ...], device: torch.device) -> Packing:
    lengths = np.array([sum(span.length for span in row) for row in rows], dtype=np.int64)
    batch_size, length = len(rows), int(lengths.max())
    masked = batch_size * length**2 <= MASK_CELLS
    layouts = {row: row_layout(row, masked) for row in dict.fromkeys(rows)}
    drawing = np.zeros((batch_size, length), dtype=bool)
    valid = np.arange(length) < lengths[:, None]
    rope_ids = np.zeros((batch_size, length), dtype=np.int64)
    visible = np.zeros((batch_size, length, length) if masked else (0, 0, 0), dtype=bool)
    if masked:
        visible[:, np.arange(length), np.arange(length)] = True
    for b, row in enumerate(rows):
        n, layout = lengths[b], layouts[row]
        drawing[b, :n] = layout.drawing
        rope_ids[b, :n] = layout.rope_ids
        if masked:
            visible[b, :n, :n] = layout.visible
    reading_cells = np.flatnonzero((valid & ~drawing).ravel())
    drawing_cells = np.flatnonzero(drawing.ravel())
    grid_source = np.zeros(batch_size * length, dtype=np.int64)
    grid_source[reading_cells] = np.arange(len(reading_cells))
    grid_source[drawing_cells] = len(reading_cells) + np.arange(len(drawing_cells))

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Packing(
        rows=rows,
        row_lengths=tuple(lengths.tolist()),
        length=length,
        lengths=tensor(lengths),
        grid_source=tensor(grid_source),
        reading_cells=tensor(reading_cells),
        drawing_cells=tensor(drawing_cells),
        rope_ids=tensor(rope_ids),
        visible=tensor(visible) if masked else None,
        rope_advance=tensor(np.array([layouts[row].rope_advance for row in rows], dtype=np.int64)),
    )
