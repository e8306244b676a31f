"""Rows of text, markers and image tokens in one vocabulary, and which places of a row see one another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from lvrpo.errors import InputError
from lvrpo.policies.janus.processor import resize_in_8_bits
from lvrpo.policies.tokenizer_files import StoredFiles, parse_tokenizer
from lvrpo.reading import parse_json
from lvrpo.types import Image

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
"""Files of a tokenizer, saved unchanged."""


@dataclass(frozen=True, eq=False)
class TokenLayout(StoredFiles, ABC):
    """Tokenizer and vocabulary of a model; never changed after it is made."""

    tokenizer: Tokenizer
    text_size: int
    """Text tokens, which come first."""
    codes: int
    """Different image tokens."""
    end: int
    """The token after a text."""
    files: Mapping[str, bytes]

    # --- what a model says ---

    @abstractmethod
    def marker(self, name: str) -> int:
        """The id of a marker, such as <|soi|>."""

    @property
    @abstractmethod
    def first_code(self) -> int:
        """The id of image token 0."""

    @property
    @abstractmethod
    def mask(self) -> int:
        """The id of a masked token."""

    @property
    @abstractmethod
    def start(self) -> int:
        """The token before a text."""

    @property
    @abstractmethod
    def forbidden(self) -> Sequence[str]:
        """What a text may not hold."""

    @abstractmethod
    def question(self, codes: torch.Tensor | None, text: str) -> list[int]:
        """The row that an answer follows: an image that is read, if any, and what a user says."""

    @abstractmethod
    def caption(self, text: Sequence[int]) -> list[int]:
        """The row before the image tokens of an image; an empty text is the unconditional branch of guidance."""

    @abstractmethod
    def padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> RowBatch:
        """Rows in one batch, padded on the right or the left."""

    def text_tokens(self, vocabulary: int) -> torch.Tensor:
        """bool (vocabulary,): the tokens that a text may contain."""
        return torch.arange(vocabulary) < self.text_size

    # --- rows ---

    def encode(self, text: str) -> list[int]:
        """Ids of a text; raises InputError where it holds a marker of the model."""
        self.check_text(text)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """A sampled text, without its end and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        for name in self.forbidden:
            if name and name in text:
                raise InputError(f"{text[:40]!r}: holds {name}, a marker of the model: leave it out")

    def read(self, codes: torch.Tensor | None) -> list[int]:
        """An image that is read, at the beginning of a row."""
        if codes is None:
            return []
        image = (codes + self.first_code).tolist()
        return [self.marker("<|mmu|>"), self.marker("<|soi|>"), *image, self.marker("<|eoi|>")]

    def drawing(self, caption: Sequence[int], codes: Sequence[int]) -> list[int]:
        """A caption with its image tokens; -1 is a masked one."""
        image = [self.mask if code < 0 else code + self.first_code for code in codes]
        return [*caption, self.marker("<|soi|>"), *image, self.marker("<|eoi|>")]


@dataclass(frozen=True)
class RowBatch:
    """A batch of rows. Letters: R rows, L places."""

    ids: torch.Tensor
    """int64 (R, L)."""
    places: torch.Tensor
    """int64 (R, L): for the position embedding."""
    seen: torch.Tensor
    """bool (R, L, L): which keys a place sees."""
    valid: torch.Tensor
    """bool (R, L): False on padding."""


def filled(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 (R, L) of rows that are padded on the right or the left, and where they are not padding (R, L)."""
    most = max(map(len, rows))
    ids, valid = torch.full((len(rows), most), pad), torch.zeros(len(rows), most, dtype=torch.bool)
    for i, row in enumerate(rows):
        first = most - len(row) if left else 0
        ids[i, first : first + len(row)] = torch.tensor(row)
        valid[i, first : first + len(row)] = True
    return ids, valid


def read_tokenizer(files: Mapping[str, bytes], folder: Path, owner: str) -> Tokenizer:
    """The tokenizer of a folder's files; raises InputError, one line. ``owner``: whose folder has it."""
    if TOKENIZER not in files:
        raise InputError(f"{folder}: holds no {TOKENIZER}: copy it from the folder of {owner}")
    return parse_tokenizer(files[TOKENIZER], folder / TOKENIZER)


def special_token(
    tokenizer: Tokenizer, files: Mapping[str, bytes], folder: Path, field: str, default: str, owner: str
) -> int:
    """The id of a special token: the one that a field of tokenizer_config.json names, or ``default``."""
    name = default
    if TOKENIZER_CONFIG in files:
        found = parse_json(files[TOKENIZER_CONFIG], str(folder / TOKENIZER_CONFIG))
        stored = found.get(field) if isinstance(found, dict) else None
        stored = stored.get("content") if isinstance(stored, dict) else stored
        name = stored if isinstance(stored, str) else name
    token = tokenizer.token_to_id(name)
    if token is None:
        raise InputError(f"{folder / TOKENIZER}: has no {name}: use the tokenizer of {owner}")
    return token


def square(image: Image, side: int) -> torch.Tensor:
    """An image of any size to pixels in [-1, 1] (3, side, side): its shorter side is fitted, its center is kept."""
    image = image.float()
    height, width = image.shape[1:]
    if (height, width) != (side, side):
        short = min(height, width)
        tall, wide = (int(side * length / short) for length in (height, width))
        image = resize_in_8_bits(image, tall, wide, "bicubic")
        top, left = round((tall - side) / 2), round((wide - side) / 2)
        image = image[:, top : top + side, left : left + side]
    return image * 2 - 1
