"""MMaDA's rows: markers and the mask are reserved text tokens, image tokens follow the tokenizer, all see all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import AddedToken

from lvrpo.errors import InputError
from lvrpo.policies.magvit.layout import (
    TOKENIZER,
    RowBatch,
    TokenLayout,
    filled,
    read_tokenizer,
    special_token,
)

MARKERS = (
    *("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>"),
    *("<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>", "[iPAD]", "<|r2i|>"),
)
"""In this order at reserved tokens of the tokenizer."""
FIRST_MARKER = 126084
"""The id of the first marker in the published tokenizer."""
TURN = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
"""Tokens of a turn; a tokenizer that lacks them gets them at its end."""
OWNER = "the MMaDA"


@dataclass(frozen=True, eq=False)
class MmadaLayout(TokenLayout):
    """Tokenizer and vocabulary of an MMaDA."""

    first_marker: int
    mask_id: int
    bos: int

    def marker(self, name: str) -> int:
        """The id of one of ``MARKERS``."""
        return self.first_marker + MARKERS.index(name)

    @property
    def first_code(self) -> int:
        return self.text_size

    @property
    def mask(self) -> int:
        return self.mask_id

    @property
    def start(self) -> int:
        return self.bos

    @property
    def turn_end(self) -> int:
        """The token after what one of the speakers says."""
        return self.tokenizer.token_to_id(TURN[2]) or 0

    @property
    def forbidden(self) -> Sequence[str]:
        ids = (self.bos, self.end, self.mask_id, *(self.marker(name) for name in MARKERS))
        return (*MARKERS, *TURN, *(self.tokenizer.id_to_token(i) or "" for i in ids))

    def text_tokens(self, vocabulary: int) -> torch.Tensor:
        """Without markers and the mask."""
        allowed = super().text_tokens(vocabulary)
        allowed[self.first_marker : self.first_marker + len(MARKERS)] = False
        allowed[self.mask_id] = False
        return allowed

    def question(self, codes: torch.Tensor | None, text: str) -> list[int]:
        """The published template of a conversation of one turn."""
        self.check_text(text)
        header, close, end = TURN
        said = f"{header}user{close}\n{text.strip()}{end}{header}assistant{close}\n"
        return [*self.read(codes), self.bos, *self.tokenizer.encode(said, add_special_tokens=False).ids]

    def caption(self, text: Sequence[int]) -> list[int]:
        return [self.marker("<|t2i|>"), self.bos, *text, self.end]

    def padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> RowBatch:
        """Rows in one batch, padded on the right or the left; all places see all that are not padding."""
        ids, valid = filled(rows, self.marker("[iPAD]"), left)
        most = ids.shape[1]
        first = (~valid).sum(dim=1, keepdim=True) if left else 0
        places = (torch.arange(most) - first).clamp(min=0).expand(len(rows), most)
        return RowBatch(ids, places, valid[:, None, :].expand(-1, most, -1), valid)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], folder: Path, codes: int, mask: int, first_marker: int) -> Self:
        """Of the contents of a folder's files; raises InputError, one line, for missing or damaged ones."""
        tokenizer = read_tokenizer(files, folder, OWNER)
        missing = [name for name in TURN if tokenizer.token_to_id(name) is None]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
        size = tokenizer.get_vocab_size()
        for what, last in (("mask_token_id", mask), ("markers end at", first_marker + len(MARKERS) - 1)):
            if not last < size:
                raise InputError(
                    f"{folder / TOKENIZER}: knows {size} tokens, {what} {last} is not among them: use the tokenizer of "
                    "the same MMaDA"
                )
        end = special_token(tokenizer, files, folder, "eos_token", "<|endoftext|>", OWNER)
        bos = special_token(tokenizer, files, folder, "bos_token", "<|startoftext|>", OWNER)
        return cls(tokenizer, size, codes, end, files, first_marker, mask, bos)
