"""Weights of small checkpoints that another project's code computed vectors on: they follow from names and shapes."""

from __future__ import annotations

import math
import zlib

import torch


def named_weight(name: str, shape: torch.Size, center: float) -> torch.Tensor:
    """A matrix of about unit gain; a vector around ``center``."""
    i = torch.arange(1, shape.numel() + 1, dtype=torch.float64)
    x = torch.sin(i * 12.9898 + zlib.crc32(name.encode()) % 1000) * 43758.5453
    u = x - x.floor() - 0.5
    values = u * 2 * math.sqrt(3 / (shape.numel() / shape[0])) if len(shape) > 1 else u * 0.4 + center
    return values.view(shape).float()
