"""The reading tower: SigLIP-2 (arXiv:2502.14786) over patches of pictures of any size, module names as published."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from lvrpo.config import Config


class VitConfig(Config):
    """Sizes of the tower."""

    width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    heads: int = Field(ge=1)
    depth: int = Field(ge=1)
    """Layers that are used: one less than vit_config.json says."""
    patch_size: int = Field(ge=1)
    side: int = Field(ge=1)
    """Rows and columns of the table of positions."""
    norm_eps: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width}, heads={self.heads}: the width must be a multiple of the heads")
        return self


class Vit(nn.Module):
    """Patches in, features out; the last layer of the published tower is left out, its last norm is not."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(3 * config.patch_size**2, config.width),
                "position_embedding": nn.Embedding(config.side**2, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VitLayer(config) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Pictures of one grid: patches (B, N, 3 p^2) and their places (N,) in the table -> features (B, N, Dv)."""
        x = self.embeddings["patch_embedding"](patches) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.post_layernorm(x)


class VitLayer(nn.Module):
    """One layer; every token of a picture sees all others of it."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(config.width, config.width) for name in names})
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(config.width, config.mlp_width), "fc2": nn.Linear(config.mlp_width, config.width)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](attended)
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](functional.gelu(h, approximate="tanh"))
