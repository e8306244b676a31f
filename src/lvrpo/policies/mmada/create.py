"""A small MMaDA from random weights, with a tokenizer of its own, in the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator

from lvrpo.policies.byte_level import learn_tokenizer
from lvrpo.policies.magvit.autoencoder import Magvit
from lvrpo.policies.magvit.create import MagvitSizes
from lvrpo.policies.magvit.layout import TOKENIZER, TOKENIZER_CONFIG
from lvrpo.policies.mmada.checkpoint import MmadaConfig, empty_transformer
from lvrpo.policies.mmada.layout import MARKERS, TURN, MmadaLayout
from lvrpo.policies.mmada.policy import MmadaPolicy
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, THINK_THEN_DRAW

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
RESERVED = tuple(f"<|reserved_token_{i}|>" for i in range(len(MARKERS)))
"""The names of the markers in the tokenizer."""


class MmadaSizes(MagvitSizes):
    """Sizes of a random MMaDA; the defaults are for tests and first runs on a CPU."""

    key_heads: int = Field(default=4, ge=1, le=1000)
    positions: int = Field(default=512, ge=8, le=1_000_000)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"heads={self.heads}: a width of {self.width} must be a multiple of 2 x heads")
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads={self.key_heads}: heads={self.heads} must be a multiple of it")
        if self.positions < self.image_tokens + 16:
            raise ValueError(f"positions={self.positions}: an image takes {self.image_tokens + 16}: use more")
        return self


def create_mmada(sizes: MmadaSizes, texts: Sequence[str] = ()) -> MmadaPolicy:
    """A fresh policy; its tokenizer has bytes and the merges learned from ``texts``."""
    transformers = transformers_library("an MMaDA")
    special = [BOS, EOS, *RESERVED, MASK, *TURN]
    tokenizer = learn_tokenizer([*texts, THINK_THEN_DRAW, THINK_THEN_ANSWER], sizes.vocabulary_size, special)
    codes, vocabulary = 2**sizes.bits, tokenizer.get_vocab_size() + 2**sizes.bits
    stored = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["MMadaModelLM"],
        "attention_layer_norm": False,
        "block_type": "llama",
        "codebook_size": codes,
        "d_model": sizes.width,
        "embedding_size": vocabulary,
        "first_marker_id": tokenizer.token_to_id(RESERVED[0]),
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": tokenizer.token_to_id(MASK),
        "max_sequence_length": sizes.positions,
        "mlp_hidden_size": sizes.mlp_width,
        "model_type": "mmada",
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.key_heads,
        "n_layers": sizes.depth,
        "num_vq_tokens": sizes.image_tokens,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "vocab_size": vocabulary,
        "weight_tying": False,
    }
    place = Path("mmada-tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        shapes = empty_transformer(
            MmadaConfig(**{k: v for k, v in stored.items() if k in MmadaConfig.model_fields}), place
        )
        model, autoencoder = transformers.LlamaForCausalLM(shapes.config), Magvit(sizes.autoencoder)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "mask_token": MASK}
    files = {TOKENIZER: tokenizer.to_str().encode(), TOKENIZER_CONFIG: json_bytes(named)}
    layout = MmadaLayout.from_files(files, place, codes, stored["mask_token_id"], stored["first_marker_id"])
    return MmadaPolicy(model, autoencoder, layout, stored)
