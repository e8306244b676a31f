"""Sizes of a random model with MAGVIT-v2 beside it, and its autoencoder."""

from __future__ import annotations

import math

from pydantic import Field

from lvrpo.policies.byte_level import ImageSizes, ModelSizes
from lvrpo.policies.convolutions import GROUPS
from lvrpo.policies.magvit.autoencoder import MagvitConfig


class MagvitSizes(ImageSizes, ModelSizes):
    """Sizes of a random model with MAGVIT-v2 beside it."""

    bits: int = Field(default=6, ge=1, le=16)
    """Bits of an image token: there are 2 ** bits tokens."""

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
