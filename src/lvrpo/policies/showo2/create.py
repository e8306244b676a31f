"""A small Show-o2 from random weights, with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from lvrpo.policies.byte_level import LanguageSizes, learn_tokenizer
from lvrpo.policies.showo2.checkpoint import CLASS, TOKENS, Parts, token_ids
from lvrpo.policies.showo2.model import HEADS, Showo2Model, Showo2Sizes
from lvrpo.policies.showo2.policy import ASSISTANT, SYSTEM, USER, Showo2Policy
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER

STRIDE = 8
"""Pixels along a side of a latent value."""


class RandomShowo2(LanguageSizes):
    """Sizes of a random Show-o2."""

    width: int = Field(default=64, ge=8, multiple_of=8, le=65_536)
    mlp_width: int = Field(default=96, ge=1, le=1_000_000)
    vision_width: int = Field(default=32, ge=4, multiple_of=4, le=65_536)
    vision_depth: int = Field(default=2, ge=2, le=1000)
    """Layers of the vision encoder, of which the last is not used."""
    head_depth: int = Field(default=2, ge=1, le=1000)
    head_width: int = Field(default=2 * HEADS, ge=2 * HEADS, multiple_of=2 * HEADS, le=65_536)
    """Width of the flow head, whose layers have 32 heads."""
    image_size: int = Field(default=32, ge=16, le=4096)
    """Side of an image, a multiple of 16."""
    channels: int = Field(default=4, ge=1, le=1024)
    """Channels of a latent."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.image_size % (2 * STRIDE):
            raise ValueError(f"image_size={self.image_size}: must be a multiple of {2 * STRIDE}")
        return self


def create_showo2(sizes: RandomShowo2, texts: Sequence[str] = ()) -> Showo2Policy:
    """A fresh policy; its tokenizer has bytes and the merges learned from ``texts``."""
    from lvrpo.policies.diffusers_flow.checkpoint import diffusers_library

    transformers, diffusers = transformers_library("a Show-o2"), diffusers_library()
    side = sizes.image_size // (2 * STRIDE)
    llm = transformers.Qwen2Config(
        vocab_size=sizes.vocabulary_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=sizes.positions,
        initializer_range=sizes.width**-0.5,
        tie_word_embeddings=True,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=2 * sizes.vision_width,
        num_hidden_layers=sizes.vision_depth,
        num_attention_heads=2,
        image_size=side,
        patch_size=1,
    )
    files = {"llm/config.json": json_bytes(llm.to_dict()), "vision/config.json": json_bytes(vision.to_dict())}
    vision.num_hidden_layers -= 1
    vision._attn_implementation = llm._attn_implementation = "sdpa"
    config: dict[str, Any] = {
        "_class_name": CLASS,
        "hidden_size": sizes.width,
        "clip_latent_dim": sizes.vision_width,
        "patch_size": 2,
        "image_latent_dim": sizes.channels,
        "image_latent_height": side,
        "image_latent_width": side,
        "num_diffusion_layers": sizes.head_depth,
    }
    network = Showo2Sizes(
        sizes.vocabulary_size, sizes.width, sizes.vision_width, 2, sizes.channels, (side, side), sizes.head_depth,
        sizes.head_width, 2 * sizes.head_width,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = Showo2Model(network, llm, vision)
        vae = diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=sizes.channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.0] * sizes.channels, latents_std=[1.0] * sizes.channels,
        )  # fmt: skip
    tokenizer = learn_tokenizer([*texts, SYSTEM, USER, ASSISTANT, THINK_THEN_ANSWER], sizes.vocabulary_size, TOKENS)
    files["llm/tokenizer.json"] = tokenizer.to_str().encode()
    ids = token_ids(Path("showo2-tiny"), tokenizer, sizes.vocabulary_size)
    return Showo2Policy(model, Parts(config, tokenizer, ids, vae, files, None))
