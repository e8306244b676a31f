"""Show-o's rows: text, markers and image tokens in one vocabulary, and which places of a row see one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer

from lvrpo.errors import InputError
from lvrpo.policies.janus.processor import resized
from lvrpo.reading import parse_json, read_bytes
from lvrpo.types import Image

MARKERS = (
    *("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>"),
    *("<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>"),
)
"""After the text tokens, in this order; the image tokens follow, and then the mask."""
HEAD = 129
"""Places of a drawing's row before its image tokens: task, text between two ends, padding on the left."""
TOKENIZER = "tokenizer.json"
FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"),
    "config.json",
)
"""Files of the language model's folder, saved unchanged."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokenizer and vocabulary of a Show-o; never changed after it is made."""

    tokenizer: Tokenizer
    text_size: int
    """Text tokens, which come first."""
    codes: int
    """Different image tokens."""
    end: int
    """The token before and after a text."""
    files: Mapping[str, bytes]

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def marker(self, name: str) -> int:
        """The id of one of ``MARKERS``."""
        return self.text_size + MARKERS.index(name)

    @property
    def first_code(self) -> int:
        """The id of image token 0."""
        return self.text_size + len(MARKERS)

    @property
    def mask(self) -> int:
        """The id of a masked image token: the last one."""
        return self.first_code + self.codes

    def encode(self, text: str) -> list[int]:
        """Ids of a text; raises InputError where it holds a marker of the model."""
        self.check_text(text)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """A sampled text, without its end and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        for name in (*MARKERS, self.tokenizer.id_to_token(self.end)):
            if name and name in text:
                raise InputError(f"{text[:40]!r}: holds {name}, a marker of the model: leave it out")

    # --- rows ---

    def question(self, codes: torch.Tensor | None, text: str) -> list[int]:
        """The row that an answer follows: an image that is read, if any, and what a user says."""
        return [*self.read(codes), self.end, *self.encode(f"USER: \n{text} ASSISTANT:")]

    def read(self, codes: torch.Tensor | None) -> list[int]:
        """An image that is read, at the beginning of a row."""
        if codes is None:
            return []
        image = (codes + self.first_code).tolist()
        return [self.marker("<|mmu|>"), self.marker("<|soi|>"), *image, self.marker("<|eoi|>")]

    def caption(self, text: Sequence[int]) -> list[int]:
        """The row before the image tokens of a drawing; an empty text is the unconditional branch of guidance."""
        return [self.marker("<|t2i|>"), self.end, *text, self.end]

    def drawing(self, caption: Sequence[int], codes: Sequence[int]) -> list[int]:
        """A caption with its image tokens; -1 is a masked one."""
        image = [self.mask if code < 0 else code + self.first_code for code in codes]
        return [*caption, self.marker("<|soi|>"), *image, self.marker("<|eoi|>")]

    def padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> Rows:
        """Rows in one batch, padded on the right or the left.

        Places before an image that is read, and those of an image, see the whole image and all before it; all others
        see what is before them. A drawing's image begins at place ``HEAD``, wherever its caption begins.
        """
        most = max(map(len, rows))
        ids = torch.full((len(rows), most), self.marker("[PAD]"))
        places = torch.arange(most).repeat(len(rows), 1)
        valid, block = (torch.zeros(len(rows), most, dtype=torch.bool) for _ in range(2))
        for i, row in enumerate(rows):
            first = most - len(row) if left else 0
            ids[i, first : first + len(row)] = torch.tensor(row)
            valid[i, first : first + len(row)] = True
            start = 0
            if self.marker("<|eoi|>") in row:
                begin, end = row.index(self.marker("<|soi|>")), row.index(self.marker("<|eoi|>"))
                reads = row[0] == self.marker("<|mmu|>")
                block[i, first + (0 if reads else begin) : first + end + 1] = True
                start = 0 if reads else HEAD - begin
            places[i] += start - first
        causal = torch.arange(most)[:, None] >= torch.arange(most)
        seen = (causal | (block[:, :, None] & block[:, None, :])) & valid[:, None, :]
        return Rows(ids, places.clamp(min=0), seen | torch.eye(most, dtype=torch.bool), valid)

    # --- files ---

    def save(self, folder: Path) -> None:
        """Writes the files that it was read from."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path, text_size: int, codes: int) -> Self:
        """Loads the tokenizer files of a folder; raises InputError, one line, for missing or damaged ones."""
        files = {name: read_bytes(folder / name, "restore it") for name in FILES if (folder / name).exists()}
        return cls.from_files(files, folder, text_size, codes)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], folder: Path, text_size: int, codes: int) -> Self:
        """See ``load``; takes the contents of the files; ``folder`` is named in errors."""
        if TOKENIZER not in files:
            raise InputError(f"{folder}: holds no {TOKENIZER}: copy it from the folder of Phi-1.5")
        try:
            tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"{folder / TOKENIZER}: truncated or damaged ({error}): restore the file") from None
        if tokenizer.get_vocab_size() != text_size:
            raise InputError(
                f"{folder / TOKENIZER}: knows {tokenizer.get_vocab_size()} tokens, llm_vocab_size says {text_size}: "
                "use the tokenizer of the language model that the Show-o was made from"
            )
        name = "<|endoftext|>"
        if "tokenizer_config.json" in files:
            found = parse_json(files["tokenizer_config.json"], str(folder / "tokenizer_config.json"))
            stored = found.get("eos_token") if isinstance(found, dict) else None
            stored = stored.get("content") if isinstance(stored, dict) else stored
            name = stored if isinstance(stored, str) else name
        end = tokenizer.token_to_id(name)
        if end is None:
            raise InputError(f"{folder / TOKENIZER}: has no {name}: use the tokenizer of Phi-1.5")
        return cls(tokenizer, text_size, codes, end, files)


@dataclass(frozen=True)
class Rows:
    """A batch of rows. Letters: R rows, L places."""

    ids: torch.Tensor
    """int64 (R, L)."""
    places: torch.Tensor
    """int64 (R, L): for the position embedding."""
    seen: torch.Tensor
    """bool (R, L, L): which keys a place sees."""
    valid: torch.Tensor
    """bool (R, L): False on padding."""


def square(image: Image, side: int) -> torch.Tensor:
    """A picture of any size to pixels in [-1, 1] (3, side, side): its shorter side is fitted, its center is kept."""
    image = image.float()
    height, width = image.shape[1:]
    if (height, width) != (side, side):
        short = min(height, width)
        tall, wide = (int(side * length / short) for length in (height, width))
        image = resized(image, tall, wide, "bicubic")
        top, left = round((tall - side) / 2), round((wide - side) / 2)
        image = image[:, top : top + side, left : left + side]
    return image * 2 - 1
