"""Random models of published layouts: the sizes of a language model, and a byte-level tokenizer learned from texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lvrpo.config import Config


class ModelSizes(Config):
    """Sizes of a random model; the defaults are for tests and first runs on a CPU."""

    width: int = Field(default=64, ge=4, le=65_536)
    depth: int = Field(default=2, ge=1, le=1000)
    heads: int = Field(default=4, ge=1, le=1000)
    mlp_width: int = Field(default=128, ge=1, le=1_000_000)
    vocabulary_size: int = Field(default=512, ge=320, le=1_000_000)
    """Tokens of texts and markers at most."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class ImageSizes(Config):
    """Sizes of the square images of a random model, in pixels."""

    image_size: int = Field(default=32, ge=8, le=1024)
    """Side of an image that is read or drawn."""
    patch_size: int = Field(default=8, ge=2, le=64)
    """A power of two: pixels along a side of an image token, and of a patch that is read."""

    @model_validator(mode="after")
    def _images_fit(self) -> Self:
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size={self.patch_size}: must be a power of two: use 8 or 16")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}")
        return self

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class LanguageSizes(ModelSizes):
    """Sizes of a random language model whose heads share keys and values."""

    width: int = Field(default=64, ge=4, multiple_of=4, le=65_536)
    key_heads: int = Field(default=2, ge=1, le=1000)
    positions: int = Field(default=512, ge=64, le=1_000_000)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"heads={self.heads}: a width of {self.width} is not divided evenly: use another number")
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads={self.key_heads}: heads={self.heads} must be a multiple of it")
        return self


def learn_tokenizer(texts: Sequence[str], vocabulary_size: int, special: Sequence[str]) -> Tokenizer:
    """A tokenizer that can write any text; ``special`` tokens have the first ids, in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
