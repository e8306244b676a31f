"""The convolutional encoder and decoder that the autoencoders of BAGEL (FLUX.1's) and Show-o (MAGVIT-v2) share.

Modules have the published names. Letters: B images, C channels, H W sides, f the number of pixels per latent place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

GROUPS, EPS = 32, 1e-6
"""Groups of the group norms, and their epsilon."""


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, C, H / f, W / f): levels of residual blocks, halved between two."""

    def __init__(self, width: int, widths: Sequence[int], blocks: Sequence[int], channels: int) -> None:
        """``widths``, ``blocks``: of every level; ``width``: before the first; ``channels``: C."""
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (level, count) in enumerate(zip(widths, blocks, strict=True)):
            row = nn.ModuleList(ResBlock(width if j == 0 else level, level) for j in range(count))
            last = i == len(widths) - 1
            self.down.append(nn.ModuleDict({"block": row} | ({} if last else {"downsample": Downsample(level)})))
            width = level
        self.mid = _middle(width)
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down.children():
            x = _run_level(level, x)
        return self.conv_out(functional.silu(self.norm_out(_run_middle(self.mid, x))))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, h f, w f); levels are numbered from the full resolution down."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], channels: int) -> None:
        """As of ``Encoder``."""
        super().__init__()
        width = widths[-1]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.mid = _middle(width)
        levels: list[nn.Module] = []
        for i, (level, count) in reversed(list(enumerate(zip(widths, blocks, strict=True)))):
            row = nn.ModuleList(ResBlock(width if j == 0 else level, level) for j in range(count))
            levels.append(nn.ModuleDict({"block": row} | ({} if i == 0 else {"upsample": Upsample(level)})))
            width = level
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = _run_middle(self.mid, self.conv_in(z))
        for level in reversed(list(self.up.children())):
            x = _run_level(level, x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice; a 1 x 1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in, eps=EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)
        self.widens = width_in != width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.widens else x) + h


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves both sides; the padding is on the right and below alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbor, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(width: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"block_1": ResBlock(width, width), "attn_1": Attention(width), "block_2": ResBlock(width, width)}
    )


def _run_middle(middle: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    return middle["block_2"](middle["attn_1"](middle["block_1"](x)))


def _run_level(level: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The residual blocks of a level, then its change of resolution, if it has one."""
    for name, part in level.named_children():
        if name == "block":
            for block in part.children():
                x = block(x)
        else:
            x = part(x)
    return x
