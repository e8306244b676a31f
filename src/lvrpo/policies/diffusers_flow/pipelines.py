"""The differences between pipelines of diffusers: prompts, latents, timesteps, and the call of the transformer.

Letters: B rows, L tokens of a prompt, N patches of an image, C = channels * patch^2 numbers of a patch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.flow import stochastic_steps
from lvrpo.sampling import shift_time
from lvrpo.types import Image

Grid = tuple[int, int]
"""Rows and columns of patches."""
Condition = Mapping[str, torch.Tensor]
"""An encoded prompt, without a batch dimension."""
ENCODED_PROMPTS = 256
"""Encoded prompts that are kept."""
DECODED_PIXELS = 2**20
"""Pixels of the images that go through the autoencoder at once; a larger image goes alone."""
TRAINED = "transformer"
"""The component that is trained."""


class FlowPipeline(ABC):
    """The frozen parts of a pipeline of diffusers, and how its transformer is called.

    Copies of a policy share it: ``copy.deepcopy`` returns the object itself. Prompts are encoded one at a time, so that
    an encoding does not depend on the batch, and kept.
    """

    components: ClassVar[tuple[str, ...]]
    """Components in model_index.json besides the transformer; those of ``optional`` may be null."""
    optional: ClassVar[tuple[str, ...]] = ()
    transformer_class: ClassVar[str]
    defaults: ClassVar[Sampling]
    """The defaults of the pipeline's own call."""
    linear_sigmas: ClassVar[bool] = True
    """Whether the pipeline passes sigmas 1, 1 - 1/T, ... to its scheduler instead of a number of steps T."""
    max_shift: ClassVar[float] = 1.15
    """Default for schedulers with dynamic shifting that name no maximum."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        """``pipe``: the pipeline of diffusers, read from ``folder``. Any: of an optional package."""
        self.pipe, self.folder = pipe, folder
        self.config: Any = pipe.transformer.config
        self._encoded: OrderedDict[str, Condition] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    @abstractmethod
    def guidance(self) -> Literal["classifier_free", "embedded", "none"]:
        """classifier_free: two branches; embedded: the scale is an input of the transformer (guidance distillation)."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Side of a patch in latent pixels."""

    @abstractmethod
    def encode_prompt(self, text: str) -> Condition:
        """A prompt as the pipeline's own encoders encode it."""

    @abstractmethod
    def velocity(
        self,
        transformer: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        grid: Grid,
        scale: float | None,
    ) -> torch.Tensor:
        """Velocity (B, N, C) at states (B, N, C) and times (B,), unguided; ``condition`` has B rows.

        ``scale``: of embedded guidance.
        """

    @abstractmethod
    def longest_prompt(self) -> tuple[Any, int]:
        """The tokenizer that reads most of a prompt, and its limit in tokens. Any: of an optional package."""

    # --- prompts ---

    def check_text(self, text: str) -> None:
        """Raises InputError for a prompt that would be cut off."""
        tokenizer, limit = self.longest_prompt()
        # characters of a longer text are not tokenized: that takes time without end
        length = len(tokenizer(text[: 64 * limit]).input_ids)
        if length > limit:
            raise InputError(f"a prompt of {length} tokens: {text[:40]!r}...: the limit is {limit}: shorten it")

    @torch.no_grad()
    def conditions(self, texts: Sequence[str], device: torch.device) -> Condition:
        """The encoded prompts with a batch dimension, each different one encoded once."""
        for text in dict.fromkeys(texts):
            if text not in self._encoded:
                with torch.autocast(device.type, enabled=False):
                    self._encoded[text] = self.encode_prompt(text)
            self._encoded.move_to_end(text)
        found = [self._encoded[text] for text in texts]
        while len(self._encoded) > ENCODED_PROMPTS:
            self._encoded.popitem(last=False)
        return self.collate(found, device)

    def collate(self, conditions: Sequence[Condition], device: torch.device) -> Condition:
        """Conditions of one length as a batch."""
        return {name: torch.stack([c[name] for c in conditions]).to(device) for name in conditions[0]}

    def prompt_tokens(self) -> int:
        """L at most."""
        return self.longest_prompt()[1]

    # --- latents ---

    @property
    def channels(self) -> int:
        """C."""
        return int(self.pipe.vae.config.latent_channels) * self.patch**2

    @property
    def stride(self) -> int:
        """Pixels along a side of a patch."""
        return int(self.pipe.vae_scale_factor) * self.patch

    def grid(self, image_size: tuple[int, int] | None) -> Grid:
        """The patches of an image of (height, width) pixels (None: the pipeline's own); raises InputError."""
        if image_size is None:
            side = int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)
            image_size = side, side
        height, width = image_size
        if height % self.stride or width % self.stride:
            raise InputError(
                f"image_size={[height, width]}: must be multiples of {self.stride}: use "
                f"{[max(1, side // self.stride) * self.stride for side in image_size]}"
            )
        return height // self.stride, width // self.stride

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, grid: Grid) -> list[Image]:
        """The images of latents (B, N, C), on the CPU, a bounded number at a time."""
        vae, found = self.pipe.vae, []
        pixels = unpack(latents.to(vae.device, vae.dtype), grid, self.patch)
        at_once = max(1, DECODED_PIXELS // (grid[0] * grid[1] * self.stride**2))
        with torch.autocast(latents.device.type, enabled=False):
            for part in pixels.split(at_once):
                images = vae.decode(part / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
                found += list(self.pipe.image_processor.postprocess(images, output_type="pt").float().cpu())
        return found

    # --- times ---

    def shift(self, grid: Grid) -> float:
        """The shift of times towards the noise, which depends on the size where the scheduler says so."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        mu = self._mu(grid)
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    def _mu(self, grid: Grid) -> float:
        """Linear in the number of patches."""
        config = self.pipe.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        start, end = config.get("base_shift", 0.5), config.get("max_shift", self.max_shift)
        slope = (end - start) / (high - low)
        return grid[0] * grid[1] * slope + (start - slope * low)

    def timesteps(self, sampling: Sampling, grid: Grid) -> torch.Tensor:
        """The sigmas (T + 1,) of the pipeline's scheduler, from 1 to 0: they are times as they are.

        With ``sampling.timestep_shift``: those of a scheduler of this shift. ``sampling.steps_after_window``: the rest
        after the window is that many steps, equal in unshifted time.
        """
        scheduler, chosen = self.pipe.scheduler, sampling.timestep_shift
        changes = {} if chosen is None else {"shift": chosen, "use_dynamic_shifting": False, "shift_terminal": None}
        scheduler = type(scheduler).from_config(scheduler.config, **changes)
        mu = {"mu": self._mu(grid)} if scheduler.config.use_dynamic_shifting else {}
        if self.linear_sigmas:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / sampling.num_steps, sampling.num_steps), **mu)
        else:
            scheduler.set_timesteps(sampling.num_steps, **mu)
        times, window, after = scheduler.sigmas.cpu(), stochastic_steps(sampling), sampling.steps_after_window
        if not window or after is None:
            return times
        shift, end = self.shift(grid) if chosen is None else chosen, window[-1] + 1
        rest = shift_time(times[end], 1 / shift) * torch.arange(after, -1, -1) / after
        return torch.cat([times[: end + 1], shift_time(rest, shift)[1:]])


def unpack(patches: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """Patches (B, N, C) to latents (B, channels, height, width)."""
    B, _, C = patches.shape
    cells = patches.view(B, *grid, C // patch**2, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(B, C // patch**2, grid[0] * patch, grid[1] * patch)


def pack(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Latents (B, channels, height, width) to patches (B, N, C)."""
    B, channels, height, width = latents.shape
    cells = latents.view(B, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, channels * patch**2)


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
    def guidance(self) -> Literal["classifier_free"]:
        return "classifier_free"

    @property
    def patch(self) -> int:
        return int(self.config.patch_size)

    def longest_prompt(self) -> tuple[Any, int]:
        """T5 reads 256 tokens; without it CLIP's 77 are all."""
        has_t5 = self.pipe.text_encoder_3 is not None
        return (self.pipe.tokenizer_3, 256) if has_t5 else (self.pipe.tokenizer, self.pipe.tokenizer_max_length)

    def prompt_tokens(self) -> int:
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
        self,
        transformer: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        grid: Grid,
        scale: float | None,
    ) -> torch.Tensor:
        v = transformer(
            hidden_states=unpack(x_t, grid, self.patch),
            timestep=1000 * t,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return pack(v, self.patch)


class Flux(FlowPipeline):
    """FLUX.1: dev, whose guidance scale is an input, and schnell, which has no guidance."""

    components = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    transformer_class = "FluxTransformer2DModel"
    defaults = Sampling(num_steps=28, guidance_scale=3.5, solver="euler")

    @property
    def patch(self) -> int:
        return 2

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
        self,
        transformer: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        grid: Grid,
        scale: float | None,
    ) -> torch.Tensor:
        rows = torch.arange(grid[0], device=x_t.device)
        columns = torch.arange(grid[1], device=x_t.device)
        places = torch.cartesian_prod(torch.zeros(1, device=x_t.device, dtype=rows.dtype), rows, columns)
        length = condition["embeds"].shape[1]
        return transformer(
            hidden_states=x_t,
            timestep=t,
            guidance=None if scale is None else x_t.new_full((len(x_t),), scale, dtype=torch.float32),
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["embeds"],
            txt_ids=torch.zeros(length, 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=places.to(x_t.dtype),
            return_dict=False,
        )[0]
