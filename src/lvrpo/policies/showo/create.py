"""A small Show-o from random weights, with a tokenizer of its own, in the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from lvrpo.policies.byte_level import learn_tokenizer
from lvrpo.policies.magvit.autoencoder import Magvit
from lvrpo.policies.magvit.checkpoint import CONFIG
from lvrpo.policies.magvit.create import MagvitSizes
from lvrpo.policies.showo.checkpoint import LANGUAGE, empty_transformer
from lvrpo.policies.showo.layout import HEAD, MARKERS, ShowoLayout
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, THINK_THEN_DRAW

END = "<|endoftext|>"


class ShowoSizes(MagvitSizes):
    """Sizes of a random Show-o; the defaults are for tests and first runs on a CPU."""

    positions: int = Field(default=512, ge=HEAD + 3, le=1_000_000)
    hidden_act: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    """Activation: that of Phi, or the same function by one operator instead of eight."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.width % (4 * self.heads):
            raise ValueError(f"heads={self.heads}: a width of {self.width} must be a multiple of 4 x heads")
        if self.positions < HEAD + self.image_tokens + 2:
            raise ValueError(f"positions={self.positions}: an image takes {HEAD + self.image_tokens + 2}: use more")
        return self


def create_showo(sizes: ShowoSizes, texts: Sequence[str] = ()) -> ShowoPolicy:
    """A fresh policy; its tokenizer has bytes and the merges learned from ``texts``."""
    transformers = transformers_library("a Show-o")
    words = [f" {text}" for text in (*texts, THINK_THEN_DRAW, THINK_THEN_ANSWER)]
    tokenizer = learn_tokenizer(words, sizes.vocabulary_size, [END])
    text_size, codes = tokenizer.get_vocab_size(), 2**sizes.bits
    vocabulary = text_size + len(MARKERS) + codes + 1
    phi = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_width,
        "hidden_act": sizes.hidden_act,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.positions,
        "initializer_range": sizes.width**-0.5,  # weights that are seen in the logits: a prompt moves them
        "bos_token_id": tokenizer.token_to_id(END),
        "eos_token_id": tokenizer.token_to_id(END),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        shapes = empty_transformer(phi, vocabulary, Path("showo-tiny"))
        model, autoencoder = transformers.PhiForCausalLM(shapes.config), Magvit(sizes.autoencoder)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "unk_token": END}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json_bytes(named),
        CONFIG: json_bytes(phi),
    }
    stored = {
        "_class_name": "Showo",
        "codebook_size": codes,
        "llm_model_path": LANGUAGE,
        "llm_vocab_size": text_size,
        "load_from_showo": True,
        "mask_token_id": vocabulary - 1,
        "num_vq_tokens": sizes.image_tokens,
        "vocab_size": vocabulary,
        "w_clip_vit": False,
    }
    layout = ShowoLayout.from_files(files, Path("showo-tiny"), text_size, codes)
    return ShowoPolicy(model, autoencoder, layout, stored)
