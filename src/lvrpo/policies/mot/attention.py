"""Attention of new rows over their contexts and themselves: under one mask, or span by span.

Letters: B rows, R rows that go together, L tokens of the longest row, S tokens already in the cache, H heads, K key
heads, G heads that share a key head, E head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lvrpo.policies.mot.sequence import UNSEEN

if TYPE_CHECKING:
    from lvrpo.policies.mot.sequence import Packing
    from lvrpo.policies.mot.transformer import Cache, CachePart


TEXT_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of attention from texts, which come in all lengths: cuDNN's kernel is planned anew for each, at the cost of many
tokens, and is therefore left out."""


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
    """``attention`` with the heads that share a key head as more queries of it, under a mask (..., L, S + L).

    A card's kernel for masks has no shared key heads, and what stands in for it writes all scores to memory.
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


@dataclass(frozen=True)
class MaskedAttention:
    """All rows at once, under one mask."""

    cache: Cache
    mask: torch.Tensor
    """bool (B, 1, L, S + L)."""

    def __call__(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        before = [part.layer(i) for part in self.cache.parts]
        k = torch.cat([*(keys for keys, _ in before), k], dim=1)
        v = torch.cat([*(values for _, values in before), v], dim=1)
        return attention(q, k, v, self.mask)


class SpanAttention:
    """Span by span, over exactly the keys that the span sees: a picture needs no mask, a text a small one.

    Rows of one layout and of contexts of equal lengths go together, so the group of a prompt is one call per span.
    Indices are made here, once for all layers: each is a copy to the card, which waits for the card.
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
        """Where the rows are once the batches stand one after another."""
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
        """Rows of one layout after the keys and values of their contexts, (R, L, H, E); places of padding are zero."""
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
        """On the device; None for all of so many in order."""
        return None if list(places) == list(range(count)) else torch.tensor(places, device=self.device)


@dataclass(frozen=True)
class _Before:
    """What rows of equal lengths have before them in one part of the cache."""

    part: CachePart
    length: int
    rows: int
    entry: int | None
    """The one that all rows share, which is no copy."""
    index: torch.Tensor | None
    """Of every row's own entry; None: as they stand."""

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values without padding, (R, length, K, E)."""
        if self.entry is not None:
            keys, values = self.part.entry(i, self.entry)
            return keys.expand(self.rows, -1, -1, -1), values.expand(self.rows, -1, -1, -1)
        keys, values = self.part.keys[i], self.part.values[i]
        if self.index is not None:
            keys, values = keys.index_select(0, self.index), values.index_select(0, self.index)
        return keys[:, : self.length], values[:, : self.length]
