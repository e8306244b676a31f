"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.pipelines import Condition, FlowPipeline, Grid, pack, unpack


class ZImage(FlowPipeline):
    """Z-Image (arXiv:2511.22699); its own ``guidance_scale`` is one less, so that 0 there is 1 here."""

    components = ("scheduler", "vae", "text_encoder", "tokenizer")
    transformer_class = "ZImageTransformer2DModel"
    defaults = Sampling(num_steps=50, guidance_scale=6.0, solver="euler")

    @property
    def default_size(self) -> int:
        return 1024

    def longest_prompt(self) -> tuple[Any, int]:
        """512 tokens, among them those of the chat template."""
        tokenizer = self.pipe.tokenizer
        turn = [{"role": "user", "content": ""}]
        template = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return tokenizer, 512 - len(tokenizer(template).input_ids)

    def prompt_tokens(self, grid: Grid) -> int:
        return 512

    def encode_prompt(self, text: str) -> Condition:
        device = self.pipe.text_encoder.device
        ((embeds,), _) = self.pipe.encode_prompt(text, device, do_classifier_free_guidance=False)
        return {"embeds": embeds}

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, grid: Grid, scale: float | None
    ) -> Tensor:
        """The transformer takes 1 - t, and its output points from noise to data."""
        embeds, mask = condition["embeds"], condition.get("mask")
        texts = list(embeds) if mask is None else [row[kept] for row, kept in zip(embeds, mask, strict=True)]
        frames = unpack(x_t, grid, self.patch)[:, :, None]
        v = transformer(list(frames), 1 - t, texts, return_dict=False)[0]
        return -pack(torch.stack(list(v))[:, :, 0], self.patch)
