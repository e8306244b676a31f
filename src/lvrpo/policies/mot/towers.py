"""What a Mixture-of-Transformers policy needs around its core: words, the reading tower, the drawing tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from lvrpo.types import Image

Grid = tuple[int, int]
"""Rows and columns of the tokens of a picture."""


class Words(Protocol):
    """The tokenizer with its four markers."""

    bos_id: int
    eos_id: int
    image_start_id: int
    image_end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids without markers; raises InputError on text that the vocabulary cannot express."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, markers skipped."""
        ...

    def forbidden(self) -> torch.Tensor:
        """bool (V,): tokens that are never written."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer files."""
        ...


class Towers(Protocol):
    """Everything between pixels, words and the transformer's width. D width, N image tokens, C channels of one.

    Pictures come in batches of one grid, so that none is ever padded.
    """

    channels: int
    """C, the numbers of a latent token."""

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (n,) -> (n, D)."""
        ...

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the reading expert (n, D) -> (n, V)."""
        ...

    def read_grid(self, image: Image) -> Grid:
        """The tokens of a picture for the reading expert."""
        ...

    def latent_grid(self, image: Image) -> Grid:
        """The tokens of a picture for the drawing expert, as a condition or as the source of what is drawn."""
        ...

    def drawn_grid(self, height: int, width: int) -> Grid:
        """The tokens of a picture that was drawn at this size."""
        ...

    def free_grid(self, image_size: tuple[int, int] | None) -> Grid:
        """The tokens of a picture drawn without a source; raises InputError for a size that does not fit."""
        ...

    def read_pictures(self, images: Sequence[Image]) -> torch.Tensor:
        """Pictures of one ``read_grid`` -> (B, N, D) tokens of the reading expert."""
        ...

    def encode_latents(self, images: Sequence[Image]) -> torch.Tensor:
        """Pictures of one ``latent_grid`` -> latents (B, N, C) in token layout."""
        ...

    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latents (B, N, C) -> pictures (B, 3, height, width) in [0, 1]."""
        ...

    def embed_latents(self, latents: torch.Tensor, t: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latents (B, N, C) at times (B,) -> (B, N, D) tokens of the drawing expert."""
        ...

    def velocity(self, hidden: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Hidden states of the drawing expert (B, N, D) at states (B, N, C), times (B,) -> velocity (B, N, C)."""
        ...
