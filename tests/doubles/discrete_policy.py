"""A small complete policy of discrete tokens: text, and images with image tokens in order or masked, guided.

One transformer over one vocabulary: a row is the prompt, then what was sampled. Text and image tokens attend to what
came before; masked image tokens to their whole image. Sampling, replay and judging are those of ``TokenPolicy``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.defaults import TokenPolicy
from lvrpo.sampling import guide_logits
from lvrpo.types import Image, LogitGuidance, Part, Parts, Segment, SegmentKind, TaskKind, TextSegment

WORDS = ("draw", "say", "think", "red", "green", "blue", "yes", "no")
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.float32)
BOS, EOS, OPEN, MASK = range(4)
FIRST_WORD = 4
FIRST_CODE = FIRST_WORD + len(WORDS)
VOCABULARY = FIRST_CODE + len(PALETTE)
SIDE = 4
N = SIDE * SIDE
"""Tokens of an image."""
LONGEST = 64


class Layer(nn.Module):
    """Attention and a perceptron, each on normed states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B, L, D); seen bool (B, L, L): which keys a query sees."""
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, L, 3, 2, D // 2).permute(2, 0, 3, 1, 4)  # two heads
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, D))
        return x + self.mlp(self.norm_mlp(x))


class DiscretePolicy(TokenPolicy):
    """Outputs text; its k-th image is made of tokens of the k-th of the given kinds."""

    image_size = 2 * SIDE
    image_tokens = N
    end_id = EOS

    def __init__(self, draws: Sequence[SegmentKind] = ("tokens",), width: int = 32, depth: int = 2, seed: int = 0):
        super().__init__()
        self.segment_kinds = ("text", *draws)
        self.sizes = {"width": width, "depth": depth}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(VOCABULARY, width)
            self.places = nn.Embedding(LONGEST, width)
            self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        tokens = torch.arange(VOCABULARY)
        self.text_tokens = (tokens == EOS) | ((tokens >= FIRST_WORD) & (tokens < FIRST_CODE))

    def default_sampling(self, task: TaskKind) -> Sampling:
        return Sampling(num_steps=4, max_new_tokens=4)

    # --- tokens ---

    def encode_text(self, text: str) -> list[int]:
        return [FIRST_WORD + WORDS.index(word) for word in text.split()]

    def decode_text(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i - FIRST_WORD] for i in ids if i != EOS)

    def encode_image(self, image: Image) -> Tensor:
        return encoded(image)

    def decode_image(self, codes: Tensor) -> Image:
        return decoded(codes)

    def context_ids(self, parts: Parts, segments: Sequence[Segment] = ()) -> list[int]:
        row = [BOS]
        for part in parts:
            row += self.encode_text(part) if isinstance(part, str) else image_ids(encoded(part))
        for segment in segments:
            row += segment.tokens.tolist() if isinstance(segment, TextSegment) else image_ids(segment.tokens)
        return row

    # --- the transformer ---

    def states(self, rows: Sequence[Sequence[int]], together: int = 0, depth: int | None = None) -> Tensor:
        """(B, L, D), padded on the right; the last ``together`` tokens of each row attend to one another."""
        B, L = len(rows), max(map(len, rows))
        ids = torch.tensor([[*row, *[EOS] * (L - len(row))] for row in rows], device=self.head.weight.device)
        length = torch.tensor([len(row) for row in rows])[:, None]
        place = torch.arange(L).expand(B, L)
        block = (place >= length - together) & (place < length)
        seen = (place[:, :, None] >= place[:, None, :]) | (block[:, :, None] & block[:, None, :])
        x = self.words(ids) + self.places(place.to(ids))
        for layer in self.layers[:depth]:
            x = layer(x, seen.to(x.device))
        return x

    def next_logits(self, rows: Sequence[Sequence[int]], together: int = 0) -> list[Tensor]:
        logits = self.head(self.norm(self.states(rows, together)))
        return [logits[b, : len(row)] for b, row in enumerate(rows)]

    def image_logits(
        self, contexts: Sequence[Sequence[int]], tokens: Tensor, masked: bool, scale: float, mode: LogitGuidance
    ) -> Tensor:
        codes = torch.where(tokens < 0, MASK, tokens + FIRST_CODE).tolist()
        unguided = scale == 1 or mode == "none"
        rows = [[*context, OPEN, *row] for context, row in zip(contexts, codes, strict=True)]
        rows += [] if unguided else [[BOS, OPEN, *row] for row in codes]
        n, together = tokens.shape[1] + (not masked), tokens.shape[1] if masked else 0
        logits = torch.stack([own[-n:, FIRST_CODE:] for own in self.next_logits(rows, together)])
        B = len(contexts)
        return guide_logits(logits[:B], None if unguided else logits[B:], scale, mode)

    @torch.no_grad()
    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[Tensor]:
        if not 0 <= layer <= len(self.layers):
            raise InputError(f"layer={layer}: the policy has {len(self.layers)} layers")
        return [self.states([self.context_ids([part])], depth=layer)[0, 1:] for part in parts]

    # --- files ---

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "discrete_policy:DiscretePolicy", "draws": self.segment_kinds[1:], **self.sizes}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(dict(self.state_dict()), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        config = json.loads((folder / "config.json").read_text())
        del config["model_type"]
        policy = cls(**config)
        policy.load_state_dict(load_file(folder / "model.safetensors"))
        return policy.to(device, dtype)


def image_ids(codes: Tensor) -> list[int]:
    """The input ids of an image."""
    return [OPEN, *(codes + FIRST_CODE).tolist()]


def decoded(codes: Tensor) -> Image:
    """The image of N codes: a square of two by two pixels each."""
    pixels = PALETTE[codes].view(SIDE, SIDE, 3).permute(2, 0, 1)
    return pixels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def encoded(image: Image) -> Tensor:
    """The codes of an image, (N,): the nearest colors."""
    pixels = image[:, ::2, ::2].flatten(1).T
    return torch.cdist(pixels, PALETTE).argmin(dim=1)
