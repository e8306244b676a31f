"""A small BAGEL from random weights in the published layout, with an autoencoder and a tokenizer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional

from lvrpo.config import Config
from lvrpo.policies.bagel.config import BagelConfig, BagelSettings, first_problem
from lvrpo.policies.bagel.encoders import ResizeRule, VaeConfig, VitConfig
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.bagel.tokenizer import MARKERS, PADDING, BagelTokenizer, published_files, use_qwen_pretokenizer
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.types import Image

SMALL_VAE: dict[str, Any] = {"width": 32, "multipliers": (1, 1, 2, 1), "res_blocks": 1}
"""Defaults of ``vae``, instead of FLUX.1's."""


class BagelSizes(Config):
    """Sizes of a random BAGEL; the defaults learn on two CPU cores."""

    width: int = Field(default=256, ge=4, multiple_of=4, le=65_536)
    depth: int = Field(default=6, ge=1, le=1000)
    heads: int = Field(default=8, ge=1, le=1000)
    key_heads: int = Field(default=4, ge=1, le=1000)
    mlp_width: int = Field(default=512, ge=1, le=1_000_000)
    vocabulary_size: int = Field(default=1024, ge=512, le=1_000_000)
    vit_width: int = Field(default=128, ge=1, le=65_536)
    vit_depth: int = Field(default=3, ge=1, le=1000)
    vit_heads: int = Field(default=4, ge=1, le=1000)
    vit_mlp_width: int = Field(default=256, ge=1, le=1_000_000)
    patch_size: int = Field(default=14, ge=1, le=1024)
    read_side: int = Field(default=70, ge=1, le=8192)
    latent_side: int = Field(default=64, ge=1, le=1024)
    vae: VaeConfig = VaeConfig.model_validate(SMALL_VAE)
    image_size: int = Field(default=64, ge=16, le=8192)
    """Side of an image generated without a source image, and the longest side of any."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("vae", mode="before")
    @classmethod
    def _rest_is_small(cls, vae: object) -> object:
        return SMALL_VAE | vae if isinstance(vae, dict) else vae

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.vit_width % self.vit_heads:
            rule = "the width must be a multiple of the heads"
            raise ValueError(f"vit_width={self.vit_width}, vit_heads={self.vit_heads}: {rule}")
        token = 2 * self.vae.downsample
        for pixels, what in ((token, "a token of an image"), (self.patch_size, "a patch that is read")):
            if self.image_size < pixels:
                raise ValueError(
                    f"image_size={self.image_size}: {what} has {pixels} x {pixels} pixels: use a larger one"
                )
        for name, side, pixels in (
            ("latent_side", self.latent_side, token),
            ("read_side", self.read_side, self.patch_size),
        ):
            needed = self.image_size // pixels
            if side < needed:
                raise ValueError(
                    f"{name}={side}: an image of image_size={self.image_size} has {needed} x {needed} places: "
                    f"use {name} >= {needed}, or smaller images"
                )
        try:
            bagel_config(self)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None
        return self


def create_bagel(sizes: BagelSizes, texts: Sequence[str] = ()) -> BagelPolicy:
    """A fresh policy; its tokens are bytes and the merges that ``texts`` suggest.

    The two experts start alike, every layer as the identity, ``llm2vae`` at zero.
    """
    tokenizer = train_tokenizer(texts, sizes.vocabulary_size)
    config = bagel_config(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        policy = BagelPolicy(config, tokenizer)
    encoders = policy.encoders
    encoders.latent_position = position_table(config.latent_side, sizes.width).bfloat16().float()
    encoders.vit_position = position_table(config.vit.side, sizes.width).bfloat16().float()
    with torch.no_grad():
        for layer in policy.transformer.layers:
            layer.get_submodule("generation").load_state_dict(layer.get_submodule("understanding").state_dict())
        encoders.latent_out.weight.zero_()
        encoders.latent_out.bias.zero_()
        _normalize_image_features(policy, sizes)
    return policy


def _normalize_image_features(policy: BagelPolicy, sizes: BagelSizes) -> None:
    """Scales the image features of the vision encoder to standard deviation 1, its position table to 0.02.

    With torch's defaults an image moves its tokens by 0.08 where the places alone have deviation 0.5, and reading
    does not begin within thousands of steps.
    """
    encoders, side = policy.encoders, sizes.image_size // sizes.patch_size * sizes.patch_size
    generator = torch.Generator().manual_seed(sizes.seed)
    places = encoders.vit.embeddings["position_embedding"].weight
    assert isinstance(places, torch.Tensor)
    places.normal_(std=0.02, generator=generator)
    pixels = torch.rand(16, 3, side, side, generator=generator) * 2 - 1
    spread = encoders.read_embed(pixels).std(dim=0).mean()
    encoders.connector_out.weight /= spread


def bagel_config(sizes: BagelSizes) -> BagelConfig:
    """The whole configuration of some sizes."""
    pixels = 2 * sizes.vae.downsample
    longest = sizes.image_size // pixels * pixels
    return BagelConfig(
        transformer=MoTConfig(
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            key_heads=sizes.key_heads,
            mlp_width=sizes.mlp_width,
            mlp="swiglu",
            attention_bias=True,
            rope_theta=1e6,
        ),
        vit=VitConfig(
            width=sizes.vit_width,
            mlp_width=sizes.vit_mlp_width,
            heads=sizes.vit_heads,
            depth=sizes.vit_depth,
            patch_size=sizes.patch_size,
            side=sizes.read_side,
        ),
        vae=sizes.vae,
        vocabulary_size=sizes.vocabulary_size,
        latent_side=sizes.latent_side,
        settings=BagelSettings(
            latent_resize=ResizeRule(max_side=longest, min_side=max(pixels, longest // 2), stride=pixels),
            read_resize=ResizeRule(
                max_side=max(sizes.patch_size, sizes.image_size // sizes.patch_size * sizes.patch_size),
                min_side=sizes.patch_size,
                stride=sizes.patch_size,
            ),
            image_size=(longest, longest),
        ),
    )


def train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> BagelTokenizer:
    """A byte-level tokenizer with BAGEL's markers that can write any text."""
    tokenizer = Tokenizer(models.BPE())
    use_qwen_pretokenizer(tokenizer)
    special = [AddedToken(marker, special=True, normalized=False) for marker in (PADDING, *MARKERS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    return BagelTokenizer(tokenizer, vocabulary_size, published_files(tokenizer))


def position_table(side: int, width: int) -> torch.Tensor:
    """The sin-cos table of a square of places, float32 (side^2, width).

    The first half of a row encodes the column, the second the row; each is [sin(p w_k), cos(p w_k)] with
    w_k = 10000^(-k / (width / 4)).
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([table.repeat(side, 1), table.repeat_interleave(side, dim=0)], dim=1).float()


Observer = Callable[[int, float], None]
"""Called with the number of steps done and the loss."""
Images = Callable[[int, int], Sequence[Image]]
"""(first, count) -> images at the size of generated ones."""

BATCH = 8
POOL = 32
"""Images, at least, that a step takes its batch from: half of it as they are, half put together from their liveliest
tiles."""
IMAGES = 8192
"""Different images that are trained on, over and over: making them costs more than a step on a GPU."""
LEARNING_RATE = 2e-3
WARMUP = 20
LOG_VARIANCE = -8.0
"""Log variance of the posterior while the autoencoder is trained."""
SPREAD = 0.02
"""Final standard deviation of the posterior, and of the decoder's training noise, relative to that of the latents."""
MEASURED = 64
"""Images that are kept aside to measure on."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Reconstruction quality of the autoencoder."""

    psnr: float
    """In decibels, over held-out images."""
    largest: float
    """Mean over images of the largest error of a pixel, in [0, 1]."""
    before: torch.Tensor
    """float32 (B, 3, H, W) in [0, 1], on the CPU: the images ..."""
    after: torch.Tensor
    """... and what came back."""


def train_autoencoder(
    policy: BagelPolicy,
    images: Images,
    steps: int,
    observe: Observer = lambda step, loss: None,
    batch: int = BATCH,
) -> Reconstruction:
    """Trains the autoencoder of a policy on reconstruction, mean |difference| plus mean square, and scales its latents.

    Afterwards latents have mean 0 and deviation 1 over the measured images, which BAGEL's scale and shift say, and
    their posterior is narrow. Nothing else of the policy changes. The images of training are the first ``IMAGES``,
    those measured come after them.
    """
    vae = policy.encoders.latent_vae
    vae.requires_grad_(True)
    set_log_variance(policy, LOG_VARIANCE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    pool_size = max(POOL, 2 * batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * max(0.02, 1 - step / steps)
        generator = torch.Generator().manual_seed(step)
        pool = stacked(policy, images(step % (IMAGES // pool_size) * pool_size, pool_size))
        mixed = collages(pool, policy.pixels_per_token(), batch // 2, generator)
        # the turn of an image of the set to be shown whole comes in later passes over the set
        start = step // (IMAGES // pool_size) * (batch - len(mixed)) % pool_size
        pixels = torch.cat([pool.roll(-start, 0)[: batch - len(mixed)], mixed])
        mean, _ = vae.moments(pixels)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        spread = SPREAD * mean.detach().std()
        difference = vae.decoder(mean + spread * noise) - pixels
        loss = difference.abs().mean() + difference.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        observe(step + 1, float(loss.detach()))
    set_log_variance(policy, LOG_VARIANCE)
    vae.requires_grad_(False)
    vae.zero_grad(set_to_none=True)
    measured = stacked(policy, images(IMAGES, MEASURED))
    scale_latents(policy, measured)
    return measure(policy, measured)


def collages(pixels: torch.Tensor, tile: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Images (count, 3, H, W) of tiles sampled by their standard deviation: most of a scene is empty ground, which
    is learned at once and then teaches nothing."""
    b, c, h, w = pixels.shape
    rows, columns = h // tile, w // tile
    tiles = pixels.reshape(b, c, rows, tile, columns, tile).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, tile, tile)
    odds = tiles.flatten(1).std(dim=1) + 1e-3
    chosen = torch.multinomial(odds.cpu(), count * rows * columns, replacement=True, generator=generator)
    grid = tiles[chosen.to(tiles.device)].reshape(count, rows, columns, c, tile, tile)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(count, c, h, w)


@torch.no_grad()
def set_log_variance(policy: BagelPolicy, value: float) -> None:
    """The same for every image and every place."""
    vae = policy.encoders.latent_vae
    weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    assert bias is not None
    weight[vae.config.channels :] = 0
    bias[vae.config.channels :] = value


@torch.no_grad()
def scale_latents(policy: BagelPolicy, pixels: torch.Tensor) -> None:
    """Sets scale and shift so that the latents of these images have mean 0 and deviation 1."""
    vae, config = policy.encoders.latent_vae, policy.config
    mean, _ = vae.moments(pixels)
    spread = float(mean.std())
    chosen = config.vae.model_copy(update={"scale": 1 / spread, "shift": float(mean.mean())})
    set_log_variance(policy, 2 * math.log(SPREAD * spread))
    vae.config = chosen
    policy.config = policy.encoders.config = config.model_copy(update={"vae": chosen})


@torch.no_grad()
def measure(policy: BagelPolicy, pixels: torch.Tensor) -> Reconstruction:
    """Measures encoding and decoding, with a sample from the posterior."""
    vae = policy.encoders.latent_vae
    noise = torch.randn(vae.moments(pixels[:1])[0].shape[1:], generator=torch.Generator().manual_seed(0))
    back = vae.decode(vae.encode(pixels, noise.to(pixels).expand(len(pixels), -1, -1, -1))).clamp(-1, 1)
    error = (back - pixels) / 2
    psnr = -10 * functional.mse_loss(back / 2, pixels / 2).log10()
    largest = float(error.abs().flatten(1).amax(dim=1).mean())
    return Reconstruction(float(psnr), largest, pixels.cpu() / 2 + 0.5, back.cpu() / 2 + 0.5)


def stacked(policy: BagelPolicy, images: Sequence[Image]) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] as the autoencoder sees them."""
    resized = [policy.config.settings.latent_resize.apply(image) for image in images]
    return ((torch.stack(resized) - 0.5) / 0.5).to(policy.device)
