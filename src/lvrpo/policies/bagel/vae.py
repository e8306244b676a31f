"""The autoencoder of FLUX.1: pictures to latents and back, module names as published. It is never trained."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from lvrpo.config import Config

GROUPS, EPS = 32, 1e-6


class VaeConfig(Config):
    """Sizes; those of FLUX.1 by default."""

    width: int = Field(default=128, ge=GROUPS, multiple_of=GROUPS)
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4, 4), min_length=1)
    """Width of each level, as a multiple of ``width``; between two levels the sides are halved."""
    res_blocks: int = Field(default=2, ge=1)
    """Per level of the encoder; the decoder has one more."""
    channels: int = Field(default=16, ge=1)
    """Of a latent."""
    scale: float = Field(default=0.3611, gt=0)
    shift: float = 0.1159

    @property
    def downsample(self) -> int:
        """Pixels per latent pixel along a side."""
        return 2 ** (len(self.multipliers) - 1)


class Vae(nn.Module):
    """``encode`` and ``decode``, in float32."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.requires_grad_(False)

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> mean and log-variance of the posterior, (B, z, H / f, W / f) each."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A draw from the posterior, scaled: scale (mean + exp(log-variance / 2) noise - shift)."""
        mean, log_variance = self.moments(pixels)
        return self.config.scale * (mean + torch.exp(0.5 * log_variance) * noise - self.config.shift)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, z, h, w) -> pixels (B, 3, h f, w f), about [-1, 1]."""
        return self.decoder(z / self.config.scale + self.config.shift)


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.width
        for i, level in enumerate(widths):
            blocks = nn.ModuleList(ResBlock(width if j == 0 else level, level) for j in range(config.res_blocks))
            last = i == len(widths) - 1
            self.down.append(nn.ModuleDict({"block": blocks} | ({} if last else {"downsample": Downsample(level)})))
            width = level
        self.mid = _middle(width)
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down.children():
            x = _run_level(level, x)
        return self.conv_out(functional.silu(self.norm_out(_run_middle(self.mid, x))))


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.channels, width, 3, padding=1)
        self.mid = _middle(width)
        levels: list[nn.Module] = []
        for i, level in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList(ResBlock(width if j == 0 else level, level) for j in range(config.res_blocks + 1))
            levels.append(nn.ModuleDict({"block": blocks} | ({} if i == 0 else {"upsample": Upsample(level)})))
            width = level
        self.up = nn.ModuleList(reversed(levels))  # numbered from the full resolution down, run the other way
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
