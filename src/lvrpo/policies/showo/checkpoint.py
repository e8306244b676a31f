"""The folder of a Show-o: its own files as published, and subfolders of its language model and autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.magvit.autoencoder import Magvit
from lvrpo.policies.magvit.checkpoint import (
    CONFIG,
    empty_causal_lm,
    find_part,
    load_autoencoder,
    load_weights,
    read_settings,
    require_square,
)
from lvrpo.policies.magvit.layout import TOKENIZER_FILES
from lvrpo.policies.showo.layout import MARKERS, ShowoLayout
from lvrpo.policies.tokenizer_files import stored_files
from lvrpo.reading import read_json_object

LANGUAGE = "phi-1_5"
"""Folder of the language model in that of a model."""
PREFIX = "showo."
"""Prefix of the transformer's tensors in a file."""


class ShowoConfig(Config):
    """The fields of a Show-o's config.json that are used."""

    vocab_size: int = Field(ge=1)
    llm_vocab_size: int = Field(ge=1)
    llm_model_path: str = Field(min_length=1)
    """The language model whose tokenizer and layers are used: a folder, or a Hub id."""
    codebook_size: int = Field(default=8192, ge=2)
    num_vq_tokens: int = Field(default=256, ge=1)
    w_clip_vit: bool = False

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.w_clip_vit:
            raise ValueError(
                "w_clip_vit=true: this one reads images through CLIP, which is not supported: use showlab/show-o or "
                "show-o-512x512"
            )
        if self.vocab_size != (needed := self.llm_vocab_size + len(MARKERS) + self.codebook_size + 1):
            raise ValueError(
                f"vocab_size={self.vocab_size}: text, {len(MARKERS)} markers, {self.codebook_size} image tokens and "
                f"the mask are {needed}: use the config.json of a Show-o"
            )
        require_square(self.num_vq_tokens)
        return self


def load_showo(folder: Path, dtype: torch.dtype, weights: bool) -> tuple[Any, Magvit, ShowoLayout, dict[str, Any]]:
    """See ``MagvitPolicy.load_parts``; docs/guides/showo.md says where its parts are looked for. Any: as there."""
    stored = read_json_object(folder / CONFIG)
    config = read_settings(ShowoConfig, stored, folder / CONFIG)
    language = find_part(folder, LANGUAGE, config.llm_model_path, "llm_model_path")
    magvit = load_autoencoder(folder, config.codebook_size, weights)
    files = stored_files(language, (*TOKENIZER_FILES, CONFIG))
    layout = ShowoLayout.from_files(files, language, config.llm_vocab_size, config.codebook_size)
    phi = read_json_object(language / CONFIG)
    if phi.get("model_type") != "phi":
        raise InputError(f"{language}: holds a model of type {phi.get('model_type')!r}, not 'phi': use that of Phi-1.5")
    model = empty_transformer(phi, config.vocab_size, language / CONFIG)
    names = {name: PREFIX + name for name in model.state_dict()}
    load_weights(folder, model, names, dtype, "a Show-o", weights)
    return model, magvit, layout, stored


def empty_transformer(phi: Mapping[str, Any], vocabulary: int, path: Path) -> Any:
    """A PhiForCausalLM with Show-o's layer norms of queries and keys, without storage. Any: of an optional package."""
    changed = {"vocab_size": vocabulary, "qk_layernorm": True, "tie_word_embeddings": False, "pad_token_id": None}
    return empty_causal_lm("Phi", {**phi, **changed}, path, "a Show-o")
