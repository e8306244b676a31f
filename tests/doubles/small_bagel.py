"""The sizes of the small BAGEL of the tests."""

from __future__ import annotations

from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.policies.bagel.encoders import VaeConfig

SMALL = BagelSizes(
    width=32,
    depth=2,
    heads=4,
    key_heads=2,
    mlp_width=48,
    vocabulary_size=512,
    vit_width=16,
    vit_depth=2,
    vit_heads=2,
    vit_mlp_width=24,
    patch_size=4,
    read_side=9,
    latent_side=6,
    vae=VaeConfig(width=32, multipliers=(1, 2), res_blocks=1, channels=4),
    image_size=16,
)
