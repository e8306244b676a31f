"""Images as rows of patches, and back."""

from __future__ import annotations

import torch


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
