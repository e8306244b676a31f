"""Pictures as BAGEL sees them: the rule for sizes, bicubic resizing in 8 bits, patches and position ids."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image as PilImage
from pydantic import Field

from lvrpo.config import Config
from lvrpo.types import Image


class ResizeRule(Config):
    """How large a picture becomes; ``max_side`` wins over ``min_side``."""

    max_side: int = Field(ge=1)
    min_side: int = Field(ge=1)
    stride: int = Field(ge=1)
    """Sides are multiples of it."""
    max_pixels: int = Field(default=1_806_336, ge=1)

    def size(self, width: int, height: int, pictures: int = 1) -> tuple[int, int]:
        """Width and height of a picture among ``pictures`` that share the pixels.

        The longer side is brought down to ``max_side``, then the shorter one up to ``min_side``, both rounded (half to
        even) to the stride. A picture of too many pixels is scaled again by the plain ratio of the pixels, not by its
        root, and one whose longer side is above ``max_side`` once more.
        """
        scale = max(min(self.max_side / max(width, height), 1.0), self.min_side / min(width, height))
        width, height = self._scaled(width, scale), self._scaled(height, scale)
        budget = self.max_pixels / pictures
        if width * height > budget:
            scale = budget / (width * height)
            width, height = self._scaled(width, scale), self._scaled(height, scale)
        if max(width, height) > self.max_side:
            scale = self.max_side / max(width, height)
            width, height = self._scaled(width, scale), self._scaled(height, scale)
        return width, height

    def apply(self, image: Image) -> Image:
        """The picture at its size, in 8-bit steps, by bicubic resampling."""
        height, width = image.shape[1:]
        return resized(image, *self.size(width, height))

    def _scaled(self, side: int, scale: float) -> int:
        return max(self.stride, int(round(round(side * scale) / self.stride) * self.stride))


def to_uint8(image: Image) -> np.ndarray:
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3), rounded."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def resized(image: Image, width: int, height: int) -> Image:
    """The picture in 8-bit steps at another size."""
    pixels = to_uint8(image)
    if pixels.shape[:2] != (height, width):
        picture = PilImage.fromarray(pixels).resize((width, height), PilImage.Resampling.BICUBIC)
        pixels = np.asarray(picture)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, patch^2 * C): tokens row-major, inside a token row, column, channel."""
    b, c, h, w = images.shape
    p = patch
    tokens = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return tokens.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(tokens: torch.Tensor, patch: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of ``patchify`` for a grid of rows and columns."""
    p, c = patch, tokens.shape[2] // patch**2
    images = tokens.reshape(len(tokens), rows, columns, p, p, c).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(len(tokens), c, rows * p, columns * p)


def position_ids(rows: int, columns: int, side: int) -> torch.Tensor:
    """int64 (rows * columns,): places in a table of side^2 entries, whatever the picture's width."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()
