"""The folder of an MMaDA: LLaDA's weights under their published names, computed by the Llama of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.magvit.autoencoder import Magvit
from lvrpo.policies.magvit.checkpoint import (
    CONFIG,
    empty_causal_lm,
    load_autoencoder,
    load_weights,
    read_settings,
    require_square,
)
from lvrpo.policies.magvit.layout import TOKENIZER_FILES
from lvrpo.policies.mmada.layout import FIRST_MARKER, MmadaLayout
from lvrpo.policies.tokenizer_files import stored_files
from lvrpo.reading import read_json_object

WEIGHTS = "model.safetensors"
WHOLE = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
"""Modules of the Llama, and their names in LLaDA."""
BLOCK = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
"""Modules of a layer."""


class MmadaConfig(Config):
    """The fields of an MMaDA's config.json that are used."""

    d_model: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    """None: as many as n_heads."""
    mlp_hidden_size: int | None = Field(default=None, ge=1)
    """None: mlp_ratio * d_model."""
    mlp_ratio: int = Field(default=4, ge=1)
    max_sequence_length: int = Field(ge=1)
    rope_theta: float = Field(gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    vocab_size: int = Field(ge=1)
    embedding_size: int | None = Field(default=None, ge=1)
    """Rows of the embedding; None: vocab_size."""
    weight_tying: bool = False
    """Whether the head is the embedding."""
    mask_token_id: int = Field(ge=0)
    codebook_size: int = Field(default=8192, ge=2)
    num_vq_tokens: int = Field(default=1024, ge=1)
    first_marker_id: int = Field(default=FIRST_MARKER, ge=0)
    """The id of <|soi|>, which the other markers follow; in files of lvrpo alone."""
    block_type: Literal["llama"] = "llama"
    activation_type: Literal["silu"] = "silu"
    layer_norm_type: Literal["rms"] = "rms"
    rope: Literal[True] = True
    alibi: Literal[False] = False
    include_bias: Literal[False] = False
    include_qkv_bias: Literal[False] = False
    attention_layer_norm: Literal[False] = False
    input_emb_norm: Literal[False] = False
    scale_logits: Literal[False] = False

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads}: d_model={self.d_model} is not divided evenly: restore the file")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: n_heads={self.n_heads} must be a multiple of it")
        if self.mask_token_id >= self.vocabulary:
            raise ValueError(
                f"mask_token_id={self.mask_token_id}: the vocabulary has {self.vocabulary} tokens: restore the file"
            )
        require_square(self.num_vq_tokens)
        return self

    @property
    def vocabulary(self) -> int:
        return self.embedding_size or self.vocab_size


def load_mmada(folder: Path, dtype: torch.dtype, weights: bool) -> tuple[Any, Magvit, MmadaLayout, dict[str, Any]]:
    """See ``MagvitPolicy.load_parts``; docs/guides/mmada.md says where its autoencoder is looked for. Any: as there."""
    stored = read_json_object(folder / CONFIG)
    config = read_settings(MmadaConfig, stored, folder / CONFIG)
    magvit = load_autoencoder(folder, config.codebook_size, weights)
    files = stored_files(folder, TOKENIZER_FILES)
    layout = MmadaLayout.from_files(files, folder, config.codebook_size, config.mask_token_id, config.first_marker_id)
    if config.vocabulary < (needed := layout.first_code + layout.codes):
        raise InputError(
            f"{folder / CONFIG}: vocab_size={config.vocabulary}: {layout.first_code} text tokens and {layout.codes} "
            f"image tokens are {needed}: use the files of one MMaDA"
        )
    model = empty_transformer(config, folder / CONFIG)
    load_weights(folder, model, stored_names(model), dtype, "an MMaDA", weights)
    if config.weight_tying:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model, magvit, layout, stored | {"num_vq_tokens": config.num_vq_tokens}


def empty_transformer(config: MmadaConfig, path: Path) -> Any:
    """A LlamaForCausalLM of LLaDA's sizes, without storage. Any: of an optional package."""
    values = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_hidden_size or config.mlp_ratio * config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": 0.5 * config.d_model**-0.5,  # of random models: seen in the logits
        "tie_word_embeddings": config.weight_tying,
        "pad_token_id": None,
    }
    return empty_causal_lm("Llama", values, path, "an MMaDA")


def stored_name(name: str) -> str:
    """The name in LLaDA's files of a module or tensor of the Llama."""
    for own, theirs in WHOLE.items():
        if name == own or name.startswith(f"{own}."):
            return f"model.transformer.{theirs}{name.removeprefix(own)}"
    found = re.match(r"model\.layers\.(\d+)\.(\w+_proj|\w+\.\w+_proj|\w+layernorm)", name)
    assert found is not None, name
    return f"model.transformer.blocks.{found[1]}.{BLOCK[found[2]]}{name[found.end() :]}"


def stored_names(model: Any) -> dict[str, str]:
    """Names in the files by those of the model's tensors; a tied head is in no file. Any: of an optional package."""
    names = {name: stored_name(name) for name in model.state_dict()}
    if model.config.tie_word_embeddings:
        names.pop("lm_head.weight")
    return names
