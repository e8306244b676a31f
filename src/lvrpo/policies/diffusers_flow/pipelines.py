"""The base of pipelines of diffusers: prompts, latents and timesteps. Each pipeline has a file of its own.

Letters: B rows, L tokens of a prompt, N patches of an image, C = channels * patch^2 numbers of a patch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.weak import TensorWeakRef

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.base import Sampling
from lvrpo.policies.flow import stochastic_steps
from lvrpo.policies.latent_cache import LatentCache
from lvrpo.sampling import shift_time
from lvrpo.types import Image

Grid = tuple[int, int]
"""Rows and columns of patches."""
Row = tuple[str, Image | None]
"""The text of a prompt and its source image."""
Condition = Mapping[str, torch.Tensor]
"""An encoded prompt without a batch dimension: ``embeds`` (L, D) and what else the transformer takes.

A batch of different lengths has a ``mask`` (B, L) besides, and edits have the latents ``source`` (B, N, C)."""
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
    empty_prompt: ClassVar[str] = ""
    """The prompt of the unguided branch."""
    encodes_source: ClassVar[bool] = False
    """Whether a prompt is encoded together with its source image."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        """``pipe``: the pipeline of diffusers, read from ``folder``. Any: of an optional package."""
        self.pipe, self.folder = pipe, folder
        self.config: Any = pipe.transformer.config
        self._encoded: OrderedDict[Hashable, tuple[TensorWeakRef | None, Condition]] = OrderedDict()
        self._sources = LatentCache()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def guidance(self) -> Literal["classifier_free", "embedded", "none"]:
        """classifier_free: two branches; embedded: the scale is an input of the transformer (guidance distillation)."""
        return "classifier_free"

    @property
    def patch(self) -> int:
        """Side of a patch in latent pixels."""
        return 2

    @classmethod
    def part_class(cls, part: str, found: Any) -> Any:
        """The class that reads a component; ``found``: the one of model_index.json. Any: of an optional package."""
        return found

    @abstractmethod
    def encode_prompt(self, text: str) -> Condition:
        """A prompt as the pipeline's own encoders encode it."""

    def encode_edit(self, text: str, source: Image, grid: Grid) -> Condition:
        """A prompt and its source image, of a pipeline with ``encodes_source``."""
        raise NotImplementedError

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, grid: Grid, scale: float | None
    ) -> Tensor:
        """Velocity (B, N, C) at states (B, N, C) and times (B,), unguided; ``condition`` has B rows.

        ``scale``: of embedded guidance.
        """

    @abstractmethod
    def longest_prompt(self) -> tuple[Any, int]:
        """The tokenizer that reads most of a prompt, and its limit in tokens. Any: of an optional package."""

    # --- prompts ---

    def check_text(self, text: str) -> None:
        """Raises InputError for a prompt that would be cut off, or holds a marker of the encoders."""
        tokenizer, limit = self.longest_prompt()
        markers = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        if found := next((marker for marker in markers if marker in text), None):
            raise InputError(f"{text[:40]!r}: holds {found}, a marker of the model: leave it out")
        # characters of a longer text are not tokenized: that takes time without end
        length = len(tokenizer(text[: 64 * limit]).input_ids)
        if length > limit:
            raise InputError(f"a prompt of {length} tokens: {text[:40]!r}...: the limit is {limit}: shorten it")

    @torch.no_grad()
    def conditions(self, rows: Sequence[Row], grid: Grid, device: torch.device) -> Condition:
        """The encoded prompts with a batch dimension, each different one encoded once; images differ by object."""
        keys = [(text, id(source), grid) if self.encodes_source else text for text, source in rows]
        for key, (text, source) in zip(keys, rows, strict=True):
            reads = source if self.encodes_source else None
            image = self._encoded[key][0] if key in self._encoded else None
            if key not in self._encoded or (image is not None and image() is not reads):  # another image had this id
                with torch.autocast(device.type, enabled=False):
                    encoded = self.encode_prompt(text) if reads is None else self.encode_edit(text, reads, grid)
                self._encoded[key] = None if reads is None else TensorWeakRef(reads), encoded
            self._encoded.move_to_end(key)
        found = [self._encoded[key][1] for key in keys]
        while len(self._encoded) > ENCODED_PROMPTS:
            self._encoded.popitem(last=False)
        return self.collate(found, device)

    def collate(self, conditions: Sequence[Condition], device: torch.device) -> Condition:
        """Conditions as a batch, see ``Condition``."""
        batch = {name: pad_sequence([c[name] for c in conditions], True).to(device) for name in conditions[0]}
        lengths = torch.tensor([len(c["embeds"]) for c in conditions])
        if lengths.min() < lengths.max():
            batch["mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        return batch

    def prompt_tokens(self, grid: Grid) -> int:
        """L at most, of the prompt of an image of this size."""
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

    @property
    def default_size(self) -> int:
        """Side in pixels of an image that the pipeline draws by default."""
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    def grid(self, image_size: tuple[int, int] | None) -> Grid:
        """The patches of an image of (height, width) pixels (None: the pipeline's own); raises InputError."""
        if image_size is None:
            image_size = self.default_size, self.default_size
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
                images = self.decode_latents(part)
                found += list(self.pipe.image_processor.postprocess(images, output_type="pt").float().cpu())
        return found

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of latents (B, channels, height, width)."""
        vae = self.pipe.vae
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    @torch.no_grad()
    def encode_source(self, image: Image, grid: Grid) -> torch.Tensor:
        """Latents (N, C) of an image (3, H, W), resized to the size of the grid: the mean of the encoder's posterior.

        Those of the images that were used last are kept.
        """
        return self._sources.get(image, grid, lambda image: self._encode_source(image, grid))

    def _encode_source(self, image: Image, grid: Grid) -> torch.Tensor:
        vae, (height, width) = self.pipe.vae, (side * self.stride for side in grid)
        pixels = self.pipe.image_processor.preprocess(to_pil(image), height, width)
        with torch.autocast(vae.device.type, enabled=False):
            latents = self.encode_pixels(pixels.to(vae.device, vae.dtype))
        return pack(latents, self.patch)[0]

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents (B, channels, height, width) of pixels (B, 3, H, W) in [-1, 1]."""
        vae = self.pipe.vae
        return (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor

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
