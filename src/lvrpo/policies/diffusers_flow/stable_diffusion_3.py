"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.pipelines import Condition, FlowPipeline, Grid, pack, unpack


class StableDiffusion3(FlowPipeline):
    """Stable Diffusion 3 and 3.5 (arXiv:2403.03206); the third text encoder may be absent."""

    components = (
        *("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("text_encoder_3", "tokenizer_3"),
    )
    optional = ("text_encoder_3", "tokenizer_3")
    transformer_class = "SD3Transformer2DModel"
    defaults = Sampling(num_steps=28, guidance_scale=7.0, solver="euler")
    linear_sigmas = False
    max_shift = 1.16

    @property
    def patch(self) -> int:
        return int(self.config.patch_size)

    def longest_prompt(self) -> tuple[Any, int]:
        """T5 reads 256 tokens; without it CLIP's 77 are all."""
        has_t5 = self.pipe.text_encoder_3 is not None
        return (self.pipe.tokenizer_3, 256) if has_t5 else (self.pipe.tokenizer, self.pipe.tokenizer_max_length)

    def prompt_tokens(self, grid: Grid) -> int:
        return self.pipe.tokenizer_max_length + 256

    def grid(self, image_size: tuple[int, int] | None) -> Grid:
        """See ``FlowPipeline.grid``; positions limit the size."""
        grid, most = super().grid(image_size), int(self.config.pos_embed_max_size)
        if max(grid) > most:
            raise InputError(
                f"image_size={[side * self.stride for side in grid]}: this model draws sides of up to "
                f"{most * self.stride}: use less"
            )
        return grid

    def encode_prompt(self, text: str) -> Condition:
        device = self.pipe.text_encoder.device
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            text, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, grid: Grid, scale: float | None
    ) -> Tensor:
        v = transformer(
            hidden_states=unpack(x_t, grid, self.patch),
            timestep=1000 * t,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return pack(v, self.patch)
