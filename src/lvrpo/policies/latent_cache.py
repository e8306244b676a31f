"""A cache of the latents of images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lvrpo.types import Image

LATENT_CACHE_BYTES = 128 << 20
"""Latents that are kept."""


class LatentCache:
    """The latents of the images that were used last: a source image is a context of every pass of an update.

    It holds no image: a latent goes with its image. Copies start empty, since the latents can be recomputed.
    """

    def __init__(self) -> None:
        self.found: MutableMapping[Image, tuple[Hashable, torch.Tensor]] = WeakTensorKeyDictionary()
        """State and latent by image, the one that was used last at the end."""

    def __reduce__(self) -> tuple[type[LatentCache], tuple[()]]:
        return LatentCache, ()

    def get(self, image: Image, state: Hashable, encode: Callable[[Image], torch.Tensor]) -> torch.Tensor:
        """The latent of an image for weights in this ``state``; images are told apart by object."""
        known = self.found.pop(image, None)
        if known is None or known[0] != state:
            known = state, encode(image)
        self.found[image] = known
        while len(self.found) > 1 and sum(latent.nbytes for _, latent in self.found.values()) > LATENT_CACHE_BYTES:
            del self.found[next(iter(self.found))]
        return known[1]
