"""Janus's image tokens one at a time from the KV cache.

Letters: R rows, L places so far, D width, B members, N tokens of a picture.
"""

from __future__ import annotations

from typing import Any

import torch

from lvrpo.policies.decoding import Decoder, Embed, Head
from lvrpo.sampling import guide_logits, sample_tokens


def read_rows(transformer: Any, x: torch.Tensor, mask: torch.Tensor) -> Decoder:
    """Reads contexts (R, L, D), padded on the left where ``mask`` int64 (R, L) is 0.

    ``transformer``: a Llama of transformers. Any: an optional package.
    """
    from transformers import DynamicCache

    def forward(x: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        out = transformer(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state

    cache, places = DynamicCache(config=transformer.config), (mask.cumsum(dim=1) - 1).clamp(min=0)
    states = forward(x, None if bool(mask.all()) else mask, places, cache)
    return Decoder(forward, cache, mask, places[:, -1:], states[:, -1])


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
