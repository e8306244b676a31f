"""Janus's tokens one at a time from the KV cache: texts from the language head, pictures from the generation head.

Letters: R rows, L places so far, D width, B members, N tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lvrpo.sampling import guide_logits, sample_tokens

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Ids (R,) to what the transformer is fed (R, D)."""
Head = Callable[[torch.Tensor], torch.Tensor]
"""Final states (R, D) to logits (R, V)."""


class Decoder:
    """Rows that each grow by one token per step; nothing of it has a gradient."""

    def __init__(self, transformer: Any, x: torch.Tensor, mask: torch.Tensor) -> None:
        """Reads contexts (R, L, D), padded on the left where ``mask`` int64 (R, L) is 0.

        ``transformer``: a Llama of transformers. Any: an optional package.
        """
        from transformers import DynamicCache

        self.transformer, self.mask = transformer, mask
        self.cache = DynamicCache(config=transformer.config)
        self.padded = not bool(mask.all())
        self.last = self._run(x, (mask.cumsum(dim=1) - 1).clamp(min=0))
        """(R, D): the final state of the newest token of each row."""

    def select(self, rows: Sequence[int]) -> None:
        """Repeats, drops or reorders the rows, which copies their keys and values."""
        if list(rows) == list(range(len(self.mask))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.last = self.mask[index], self.last[index]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One more token per row, embedded (R, D); the new final states (R, D)."""
        places = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.last = self._run(x[:, None], places)
        return self.last

    def _run(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        out = self.transformer(
            inputs_embeds=x,
            attention_mask=self.mask if self.padded else None,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]


def generate_text(
    decoder: Decoder, embed: Embed, head: Head, eos_id: int, uniforms: torch.Tensor, temperature: float
) -> list[list[int]]:
    """Samples a text per row with uniforms (B, max tokens); the end token is included where a text ended by itself."""
    texts: list[list[int]] = [[] for _ in uniforms]
    active, logits = list(range(len(texts))), head(decoder.last)
    for i in range(uniforms.shape[1]):
        tokens = sample_tokens(logits, uniforms[active, i], temperature)
        for b, token in zip(active, tokens.tolist(), strict=True):
            texts[b].append(token)
        still = [k for k, token in enumerate(tokens.tolist()) if token != eos_id]
        if not still or i + 1 == uniforms.shape[1]:
            break
        decoder.select(still)
        active = [active[k] for k in still]
        logits = head(decoder.step(embed(tokens[still])))
    return texts


def generate_image_tokens(
    decoder: Decoder, embed: Embed, head: Head, uniforms: torch.Tensor, temperature: float, guidance_scale: float
) -> torch.Tensor:
    """Samples the tokens of a picture per member with uniforms (B, N), to int64 (B, N).

    The rows of the decoder: B contexts; under guidance (a scale other than 1) B more without the prompt, which are fed
    the same tokens.
    """
    B, N = uniforms.shape
    drawn: list[torch.Tensor] = []
    for i in range(N):
        state = decoder.last if not drawn else decoder.step(embed(drawn[-1].repeat(len(decoder.mask) // B)))
        logits = head(state)
        guided = guide_logits(logits[:B], logits[B:] if len(logits) > B else None, guidance_scale)
        drawn.append(sample_tokens(guided, uniforms[:, i], temperature))
    return torch.stack(drawn, dim=1)
