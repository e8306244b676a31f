"""Show-o's rows: markers follow the text tokens, image tokens follow them, and the mask is the last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

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
    *("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>"),
    *("<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>"),
)
"""After the text tokens, in this order; the image tokens follow, and then the mask."""
HEAD = 129
"""Places of an image's row before its image tokens: task, text between two ends, padding on the left."""
OWNER = "Phi-1.5"
"""Whose tokenizer it is."""


@dataclass(frozen=True, eq=False)
class ShowoLayout(TokenLayout):
    """Tokenizer and vocabulary of a Show-o; the end token also begins a text."""

    def marker(self, name: str) -> int:
        """The id of one of ``MARKERS``."""
        return self.text_size + MARKERS.index(name)

    @property
    def first_code(self) -> int:
        return self.text_size + len(MARKERS)

    @property
    def mask(self) -> int:
        """The last token."""
        return self.first_code + self.codes

    @property
    def start(self) -> int:
        """The end token."""
        return self.end

    @property
    def forbidden(self) -> Sequence[str]:
        return (*MARKERS, self.tokenizer.id_to_token(self.end) or "")

    def question(self, codes: torch.Tensor | None, text: str) -> list[int]:
        return [*self.read(codes), self.end, *self.encode(f"USER: \n{text} ASSISTANT:")]

    def caption(self, text: Sequence[int]) -> list[int]:
        return [self.marker("<|t2i|>"), self.end, *text, self.end]

    def padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> RowBatch:
        """Rows in one batch, padded on the right or the left.

        Places before an image that is read, and those of an image, see the whole image and all before it; all others
        see what is before them. An image begins at place ``HEAD``, wherever its caption begins.
        """
        ids, valid = filled(rows, self.marker("[PAD]"), left)
        most = ids.shape[1]
        places, block = torch.arange(most).repeat(len(rows), 1), torch.zeros_like(valid)
        for i, row in enumerate(rows):
            first = most - len(row) if left else 0
            start = 0
            if self.marker("<|eoi|>") in row:
                begin, end = row.index(self.marker("<|soi|>")), row.index(self.marker("<|eoi|>"))
                reads = row[0] == self.marker("<|mmu|>")
                block[i, first + (0 if reads else begin) : first + end + 1] = True
                start = 0 if reads else HEAD - begin
            places[i] += start - first
        causal = torch.arange(most)[:, None] >= torch.arange(most)
        seen = (causal | (block[:, :, None] & block[:, None, :])) & valid[:, None, :]
        return RowBatch(ids, places.clamp(min=0), seen | torch.eye(most, dtype=torch.bool), valid)

    def captions(self, contexts: Sequence[Sequence[int]]) -> RowBatch:
        """Rows before the image tokens of images in one batch, padded on the left: they end before place ``HEAD``."""
        batch = self.padded(contexts, left=True)
        most = batch.ids.shape[1]
        return replace(batch, places=torch.arange(HEAD - most, HEAD).expand(len(contexts), -1))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], folder: Path, text_size: int, codes: int) -> Self:
        """Of the contents of a folder's files; raises InputError, one line, for missing or damaged ones."""
        tokenizer = read_tokenizer(files, folder, OWNER)
        if tokenizer.get_vocab_size() != text_size:
            raise InputError(
                f"{folder / TOKENIZER}: knows {tokenizer.get_vocab_size()} tokens, llm_vocab_size says {text_size}: "
                "use the tokenizer of the language model that the Show-o was made from"
            )
        end = special_token(tokenizer, files, folder, "eos_token", "<|endoftext|>", OWNER)
        return cls(tokenizer, text_size, codes, end, files)
