"""A flow-matching pipeline of diffusers as a policy: its transformer is trained, all other parts are frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.adapter import Modules, is_adapter
from lvrpo.policies.base import Sampling, TokenCounts, with_seeds
from lvrpo.policies.diffusers_flow.checkpoint import load_pipeline, save_pipeline
from lvrpo.policies.diffusers_flow.pipelines import FlowPipeline, Grid, Row
from lvrpo.policies.flow_policy import LatentFlowPolicy
from lvrpo.types import Group, Image, Prompt, SegmentKind, TaskKind, Trajectory


class DiffusersPolicy(LatentFlowPolicy[Row]):
    """A flow-matching text-to-image pipeline of diffusers.

    It draws from text; ``DiffusersEditPolicy`` edits, too, and ``DiffusersEditOnlyPolicy`` edits alone. Its states are
    latents as the transformer takes them, in patches; a time is a sigma of the scheduler.
    """

    segment_kinds: tuple[SegmentKind, ...] = ("flow",)
    tasks: tuple[TaskKind, ...] = ("generate",)
    judging_sides = ()
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"(?P<expert>transformer)\..*\.(attn|attn2|attention)\."
        r"(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
        "mlp": r"(?P<expert>transformer)\.(.*\.(ff|ff_context|img_mlp|txt_mlp)\.net\.(0\.proj|2)"
        r"|.*\.feed_forward\.w[123]|single_transformer_blocks\.\d+\.(proj_mlp|proj_out))",
    }

    def __init__(self, transformer: nn.Module, pipeline: FlowPipeline) -> None:
        """``transformer``: of diffusers; ``pipeline`` holds all other parts."""
        super().__init__()
        self.transformer: Any = transformer  # Any: a class of an optional package
        self.pipeline = pipeline
        self.train(False)

    # --- settings ---

    @property
    def base_weight(self) -> torch.Tensor:
        """The first weight of the transformer."""
        return next(p for name, p in self.transformer.named_parameters() if not is_adapter(name))

    @property
    def two_branches(self) -> bool:
        """Whether guidance is classifier-free."""
        return self.pipeline.guidance == "classifier_free"

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether blocks of the transformer are computed again in the backward pass."""
        self.checkpointed = on
        if on:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()

    def default_sampling(self, task: TaskKind) -> Sampling:
        """The steps and the guidance that the pipeline has by default, and Euler's step."""
        return replace(self.pipeline.defaults, **({"guidance_scale": 1.0} if self.pipeline.guidance == "none" else {}))

    def timestep_shift(self) -> float:
        """Shift of the scheduler; where it depends on the size, at the pipeline's default size."""
        return self.pipeline.shift(self.pipeline.grid(None))

    def check_text(self, text: str) -> None:
        """Raises InputError where the encoders would cut a text off."""
        self.pipeline.check_text(text)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises InputError for settings that the pipeline has no use for, and for a size that it cannot draw."""
        self.pipeline.grid(sampling.image_size)
        kind, default = self.pipeline.guidance, Sampling()
        unused = ["image_guidance_scale"]
        if kind != "classifier_free":
            unused += ["guidance_renorm", "guidance_interval", "guided_logprobs"]
        if kind == "none":
            unused.append("guidance_scale")
        for name in unused:
            if (value := getattr(sampling, name)) != getattr(default, name):  # fields of Sampling
                reason = "guides by text alone" if name == "image_guidance_scale" else f"has {GUIDANCE[kind]}"
                raise InputError(f"{name}={value}: this model {reason}: use {getattr(default, name)}")

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """Every pass of an image includes the tokens of its prompt, and the patches of a source image."""
        image = trajectory.image
        if image is None:
            return TokenCounts(0, 0, 0)
        grid = self.latent_grid((image.shape[1], image.shape[2]))
        return TokenCounts(0, 0, self.row_tokens(self.row(trajectory.prompt), grid))

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; raises InputError for a prompt with an image or for a text output."""
        for prompt in prompts:
            self.check_prompt(prompt, sampling)
        self.check_sampling(sampling)
        drawn = iter(self.draw(with_seeds(prompts, seeds), sampling))
        return [Group(prompt, tuple(islice(drawn, sampling.group_size))) for prompt in prompts]

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """See ``PolicyDefaults.check_prompt``."""
        named = f"prompt {prompt.id!r}"
        if prompt.output != ("image",):
            raise InputError(f"{named}: this model draws and writes nothing: ask for an image alone")
        images = len(prompt.images)
        if not images and "generate" not in self.tasks:
            raise InputError(f"{named}: this model edits an image and draws none from text alone: give it one")
        if images and "edit" not in self.tasks:
            raise InputError(f"{named}: this model draws from text alone, not from an image: leave the image out")
        if images > 1:
            raise InputError(f"{named}: has {images} images: this model edits one: leave the others out")
        try:
            self.check_text(prompt.text)
        except InputError as error:
            raise InputError(f"{named}: {error}") from None

    # --- the transformer ---

    def row(self, prompt: Prompt) -> Row:
        """See ``LatentFlowPolicy.row``."""
        return prompt.text, next(iter(prompt.images), None)

    def without_text(self, row: Row) -> Row:
        """See ``LatentFlowPolicy.without_text``."""
        return self.pipeline.empty_prompt, row[1]

    def alike(self, rows: Sequence[Row]) -> list[list[int]]:
        """See ``LatentFlowPolicy.alike``: rows with a source image are not mixed with others."""
        return [[i for i, (_, source) in enumerate(rows) if (source is None) == drawn] for drawn in (True, False)]

    def row_tokens(self, row: Row, grid: Grid) -> int:
        """See ``LatentFlowPolicy.row_tokens``; texts are padded."""
        return (1 + (row[1] is not None)) * grid[0] * grid[1] + self.pipeline.prompt_tokens(grid)

    def latent_grid(self, image_size: tuple[int, int] | None) -> Grid:
        """See ``LatentFlowPolicy.latent_grid``."""
        return self.pipeline.grid(image_size)

    def latent_shape(self, grid: Grid) -> tuple[int, int]:
        """See ``LatentFlowPolicy.latent_shape``."""
        return grid[0] * grid[1], self.pipeline.channels

    def times(self, sampling: Sampling, grid: Grid) -> torch.Tensor:
        """See ``LatentFlowPolicy.times``: sigmas of the scheduler."""
        return self.pipeline.timesteps(sampling, grid)

    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> list[Image]:
        """See ``LatentFlowPolicy.decode_latents``."""
        return self.pipeline.decode(latents, grid)

    def flow(self, rows: Sequence[Row], x_t: torch.Tensor, t: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
        """See ``LatentFlowPolicy.flow``."""
        dtype, branches = self.base_weight.dtype, len(rows) // len(x_t)
        condition = dict(self.pipeline.conditions(rows, grid, self.device))
        sources = [source for _, source in rows if source is not None]
        if sources:
            different = {id(source): source for source in sources}
            latents = {key: self.pipeline.encode_source(source, grid) for key, source in different.items()}
            condition["source"] = torch.stack([latents[id(source)] for source in sources]).to(self.device)
        condition = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        embedded = scale if self.pipeline.guidance == "embedded" else None
        x_t, t = x_t.repeat(branches, 1, 1).to(dtype), t.repeat(branches)
        with self.autocast():
            v = self.pipeline.velocity(self.transformer, x_t, t, condition, grid, embedded)
        return v.float()

    # --- weights ---

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All under "generate"."""
        return {"understand": [], "generate": [p for p in self.parameters() if p.requires_grad], "shared": []}

    def stored_name(self, name: str) -> str:
        """The name within the transformer, which peft and diffusers use."""
        return name.removeprefix("transformer.")

    def save_model(self, folder: Path) -> None:
        """Writes a folder that the pipeline's ``from_pretrained`` reads: the trained transformer, and the frozen parts
        as they were loaded, linked where the file system can."""
        save_pipeline(self.transformer, self.pipeline, folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads a folder of a pipeline, safetensors only; no code of the folder runs.

        ``dtype``: of the transformer; None is float32 on a CPU, bfloat16 elsewhere. Text encoders are bfloat16 except
        on a CPU, the autoencoder is float32. Raises InputError, one line, for a pipeline of another class, for missing
        or damaged files and without diffusers.
        """
        pipeline = load_pipeline(Path(folder), torch.device(device), dtype)
        return cls(pipeline.pipe.transformer, pipeline)

    @classmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """See ``EstimablePolicy.from_config``."""
        pipeline = load_pipeline(Path(folder), torch.device(device), dtype, weights=False)
        return cls(pipeline.pipe.transformer, pipeline)

    @property
    def frozen_parts(self) -> list[nn.Module]:
        """Text encoders and autoencoder, which are no submodules."""
        parts = [getattr(self.pipeline.pipe, name, None) for name in self.pipeline.components]
        return [part for part in parts if isinstance(part, nn.Module)]


class DiffusersEditPolicy(DiffusersPolicy):
    """A pipeline that also edits: the prompt has one source image, which is resized to the size of the output."""

    tasks: tuple[TaskKind, ...] = ("generate", "edit")


class DiffusersEditOnlyPolicy(DiffusersPolicy):
    """A pipeline that draws nothing without a source image."""

    tasks: tuple[TaskKind, ...] = ("edit",)


GUIDANCE: Mapping[str, str] = {
    "embedded": "a guidance scale as an input, and one branch",
    "none": "no guidance",
}
"""How pipelines without classifier-free guidance are guided."""
