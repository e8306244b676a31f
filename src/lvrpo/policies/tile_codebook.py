"""An image tokenizer without a network: a token is the nearest of K tiles, found by k-means (vector quantization).

Of images that are made of tiles, as those of the built-in world, it loses less than a small convolutional
autoencoder, is learned in seconds, and costs nothing beside the transformer.

Letters: B images, N tiles of an image in raster order, K codes, p pixels along a side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from lvrpo.atomic_io import read_weights, write_tensors
from lvrpo.errors import InputError
from lvrpo.types import Image

FILE = "tile_codebook.safetensors"
"""In the folder of a model: its tokenizer, in place of the autoencoder."""
ROUNDS = 15
"""Iterations of k-means."""


class TileCodebook(nn.Module):
    """Codes of images by the nearest tile, and images of codes; never trained by gradients."""

    def __init__(self, tiles: torch.Tensor) -> None:
        """``tiles``: float32 (K, 3, p, p) in [0, 1]."""
        super().__init__()
        self.register_buffer("tiles", tiles, persistent=False)  # in a file of its own
        self.tiles: torch.Tensor

    @property
    def patch_size(self) -> int:
        """p."""
        return self.tiles.shape[-1]

    def encode(self, images: Sequence[Image]) -> torch.Tensor:
        """Codes int64 (B, N) of images of one size, whose sides are multiples of p, on the CPU."""
        cut = _cut(torch.stack(list(images)).to(self.tiles), self.patch_size)
        return self._nearest(cut.flatten(0, 1)).unflatten(0, cut.shape[:2]).cpu()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Square images (B, 3, H, W) in [0, 1] of codes (B, N), on the CPU."""
        side = round(codes.shape[1] ** 0.5)
        tiles = self.tiles[codes.to(self.tiles.device)].unflatten(1, (side, side))  # (B, h, w, 3, p, p)
        return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).cpu()

    def embeddings(self, width: int) -> torch.Tensor:
        """The principal components of the tiles, (K, width) with deviation 1: vectors to begin from."""
        flat = self.tiles.flatten(1) - self.tiles.flatten(1).mean(dim=0)
        components = torch.linalg.svd(flat, full_matrices=False).Vh[:width]
        found = functional.pad(flat @ components.T, (0, width - len(components)))
        return found / found.std()

    def _nearest(self, flat: torch.Tensor) -> torch.Tensor:
        table = self.tiles.flatten(1)
        return (table.square().sum(dim=1) - 2 * flat @ table.T).argmin(dim=1)

    @classmethod
    def learn(cls, images: Sequence[Image], codes: int, patch_size: int) -> Self:
        """K-means of the tiles of images of one size; it begins at the most frequent ones, in ties at random ones.

        Raises InputError where they have fewer than ``codes`` different tiles.
        """
        every = _cut(torch.stack(list(images)), patch_size).flatten(0, 1)
        different, counts = torch.unique(every, dim=0, return_counts=True)
        if len(different) < codes:
            raise InputError(f"codes={codes}: the images have {len(different)} different tiles: use fewer")
        chance = torch.randperm(len(different), generator=torch.Generator().manual_seed(0))
        different, counts = different[chance], counts[chance]
        weights, order = counts.to(every), counts.argsort(descending=True, stable=True)
        codebook = cls(different[order[:codes]].unflatten(1, (3, patch_size, patch_size)))
        for _ in range(ROUNDS):
            nearest = codebook._nearest(different)
            total = weights.new_zeros(codes).index_add_(0, nearest, weights)
            sums = torch.zeros_like(different[:codes]).index_add_(0, nearest, different * weights[:, None])
            means = torch.where(total[:, None] > 0, sums / total[:, None].clamp(min=1), codebook.tiles.flatten(1))
            codebook.tiles = means.view_as(codebook.tiles)
        return codebook

    def save(self, folder: Path) -> None:
        """Writes its file."""
        write_tensors(folder / FILE, {"tiles": self.tiles.cpu().contiguous()}, {"format": "pt"})

    @classmethod
    def load(cls, folder: Path, codes: int, patch_size: int) -> Self | None:
        """Reads the file of a folder; None where there is none. Raises InputError, one line, for another model's."""
        path = folder / FILE
        if not path.exists():
            return None
        found, _ = read_weights(path, "restore the file")
        shape = (codes, 3, patch_size, patch_size)
        tiles = found.get("tiles")
        if tiles is None or tuple(tiles.shape) != shape:
            held = "no tiles" if tiles is None else f"tiles of shape {list(tiles.shape)}"
            raise InputError(f"{path}: holds {held}, config.json says {list(shape)}: use the files of one model")
        return cls(tiles.float())


def _cut(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, N, 3 p p)."""
    rows, columns = (side // patch_size for side in images.shape[2:])
    tiles = images.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))  # (B, 3, h, p, w, p)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
