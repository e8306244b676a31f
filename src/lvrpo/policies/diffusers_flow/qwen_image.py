"""Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.pipelines import Condition, FlowPipeline, Grid


class QwenImage(FlowPipeline):
    """Qwen-Image (arXiv:2508.02324). Guidance keeps the norm of the conditional velocity of each patch."""

    components = ("scheduler", "vae", "text_encoder", "tokenizer")
    transformer_class = "QwenImageTransformer2DModel"
    defaults = Sampling(num_steps=50, guidance_scale=4.0, guidance_renorm="channel_match", solver="euler")
    empty_prompt = " "

    def __init__(self, pipe: Any, folder: Path) -> None:
        """See ``FlowPipeline``."""
        super().__init__(pipe, folder)
        rope = pipe.transformer.pos_embed
        if rope.pos_freqs.is_meta:  # of a transformer without weights: neither parameters nor buffers
            pipe.transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)

    @property
    def channels(self) -> int:
        return int(self.config.in_channels)

    def longest_prompt(self) -> tuple[Any, int]:
        """512 tokens, among them what the template puts after the prompt."""
        pipe = self.pipe
        template = pipe.tokenizer(pipe.prompt_template_encode.format("")).input_ids
        return pipe.tokenizer, 512 + pipe.prompt_template_encode_start_idx - len(template)

    def prompt_tokens(self) -> int:
        return 512

    def encode_prompt(self, text: str) -> Condition:
        device = self.pipe.text_encoder.device
        return {"embeds": self.pipe.encode_prompt(text, device, max_sequence_length=512)[0][0]}

    def velocity(
        self,
        transformer: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        grid: Grid,
        scale: float | None,
    ) -> torch.Tensor:
        return transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition.get("mask"),
            img_shapes=[[(1, *grid)]] * len(x_t),
            return_dict=False,
        )[0]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        mean, std = (latents.new_tensor(x)[:, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
        return vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]
