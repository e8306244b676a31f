"""Qwen-Image, and Qwen-Image-Edit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.pipelines import Condition, FlowPipeline, Grid
from lvrpo.policies.transformers_checkpoint import require_same_images
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.policies.video_frames import decode_frames, encode_frames
from lvrpo.types import Image

WIDEST = 200
"""Ratio of the longer side to the shorter one up to which the processor of Qwen2-VL reads an image."""


class QwenImage(FlowPipeline):
    """Qwen-Image (arXiv:2508.02324). Guidance keeps the norm of the conditional velocity of each patch."""

    components = ("scheduler", "vae", "text_encoder", "tokenizer")
    transformer_class = "QwenImageTransformer2DModel"
    defaults = Sampling(num_steps=50, guidance_scale=4.0, guidance_renorm="channel_match", solver="euler")
    empty_prompt = " "
    prompt_prefix: ClassVar[str] = ""
    """Before the prompt in the template, which names the source image."""

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
        template = pipe.tokenizer(pipe.prompt_template_encode.format(self.prompt_prefix)).input_ids
        return pipe.tokenizer, 512 + pipe.prompt_template_encode_start_idx - len(template)

    def prompt_tokens(self, grid: Grid) -> int:
        return 512

    def encode_prompt(self, text: str) -> Condition:
        device = self.pipe.text_encoder.device
        return {"embeds": self.pipe.encode_prompt(text, device, max_sequence_length=512)[0][0]}

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, grid: Grid, scale: float | None
    ) -> Tensor:
        source, N = condition.get("source"), x_t.shape[1]
        images = 1 if source is None else 2
        return transformer(
            hidden_states=x_t if source is None else torch.cat([x_t, source], 1),
            timestep=t,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition.get("mask"),
            img_shapes=[[(1, *grid)] * images] * len(x_t),
            return_dict=False,
        )[0][:, :N]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_frames(self.pipe.vae, latents)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return encode_frames(self.pipe.vae, pixels)


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: Qwen2.5-VL reads the source image, whose latents follow those of the output, too.

    Both branches of guidance have the image. Its tokens have the positions of rows and columns that the weights were
    trained with, which pipelines of diffusers up to 0.42 leave out with transformers 5 (diffusers issue 14194).
    """

    components = (*QwenImage.components, "processor")
    encodes_source = True

    def __init__(self, pipe: Any, folder: Path) -> None:
        """Raises InputError where the processor and the text encoder do not belong together."""
        super().__init__(pipe, folder)
        require_same_images(folder / "processor", pipe.processor, pipe.text_encoder.config)

    @classmethod
    def part_class(cls, part: str, found: Any) -> Any:
        """The processor without its part for videos, which needs torchvision."""
        mixin = transformers_library("a processor").ProcessorMixin
        return _images_alone(found) if part == "processor" and issubclass(found, mixin) else found

    def grid(self, image_size: tuple[int, int] | None) -> Grid:
        """See ``FlowPipeline.grid``; the text encoder must be able to read an image of these sides."""
        grid = super().grid(image_size)
        short, long = sorted(self.read_size(grid))
        if long > WIDEST * short:
            raise InputError(
                f"image_size={[side * self.stride for side in grid]}: the text encoder reads images of sides up to "
                f"{WIDEST} : 1: use a size that is less elongated"
            )
        return grid

    def prompt_tokens(self, grid: Grid) -> int:
        processor, (height, width) = self.pipe.processor.image_processor, self.read_size(grid)
        return 511 + processor.get_number_of_image_patches(height, width, {}) // processor.merge_size**2

    def read_size(self, grid: Grid) -> tuple[int, int]:
        """Height and width of the source image for the text encoder, whose processor resizes it further."""
        return grid[0] * self.stride, grid[1] * self.stride

    def encode_edit(self, text: str, source: Image, grid: Grid) -> Condition:
        pipe = self.pipe
        image = pipe.image_processor.resize(to_pil(source), *self.read_size(grid))
        words = pipe.prompt_template_encode.format(self.prompt_prefix + text)
        inputs = pipe.processor(text=[words], images=[image], return_tensors="pt").to(pipe.text_encoder.device)
        states = pipe.text_encoder(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return {"embeds": states[0, pipe.prompt_template_encode_start_idx :]}


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-2509 and later, with one source image: the text encoder reads it at about 384 x 384."""

    prompt_prefix = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"

    def read_size(self, grid: Grid) -> tuple[int, int]:
        """An area of 384 x 384, sides rounded to multiples of 32."""
        ratio = math.sqrt(grid[0] / grid[1])
        return round(384 * ratio / 32) * 32, round(384 / ratio / 32) * 32


def _images_alone(processor: Any) -> Any:
    """A subclass of a processor of transformers that reads no videos. Any: classes of an optional package."""

    class Images(processor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template)

    return Images
