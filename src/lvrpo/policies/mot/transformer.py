"""A Mixture-of-Transformers: two experts per layer, one softmax over the mixed sequence (arXiv 2411.04996, 2505.14683).

Letters: B rows, L tokens of the longest row, S cached tokens, D width, H heads, K key heads, E head width,
Nu / Ng tokens of the understanding / generation block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lvrpo.config import Config
from lvrpo.policies.mot import attention
from lvrpo.policies.mot.attention import Attend, MaskedAttention, Packing, SpanAttention


class MoTConfig(Config):
    """Configuration of the transformer; the two experts have the same sizes."""

    width: int = Field(default=128, ge=1, le=65_536)
    """Width of the residual stream."""
    depth: int = Field(default=4, ge=1, le=1000)
    """Number of layers."""
    heads: int = Field(default=4, ge=1, le=1000)
    """Query heads."""
    key_heads: int = Field(default=4, ge=1, le=1000)
    """Key and value heads."""
    mlp_width: int = Field(default=512, ge=1, le=1_000_000)
    """Hidden width of the feed-forward blocks."""
    mlp: Literal["relu2", "swiglu"] = "relu2"
    """Activation: squared ReLU, or SwiGLU."""
    attention_bias: bool = False
    """Whether projections of queries, keys and values have a bias."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position embedding."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of RMSNorm."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width}, heads={self.heads}: the width must be heads times an even number")
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads={self.key_heads}: must divide heads={self.heads}")
        return self


SPREAD_BYTES = 64 << 20
"""A shared context of at most this size is copied once per row, instead of in every pass."""


FEW_BATCHES = 8
"""Maximum number of batches of rows for which ``SpanAttention`` is used on a GPU, where it beats one masked call."""


@dataclass(frozen=True)
class CachePart:
    """Keys and values of consecutive tokens, stored once for all rows that share them; R entries."""

    keys: tuple[torch.Tensor, ...]
    """Per layer (R, S, K, E)."""
    values: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]
    """Tokens of every entry, padding excluded."""
    entries: tuple[int, ...]
    """(B,): the entry of each row."""

    @cached_property
    def index(self) -> torch.Tensor | None:
        """``entries`` on the device; None where every row has its own, in order."""
        if self.entries == tuple(range(len(self.lengths))):
            return None
        return torch.tensor(self.entries, device=self.keys[0].device)

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool (B, S)."""
        keys = self.keys[0]
        lengths = torch.tensor([self.lengths[entry] for entry in self.entries], device=keys.device)
        return torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]

    @cached_property
    def padded(self) -> bool:
        """Whether the entry of a row is shorter than the longest."""
        longest = self.keys[0].shape[1]
        return any(self.lengths[entry] < longest for entry in set(self.entries))

    @property
    def nbytes(self) -> int:
        """Size of its keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer i, (B, S, K, E), copied per row."""
        if self.index is None:
            return self.keys[i], self.values[i]
        return self.keys[i].index_select(0, self.index), self.values[i].index_select(0, self.index)

    def entry(self, i: int, entry: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer i of one entry without padding, (1, length, K, E)."""
        length = self.lengths[entry]
        return self.keys[i][entry : entry + 1, :length], self.values[i][entry : entry + 1, :length]


@dataclass(frozen=True)
class Cache:
    """A KV cache in parts; rows with the same context share its part. Keys are normed and rotated."""

    parts: tuple[CachePart, ...]
    rope: torch.Tensor
    """int64 (B,): the rope id of the next token."""

    def select(self, rows: Sequence[int]) -> Cache:
        """The cache with its rows repeated, dropped or reordered; keys and values are shared, not copied."""
        rows = tuple(rows)
        if rows == tuple(range(len(self.rope))):
            return self
        parts = tuple(replace(part, entries=tuple(part.entries[row] for row in rows)) for part in self.parts)
        return Cache(parts, self.rope.index_select(0, torch.tensor(rows, dtype=torch.int64, device=self.rope.device)))

    def spread(self, rows: Sequence[int]) -> Cache:
        """``select`` for rows that diverge from here: small keys and values are copied."""
        chosen = self.select(rows)
        copies = sum(part.nbytes // len(part.lengths) * len(rows) for part in self.parts)
        if chosen is self or copies > SPREAD_BYTES:
            return chosen
        parts = []
        for part in chosen.parts:
            layers = [part.layer(i) for i in range(len(part.keys))]
            lengths = tuple(part.lengths[entry] for entry in part.entries)
            each = tuple(range(len(rows)))
            parts.append(CachePart(tuple(k for k, _ in layers), tuple(v for _, v in layers), lengths, each))
        return Cache(tuple(parts), chosen.rope)

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer i, (B, S, K, E), padding included; needs at least one part."""
        keys, values = zip(*(part.layer(i) for part in self.parts), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    @property
    def lengths(self) -> list[int]:
        """(B,): tokens of every context."""
        return [sum(part.lengths[part.entries[b]] for part in self.parts) for b in range(len(self.rope))]

    @property
    def nbytes(self) -> int:
        """Size of all keys and values."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Hidden:
    """Output of the transformer."""

    understanding: torch.Tensor
    """(Nu, D), normed; with ``outputs`` (n, D) or empty."""
    generation: torch.Tensor
    """(Ng, D), normed; with ``outputs`` of understanding tokens empty."""
    cache: Cache
    """The cache, with these rows where ``extend`` is set."""
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """The two blocks after every layer, not normed; empty without ``keep_layers``."""


class Expert(nn.Module):
    """The weights of one expert in one layer: projections, norms, MLP."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        bias = config.attention_bias
        self.config = config
        self.input_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.q_proj = nn.Linear(width, config.heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, config.key_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, config.key_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(config.heads * head_width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_width, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(head_width, eps=config.norm_eps)
        self.post_norm = nn.RMSNorm(width, eps=config.norm_eps)
        if config.mlp == "swiglu":
            self.gate_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, width, bias=False)
        nn.init.zeros_(self.o_proj.weight)  # every layer starts as the identity
        nn.init.zeros_(self.down_proj.weight)

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, D) -> queries before keys, normed per head, (N, H + K, E), and values (N, K, E)."""
        config = self.config
        h = self.input_norm(x)
        dtype = self.q_norm.weight.dtype  # under autocast the heads are normed, and roped, at that of the weights
        q = self.q_norm(self.q_proj(h).to(dtype).unflatten(-1, (config.heads, -1)))
        k = self.k_norm(self.k_proj(h).to(dtype).unflatten(-1, (config.key_heads, -1)))
        return torch.cat([q, k], dim=1), self.v_proj(h).unflatten(-1, (config.key_heads, -1))

    def feed_forward(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual stream (N, D) and attention output (N, H * E) -> residual stream (N, D)."""
        x = x + self.o_proj(attended)
        h = self.post_norm(x)
        if self.config.mlp == "swiglu":
            return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + self.down_proj(functional.relu(self.up_proj(h)).square())


class Layer(nn.Module):
    """An understanding and a generation expert with joint attention."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.understanding = Expert(config)
        self.generation = Expert(config)


class MoT(nn.Module):
    """The transformer: input embeddings to hidden states and the extended cache."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.understanding_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.generation_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.checkpointing = False
        """Gradient checkpointing."""
        head_width = config.width // config.heads
        # explicitly on the CPU: a model built on the meta device still has its frequencies
        steps = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu")
        inv_freq = config.rope_theta ** (-steps / head_width)
        self.register_buffer("inv_freq", torch.cat([-inv_freq, inv_freq]), persistent=False)
        self.inv_freq: torch.Tensor
        """float32 (E,): radians per rope id, negated in the first half of a head: see ``rotate``."""

    def empty_cache(self, batch_size: int) -> Cache:
        """The cache of ``batch_size`` rows without tokens."""
        return Cache((), torch.zeros(batch_size, dtype=torch.int64, device=self.inv_freq.device))

    def forward(
        self,
        understanding: torch.Tensor,
        generation: torch.Tensor,
        packing: Packing,
        cache: Cache,
        keep_layers: bool = False,
        extend: bool = True,
        outputs: torch.Tensor | Literal["generation"] | None = None,
    ) -> Hidden:
        """Runs new rows after their contexts.

        understanding (Nu, D) and generation (Ng, D) are the embedded tokens in row order; row b continues row b of the
        cache. Without ``extend`` the cache stays as it is, as in a step of a flow. ``outputs``: int64 (n,), the
        understanding tokens to return states of, or the generation block; the last layer computes no others. None: all
        tokens of both blocks.
        """
        attend = self._attention_of(packing, cache)
        cos, sin = self.rotation(cache.rope[:, None] + packing.rope_ids)
        keys, values, layers = [], [], []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)

            def run(
                understanding: torch.Tensor, generation: torch.Tensor, layer: Layer = layer, i: int = i
            ) -> tuple[torch.Tensor, ...]:
                heads, v = self._project(layer, understanding, generation, packing)
                q, k = rotate(heads, cos, sin).to(v.dtype).split([self.config.heads, self.config.key_heads], dim=2)
                k = k.clone() if extend else k  # a cache of views would keep the queries, too
                cells = packing.understanding_cells
                if outputs is not None and i == len(self.layers) - 1:
                    if isinstance(outputs, str):
                        understanding = understanding[:0]
                    else:
                        understanding, generation = understanding.index_select(0, outputs), generation[:0]
                        cells = cells.index_select(0, outputs)
                    if not len(understanding) and not len(generation):
                        return understanding, generation, k, v
                attended = attend(i, q, k, v).reshape(packing.batch_size * packing.length, -1)  # (B * L, H * E)
                if len(understanding):
                    understanding = layer.understanding.feed_forward(understanding, _cells(attended, cells))
                if len(generation):
                    generation = layer.generation.feed_forward(generation, _cells(attended, packing.generation_cells))
                return understanding, generation, k, v

            if self.checkpointing and torch.is_grad_enabled():
                understanding, generation, k, v = checkpoint(
                    run, understanding, generation, use_reentrant=False, preserve_rng_state=False
                )
            else:
                understanding, generation, k, v = run(understanding, generation)
            if extend:
                keys.append(k)
                values.append(v)
            if keep_layers:
                layers.append((understanding, generation))
        extended = cache
        if extend:
            part = CachePart(tuple(keys), tuple(values), packing.row_lengths, tuple(range(packing.batch_size)))
            extended = Cache((*cache.parts, part), cache.rope + packing.rope_advance)
        understanding = self.understanding_norm(understanding) if len(understanding) else understanding
        generation = self.generation_norm(generation) if len(generation) else generation
        return Hidden(understanding, generation, extended, tuple(layers))

    def _project(
        self, layer: Layer, understanding: torch.Tensor, generation: torch.Tensor, packing: Packing
    ) -> tuple[torch.Tensor, ...]:
        """What both experts' ``queries_keys_values`` return, on the (B, L) grid."""
        blocks = []
        if len(understanding):
            blocks.append(layer.understanding.queries_keys_values(understanding))
        if len(generation):
            blocks.append(layer.generation.queries_keys_values(generation))
        grid = (packing.batch_size, packing.length)
        total = packing.batch_size * packing.length
        out = []
        for parts in zip(*blocks, strict=True):
            if len(parts) == 1 and len(parts[0]) == total:  # one expert, no padding: the grid is the block
                out.append(parts[0].unflatten(0, grid))
            else:
                block = parts[0] if len(parts) == 1 else torch.cat(parts)
                out.append(block.index_select(0, packing.grid_source).unflatten(0, grid))
        return tuple(out)

    def _attention_of(self, packing: Packing, cache: Cache) -> Attend:
        """Attention of the new rows over their contexts and themselves: one call, or span by span for a large mask.

        On a GPU also span by span where that is few calls, since FlashAttention takes no mask.
        """
        context = sum(part.keys[0].shape[1] for part in cache.parts)
        cells = packing.batch_size * packing.length * (context + packing.length)
        large = packing.visible is None or cells > attention.MASK_CELLS
        if large or self.inv_freq.is_cuda:
            spans = SpanAttention(packing, cache)
            if large or len(spans.batches) <= FEW_BATCHES:
                return spans
        assert packing.visible is not None
        if packing.sees_all and not any(part.padded for part in cache.parts):
            return MaskedAttention(cache, None)
        seen = [part.valid[:, None, :].expand(-1, packing.length, -1) for part in cache.parts]
        return MaskedAttention(cache, torch.cat([*seen, packing.visible], dim=2)[:, None])

    def rotation(self, rope_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for ``rotate`` at rope ids (B, L), (B, L, 1, E) each."""
        angles = rope_ids[..., None, None] * self.inv_freq
        return angles.cos(), angles.sin()


def _cells(grid: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return grid if len(cells) == len(grid) else grid.index_select(0, cells)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, rotate-half form, of x (..., heads, E); ``sin`` has its first half negated."""
    # roll swaps the halves in an eighth of the time of torch.cat, which copies short pieces slowly on a CPU
    return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1) * sin)
