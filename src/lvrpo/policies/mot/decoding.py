"""Text token by token with the reading expert alone, after contexts that stay in place.

Letters: R rows, S keys so far, D width, H heads, K key heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import sdpa_kernel

from lvrpo.policies.mot.attention import TEXT_KERNELS, attention
from lvrpo.policies.mot.transformer import Cache, Layer, MoT, rotate

BUFFER_BYTES = 8 << 30
"""Keys and values of rows that are written together: more members than fit are written one part after another."""


def at_once(transformer: MoT, cache: Cache, steps: int) -> int:
    """How many rows are written together: at least one."""
    config = transformer.config
    element = cache.parts[0].keys[0].element_size() if cache.parts else transformer.inv_freq.element_size()
    width = config.key_heads * config.width // config.heads
    row = 2 * config.depth * width * element * (_length(cache) + steps)
    return max(1, BUFFER_BYTES // max(1, row))


class Decoder:
    """Rows that each grow by one text token per step; nothing of it has a gradient.

    Every row has keys and values of its own, with room for all steps: a step writes one place of each and copies
    nothing. What a step needs of indices and masks is made before its layers, and only where rows change.
    """

    def __init__(self, transformer: MoT, cache: Cache, steps: int) -> None:
        self.transformer, self.cache = transformer, cache
        self.rope, self.length, self.room = cache.rope, _length(cache), _length(cache) + steps
        self.keys: list[torch.Tensor] = []
        """Per layer (R, room, K, E), from the first step on."""
        self.values: list[torch.Tensor] = []
        self.mask = self._mask()
        """(R, 1, 1, room), added to the scores; None where no context is padded."""

    @torch.no_grad()
    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Embedded tokens (R, D), one per row -> their final states (R, D), normed."""
        transformer, config = self.transformer, self.transformer.config
        cos, sin = transformer.rotation(self.rope[:, None])  # (R, 1, 1, E)
        cos, sin = cos[:, 0], sin[:, 0]
        mask = None if self.mask is None else self.mask[..., : self.length + 1]
        with sdpa_kernel(TEXT_KERNELS):
            for i, layer in enumerate(transformer.layers):
                assert isinstance(layer, Layer)
                q, k, v = layer.reading.queries_keys_values(x)
                roped = rotate(torch.cat([q, k], dim=1), cos, sin).to(v.dtype)
                q, k = roped.split([config.heads, config.key_heads], dim=1)
                keys, values = self._append(i, k, v)
                mask = mask if mask is None else mask.to(v.dtype)
                x = layer.reading.feed_forward(x, attention(q[:, None], keys, values, mask).flatten(1))
        self.length += 1
        self.rope = self.rope + 1
        return transformer.reading_norm(x)

    @torch.no_grad()
    def select(self, rows: Sequence[int]) -> None:
        """Repeats, drops or reorders the rows, which copies them; rows that stay as they are cost nothing."""
        if list(rows) == list(range(len(self.rope))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.rope.device)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):  # one layer after another: the old rows of a layer go at once
                buffers[i] = buffer.index_select(0, index)
        self.rope = self.rope.index_select(0, index)
        self.mask = None if self.mask is None else self.mask.index_select(0, index)

    def _append(self, i: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new token's keys and values (R, K, E) of layer i; those of all tokens so far, (R, S, K, E)."""
        if i == len(self.keys):
            layers = [part.layer(i) for part in self.cache.parts]
            self.keys.append(self._buffer([keys for keys, _ in layers], k))
            self.values.append(self._buffer([values for _, values in layers], v))
        keys, values = self.keys[i], self.values[i]
        keys[:, self.length] = k
        values[:, self.length] = v
        return keys[:, : self.length + 1], values[:, : self.length + 1]

    def _buffer(self, parts: Sequence[torch.Tensor], new: torch.Tensor) -> torch.Tensor:
        buffer = new.new_empty(len(new), self.room, *new.shape[1:])
        start = 0
        for part in parts:
            buffer[:, start : start + part.shape[1]] = part
            start += part.shape[1]
        return buffer

    def _mask(self) -> torch.Tensor | None:
        parts = self.cache.parts
        if all(part.lengths[entry] == part.keys[0].shape[1] for part in parts for entry in part.entries):
            return None
        valid = torch.cat([part.valid for part in parts], dim=1)
        mask = torch.zeros(len(valid), self.room, device=valid.device)
        mask[:, : valid.shape[1]].masked_fill_(~valid, -torch.inf)
        return mask[:, None, None]


def _length(cache: Cache) -> int:
    """Places of a context, padding included."""
    return sum(part.keys[0].shape[1] for part in cache.parts)
