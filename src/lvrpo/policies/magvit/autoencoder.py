"""MAGVIT-v2 (arXiv:2310.05737): an autoencoder whose latent codes are the signs of its channels (lookup-free).

Letters: B images, C channels, H W sides, N = h w codes in raster order, Z bits of a code.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lvrpo.config import Config
from lvrpo.policies.convolutions import GROUPS, Decoder, Encoder


class MagvitConfig(Config):
    """Sizes of the autoencoder; the defaults are those of the published one, whose config.json names none."""

    ch: int = Field(default=128, ge=GROUPS, multiple_of=GROUPS, le=65_536)
    """Channels of the first level; those of a level are a multiple of it."""
    z_channels: int = Field(default=13, ge=1, le=24)
    """Bits of a code: there are 2 ** z_channels codes."""
    encoder_ch_mult: tuple[int, ...] = Field(default=(1, 2, 2, 4, 4), min_length=1)
    encoder_num_res_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_num_res_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        levels = len(self.encoder_ch_mult)
        for name in ("encoder_ch_mult", "encoder_num_res_blocks", "decoder_ch_mult", "decoder_num_res_blocks"):
            values: tuple[int, ...] = getattr(self, name)  # its fields, by name
            if len(values) != levels or min(values) < 1:
                raise ValueError(f"{name}={list(values)}: must have {levels} numbers >= 1, as encoder_ch_mult has")
        return self

    @property
    def patch_size(self) -> int:
        """Pixels along a side of one code."""
        return 2 ** (len(self.encoder_ch_mult) - 1)

    @property
    def codes(self) -> int:
        """Different codes."""
        return 2**self.z_channels


class _Encoder(Encoder):
    def __init__(self, config: MagvitConfig) -> None:
        widths = [config.ch * factor for factor in config.encoder_ch_mult]
        super().__init__(config.ch, widths, config.encoder_num_res_blocks, config.z_channels)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to latents (B, Z, h, w)."""
        return self.quant_conv(super().forward(x))


class _Decoder(Decoder):
    def __init__(self, config: MagvitConfig) -> None:
        widths = [config.ch * factor for factor in config.decoder_ch_mult]
        super().__init__(widths, config.decoder_num_res_blocks, config.z_channels)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, Z, h, w) to pixels (B, 3, H, W)."""
        return super().forward(self.post_quant_conv(z))


class Magvit(nn.Module):
    """Images to codes and back. The highest bit of a code is the sign of the first channel."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) to features (B, Z, h, w), which are quantized by their signs."""
        return self.encoder(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) to codes int64 (B, N)."""
        bits = (self.latents(pixels) > 0).flatten(2)  # (B, Z, N)
        return (bits.long() << self._places(bits)[:, None]).sum(dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) of a square image to pixels about [-1, 1] (B, 3, H, W)."""
        side = round(codes.shape[1] ** 0.5)
        bits = (codes[:, None] >> self._places(codes)[:, None]) & 1  # (B, Z, N)
        dtype = self.decoder.conv_in.weight.dtype
        return self.decoder((bits * 2 - 1).to(dtype).unflatten(2, (side, side)))

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.config.z_channels - 1, -1, -1, device=like.device)
