"""Preallocated KV buffers, with room for the tokens to come: selection of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def select_rows(buffer: torch.Tensor, rows: Sequence[int], length: int) -> torch.Tensor:
    """Rows of (R, heads, places, width), whose first ``length`` places are in use, repeated, dropped or reordered.

    Where no row that moves comes from a place that stays in use, those rows are copied alone, in the same buffer.
    """
    moved = [(place, row) for place, row in enumerate(rows) if place != row]
    if len(rows) <= len(buffer) and all(row >= len(rows) for _, row in moved):
        for place, row in moved:
            buffer[place, :, :length] = buffer[row, :, :length]
        return buffer[: len(rows)]
    index = torch.tensor(rows, dtype=torch.int64, device=buffer.device)
    out = buffer.new_empty(len(rows), *buffer.shape[1:])
    out[:, :, :length] = buffer[:, :, :length].index_select(0, index)
    return out
