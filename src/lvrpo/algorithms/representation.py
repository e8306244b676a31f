"""Representation alignment (REPA): hidden states of the generation side are aligned to a frozen image encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["repa_loss"]


def repa_loss(
    projected: Float[Tensor, "B N D"],
    features: Float[Tensor, "B N D"],
    mask: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, " B"]:
    """Aligns projected hidden states of a noisy image with a frozen encoder's features of the clean image (REPA,
    arXiv:2410.06940).

    loss = -mean_n cos(projected_n, features_n) over the (valid) tokens of an image.

    ``projected`` is h(hidden states) with a small trained head h, at the same N positions as ``features``, which get no
    gradient. Added to the flow-matching loss with a weight of about 0.5. The head must not be initialized to zero, as
    the cosine with a zero vector has no finite gradient.

    Shapes: projected and features (B, N, D), mask (B, N), to (B,), float32. Range: [-1, 1]; 0 for zero vectors and for
    an image without a valid token.
    Raises: nothing.
    Differs from the paper: no. The encoder may be the model's own frozen image encoder.
    """
    projected, features = projected.float(), features.detach().float()
    if mask is None:
        return -functional.cosine_similarity(projected, features, dim=-1).mean(dim=1)
    projected = torch.where(mask[..., None], projected, 0.0)
    features = torch.where(mask[..., None], features, 0.0)
    cosine = functional.cosine_similarity(projected, features, dim=-1)  # (B, N), 0 where masked
    return -cosine.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
