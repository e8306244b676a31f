"""Qwen2.5's byte-level BPE with BAGEL's four special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lvrpo.errors import InputError
from lvrpo.policies.tokenizer_files import StoredFiles, parse_tokenizer, stored_files

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
"""Begin and end of a text, begin and end of an image."""
PADDING = "<|endoftext|>"
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenizer of Qwen2."""


class BagelTokenizer(StoredFiles):
    """A tokenizer that never adds markers by itself; never changed after it is made."""

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, files: Mapping[str, bytes]) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # a marker that stands in a user's text is plain text
        self.vocabulary_size = vocabulary_size
        self.files = dict(files)
        self.bos_id, self.eos_id, self.image_start_id, self.image_end_id = (self._id(marker) for marker in MARKERS)
        self._markers = frozenset((self.bos_id, self.eos_id, self.image_start_id, self.image_end_id))

    def _id(self, marker: str) -> int:
        number = self.tokenizer.token_to_id(marker)
        if number is None:
            raise InputError(f"the tokenizer has no {marker}: use the tokenizer files of BAGEL")
        if number >= self.vocabulary_size:
            raise InputError(
                f"the tokenizer gives {marker} the id {number}, the model knows {self.vocabulary_size}: "
                "use the tokenizer and the weights of one model"
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Ids without markers."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self._markers.isdisjoint(ids):
            raise InputError(
                f"{text[:40]!r}: holds a marker of the model ({' '.join(MARKERS)}), which its tokenizer files do not "
                "call special: leave it out, or fix the files"
            )
        if ids and max(ids) >= self.vocabulary_size:
            raise InputError(
                f"{text[:40]!r}: token {max(ids)} of {self.vocabulary_size}: use the tokenizer of the model"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def suppressed_tokens(self) -> torch.Tensor:
        """None: the published model suppresses no token."""
        return torch.zeros(self.vocabulary_size, dtype=torch.bool)

    @classmethod
    def load(cls, folder: Path, vocabulary_size: int) -> Self:
        """Loads tokenizer.json, or vocab.json and merges.txt; raises InputError if they fail or lack a marker."""
        files = stored_files(folder, FILES)
        if "tokenizer.json" in files:
            tokenizer = parse_tokenizer(files["tokenizer.json"], folder / "tokenizer.json")
        elif "vocab.json" in files and "merges.txt" in files:
            tokenizer = _from_merges(folder, files)
            files["tokenizer.json"] = tokenizer.to_str().encode()
        else:
            raise InputError(f"{folder}: holds no tokenizer.json: copy the tokenizer files of BAGEL")
        try:
            return cls(tokenizer, vocabulary_size, files)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None


def _from_merges(folder: Path, files: Mapping[str, bytes]) -> Tokenizer:
    try:
        vocabulary = json.loads(files["vocab.json"])
        lines = files["merges.txt"].decode().splitlines()
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        added = settings.get("added_tokens_decoder", {})
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))  # type: ignore[arg-type]  # pairs, as it wants them
    except Exception as error:  # json, unicode, and whatever tokenizers raises
        raise InputError(f"{folder}: vocab.json and merges.txt do not fit ({error}): restore them") from error
    use_qwen_pretokenizer(tokenizer)
    tokenizer.add_tokens([_added(entry) for _, entry in sorted(added.items(), key=lambda item: int(item[0]))])
    return tokenizer


def use_qwen_pretokenizer(tokenizer: Tokenizer) -> None:
    """Installs the pre-tokenization of Qwen2, whatever the merges."""
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()


def published_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The four files of a byte-level tokenizer, which transformers' Qwen2Tokenizer reads too."""
    whole = tokenizer.to_str()
    model = json.loads(whole)["model"]
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [entry["content"] for entry in added.values() if entry["content"] in MARKERS],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": MARKERS[1],
        "errors": "replace",
        "pad_token": PADDING,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    return {
        "tokenizer.json": whole.encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
        "merges.txt": ("\n".join(merges) + "\n").encode(),
    }


def _added(entry: Mapping[str, Any]) -> AddedToken:
    """Any: decoded JSON."""
    return AddedToken(entry["content"], special=bool(entry.get("special")), normalized=bool(entry.get("normalized")))
