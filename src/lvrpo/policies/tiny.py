"""The built-in tiny policy: the Mixture-of-Transformers core with pixel patches and a small vocabulary.

About 1.8 million parameters: trains on two CPU cores in minutes, on the same code and sequence layout as BAGEL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from torch.nn import functional

from lvrpo.atomic_io import read_weights, write_atomic, write_tensors
from lvrpo.config import Config, parse_section
from lvrpo.errors import InputError
from lvrpo.policies.base import current_name
from lvrpo.policies.mot.model_runner import Grid
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.mot.transformer import Layer, MoT, MoTConfig
from lvrpo.policies.patches import patchify, unpatchify
from lvrpo.policies.tokenizer_files import parse_tokenizer
from lvrpo.reading import JSON_BYTES, read_bytes, read_json_object
from lvrpo.types import Image

SPECIAL_TOKENS = ("[pad]", "[bos]", "[eos]", "[image]", "[/image]", "[unk]")

IGNORED_PUNCTUATION = ".,;:!"
"""Punctuation that is dropped from texts."""
MAX_ENCODED = 65536
"""Maximum number of texts whose tokens a tokenizer remembers."""


class TinyConfig(Config):
    """Sizes of the tiny policy."""

    image_size: int = Field(default=32, ge=8, le=1024, multiple_of=8)
    """Side of the square images in pixels."""
    patch_size: int = Field(default=8, ge=2, le=1024)
    """Side of a patch in pixels."""
    transformer: MoTConfig = MoTConfig()
    tower_width: int = Field(default=256, ge=8, le=65_536)
    """Hidden width of the patch embeddings."""
    min_time: float = Field(default=0.1, gt=0, lt=1)
    """The flow loss, on the predicted clean image, is weighted by 1 / max(t, min_time)^2."""
    timestep_shift: float = Field(default=3.0, gt=0)
    """Times of the flow loss are shifted toward noise: a token of 192 numbers is recognisable at t = .8 already, so
    what is where is decided above."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size}: must divide image_size={self.image_size}")
        if self.transformer.width % 4:
            raise ValueError(f"transformer.width={self.transformer.width}: must be a multiple of 4")
        return self

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def channels(self) -> int:
        return 3 * self.patch_size**2


class TinyTokenizer:
    """A word-level tokenizer with a closed vocabulary."""

    pad_id, bos_id, eos_id, image_start_id, image_end_id, unknown_id = range(len(SPECIAL_TOKENS))

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab()
        self._encoded: dict[str, list[int]] = {}

    @classmethod
    def from_vocabulary(cls, vocabulary: Sequence[str]) -> Self:
        """A word-level tokenizer over the given words."""
        table = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *vocabulary))}
        tokenizer = Tokenizer(models.WordLevel(table, unk_token="[unk]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return cls(tokenizer)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids; an unknown word raises InputError, which names the nearest known one."""
        if text not in self._encoded:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ids = []
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                word = text[start:stop]
                if token == self.unknown_id and not word.strip(IGNORED_PUNCTUATION):
                    continue
                ids.append(token)
                if token == self.unknown_id:
                    words = set(self.vocabulary) - set(SPECIAL_TOKENS)
                    near = get_close_matches(word.lower(), words, n=1)
                    hint = f"did you mean '{near[0]}'?" if near else "use the words of `lvrpo data vocabulary`"
                    raise InputError(f"{word!r} in {text!r}: not among the {len(words)} words of this model: {hint}")
            if len(self._encoded) >= MAX_ENCODED:  # prompts are new ones in every step
                self._encoded.clear()
            self._encoded[text] = ids
        return self._encoded[text]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokenizer.id_to_token(int(i)) or "" for i in ids if i >= len(SPECIAL_TOKENS))

    def suppressed_tokens(self) -> torch.Tensor:
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[[self.pad_id, self.bos_id, self.image_start_id, self.image_end_id, self.unknown_id]] = True
        return mask

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / "tokenizer.json"
        return cls(parse_tokenizer(read_bytes(path, "restore the file", JSON_BYTES), path))


class TinyEncoders(nn.Module):
    """Pixel patches as tokens; the output head predicts the clean image x_0, from which the velocity follows."""

    def __init__(self, config: TinyConfig, vocabulary_size: int) -> None:
        super().__init__()
        width = config.transformer.width
        self.config = config
        self.channels = config.channels
        self.embed_tokens_table = nn.Embedding(vocabulary_size, width)
        self.lm_head = nn.Linear(width, vocabulary_size, bias=False)
        self.patch_in = nn.Linear(config.channels, config.tower_width)
        self.patch_out = nn.Linear(config.tower_width, width)
        self.patch_position = nn.Parameter(0.5 * _position_table(config.image_size // config.patch_size, width))
        self.latent_in = nn.Linear(config.channels, width)
        self.latent_out = nn.Linear(width, config.channels)
        # position embeddings at the scale of the noise at t = 1: copying a source is learned in hundreds of steps
        self.latent_position = nn.Parameter(_position_table(config.image_size // config.patch_size, width))
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)
        nn.init.normal_(self.embed_tokens_table.weight, std=0.5)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.zeros_(self.latent_out.weight)
        frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", 1000.0 * frequencies, persistent=False)
        self.frequencies: torch.Tensor

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens_table(ids)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def encode_images(self, images: Sequence[Image]) -> torch.Tensor:
        hidden = functional.relu(self.patch_in(self.encode_latents(images))).square()
        return self.patch_out(hidden) + self.patch_position

    def encode_latents(self, images: Sequence[Image]) -> torch.Tensor:
        size = self.config.image_size
        for image in images:
            if image.shape != (3, size, size):
                raise InputError(
                    f"image of shape {tuple(image.shape)}: this model reads (3, {size}, {size}): resize it"
                )
        pixels = torch.stack(list(images)).to(self.frequencies) * 2 - 1
        return patchify(pixels, self.config.patch_size)

    def vision_grid(self, image: Image) -> Grid:
        return self.default_grid(None)

    def latent_grid(self, image: Image) -> Grid:
        return self.default_grid(None)

    def output_grid(self, height: int, width: int) -> Grid:
        return self.default_grid((height, width))

    def default_grid(self, image_size: tuple[int, int] | None) -> Grid:
        size = self.config.image_size
        if image_size not in (None, (size, size)):
            raise InputError(f"image_size={image_size}: this model draws {size} x {size}: leave the size out")
        side = size // self.config.patch_size
        return side, side

    def decode_latents(self, latents: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        return (unpatchify(latents, self.config.patch_size, *self.default_grid(None)) / 2 + 0.5).clamp(0, 1)

    def embed_latents(self, latents: torch.Tensor, t: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        time = torch.cat([angles.cos(), angles.sin()], dim=-1)
        time = self.time_out(functional.silu(self.time_in(time)))
        return self.latent_in(latents) + time[:, None] + self.latent_position

    def velocity(self, hidden: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_0 = self.latent_out(hidden)
        return (x_t - x_0) / t[:, None, None]


class TinyPolicy(MoTPolicy):
    """The Mixture-of-Transformers core with the tiny encoders."""

    model_type = "lvrpo_tiny"

    def __init__(self, config: TinyConfig, tokenizer: TinyTokenizer) -> None:
        super().__init__(MoT(config.transformer), TinyEncoders(config, len(tokenizer)), tokenizer)
        self.config = config

    @classmethod
    def from_vocabulary(cls, config: TinyConfig, vocabulary: Sequence[str], seed: int = 0) -> Self:
        """A fresh random policy."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = cls(config, TinyTokenizer.from_vocabulary(vocabulary))
        for layer in policy.transformer.layers:
            assert isinstance(layer, Layer)
            # k_proj = q_proj: a noisy token attends to the source token at its own position from the start
            heads = layer.generation.q_proj.weight.data.unflatten(0, (config.transformer.heads, -1))
            shared = config.transformer.heads // config.transformer.key_heads
            layer.generation.k_proj.weight.data.copy_(heads[::shared].flatten(0, 1))
        return policy

    @property
    def image_size(self) -> int:
        """Side in pixels of input and output images."""
        return self.config.image_size

    def pixels_per_token(self) -> int:
        return self.config.patch_size

    def min_time(self) -> float:
        return self.config.min_time

    def timestep_shift(self) -> float:
        return self.config.timestep_shift

    def save_model(self, folder: Path) -> None:
        """Writes config.json, model.safetensors and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})
        config = {"model_type": self.model_type, **self.config.model_dump(mode="json")}
        write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        self.tokenizer.save(folder)

    @classmethod
    def stored_image_size(cls, folder: Path) -> int | None:
        """``image_size`` of a saved policy's config.json; None where it is missing."""
        try:
            side = read_json_object(folder / "config.json").get("image_size")
        except InputError:
            return None  # load raises the error
        return side if type(side) is int else None

    @classmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """See ``MoTPolicy.from_config``; the dtype is float32."""
        if dtype not in (None, torch.float32):
            raise InputError(f"dtype={str(dtype).removeprefix('torch.')}: {folder} computes in float32: leave it out")
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: holds no {name}: give a folder that lvrpo saved")
        config = read_json_object(folder / "config.json")
        found = config.pop("model_type", None)
        if found != cls.model_type:
            raise InputError(f"{folder}: holds a model of type {found!r}, not {cls.model_type!r}: give another folder")
        return cls(parse_section(TinyConfig, config, folder / "config.json"), TinyTokenizer.load(folder))

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads what ``save`` wrote; the dtype is float32."""
        policy = cls.from_config(folder, device, dtype)
        stored, _ = read_weights(folder / "model.safetensors", "restore the file")
        state = {current_name(policy, name): tensor for name, tensor in stored.items()}
        own = policy.state_dict()
        wrong = sorted(set(own) ^ set(state) | {k for k in set(own) & set(state) if own[k].shape != state[k].shape})
        if wrong:
            raise InputError(f"{folder}: weights do not fit config.json at {wrong[0]}: use the two files of one model")
        policy.load_state_dict(state)
        return policy.to(device)


def _position_table(side: int, width: int) -> torch.Tensor:
    """2-D sin-cos table (side^2, width): the first half of a row encodes the column, the second the row."""
    frequencies = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = table.repeat(side, 1)
    rows = table.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)
