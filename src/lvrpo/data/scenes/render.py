"""Scene -> picture, and cells -> pixels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch

from lvrpo.data.scenes.objects import CELL, COLOR, DEFAULT_SIZE, GROUND, Scene, digit_samples, shape_masks
from lvrpo.types import Image


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
    picture = np.empty((3, size, size), dtype=np.float32)
    picture[:] = np.asarray(GROUND[scene.ground], dtype=np.float32)[:, None, None]
    for o in scene.objects:
        top, left = o.row * CELL, o.col * CELL
        if not (0 <= top < size and 0 <= left < size):
            raise ValueError(f"{o} lies outside a picture of {size} pixels")
        picture[:, top : top + CELL, left : left + CELL] = _block(scene.ground, o.color, o.shape, o.sample)
    return torch.from_numpy(picture)


def cells_mask(cells: Iterable[tuple[int, int]], size: int = DEFAULT_SIZE) -> torch.Tensor:
    """The pixels of cells (row, col): bool (size, size)."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    for row, col in cells:
        mask[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL] = True
    return mask
