"""Training the autoencoder of a small BAGEL: a random one has no latents worth drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.types import Image

Observer = Callable[[int, float], None]
"""Called with the number of steps done and the loss."""
Pictures = Callable[[int, int], Sequence[Image]]
"""(first, count) -> pictures at the size that is drawn."""

BATCH = 8
POOL = 32
"""Pictures, at least, that a step takes its batch from: half of it as they are, half put together from their liveliest
tiles."""
PICTURES = 8192
"""Different pictures that are trained on, over and over: making them costs more than a step on a card."""
LEARNING_RATE = 2e-3
WARMUP = 20
LOG_VARIANCE = -8.0
"""Of the posterior, while the autoencoder is trained."""
SPREAD = 0.02
"""Of the posterior in the end, and of the noise that the decoder is trained with, over the deviation of the latents."""
MEASURED = 64
"""Pictures that are kept aside to measure on."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """How much of a picture survives the autoencoder."""

    psnr: float
    """In decibels, of pictures that were not trained on."""
    largest: float
    """Mean over pictures of the largest error of a pixel, in [0, 1]."""
    before: torch.Tensor
    """float32 (B, 3, H, W) in [0, 1], on the CPU: the pictures ..."""
    after: torch.Tensor
    """... and what came back."""


def train_autoencoder(
    policy: BagelPolicy,
    pictures: Pictures,
    steps: int,
    observe: Observer = lambda step, loss: None,
    batch: int = BATCH,
) -> Reconstruction:
    """Trains the autoencoder of a policy on reconstruction, mean |difference| plus mean square, and scales its latents.

    Afterwards latents have mean 0 and deviation 1 over the measured pictures, which BAGEL's scale and shift say, and
    their posterior is narrow. Nothing else of the policy changes. The pictures of training are the first ``PICTURES``,
    those measured come after them.
    """
    vae = policy.towers.latent_vae
    vae.requires_grad_(True)
    set_log_variance(policy, LOG_VARIANCE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    pool_size = max(POOL, 2 * batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * max(0.02, 1 - step / steps)
        generator = torch.Generator().manual_seed(step)
        pool = stacked(policy, pictures(step % (PICTURES // pool_size) * pool_size, pool_size))
        mixed = collages(pool, policy.pixels_per_token(), batch // 2, generator)
        # the turn of a picture of the set to be shown whole comes in later passes over the set
        start = step // (PICTURES // pool_size) * (batch - len(mixed)) % pool_size
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
    measured = stacked(policy, pictures(PICTURES, MEASURED))
    scale_latents(policy, measured)
    return measure(policy, measured)


def collages(pixels: torch.Tensor, tile: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures (count, 3, H, W) of tiles drawn with the odds of their deviation: most of a scene is empty ground, which
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
    """The same for every picture and every place."""
    vae = policy.towers.latent_vae
    weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    assert bias is not None
    weight[vae.config.channels :] = 0
    bias[vae.config.channels :] = value


@torch.no_grad()
def scale_latents(policy: BagelPolicy, pixels: torch.Tensor) -> None:
    """Sets scale and shift so that the latents of these pictures have mean 0 and deviation 1."""
    vae, config = policy.towers.latent_vae, policy.config
    mean, _ = vae.moments(pixels)
    spread = float(mean.std())
    chosen = config.vae.model_copy(update={"scale": 1 / spread, "shift": float(mean.mean())})
    set_log_variance(policy, 2 * math.log(SPREAD * spread))
    vae.config = chosen
    policy.config = policy.towers.config = config.model_copy(update={"vae": chosen})


@torch.no_grad()
def measure(policy: BagelPolicy, pixels: torch.Tensor) -> Reconstruction:
    """There and back, a draw from the posterior included."""
    vae = policy.towers.latent_vae
    noise = torch.randn(vae.moments(pixels[:1])[0].shape[1:], generator=torch.Generator().manual_seed(0))
    back = vae.decode(vae.encode(pixels, noise.to(pixels).expand(len(pixels), -1, -1, -1))).clamp(-1, 1)
    error = (back - pixels) / 2
    psnr = -10 * functional.mse_loss(back / 2, pixels / 2).log10()
    largest = float(error.abs().flatten(1).amax(dim=1).mean())
    return Reconstruction(float(psnr), largest, pixels.cpu() / 2 + 0.5, back.cpu() / 2 + 0.5)


def stacked(policy: BagelPolicy, images: Sequence[Image]) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as the autoencoder sees them."""
    resized = [policy.config.settings.latent_resize.apply(image) for image in images]
    return ((torch.stack(resized) - 0.5) / 0.5).to(policy.device)
