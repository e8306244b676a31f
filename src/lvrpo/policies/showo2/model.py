"""The network of Show-o2 (arXiv:2506.15564): a Qwen2.5 with two paths from latents in, and a flow head out.

Parameters have the names of the published weights. Letters: B rows, L places of a row, D width of the language model,
M images of a batch, N tokens of an image, C channels of a latent, h x w its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

HEADS, KEY_HEADS = 32, 8
"""Heads of the flow head, in all published sizes."""
HEAD_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
FREQUENCIES = 256


@dataclass(frozen=True)
class Rows:
    """A batch of rows as the network is fed, padded on the left."""

    x: torch.Tensor
    """(B, L, D)."""
    attention: torch.Tensor
    """bool (B, 1, L, L): whether a place (row) sees another (column)."""
    positions: torch.Tensor
    """int64 (B, L)."""
    images: tuple[tuple[int, int, int], ...]
    """Row, first place (that of the time) and number of places of each image, in order."""
    image_at: torch.Tensor
    """int64 (B, L): the image of each place by its number, that of images where there is none."""


Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of places (B, L, head width)."""


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32, as in Llama."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * functional.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype)


class PatchEmbed(nn.Module):
    """Patches of a latent (M, C, h, w) to tokens (M, N, width)."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time in [0, 1], and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class HeadAttention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_width = width // HEADS
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, KEY_HEADS * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, KEY_HEADS * self.head_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_width), RMSNorm(self.head_width)

    def forward(self, x: torch.Tensor, attention: torch.Tensor, rope: Rope) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(self.q_norm(q), rope), _rotate(self.k_norm(k), rope)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        groups = HEADS // KEY_HEADS
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=attention)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class HeadMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class HeadLayer(nn.Module):
    """A layer of the flow head; the time modulates the places of images alone."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.self_attn = HeadAttention(width)
        self.mlp = HeadMLP(width, inner)
        self.input_layernorm = RMSNorm(width, 1e-5)
        self.post_attention_layernorm = RMSNorm(width, 1e-5)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        rows: Rows,
        rope: Rope,
    ) -> torch.Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            _at_images(value, rows, float(i in (2, 5)))
            for i, value in enumerate(self.adaLN_modulation(time).chunk(6, 1))
        )
        x = x + gate * self.self_attn(_modulate(self.input_layernorm(x), shift, scale), rows.attention, rope)
        return x + mlp_gate * self.mlp(_modulate(self.post_attention_layernorm(x), mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """States to the values of patches (B, L, patch * patch * C)."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, time: torch.Tensor, rows: Rows) -> torch.Tensor:
        shift, scale = (_at_images(value, rows, 0.0) for value in self.adaLN_modulation(time).chunk(2, dim=1))
        return self.linear(_modulate(self.norm_final(x), shift, scale))


@dataclass(frozen=True)
class Showo2Sizes:
    """Sizes of the network in config.json."""

    vocabulary: int
    width: int
    """D."""
    vision_width: int
    patch: int
    channels: int
    grid: tuple[int, int]
    """Height and width in tokens of the images that it was trained on last."""
    head_layers: int
    head_width: int = 2048
    head_inner: int = 8192


class Showo2Model(nn.Module):
    """The whole network but its autoencoder."""

    def __init__(self, sizes: Showo2Sizes, llm: Any, vision: Any) -> None:
        """``llm``, ``vision``: a Qwen2Config and a SiglipVisionConfig (its last layer is left out). Any: optional."""
        super().__init__()
        from transformers import Qwen2ForCausalLM
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        self.sizes = sizes
        self.showo = Qwen2ForCausalLM(llm)
        self.image_embedder_und = PatchEmbed(sizes.patch, sizes.channels, sizes.vision_width)
        self.image_embedder_gen = PatchEmbed(sizes.patch, sizes.channels, sizes.width)
        self.position_embedding = nn.Embedding((vision.image_size // vision.patch_size) ** 2, sizes.vision_width)
        self.und_trans = SiglipEncoder(vision)
        joint = sizes.vision_width + sizes.width
        self.fusion_proj = nn.Sequential(
            RMSNorm(joint), nn.Linear(joint, sizes.width), nn.GELU(), nn.Linear(sizes.width, sizes.width)
        )
        self.time_embed = TimeEmbedding(sizes.head_width)
        self.diff_proj, self.time_embed_proj = nn.Identity(), nn.Identity()
        if sizes.width != sizes.head_width:
            widths = sizes.head_width, sizes.head_width
            self.diff_proj = nn.Sequential(nn.Linear(sizes.width, widths[0]), nn.GELU(), nn.Linear(*widths))
            self.time_embed_proj = nn.Linear(sizes.head_width, sizes.width)
        layers = (HeadLayer(sizes.head_width, sizes.head_inner) for _ in range(sizes.head_layers))
        self.diffusion_head_a = nn.ModuleList(layers)
        self.diffusion_head_b = FinalLayer(sizes.head_width, sizes.patch, sizes.channels)
        self.make_rotary()

    def make_rotary(self) -> None:
        """Computes the rotary angles, which no file holds; called again after a "meta" network got its tensors."""
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        width = self.sizes.head_width
        self.showo.model.rotary_emb = Qwen2RotaryEmbedding(self.showo.config)
        config = LlamaConfig(
            hidden_size=width,
            num_attention_heads=HEADS,
            head_dim=width // HEADS,
            max_position_embeddings=131_072,
            rope_parameters=dict(HEAD_ROPE),  # type: ignore[arg-type]  # a typed dictionary of transformers
        )
        self._head_rope = [LlamaRotaryEmbedding(config)]  # in a list, as it is no part of the published names

    def embed_images(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Latents (M, C, h, w) at Show-o2's own times (M,), 0 noise and 1 data, as places (M, 1 + N, D)."""
        dtype = self.image_embedder_gen.proj.weight.dtype
        latents = latents.to(dtype)
        height, width = (side // self.sizes.patch for side in latents.shape[-2:])
        semantic = self.image_embedder_und(latents) + self._positions(height, width)
        semantic = self.und_trans(inputs_embeds=semantic).last_hidden_state
        fused = self.fusion_proj(torch.cat([semantic, self.image_embedder_gen(latents)], dim=-1))
        return torch.cat([self.time_embed_proj(self.time_embed(t, dtype))[:, None], fused], dim=1)

    @property
    def config(self) -> Any:
        """The Qwen2Config. Any: of an optional package."""
        return self.showo.config

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of text tokens."""
        return self.showo.model.embed_tokens

    def states(self, rows: Rows, layer: int | None = None) -> torch.Tensor:
        """Final states of the language model (B, L, D); ``layer``: those after so many layers instead."""
        out = self.showo.model(
            inputs_embeds=rows.x,
            attention_mask=rows.attention,
            position_ids=rows.positions,
            use_cache=False,
            output_hidden_states=layer is not None,
        )
        return out.last_hidden_state if layer is None else out.hidden_states[layer]

    def velocity(self, rows: Rows, t: torch.Tensor) -> torch.Tensor:
        """Show-o2's own velocity (data minus noise) of the images of rows, as tokens (M, N, patch * patch * C)."""
        x, time = self.diff_proj(self.states(rows)), self.time_embed(t, rows.x.dtype)
        rope = self._head_rope[0].to(x.device)(x, rows.positions)
        for layer in self.diffusion_head_a:
            x = layer(x, time, rows, rope)
        x = self.diffusion_head_b(x, time, rows)
        return torch.stack([x[row, start + 1 : start + length] for row, start, length in rows.images])

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """(1, N, vision width): interpolated to another grid than that of the images it was trained on."""
        table = self.position_embedding.weight
        if (height, width) == self.sizes.grid and height * width == len(table):
            return table[None]
        side = math.isqrt(len(table))
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = functional.interpolate(square.float(), size=(height, width), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(table.dtype)


def place_rows(
    before: Sequence[torch.Tensor], images: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor]
) -> Rows:
    """Rows of embedded text (l, D), an image's places (1 + N, D) or None, and text.

    Attention is causal; an image sees all of itself.
    """
    parts = [[b, *([] if i is None else [i]), a] for b, i, a in zip(before, images, after, strict=True)]
    lengths = [sum(len(part) for part in row) for row in parts]
    most, device = max(lengths), before[0].device
    x = torch.stack(
        [functional.pad(torch.cat(row), (0, 0, most - n, 0)) for row, n in zip(parts, lengths, strict=True)]
    )
    places = torch.arange(most, device=device)
    padding = most - torch.tensor(lengths, device=device)
    attention = (places[:, None] >= places) & (places >= padding[:, None, None])
    spans: list[tuple[int, int, int]] = []
    image_at = torch.full((len(parts), most), sum(image is not None for image in images), device=device)
    for row, (b, image) in enumerate(zip(before, images, strict=True)):
        if image is not None:
            start = most - lengths[row] + len(b)
            image_at[row, start : start + len(image)] = len(spans)
            spans.append((row, start, len(image)))
            attention[row, start : start + len(image), start : start + len(image)] = True
    attention = attention | torch.eye(most, dtype=torch.bool, device=device)  # a padded place sees itself
    positions = (places - padding[:, None]).clamp(min=0)
    return Rows(x, attention[:, None], positions, tuple(spans), image_at)


def to_tokens(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Latents (M, C, h, w) to tokens (M, N, patch * patch * C): runs of values in raster order, as in the head."""
    return latents.flatten(2).transpose(1, 2).reshape(len(latents), -1, patch * patch * latents.shape[1])


def to_latents(tokens: torch.Tensor, size: tuple[int, int], channels: int) -> torch.Tensor:
    """The inverse of ``to_tokens``; ``size``: height and width of the latents."""
    return tokens.reshape(len(tokens), -1, channels).transpose(1, 2).reshape(len(tokens), channels, *size)


def _rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """(B, L, heads, width) by angles (B, L, width)."""
    cos, sin = (each[:, :, None] for each in rope)
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * (1 + scale.float()) + shift.float()).to(x.dtype)


def _at_images(values: torch.Tensor, rows: Rows, elsewhere: float) -> torch.Tensor:
    """Values of images (M, width) at their places (B, L, width), and a number at all others."""
    return torch.cat([values, values.new_full((1, values.shape[1]), elsewhere)])[rows.image_at]
