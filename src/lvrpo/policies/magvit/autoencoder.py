"""MAGVIT-v2 (arXiv:2310.05737): an autoencoder whose latent codes are the signs of its channels (lookup-free).

Letters: B pictures, C channels, H W sides, N = h w codes in raster order, Z bits of a code.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from lvrpo.config import Config

GROUPS = 32
"""Groups of the group norms."""


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


def _conv(inner: int, outer: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, stride, padding=size // 2 if stride == 1 else 0)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class _Residual(nn.Module):
    """Two convolutions, each after a norm and SiLU, added to the input."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inner), _conv(inner, outer)
        self.norm2, self.conv2 = _norm(outer), _conv(outer, outer)
        self.nin_shortcut = _conv(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class _Attention(nn.Module):
    """One head over all places, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (_conv(channels, channels, 1) for _ in range(3))
        self.proj_out = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, HW, C)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = _Residual(channels, channels), _Attention(channels)
        self.block_2 = _Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Resample(nn.Module):
    """Half or twice the sides, then or thereby convolved."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = _conv(channels, channels, stride=1 if up else 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, inner: int, outer: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Residual(inner if i == 0 else outer, outer) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.encoder_ch_mult]
        self.conv_in = _conv(3, config.ch)
        self.down = nn.ModuleList()
        for i, blocks in enumerate(config.encoder_num_res_blocks):
            level = _Level(config.ch if i == 0 else widths[i - 1], widths[i], blocks)
            if i + 1 < len(widths):
                level.add_module("downsample", _Resample(widths[i], up=False))
            self.down.append(level)
        self.mid = _Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], config.z_channels)
        self.quant_conv = _conv(config.z_channels, config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to latents (B, Z, h, w)."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i + 1 < len(self.down):
                x = level.get_submodule("downsample")(x)
        return self.quant_conv(self.conv_out(functional.silu(self.norm_out(self.mid(x)))))


class _Decoder(nn.Module):
    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.decoder_ch_mult]
        self.post_quant_conv = _conv(config.z_channels, config.z_channels, 1)
        self.conv_in = _conv(config.z_channels, widths[-1])
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, blocks in enumerate(config.decoder_num_res_blocks):
            level = _Level(widths[min(i + 1, len(widths) - 1)], widths[i], blocks)
            if i > 0:
                level.add_module("upsample", _Resample(widths[i], up=True))
            self.up.append(level)
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, Z, h, w) to pixels (B, 3, H, W)."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            if i > 0:
                x = self.up[i].get_submodule("upsample")(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Magvit(nn.Module):
    """Pictures to codes and back. The highest bit of a code is the sign of the first channel."""

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
        """Codes (B, N) of a square picture to pixels about [-1, 1] (B, 3, H, W)."""
        side = round(codes.shape[1] ** 0.5)
        bits = (codes[:, None] >> self._places(codes)[:, None]) & 1  # (B, Z, N)
        dtype = self.decoder.conv_in.weight.dtype
        return self.decoder((bits * 2 - 1).to(dtype).unflatten(2, (side, side)))

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.config.z_channels - 1, -1, -1, device=like.device)
