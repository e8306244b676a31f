"""Images as single frames of an autoencoder of videos in diffusers: Wan 2.1's, and Qwen-Image's.

Letters: B images, C channels of a latent, h x w its size.
"""

from __future__ import annotations

from typing import Any

import torch


def encode_frames(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to normalized latents (B, C, h, w), the mode of the posterior.

    Any: of an optional package.
    """
    mean, std = _statistics(vae, pixels)
    return (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std


def decode_frames(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of ``encode_frames``. Any: as there."""
    mean, std = _statistics(vae, latents)
    return vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]


def _statistics(vae: Any, like: torch.Tensor) -> list[torch.Tensor]:
    """Mean and standard deviation of latents (C, 1, 1). Any: as above."""
    both = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None] for values in both]
