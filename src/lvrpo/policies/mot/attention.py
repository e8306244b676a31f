"""Sequence layout and attention: the attention mask, the expert and the position id of every token.

The rules are those of BAGEL (arXiv:2505.14683). A row of a batch is a list of spans. Inside one row, query i may attend
to key j if j comes no later than i, or both are in the same image, unless j belongs to a noisy image, or an option,
that is not i's own. Text takes one rope id per token; all tokens of an image, its two markers included, share one id;
after an image the id advances by 1, after a noisy one or an option not at all. The generation expert owns the latent
tokens (noisy or clean); the understanding expert owns everything else, markers included.

Letters: B rows, R rows of one batch, L tokens of the longest row, S cached tokens, D width, H heads,
K key heads, G heads that share a key head, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from lvrpo.policies.mot.transformer import Cache, CachePart

TEXT_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for text, which comes in all lengths. cuDNN's is left out: it compiles a plan for every new length."""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, H, E) queries over (B, S + L, K, E) keys and values -> (B, L, H, E)."""
    shared = q.shape[2] // k.shape[2]
    if shared > 1 and mask is not None and q.is_cuda:
        return folded_attention(q, k, v, mask)
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=shared > 1
    )
    return out.transpose(1, 2)


def folded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``attention`` under a mask (..., L, S + L), with the G query heads of a key head folded into the query axis.

    On CUDA the memory-efficient kernel takes masks but no grouped heads; the fallback would store all scores.
    """
    L, K = q.shape[1], k.shape[2]
    G = q.shape[2] // K
    queries = q.unflatten(2, (K, G)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, K, G * L, E)
    repeated = mask.unsqueeze(-3).expand(*mask.shape[:-2], G, *mask.shape[-2:]).flatten(-3, -2)
    out = functional.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), attn_mask=repeated)
    return out.unflatten(2, (G, L)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class Attend(Protocol):
    """Attention of one layer: q (B, L, H, E), new keys and values (B, L, K, E) -> (B, L, H, E)."""

    def __call__(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


@dataclass
class MaskedAttention:
    """All rows in one call."""

    cache: Cache
    mask: torch.Tensor | None
    """(B, 1, L, S + L), bool until the first layer, then added to the scores; None: every token attends to all others
    and to the whole context."""

    def __call__(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.mask is not None and self.mask.dtype == torch.bool:  # else torch converts it in every layer
            self.mask = torch.zeros_like(self.mask, dtype=q.dtype).masked_fill_(~self.mask, -torch.inf)
        before = [part.layer(i) for part in self.cache.parts]
        k = torch.cat([*(keys for keys, _ in before), k], dim=1)
        v = torch.cat([*(values for _, values in before), v], dim=1)
        return attention(q, k, v, self.mask)


class SpanAttention:
    """Span by span, over the keys that the span attends to: images need no mask, texts a small one.

    Rows with equal layouts and context lengths are batched, so the group of a prompt is one call per span. Indices are
    made once for all layers, because a copy to the GPU synchronizes.
    """

    def __init__(self, packing: Packing, cache: Cache) -> None:
        self.packing, self.device = packing, packing.lengths.device
        rows_of: dict[Hashable, list[int]] = {}
        for b, spans in enumerate(packing.rows):
            before = tuple(part.lengths[part.entries[b]] for part in cache.parts)
            rows_of.setdefault((spans, before), []).append(b)
        self.batches = list(rows_of.values())
        self.indices = [self._index(rows, packing.batch_size) for rows in self.batches]
        order = [b for rows in self.batches for b in rows]
        places = sorted(range(len(order)), key=order.__getitem__)
        self.places = self._index(places, len(order))
        """int64 (B,): the place of every row in the concatenated batches; None: in order."""
        self.contexts = [[self._context(part, rows) for part in cache.parts] for rows in self.batches]

    def __call__(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = []
        for rows, index, context in zip(self.batches, self.indices, self.contexts, strict=True):
            keys, values = [], []
            for before in context:
                before_k, before_v = before.layer(i)
                keys.append(before_k)
                values.append(before_v)
            new = [x if index is None else x.index_select(0, index) for x in (q, k, v)]
            found.append(self._rows(rows, keys, values, *new))
        out = found[0] if len(found) == 1 else torch.cat(found)
        return out if self.places is None else out.index_select(0, self.places)

    def _rows(
        self,
        rows: list[int],
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """Attention (R, L, H, E) of rows with one layout; zero at padding."""
        out, start = [], 0
        for span in self.packing.rows[rows[0]]:
            stop = start + span.length
            if not span.length:
                continue
            own_k, own_v = torch.cat([*keys, k[:, start:stop]], dim=1), torch.cat([*values, v[:, start:stop]], dim=1)
            mask = None
            if span.kind in ("text", "option") and span.length > 1:
                mask = torch.ones(span.length, own_k.shape[1], dtype=torch.bool, device=q.device)
                mask = mask.tril(own_k.shape[1] - span.length)
            with sdpa_kernel(TEXT_KERNELS) if span.kind in ("text", "option") else nullcontext():
                out.append(attention(q[:, start:stop], own_k, own_v, mask))
            if span.kind not in UNSEEN:
                keys.append(k[:, start:stop])
                values.append(v[:, start:stop])
            start = stop
        if start < q.shape[1] or not out:
            out.append(torch.zeros_like(q[:, start:]))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _context(self, part: CachePart, rows: Sequence[int]) -> _Before:
        entries = [part.entries[b] for b in rows]
        length = part.lengths[entries[0]]
        if len(set(entries)) == 1:
            return _Before(part, length, len(rows), entries[0], None)
        return _Before(part, length, len(rows), None, self._index(entries, len(part.lengths)))

    def _index(self, places: Sequence[int], count: int) -> torch.Tensor | None:
        """``places`` as a tensor on the device; None for 0 .. count - 1."""
        return None if list(places) == list(range(count)) else torch.tensor(places, device=self.device)


@dataclass(frozen=True)
class _Before:
    """The entries of one cache part before rows with contexts of equal lengths."""

    part: CachePart
    length: int
    rows: int
    entry: int | None
    """The entry that all rows share: a view, no copy."""
    index: torch.Tensor | None
    """int64 (R,): the entry of each row; None: in order."""

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values without padding, (R, length, K, E)."""
        if self.entry is not None:
            keys, values = self.part.entry(i, self.entry)
            return keys.expand(self.rows, -1, -1, -1), values.expand(self.rows, -1, -1, -1)
        keys, values = self.part.keys[i], self.part.values[i]
        if self.index is not None:
            keys, values = keys.index_select(0, self.index), values.index_select(0, self.index)
        return keys[:, : self.length], values[:, : self.length]


SpanKind = Literal["text", "option", "read", "clean", "noise", "dropped"]
"""text; option: one of several texts scored after the same context; read: vision-encoder tokens of an image; clean:
latent tokens of a condition image; noise: those of the image being generated; dropped: an image that training drops,
without tokens but with its rope id."""
UNSEEN: tuple[SpanKind, ...] = ("option", "noise")
"""Later spans do not attend to these, and their rope ids do not depend on them."""


@dataclass(frozen=True)
class Span:
    """One segment of a row; for the image kinds ``length`` counts the two markers too."""

    kind: SpanKind
    length: int


@dataclass(frozen=True)
class RowLayout:
    """The layout of one row of l tokens."""

    generation: np.ndarray
    """bool (l,): whether the generation expert processes the token."""
    rope_ids: np.ndarray
    """int64 (l,): rope ids relative to the row's start."""
    visible: np.ndarray
    """bool (l, l): visible[i, j] if query i attends to key j; (0, 0) without ``mask``."""
    rope_advance: int
    """Added to the rope id of the next row."""


def row_layout(spans: tuple[Span, ...], mask: bool = True) -> RowLayout:
    """The layout of a row; ``visible`` is computed with ``mask`` alone."""
    length = sum(span.length for span in spans)
    generation = np.zeros(length, dtype=bool)
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
            generation[start + 1 : stop - 1] = span.kind in ("clean", "noise")
            rope += span.kind != "noise"
            if mask:
                visible[inside, inside] = True
        if mask and span.kind in UNSEEN:
            visible[stop:, inside] = False
        start = stop
    return RowLayout(generation, rope_ids, visible, rope)


@dataclass(frozen=True)
class Packing:
    """Index tensors of a batch of rows.

    Tokens are two blocks in row order: understanding (Nu, D) and generation (Ng, D).
    """

    rows: tuple[tuple[Span, ...], ...]
    row_lengths: tuple[int, ...]
    """Tokens of every row."""
    length: int
    lengths: torch.Tensor
    """int64 (B,): ``row_lengths`` on the device."""
    grid_source: torch.Tensor
    """int64 (B * L,): for every grid cell its row in cat(understanding, generation); padding points at row 0."""
    understanding_cells: torch.Tensor
    """int64 (Nu,): the grid cell of every understanding token."""
    generation_cells: torch.Tensor
    """int64 (Ng,)."""
    rope_ids: torch.Tensor
    """int64 (B, L): relative to each row's start."""
    visible: torch.Tensor | None
    """bool (B, L, L): attention mask; a padding query attends to itself. None for more than ``MASK_CELLS`` cells:
    ``SpanAttention`` then reads ``rows``."""
    rope_advance: torch.Tensor
    """int64 (B,)."""

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @cached_property
    def sees_all(self) -> bool:
        """Whether every token attends to all others of its row, without padding: one image a row, all of one grid."""
        spans = self.rows[0]
        return len(set(self.rows)) == 1 and len(spans) == 1 and spans[0].kind in ("read", "clean", "noise")

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


MASK_CELLS = 1 << 24
"""Largest mask that is built: one row of 4096 tokens, or sixteen of 1024."""
PACKING_CACHE_BYTES = 64 << 20
"""Size of the cache of packings (least recently used are dropped)."""
_Key = tuple[tuple[tuple[Span, ...], ...], torch.device]


class _PackingCache:
    """An LRU cache of packings."""

    def __init__(self) -> None:
        self.packings: OrderedDict[_Key, Packing] = OrderedDict()
        self.bytes = 0

    def get(self, key: _Key) -> Packing | None:
        if key in self.packings:
            self.packings.move_to_end(key)
        return self.packings.get(key)

    def put(self, key: _Key, packing: Packing) -> None:
        """Stores a packing of at most a quarter of the size, and drops the least recently used ones."""
        if packing.bytes > PACKING_CACHE_BYTES // 4:
            return
        self.packings[key] = packing
        self.bytes += packing.bytes
        while self.bytes > PACKING_CACHE_BYTES:
            self.bytes -= self.packings.popitem(last=False)[1].bytes

    def clear(self) -> None:
        self.packings.clear()
        self.bytes = 0


_packings = _PackingCache()


def pack(rows: Sequence[tuple[Span, ...]], device: torch.device) -> Packing:
    """The packing of rows on a (B, L) grid, padded at the end; cached."""
    key = tuple(rows), device
    packing = _packings.get(key)
    if packing is None:
        packing = _pack(*key)
        _packings.put(key, packing)
    return packing


def forget_packings() -> None:
    """Empties the cache of ``pack``."""
    _packings.clear()


def _pack(rows: tuple[tuple[Span, ...], ...], device: torch.device) -> Packing:
    lengths = np.array([sum(span.length for span in row) for row in rows], dtype=np.int64)
    batch_size, length = len(rows), int(lengths.max())
    masked = batch_size * length**2 <= MASK_CELLS
    layouts = {row: row_layout(row, masked) for row in dict.fromkeys(rows)}
    generation = np.zeros((batch_size, length), dtype=bool)
    valid = np.arange(length) < lengths[:, None]
    rope_ids = np.zeros((batch_size, length), dtype=np.int64)
    visible = np.zeros((batch_size, length, length) if masked else (0, 0, 0), dtype=bool)
    if masked:
        visible[:, np.arange(length), np.arange(length)] = True
    for b, row in enumerate(rows):
        n, layout = lengths[b], layouts[row]
        generation[b, :n] = layout.generation
        rope_ids[b, :n] = layout.rope_ids
        if masked:
            visible[b, :n, :n] = layout.visible
    understanding_cells = np.flatnonzero((valid & ~generation).ravel())
    generation_cells = np.flatnonzero(generation.ravel())
    grid_source = np.zeros(batch_size * length, dtype=np.int64)
    grid_source[understanding_cells] = np.arange(len(understanding_cells))
    grid_source[generation_cells] = len(understanding_cells) + np.arange(len(generation_cells))

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Packing(
        rows=rows,
        row_lengths=tuple(lengths.tolist()),
        length=length,
        lengths=tensor(lengths),
        grid_source=tensor(grid_source),
        understanding_cells=tensor(understanding_cells),
        generation_cells=tensor(generation_cells),
        rope_ids=tensor(rope_ids),
        visible=tensor(visible) if masked else None,
        rope_advance=tensor(np.array([layouts[row].rope_advance for row in rows], dtype=np.int64)),
    )
