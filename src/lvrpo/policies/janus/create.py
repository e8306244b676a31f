"""A small Janus from random weights, with a tokenizer of its own, in the layout of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, processors

from lvrpo.policies.byte_level import ImageSizes, LanguageSizes, learn_tokenizer
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.janus.processor import TEMPLATE, TOKENS, Processor
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, THINK_THEN_DRAW

MARKERS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|begin_of_sentence|>",
    "eos_token": "<|end_of_sentence|>",
    **{name: token for name, token in TOKENS.items() if token is not None},
}
ROLES = ("<|User|>", "<|Assistant|>")
VQ_CHANNELS = 32
"""Channels of the autoencoder: the minimum for its group norms."""


class JanusSizes(ImageSizes, LanguageSizes):
    """Sizes of a random Janus."""

    vision_width: int = Field(default=32, ge=4, multiple_of=4, le=65_536)
    vision_depth: int = Field(default=2, ge=1, le=1000)
    vision_heads: int = Field(default=2, ge=1, le=1000)
    codes: int = Field(default=64, ge=2, le=1_000_000)
    """Different image tokens."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_heads={self.vision_heads}: a width of {self.vision_width} is not divided evenly: use another "
                "number"
            )
        return self


def create_janus(sizes: JanusSizes, texts: Sequence[str] = ()) -> JanusPolicy:
    """A fresh policy; its tokenizer has bytes and the merges learned from ``texts``."""
    transformers = transformers_library("a Janus")
    tokenizer = janus_tokenizer([*texts, THINK_THEN_DRAW, THINK_THEN_ANSWER], sizes.vocabulary_size)
    ids = {name: number for number, name in enumerate(MARKERS)}  # they come first
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = transformers.JanusForConditionalGeneration(janus_config(transformers, sizes, ids["image_token"]))
    model.generation_config = transformers.GenerationConfig(**_generation(ids))
    files, about = processor_files(tokenizer, sizes, ids), (sizes.image_tokens, sizes.image_size, sizes.vocabulary_size)
    return JanusPolicy(model, Processor.from_files(files, Path("janus-tiny"), *about))


def janus_config(transformers: Any, sizes: JanusSizes, image_token: int) -> Any:
    """The configuration of some sizes. Any: of an optional package."""
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    spread = sizes.width**-0.5  # weights that are seen in the logits: a prompt moves them, and so does an image
    levels = round(math.log2(sizes.patch_size)) + 1
    return transformers.JanusConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=sizes.vocabulary_size,
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp_width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_heads,
            max_position_embeddings=sizes.positions,
            initializer_range=spread,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=sizes.vision_width,
            num_hidden_layers=sizes.vision_depth,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            projection_dim=sizes.width,
            num_image_tokens=sizes.image_tokens,
            mlp_ratio=2.0,
            initializer_range=sizes.vision_width**-0.5,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=sizes.codes,
            latent_channels=VQ_CHANNELS,
            base_channels=VQ_CHANNELS,
            channel_multiplier=[1] * levels,
            num_res_blocks=1,
            projection_dim=sizes.width,
            image_token_embed_dim=sizes.width,
            initializer_range=spread,
        ),
        image_token_id=image_token,
        tie_word_embeddings=False,
    )


def janus_tokenizer(texts: Sequence[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level tokenizer with Janus's markers that can write any text."""
    tokenizer = learn_tokenizer([f" {text}" for text in texts], vocabulary_size, (*MARKERS.values(), *ROLES))
    begin = MARKERS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def processor_files(tokenizer: Tokenizer, sizes: JanusSizes, ids: dict[str, int]) -> dict[str, bytes]:
    """The files of tokenizer, processor and sampling, as transformers reads them."""
    side = sizes.image_size
    drawn = {name: MARKERS[name] for name in ("image_token", "boi_token", "eoi_token")}
    named = {
        **MARKERS,
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "add_bos_token": True,
        "extra_special_tokens": drawn,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sizes.positions,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    images = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "JanusImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json_bytes(named),
        "chat_template.jinja": TEMPLATE.encode(),
        "preprocessor_config.json": json_bytes(images),
        "processor_config.json": json_bytes(
            {
                "num_image_tokens": sizes.image_tokens,
                "processor_class": "JanusProcessor",
            }
        ),
        "generation_config.json": json_bytes(_generation(ids)),
    }


def _generation(ids: dict[str, int]) -> dict[str, Any]:
    """Any: what JSON may hold."""
    return {
        "bos_token_id": ids["bos_token"],
        "eos_token_id": ids["eos_token"],
        "pad_token_id": ids["pad_token"],
        "guidance_scale": 5,
        "generation_kwargs": {"boi_token_id": ids["boi_token"]},
    }
