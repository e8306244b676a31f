"""FLUX.1 dev, schnell and Kontext."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.pipelines import Condition, FlowPipeline, Grid


class Flux(FlowPipeline):
    """FLUX.1: dev, whose guidance scale is an input, and schnell, which has no guidance."""

    components = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    transformer_class = "FluxTransformer2DModel"
    defaults = Sampling(num_steps=28, guidance_scale=3.5, solver="euler")

    @property
    def guidance(self) -> Literal["embedded", "none"]:
        return "embedded" if self.config.guidance_embeds else "none"

    def longest_prompt(self) -> tuple[Any, int]:
        """512 tokens of T5."""
        return self.pipe.tokenizer_2, 512

    def encode_prompt(self, text: str) -> Condition:
        embeds, pooled, _ = self.pipe.encode_prompt(text, device=self.pipe.text_encoder.device)
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, grid: Grid, scale: float | None
    ) -> Tensor:
        source, N = condition.get("source"), x_t.shape[1]
        places = _places(1 if source is None else 2, grid, x_t)
        if source is not None:
            x_t = torch.cat([x_t, source], 1)
        length = condition["embeds"].shape[1]
        return transformer(
            hidden_states=x_t,
            timestep=t,
            guidance=None if scale is None else x_t.new_full((len(x_t),), scale, dtype=torch.float32),
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["embeds"],
            txt_ids=torch.zeros(length, 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=places,
            return_dict=False,
        )[0][:, :N]


def _places(images: int, grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """(images * N, 3), of the dtype and on the device of ``like``: the image, row and column of each patch."""
    return torch.cartesian_prod(*(torch.arange(n, device=like.device) for n in (images, *grid))).to(like.dtype)


class FluxKontext(Flux):
    """FLUX.1 Kontext (arXiv:2506.15742): the patches of a source image follow those of the image that is drawn."""
