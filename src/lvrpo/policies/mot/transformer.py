"""A Mixture-of-Transformers: two experts per layer, one softmax over the mixed sequence (arXiv 2411.04996, 2505.14683).

Letters: B rows, L tokens of the longest row, S cached tokens, D width, H heads, K key heads, E head width,
Nr / Nd tokens of the reading / drawing block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from lvrpo.config import Config
from lvrpo.policies.mot.sequence import Packing


class MoTConfig(Config):
    """Sizes and choices of the transformer; the two experts are alike."""

    width: int = Field(default=128, ge=1)
    depth: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    key_heads: int = Field(default=4, ge=1)
    mlp_width: int = Field(default=512, ge=1)
    mlp: Literal["relu2", "swiglu"] = "relu2"
    attention_bias: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width}, heads={self.heads}: the width must be heads times an even number")
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads={self.key_heads}: must divide heads={self.heads}")
        return self


@dataclass(frozen=True)
class Cache:
    """Keys and values of a context, per layer, normed and roped."""

    keys: tuple[torch.Tensor, ...]
    """Per layer (B, S, K, E)."""
    values: tuple[torch.Tensor, ...]
    valid: torch.Tensor
    """bool (B, S): False on padding."""
    rope: torch.Tensor
    """int64 (B,): the rope id of whatever comes next."""

    def select(self, rows: torch.Tensor) -> Cache:
        """The cache with its rows repeated, dropped or reordered: (B,) -> (len(rows),)."""
        return Cache(
            keys=tuple(k.index_select(0, rows) for k in self.keys),
            values=tuple(v.index_select(0, rows) for v in self.values),
            valid=self.valid.index_select(0, rows),
            rope=self.rope.index_select(0, rows),
        )


@dataclass(frozen=True)
class Hidden:
    """Final hidden states of the two blocks, and the context that now includes these rows."""

    reading: torch.Tensor
    """(Nr, D), normed."""
    drawing: torch.Tensor
    """(Nd, D), normed."""
    cache: Cache
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """The two blocks after every layer, not normed; empty unless asked for."""


class Expert(nn.Module):
    """One expert's share of one layer: projections, norms, MLP. It never mixes tokens."""

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

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, D) -> (N, H, E), (N, K, E), (N, K, E), q and k normed per head."""
        config = self.config
        h = self.input_norm(x)
        dtype = self.q_norm.weight.dtype  # under autocast the heads are normed, and roped, at that of the weights
        q = self.q_norm(self.q_proj(h).to(dtype).unflatten(-1, (config.heads, -1)))
        k = self.k_norm(self.k_proj(h).to(dtype).unflatten(-1, (config.key_heads, -1)))
        v = self.v_proj(h).unflatten(-1, (config.key_heads, -1))
        return q, k, v

    def feed_forward(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual stream (N, D) and attention output (N, H * E) -> residual stream (N, D)."""
        x = x + self.o_proj(attended)
        h = self.post_norm(x)
        if self.config.mlp == "swiglu":
            return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + self.down_proj(functional.relu(self.up_proj(h)).square())


class Layer(nn.Module):
    """Two experts around one shared attention."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.reading = Expert(config)
        self.drawing = Expert(config)


class MoT(nn.Module):
    """The transformer: embedded rows in, hidden states and the longer context out."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.reading_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.drawing_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        head_width = config.width // config.heads
        # on the CPU by name: a model that is built on the meta device still has its angles
        steps = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu")
        inv_freq = config.rope_theta ** (-steps / head_width)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.inv_freq: torch.Tensor

    def empty_cache(self, batch_size: int) -> Cache:
        """The context of ``batch_size`` rows that have seen nothing."""
        config, device = self.config, self.inv_freq.device
        shape = (batch_size, 0, config.key_heads, config.width // config.heads)
        dtype = self.reading_norm.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        return Cache(
            keys=(empty,) * config.depth,
            values=(empty,) * config.depth,
            valid=torch.zeros(batch_size, 0, dtype=torch.bool, device=device),
            rope=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def forward(
        self, reading: torch.Tensor, drawing: torch.Tensor, packing: Packing, cache: Cache, keep_layers: bool = False
    ) -> Hidden:
        """Runs new rows after their contexts.

        reading (Nr, D) and drawing (Nd, D) are the embedded tokens in row order; row b continues row b of the cache.
        """
        mask = self._mask(packing, cache)
        cos, sin = self._rotation(packing, cache)
        keys, values, layers = [], [], []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            q, k, v = self._project(layer, reading, drawing, packing)
            q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
            k = torch.cat([cache.keys[i], k], dim=1)
            v = torch.cat([cache.values[i], v], dim=1)
            keys.append(k)
            values.append(v)
            attended = _attention(q, k, v, mask).flatten(0, 1).flatten(1)  # (B * L, H * E)
            if len(reading):
                reading = layer.reading.feed_forward(reading, _cells(attended, packing.reading_cells))
            if len(drawing):
                drawing = layer.drawing.feed_forward(drawing, _cells(attended, packing.drawing_cells))
            if keep_layers:
                layers.append((reading, drawing))
        own = torch.arange(packing.length, device=mask.device) < packing.lengths[:, None]
        extended = Cache(
            keys=tuple(keys),
            values=tuple(values),
            valid=torch.cat([cache.valid, own], dim=1),
            rope=cache.rope + packing.rope_advance,
        )
        return Hidden(self.reading_norm(reading), self.drawing_norm(drawing), extended, tuple(layers))

    def _project(
        self, layer: Layer, reading: torch.Tensor, drawing: torch.Tensor, packing: Packing
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of both blocks on the (B, L) grid."""
        blocks = []
        if len(reading):
            blocks.append(layer.reading.queries_keys_values(reading))
        if len(drawing):
            blocks.append(layer.drawing.queries_keys_values(drawing))
        grid = (packing.batch_size, packing.length)
        total = packing.batch_size * packing.length
        out = []
        for parts in zip(*blocks, strict=True):
            if len(parts) == 1 and len(parts[0]) == total:  # one expert, no padding: the grid is the block
                out.append(parts[0].unflatten(0, grid))
            else:
                out.append(torch.cat(parts).index_select(0, packing.grid_source).unflatten(0, grid))
        return tuple(out)

    def _mask(self, packing: Packing, cache: Cache) -> torch.Tensor:
        """bool (B, 1, L, S + L)."""
        context = cache.valid[:, None, :].expand(-1, packing.length, -1)
        return torch.cat([context, packing.visible], dim=2)[:, None]

    def _rotation(self, packing: Packing, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rope angles, (B, L, 1, E)."""
        angles = (cache.rope[:, None] + packing.rope_ids)[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        return angles.cos(), angles.sin()


def _cells(grid: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return grid if len(cells) == len(grid) else grid.index_select(0, cells)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, rotate-half form, (B, L, heads, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, L, H, E) queries over (B, S + L, K, E) keys and values -> (B, L, H, E)."""
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def drop_padding(cache: Cache) -> Cache:
    """The same contexts with columns that are padding in every row removed."""
    used = cache.valid.any(dim=0)
    if bool(used.all()):
        return cache
    columns = used.nonzero()[:, 0]
    return Cache(
        keys=tuple(k.index_select(1, columns) for k in cache.keys),
        values=tuple(v.index_select(1, columns) for v in cache.values),
        valid=cache.valid.index_select(1, columns),
        rope=cache.rope,
    )
