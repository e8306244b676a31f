"""The encoders and decoders of BAGEL: SigLIP-2 vision encoder, FLUX.1 autoencoder, embeddings and output heads.

Letters: B images, N tokens of one, D width of the transformer, Dv of the vision encoder, C channels of a latent token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
import torch
from PIL import Image as PilImage
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.images import to_uint8
from lvrpo.policies.convolutions import GROUPS, Decoder, Encoder
from lvrpo.policies.latent_cache import LatentCache
from lvrpo.policies.mot.model_runner import Grid
from lvrpo.policies.patches import patchify, unpatchify
from lvrpo.sampling import derive_seed, normal_noise
from lvrpo.types import Image

if TYPE_CHECKING:
    from lvrpo.policies.bagel.config import BagelConfig

TIME_WIDTH = 256
VAE_BYTES, VAE_BYTES_CPU = 1 << 30, 8 << 20
"""Largest activation of the autoencoder: more images go through in parts. On a CPU what fits into its caches: eight
images of 256 x 256 are decoded in half the time of one batch (docs/results/speed.md)."""

PosteriorNoise = Callable[[Image, tuple[int, int, int]], torch.Tensor]
"""(image at the size that is encoded, shape (z, h, w)) -> the standard normal draw of its posterior."""


def image_noise(image: Image, shape: tuple[int, int, int]) -> torch.Tensor:
    """A draw that is a function of the image alone, so that every policy and every replay sees one context."""
    digest = hashlib.blake2b(to_uint8(image).tobytes(), digest_size=16).hexdigest()
    return normal_noise([derive_seed("posterior", digest, *image.shape[1:])], shape)[0]


class BagelEncoders(nn.Module):
    """SigLIP-2 and its connector, FLUX's autoencoder, sin-cos position tables, Qwen's token embedding and lm_head."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width = config.transformer.width
        self.config = config
        self.channels = config.channels
        self.posterior_noise: PosteriorNoise = image_noise
        self._latents = LatentCache()
        self.embed_tokens_table = nn.Embedding(config.vocabulary_size, width)
        self.lm_head = nn.Linear(width, config.vocabulary_size, bias=False)
        self.vit = Vit(config.vit)
        self.connector_in = nn.Linear(config.vit.width, width)
        self.connector_out = nn.Linear(width, width)
        self.latent_vae = Vae(config.vae)
        self.latent_in = nn.Linear(config.channels, width)
        self.latent_out = nn.Linear(width, config.channels)
        self.time_in = nn.Linear(TIME_WIDTH, width)
        self.time_out = nn.Linear(width, width)
        # stored tables, rounded to bfloat16: computed anew they would move outputs by 1e-3
        self.register_buffer("vit_position", torch.empty(config.vit.side**2, width))
        self.register_buffer("latent_position", torch.empty(config.latent_side**2, width))
        half = TIME_WIDTH // 2
        exponents = torch.arange(half, dtype=torch.float32, device="cpu") / half
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents), persistent=False)
        self.vit_position: torch.Tensor
        self.latent_position: torch.Tensor
        self.frequencies: torch.Tensor

    # ---------------------------------------------------------------- text
    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens_table(ids)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    # ---------------------------------------------------------------- sizes
    def vision_grid(self, image: Image) -> Grid:
        height, width = image.shape[1:]
        settings, patch = self.config.settings, self.config.vit.patch_size
        width, height = settings.read_resize.size(*settings.latent_resize.size(width, height))
        return self._fitting((height // patch, width // patch), self.config.vit.side, patch, "read")

    def latent_grid(self, image: Image) -> Grid:
        height, width = image.shape[1:]
        width, height = self.config.settings.latent_resize.size(width, height)
        return self.output_grid(height, width)

    def output_grid(self, height: int, width: int) -> Grid:
        pixels = self.config.token_pixels
        return self._fitting((height // pixels, width // pixels), self.config.latent_side, pixels, "draw")

    def default_grid(self, image_size: tuple[int, int] | None) -> Grid:
        height, width = image_size or self.config.settings.image_size
        pixels = self.config.token_pixels
        if height % pixels or width % pixels or min(height, width) < pixels:
            nearest = " x ".join(str(max(1, round(side / pixels)) * pixels) for side in (width, height))
            raise InputError(f"an image of {width} x {height} pixels: use multiples of {pixels}, such as {nearest}")
        return self.output_grid(height, width)

    def _fitting(self, grid: Grid, side: int, pixels: int, does: str) -> Grid:
        """The grid, if at most ``side`` tokens long; ``pixels``: per side of a token. Raises InputError."""
        if max(grid) > side:
            height, width, most = grid[0] * pixels, grid[1] * pixels, side * pixels
            raise InputError(
                f"an image of {width} x {height} pixels: this model can {does} up to {most} x {most}: shrink it"
            )
        return grid

    # ---------------------------------------------------------------- understanding
    def read_pixels(self, image: Image) -> torch.Tensor:
        """Input of the vision encoder: (3, h, w) in [-1, 1]."""
        settings = self.config.settings
        return (settings.read_resize.apply(settings.latent_resize.apply(image)) - 0.5) / 0.5

    def encode_images(self, images: Sequence[Image]) -> torch.Tensor:
        return self.read_embed(torch.stack([self.read_pixels(image) for image in images]))

    def read_embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, h, w) -> (B, N, D)."""
        patch = self.config.vit.patch_size
        weight = self.connector_in.weight
        places = position_ids(pixels.shape[2] // patch, pixels.shape[3] // patch, self.config.vit.side)
        places = places.to(weight.device)
        features = self.vit(patchify(pixels, patch).to(weight), places)
        hidden = functional.gelu(self.connector_in(features), approximate="tanh")
        return self.connector_out(hidden) + self.vit_position[places]

    # ---------------------------------------------------------------- generation
    def encode_latents(self, images: Sequence[Image]) -> torch.Tensor:
        weight = self.latent_vae.encoder.conv_in.weight  # changes with the autoencoder, which is otherwise frozen
        state = id(weight), weight._version, weight.device, self.posterior_noise
        # one by one, so that the latent of an image has the same bits whatever it is encoded with
        return torch.stack([self._latents.get(image, state, self._encode_latent) for image in images])

    def _encode_latent(self, image: Image) -> torch.Tensor:
        resized = self.config.settings.latent_resize.apply(image)
        f = self.config.vae.downsample
        shape = (self.config.vae.channels, resized.shape[1] // f, resized.shape[2] // f)
        noise = self.posterior_noise(resized, shape)
        return self.encode_pixels((resized[None] - 0.5) / 0.5, noise[None])[0]

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] and posterior draws (B, z, h, w) -> latent tokens (B, N, C), float32."""
        device = self.latent_in.weight.device
        together = self._together(pixels.shape[-2:], device)
        with torch.autocast(device.type, enabled=False):
            parts = zip(pixels.to(device).split(together), noise.to(device).split(together), strict=True)
            z = torch.cat([self.latent_vae.encode(*part) for part in parts])
        return patchify(z, self.config.latent_patch)

    @torch.no_grad()
    def decode_pixels(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latent tokens (B, N, C) -> pixels (B, 3, H, W), about [-1, 1]."""
        z = unpatchify(latents.float(), self.config.latent_patch, *grid)
        f = self.config.vae.downsample
        together = self._together((z.shape[-2] * f, z.shape[-1] * f), z.device)
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([self.latent_vae.decode(part) for part in z.split(together)])

    def _together(self, size: Sequence[int], device: torch.device) -> int:
        """The number of images of (height, width) pixels that the autoencoder processes at once."""
        largest = self.config.vae.width * size[0] * size[1] * 4  # bytes of an activation at full resolution, float32
        return max(1, (VAE_BYTES_CPU if device.type == "cpu" else VAE_BYTES) // largest)

    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Images quantized to 8 bits, rounded down as published, so that rewards score what a file would hold."""
        pixels = (self.decode_pixels(latents, grid) * 0.5 + 0.5).clamp(0, 1) * 255
        return pixels.floor() / 255

    def embed_latents(self, latents: torch.Tensor, t: torch.Tensor, grid: Grid) -> torch.Tensor:
        weight = self.latent_in.weight
        angles = t.float()[:, None] * self.frequencies
        time = torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype)
        time = self.time_out(functional.silu(self.time_in(time)))
        places = position_ids(*grid, self.config.latent_side).to(weight.device)
        return self.latent_in(latents.to(weight.dtype)) + time[:, None] + self.latent_position[places]

    def velocity(self, hidden: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.latent_out(hidden).float()


class VitConfig(Config):
    """Sizes of the vision encoder."""

    width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    heads: int = Field(ge=1)
    depth: int = Field(ge=1)
    """Layers that are run: one fewer than in vit_config.json."""
    patch_size: int = Field(ge=1)
    side: int = Field(ge=1)
    """Rows and columns of the table of positions."""
    norm_eps: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width}, heads={self.heads}: the width must be a multiple of the heads")
        return self


class Vit(nn.Module):
    """Patches in, features out; without the last layer of the published SigLIP, but with its final norm."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(3 * config.patch_size**2, config.width),
                "position_embedding": nn.Embedding(config.side**2, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VitLayer(config) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Images of one grid: patches (B, N, 3 p^2) and their places (N,) in the table -> features (B, N, Dv)."""
        x = self.embeddings["patch_embedding"](patches) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.post_layernorm(x)


class VitLayer(nn.Module):
    """One layer; full attention within an image."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(config.width, config.width) for name in names})
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(config.width, config.mlp_width), "fc2": nn.Linear(config.mlp_width, config.width)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](attended)
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](functional.gelu(h, approximate="tanh"))


class VaeConfig(Config):
    """Sizes; those of FLUX.1 by default."""

    width: int = Field(default=128, ge=GROUPS, multiple_of=GROUPS)
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4, 4), min_length=1)
    """Width of each level, as a multiple of ``width``; between two levels the sides are halved."""
    res_blocks: int = Field(default=2, ge=1)
    """Per level of the encoder; the decoder has one more."""
    channels: int = Field(default=16, ge=1)
    """Channels of a latent."""
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
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.encoder = Encoder(config.width, widths, [config.res_blocks] * len(widths), 2 * config.channels)
        self.decoder = Decoder(widths, [config.res_blocks + 1] * len(widths), config.channels)
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


class ResizeRule(Config):
    """Limits of the size of an image; ``max_side`` takes precedence over ``min_side``."""

    max_side: int = Field(ge=1)
    min_side: int = Field(ge=1)
    stride: int = Field(ge=1)
    """Sides are multiples of it."""
    max_pixels: int = Field(default=1_806_336, ge=1)

    def size(self, width: int, height: int, images: int = 1) -> tuple[int, int]:
        """Width and height of an image among ``images`` that share the pixels.

        The longer side is brought down to ``max_side``, then the shorter one up to ``min_side``, both rounded (half to
        even) to the stride. An image of too many pixels is scaled again by the plain ratio of the pixels, not by its
        root, and one whose longer side is above ``max_side`` once more.
        """
        scale = max(min(self.max_side / max(width, height), 1.0), self.min_side / min(width, height))
        width, height = self._scaled(width, scale), self._scaled(height, scale)
        budget = self.max_pixels / images
        if width * height > budget:
            scale = budget / (width * height)
            width, height = self._scaled(width, scale), self._scaled(height, scale)
        if max(width, height) > self.max_side:
            scale = self.max_side / max(width, height)
            width, height = self._scaled(width, scale), self._scaled(height, scale)
        return width, height

    def apply(self, image: Image) -> Image:
        """The image at its size, in 8-bit steps, by bicubic resampling."""
        height, width = image.shape[1:]
        return resize_with_pil(image, *self.size(width, height))

    def _scaled(self, side: int, scale: float) -> int:
        return max(self.stride, int(round(round(side * scale) / self.stride) * self.stride))


def resize_with_pil(image: Image, width: int, height: int) -> Image:
    """The image in 8-bit steps at another size."""
    pixels = to_uint8(image)
    if pixels.shape[:2] != (height, width):
        resized = PilImage.fromarray(pixels).resize((width, height), PilImage.Resampling.BICUBIC)
        pixels = np.asarray(resized)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def position_ids(rows: int, columns: int, side: int) -> torch.Tensor:
    """int64 (rows * columns,): places in a table of side^2 entries, whatever the image's width."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()
