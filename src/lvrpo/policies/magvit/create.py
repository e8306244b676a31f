"""Sizes of a random model with MAGVIT-v2 beside it, and its autoencoder."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.policies.convolutions import GROUPS
from lvrpo.policies.magvit.autoencoder import MagvitConfig


class MagvitSizes(Config):
    """Sizes of a random model; the defaults are for tests and first runs on a CPU."""

    width: int = Field(default=64, ge=4, le=65_536)
    depth: int = Field(default=2, ge=1, le=1000)
    heads: int = Field(default=4, ge=1, le=1000)
    mlp_width: int = Field(default=128, ge=1, le=1_000_000)
    vocabulary_size: int = Field(default=512, ge=320, le=1_000_000)
    """Text tokens at most."""
    image_size: int = Field(default=32, ge=8, le=1024)
    """Side of a picture that is read or drawn."""
    patch_size: int = Field(default=8, ge=2, le=64)
    """A power of two: pixels along a side of an image token."""
    bits: int = Field(default=6, ge=1, le=16)
    """Bits of an image token: there are 2 ** bits tokens."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _pictures_fit(self) -> Self:
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size={self.patch_size}: must be a power of two: use 8 or 16")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}")
        return self

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def autoencoder(self) -> MagvitConfig:
        """One residual block of the fewest channels per level."""
        once = (1,) * (round(math.log2(self.patch_size)) + 1)
        return MagvitConfig(
            ch=GROUPS,
            z_channels=self.bits,
            encoder_ch_mult=once,
            encoder_num_res_blocks=once,
            decoder_ch_mult=once,
            decoder_num_res_blocks=once,
        )
