"""A cache of the latents of images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from lvrpo.types import Image

LATENT_CACHE_BYTES = 128 << 20
"""Images and latents that are kept."""


class LatentCache:
    """The latents of the images that were used last: a source image is a context of every pass of an update.

    Copies start empty, since the latents can be recomputed.
    """

    def __init__(self) -> None:
        self.found: OrderedDict[int, tuple[Image, Hashable, torch.Tensor]] = OrderedDict()

    def __deepcopy__(self, memo: object) -> LatentCache:
        return LatentCache()

    def get(self, image: Image, state: Hashable, encode: Callable[[Image], torch.Tensor]) -> torch.Tensor:
        """The latent of an image for weights in this ``state``; images are told apart by object."""
        known = self.found.get(id(image))
        if known is None or known[0] is not image or known[1] != state:
            known = image, state, encode(image)
            self.found[id(image)] = known
        self.found.move_to_end(id(image))
        while len(self.found) > 1 and sum(i.nbytes + z.nbytes for i, _, z in self.found.values()) > LATENT_CACHE_BYTES:
            self.found.popitem(last=False)
        return known[2]
