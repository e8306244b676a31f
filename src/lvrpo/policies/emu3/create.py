"""A small Emu3 from random weights, with a tokenizer of its own, in the layout of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import Field
from tokenizers import Tokenizer

from lvrpo.policies.byte_level import LanguageSizes, learn_tokenizer
from lvrpo.policies.emu3.policy import KIND, TEMPLATE, Emu3Policy
from lvrpo.policies.image_text_to_text import Chat
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, THINK_THEN_DRAW

NAMED = {
    "pad_token": "<|endoftext|>",
    "bos_token": "<|extra_203|>",
    "eos_token": "<|extra_204|>",
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
"""Markers of the published tokenizer, by the names that its processor has for them."""
LINE_END = "<|extra_200|>"
TOKEN_SIDE = 8
"""Pixels along a side of an image token: the processor knows no other."""
VQ_CHANNELS = 32
"""Channels of the autoencoder: the minimum for its group norms."""


class Emu3Sizes(LanguageSizes):
    """Sizes of a random Emu3; image tokens come to ``vocabulary_size``."""

    image_size: int = Field(default=32, ge=8, multiple_of=8, le=1024)
    """Side of the square outputs, and of the largest square image that is read whole."""
    codes: int = Field(default=64, ge=2, le=1_000_000)
    """Different image tokens."""


def create_emu3(sizes: Emu3Sizes, texts: Sequence[str] = ()) -> Emu3Policy:
    """A fresh policy; its tokenizer has bytes and the merges learned from ``texts``."""
    transformers = transformers_library(KIND)
    from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

    drawn = [f"<|visual token {code:06d}|>" for code in range(sizes.codes)]
    words = [f" {text}" for text in (*texts, THINK_THEN_DRAW, THINK_THEN_ANSWER)]
    tokenizer = learn_tokenizer(words, sizes.vocabulary_size + sizes.codes, (*NAMED.values(), LINE_END, *drawn))
    text = Emu3TextConfig(
        vocab_size=sizes.vocabulary_size + sizes.codes,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=sizes.positions,
        initializer_range=sizes.width**-0.5,  # weights that are seen in the logits: a prompt moves them
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    images = Emu3VQVAEConfig(
        codebook_size=sizes.codes,
        base_channels=VQ_CHANNELS,
        hidden_size=VQ_CHANNELS,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
    )
    config = transformers.Emu3Config(
        text_config=text, vq_config=images, vocabulary_map=tokenizer.get_vocab(), tie_word_embeddings=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = transformers.Emu3ForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with TemporaryDirectory() as folder:
        write_processor(tokenizer, sizes, Path(folder))
        chat = Chat.load(Path(folder))
    chat.folder = Path("emu3-tiny")
    return Emu3Policy(model, chat)


def write_processor(tokenizer: Tokenizer, sizes: Emu3Sizes, folder: Path) -> None:
    """Writes the files of tokenizer and processor, as transformers reads them."""
    further = {name: token for name, token in NAMED.items() if name not in ("pad_token", "bos_token", "eos_token")}
    named = {
        **NAMED,
        "extra_special_tokens": further,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sizes.positions,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    images = {
        "image_processor_type": "Emu3ImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "min_pixels": TOKEN_SIDE**2,
        "max_pixels": sizes.image_size**2,
        "spatial_factor": TOKEN_SIDE,
    }
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name, content in (
        ("tokenizer.json", tokenizer.to_str().encode()),
        ("tokenizer_config.json", json_bytes(named)),
        ("chat_template.jinja", TEMPLATE.encode()),
        ("preprocessor_config.json", json_bytes(images)),
        ("processor_config.json", json_bytes({"processor_class": "Emu3Processor"})),
        ("generation_config.json", json_bytes(generation)),
    ):
        (folder / name).write_bytes(content)
