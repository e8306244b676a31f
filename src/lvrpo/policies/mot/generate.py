"""Text generation, one token at a time from the KV cache, and the log-probs of given texts.

Letters: R rows, S cached keys, D width, H heads, K key heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.attention import sdpa_kernel

from lvrpo.policies import decoding
from lvrpo.policies.kv_buffers import select_rows
from lvrpo.policies.mot.attention import TEXT_KERNELS, attention
from lvrpo.policies.mot.model_runner import ModelRunner, Row
from lvrpo.policies.mot.transformer import Cache, Layer, MoT, rotate
from lvrpo.sampling import token_scores


@dataclass(frozen=True)
class TokenizedText:
    """A sampled text."""

    tokens: tuple[int, ...]
    """Ends with the end token where ``ended``."""
    ended: bool


@dataclass(frozen=True)
class TextScores:
    """Scores of a batch of texts, one entry per row; the tensors of row b are (L_b,)."""

    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor]
    cache: Cache
    """The cache, with the texts where ``closed``."""


def generate_text(
    runner: ModelRunner, cache: Cache, owner: Sequence[int], uniforms: torch.Tensor, temperature: float
) -> list[TokenizedText]:
    """Samples one text per member: member m continues row ``owner[m]`` of the cache, with uniforms (B, max tokens).

    Members with the same prefix share one row, so a step costs the number of distinct prefixes. Members that do not fit
    into the buffers are sampled in parts.
    """
    together = decode_batch_size(runner.transformer, cache, uniforms.shape[1])
    if len(owner) <= together:
        return _generate_batch(runner, cache, owner, uniforms, temperature)
    out = []
    for start in range(0, len(owner), together):
        part = slice(start, start + together)
        rows = sorted(set(owner[part]))
        places = [rows.index(row) for row in owner[part]]
        out += _generate_batch(runner, cache.select(rows), places, uniforms[part], temperature)
    return out


@torch.no_grad()
def _generate_batch(
    runner: ModelRunner, cache: Cache, owner: Sequence[int], uniforms: torch.Tensor, temperature: float
) -> list[TokenizedText]:
    """Samples members in one batch."""
    eos, embed = runner.tokenizer.eos_id, runner.encoders.embed_tokens
    decoder = Decoder(runner.transformer, cache, uniforms.shape[1])
    decoder.step(embed(torch.full((len(cache.rope),), runner.tokenizer.bos_id, device=uniforms.device)))
    allowed = ~runner.tokenizer.suppressed_tokens().to(uniforms.device)
    head = runner.encoders.text_logits
    texts = decoding.generate_text(decoder, owner, embed, head, {eos}, uniforms, temperature, allowed)
    return [TokenizedText(tuple(tokens), bool(tokens) and tokens[-1] == eos) for tokens in texts]


def score_text(
    runner: ModelRunner,
    cache: Cache,
    owner: Sequence[int],
    texts: Sequence[TokenizedText],
    temperature: float,
    closed: bool,
) -> TextScores:
    """Log-prob of every token of text b after row ``owner[b]`` of the cache, differentiable.

    ``closed`` feeds the end token too, so that the returned cache can be continued. Equal texts after the same context
    are computed once.
    """
    keys = list(zip(owner, texts, strict=True))
    places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    rows: list[Row] = []
    positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    start = 0
    for _, text in places:
        ids = text.tokens[:-1] if text.ended else text.tokens
        piece = runner.text(ids) if closed else runner.open_text(ids)
        rows.append((piece,))
        positions += range(start, start + len(text.tokens))
        targets += text.tokens
        counts.append(len(text.tokens))
        start += piece.span.length
    hidden = runner.run(rows, cache.select([parent for parent, _ in places]), extend=closed)
    device = hidden.understanding.device
    selected = hidden.understanding.index_select(0, torch.tensor(positions, device=device))
    allowed = ~runner.tokenizer.suppressed_tokens().to(device)
    logits = runner.encoders.text_logits(selected)
    # temperature 0 is scored at temperature 1
    chosen, entropy = token_scores(logits, torch.tensor(targets, device=device), temperature, allowed)
    order = [places[key] for key in keys]
    extended = hidden.cache.select(order) if closed else hidden.cache
    order.reverse()  # gradients of equal texts are summed at once, those of the last row first
    starts = [0, *accumulate(counts)]
    repeated = torch.tensor([k for i in order for k in range(starts[i], starts[i + 1])], device=device)
    counts = [counts[i] for i in order]
    logprobs, entropies = (scores.index_select(0, repeated).split(counts)[::-1] for scores in (chosen, entropy))
    return TextScores(list(logprobs), list(entropies), extended)


def text_logits(runner: ModelRunner, hidden: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, V); -inf for suppressed tokens."""
    return runner.encoders.text_logits(hidden).masked_fill(forbidden, -torch.inf)


BUFFER_BYTES = 8 << 30
"""Largest KV buffer of a batch of texts; more members are sampled in parts."""


def decode_batch_size(transformer: MoT, cache: Cache, steps: int) -> int:
    """The number of rows of a batch: at least one."""
    config = transformer.config
    element = cache.parts[0].keys[0].element_size() if cache.parts else transformer.inv_freq.element_size()
    width = config.key_heads * config.width // config.heads
    row = 2 * config.depth * width * element * (_length(cache) + steps)
    return max(1, BUFFER_BYTES // max(1, row))


class Decoder:
    """Decodes one text token per row and step from a preallocated KV cache, without gradient."""

    def __init__(self, transformer: MoT, cache: Cache, steps: int) -> None:
        self.transformer, self.cache = transformer, cache
        self.rope, self.length, self.room = cache.rope, _length(cache), _length(cache) + steps
        self.keys: list[torch.Tensor] = []
        """Per layer (R, K, room, E), from the first step on: attention reads the keys of a head in one piece."""
        self.values: list[torch.Tensor] = []
        self.mask = self._mask()
        """(R, 1, 1, room), added to the scores; None where no context is padded."""
        self.last = transformer.inv_freq.new_zeros(len(cache.rope), 0)
        """(R, D): what the last step returned; empty before the first one."""

    @torch.no_grad()
    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Input embeddings (R, D), one token per row -> final states (R, D), normed."""
        transformer, config = self.transformer, self.transformer.config
        cos, sin = transformer.rotation(self.rope[:, None])  # (R, 1, 1, E)
        cos, sin = cos[:, 0], sin[:, 0]
        mask = None if self.mask is None else self.mask[..., : self.length + 1]
        with sdpa_kernel(TEXT_KERNELS):
            for i, layer in enumerate(transformer.layers):
                assert isinstance(layer, Layer)
                heads, v = layer.understanding.queries_keys_values(x)
                q, k = rotate(heads, cos, sin).to(v.dtype).split([config.heads, config.key_heads], dim=1)
                keys, values = self._append(i, k, v)
                mask = mask if mask is None else mask.to(v.dtype)
                x = layer.understanding.feed_forward(x, attention(q[:, None], keys, values, mask).flatten(1))
        self.length += 1
        self.rope = self.rope + 1
        self.last = transformer.understanding_norm(x)
        return self.last

    def skip(self) -> None:
        """See ``decoding.TokenDecoder``."""
        places = self.room - 1 - self.length
        self.length, self.rope = self.length + places, self.rope + places

    @torch.no_grad()
    def select(self, rows: Sequence[int]) -> None:
        """Repeats, drops or reorders the rows by copying; all rows in order are not copied."""
        if list(rows) == list(range(len(self.rope))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.rope.device)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):  # one layer after another: the old rows of a layer go at once
                buffers[i] = select_rows(buffer, rows, self.length)
        self.rope, self.last = self.rope.index_select(0, index), self.last.index_select(0, index)
        self.mask = None if self.mask is None else self.mask.index_select(0, index)

    def _append(self, i: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values (R, K, E) of layer i; returns those of all tokens, (R, S, K, E)."""
        if i == len(self.keys):
            layers = [part.layer(i) for part in self.cache.parts]
            self.keys.append(self._buffer([keys for keys, _ in layers], k))
            self.values.append(self._buffer([values for _, values in layers], v))
        keys, values = self.keys[i], self.values[i]
        keys[:, :, self.length] = k
        values[:, :, self.length] = v
        seen = slice(self.length + 1)
        return keys[:, :, seen].transpose(1, 2), values[:, :, seen].transpose(1, 2)

    def _buffer(self, parts: Sequence[torch.Tensor], new: torch.Tensor) -> torch.Tensor:
        rows, heads, width = new.shape
        buffer = new.new_empty(rows, heads, self.room, width)
        start = 0
        for part in parts:
            buffer[:, :, start : start + part.shape[1]] = part.transpose(1, 2)
            start += part.shape[1]
        return buffer

    def _mask(self) -> torch.Tensor | None:
        parts = self.cache.parts
        if not any(part.padded for part in parts):
            return None
        valid = torch.cat([part.valid for part in parts], dim=1)
        mask = torch.zeros(len(valid), self.room, device=valid.device)
        mask[:, : valid.shape[1]].masked_fill_(~valid, -torch.inf)
        return mask[:, None, None]


def _length(cache: Cache) -> int:
    """Length of the cache, padding included."""
    return sum(part.keys[0].shape[1] for part in cache.parts)
