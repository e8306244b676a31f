"""A KV cache layer of ``transformers`` that grows in place; imported where that optional package is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from lvrpo.policies.kv_buffers import select_rows


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer`` that writes new places into a buffer, where that one copies all places for every new one.

    Buffers are (R, heads, places, width); what attention reads, ``keys`` and ``values``, are views of their beginning.
    Without gradient: a place is overwritten in no graph.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        """Continues a layer with places, which is left as it is, by at most ``room`` places before it is moved."""
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.most = layer.get_seq_length() + room
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values (R, heads, n, width). Any: what the base class takes and ignores."""
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if self._buffers is None or stop > self.most:
            self.most = max(self.most, stop)
            self._buffers = _moved(self.keys, self.most), _moved(self.values, self.most)
        keys, values = self._buffers
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values

    def select(self, rows: Sequence[int]) -> None:
        """Repeats, drops or reorders rows."""
        assert self.keys is not None
        assert self.values is not None
        length = self.keys.shape[-2]
        if self._buffers is None:
            index = torch.tensor(rows, dtype=torch.int64, device=self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        else:
            keys, values = (select_rows(buffer, rows, length) for buffer in self._buffers)
            self._buffers = keys, values
            self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def _moved(places: torch.Tensor, most: int) -> torch.Tensor:
    """(R, heads, L, width) at the beginning of (R, heads, most, width)."""
    rows, heads, length, width = places.shape
    buffer = places.new_empty(rows, heads, most, width)
    buffer[:, :, :length] = places
    return buffer
