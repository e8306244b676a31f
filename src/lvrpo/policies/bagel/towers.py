"""Everything between pixels, words and the transformer's width in BAGEL.

Letters: B pictures, N tokens of one, D width of the transformer, Dv of the reading tower, C numbers of a latent token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from lvrpo.errors import InputError
from lvrpo.policies.bagel.config import BagelConfig
from lvrpo.policies.bagel.images import patchify, position_ids, to_uint8, unpatchify
from lvrpo.policies.bagel.vae import Vae
from lvrpo.policies.bagel.vit import Vit
from lvrpo.policies.mot.towers import Grid
from lvrpo.sampling import derive_seed, normal_noise
from lvrpo.types import Image

TIME_WIDTH = 256

PosteriorNoise = Callable[[Image, tuple[int, int, int]], torch.Tensor]
"""(picture at the size that is encoded, shape (z, h, w)) -> the standard normal draw of its posterior."""


def picture_noise(image: Image, shape: tuple[int, int, int]) -> torch.Tensor:
    """A draw that is a function of the picture alone, so that every policy and every replay sees one context."""
    digest = hashlib.blake2b(to_uint8(image).tobytes(), digest_size=16).hexdigest()
    return normal_noise([derive_seed("posterior", digest, *image.shape[1:])], shape)[0]


class BagelTowers(nn.Module):
    """SigLIP-2 and connector for reading, FLUX's autoencoder for drawing, sin-cos tables of places, Qwen's words."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width = config.transformer.width
        self.config = config
        self.channels = config.channels
        self.posterior_noise: PosteriorNoise = picture_noise
        self.embed_tokens_table = nn.Embedding(config.vocabulary_size, width)
        self.lm_head = nn.Linear(width, config.vocabulary_size, bias=False)
        self.read_vit = Vit(config.vit)
        self.read_connector_in = nn.Linear(config.vit.width, width)
        self.read_connector_out = nn.Linear(width, width)
        self.latent_vae = Vae(config.vae)
        self.latent_in = nn.Linear(config.channels, width)
        self.latent_out = nn.Linear(width, config.channels)
        self.time_in = nn.Linear(TIME_WIDTH, width)
        self.time_out = nn.Linear(width, width)
        # stored tables, rounded to bfloat16: computed anew they would move outputs by 1e-3
        self.register_buffer("read_position", torch.empty(config.vit.side**2, width))
        self.register_buffer("latent_position", torch.empty(config.latent_side**2, width))
        half = TIME_WIDTH // 2
        exponents = torch.arange(half, dtype=torch.float32, device="cpu") / half
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents), persistent=False)
        self.read_position: torch.Tensor
        self.latent_position: torch.Tensor
        self.frequencies: torch.Tensor

    # ---------------------------------------------------------------- words
    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens_table(ids)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    # ---------------------------------------------------------------- sizes
    def read_grid(self, image: Image) -> Grid:
        height, width = image.shape[1:]
        settings, patch = self.config.settings, self.config.vit.patch_size
        width, height = settings.read_resize.size(*settings.latent_resize.size(width, height))
        return self._fitting((height // patch, width // patch), self.config.vit.side, patch, "read")

    def latent_grid(self, image: Image) -> Grid:
        height, width = image.shape[1:]
        width, height = self.config.settings.latent_resize.size(width, height)
        return self.drawn_grid(height, width)

    def drawn_grid(self, height: int, width: int) -> Grid:
        pixels = self.config.token_pixels
        return self._fitting((height // pixels, width // pixels), self.config.latent_side, pixels, "draw")

    def free_grid(self, image_size: tuple[int, int] | None) -> Grid:
        height, width = image_size or self.config.settings.image_size
        pixels = self.config.token_pixels
        if height % pixels or width % pixels or min(height, width) < pixels:
            nearest = " x ".join(str(max(1, round(side / pixels)) * pixels) for side in (width, height))
            raise InputError(f"a picture of {width} x {height} pixels: use multiples of {pixels}, such as {nearest}")
        return self.drawn_grid(height, width)

    def _fitting(self, grid: Grid, side: int, pixels: int, does: str) -> Grid:
        """The grid, of tokens of so many pixels along a side."""
        if max(grid) > side:
            height, width, most = grid[0] * pixels, grid[1] * pixels, side * pixels
            raise InputError(
                f"a picture of {width} x {height} pixels: this model can {does} up to {most} x {most}: shrink it"
            )
        return grid

    # ---------------------------------------------------------------- reading
    def read_pixels(self, image: Image) -> torch.Tensor:
        """What the reading tower sees of a picture: (3, h, w) in [-1, 1]."""
        settings = self.config.settings
        return (settings.read_resize.apply(settings.latent_resize.apply(image)) - 0.5) / 0.5

    def read_pictures(self, images: Sequence[Image]) -> torch.Tensor:
        return self.read_embed(torch.stack([self.read_pixels(image) for image in images]))

    def read_embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, h, w) -> (B, N, D)."""
        patch = self.config.vit.patch_size
        weight = self.read_connector_in.weight
        places = position_ids(pixels.shape[2] // patch, pixels.shape[3] // patch, self.config.vit.side)
        places = places.to(weight.device)
        features = self.read_vit(patchify(pixels, patch).to(weight), places)
        hidden = functional.gelu(self.read_connector_in(features), approximate="tanh")
        return self.read_connector_out(hidden) + self.read_position[places]

    # ---------------------------------------------------------------- drawing
    def encode_latents(self, images: Sequence[Image]) -> torch.Tensor:
        resized = [self.config.settings.latent_resize.apply(image) for image in images]
        height, width = resized[0].shape[1:]
        f = self.config.vae.downsample
        shape = (self.config.vae.channels, height // f, width // f)
        noise = torch.stack([self.posterior_noise(image, shape) for image in resized])
        return self.encode_pixels((torch.stack(resized) - 0.5) / 0.5, noise)

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] and posterior draws (B, z, h, w) -> latent tokens (B, N, C), float32."""
        device = self.latent_in.weight.device
        with torch.autocast(device.type, enabled=False):
            z = self.latent_vae.encode(pixels.to(device), noise.to(device))
        return patchify(z, self.config.latent_patch)

    @torch.no_grad()
    def decode_pixels(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latent tokens (B, N, C) -> pixels (B, 3, H, W), about [-1, 1]."""
        z = unpatchify(latents.float(), self.config.latent_patch, *grid)
        with torch.autocast(z.device.type, enabled=False):
            return self.latent_vae.decode(z)

    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Pictures in 8-bit steps, rounded down as published: what is judged is what a file would hold."""
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
