"""A flow-matching pipeline of diffusers as a policy: its transformer is trained, all other parts are frozen."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdaptablePolicy, Modules, is_adapter
from lvrpo.policies.base import Sampling, TokenCounts
from lvrpo.policies.diffusers_flow.checkpoint import load_pipeline, save_pipeline
from lvrpo.policies.diffusers_flow.pipelines import FlowPipeline, Grid
from lvrpo.policies.flow import (
    Guidance,
    Velocity,
    draw_noise,
    flow_segments,
    guidance_of,
    integrate,
    replay_settings,
    replay_steps,
)
from lvrpo.sampling import derive_seed, guide
from lvrpo.types import (
    SEGMENT_KINDS,
    FlowSegment,
    Group,
    Image,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    TaskKind,
    Trajectory,
)

MAX_TOKENS = 32768
"""Tokens of prompts and images, over all branches of guidance, that go through the transformer at once."""
Row = tuple[str, Image | None]
"""The text of a prompt and its source image."""


class DiffusersPolicy(AdaptablePolicy):
    """A flow-matching text-to-image pipeline of diffusers.

    It draws from text; ``DiffusersEditPolicy`` edits, too. Its states are latents as the transformer takes them, in
    patches; a time is a sigma of the scheduler. Both branches of classifier-free guidance are one batch, the unguided
    one has the empty prompt; where it has no gradient, it is a pass of its own, in the rollout too.
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
        self.max_tokens = MAX_TOKENS
        self._autocast: torch.dtype | None = None
        self.train(False)

    # --- settings ---

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: dropout would make a replay differ from its rollout."""
        return super().train(False)

    @property
    def _weight(self) -> torch.Tensor:
        return next(p for name, p in self.transformer.named_parameters() if not is_adapter(name))

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The autocast dtype, else that of the weights."""
        return self._autocast or self._weight.dtype

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Turns autocast on at this dtype; off where it is the dtype of the weights."""
        self._autocast = None if dtype == self._weight.dtype else dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context of ``set_compute_dtype``."""
        return nullcontext() if self._autocast is None else torch.autocast(self.device.type, dtype=self._autocast)

    def limit_tokens(self, limit: int | None) -> None:
        """See ``Policy.limit_tokens``; an image of more goes through alone."""
        self.max_tokens = limit or MAX_TOKENS

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether blocks of the transformer are computed again in the backward pass."""
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
        patches = 0 if image is None else image[0].numel() // self.pipeline.stride**2
        images = 1 + (_source(trajectory.prompt) is not None)
        return TokenCounts(0, 0, images * patches + self.pipeline.prompt_tokens())

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; raises InputError for a prompt with a picture or for a text output."""
        for prompt in prompts:
            self._check(prompt)
        self.check_sampling(sampling)
        pipeline, size, guidance = self.pipeline, sampling.group_size, guidance_of(sampling)
        grid = pipeline.grid(sampling.image_size)
        timesteps, shape = pipeline.timesteps(sampling, grid), (grid[0] * grid[1], pipeline.channels)
        members = [(prompt, m, seed) for prompt, seed in zip(prompts, seeds, strict=True) for m in range(size)]
        found: dict[int, Trajectory] = {}
        for part in self._parts([prompt for prompt, _, _ in members], grid, guidance):
            own = [derive_seed(members[i][2], members[i][1]) for i in part]
            noise_seeds = [members[i][2] for i in part] if sampling.shared_noise else own
            noise, step_noise = draw_noise(
                sampling,
                [derive_seed(seed, "noise") for seed in noise_seeds],
                [derive_seed(seed, "steps") for seed in own],
                shape,
            )
            step_noise = None if step_noise is None else step_noise.to(self.device)
            velocity = self._velocity_of([members[i][0] for i in part], grid, guidance)
            flows = integrate(velocity, sampling, timesteps, noise.to(self.device), step_noise)
            segments = flow_segments(flows, pipeline.decode(flows.latents, grid), sampling)
            for i, segment, seed in zip(part, segments, own, strict=True):
                found[i] = Trajectory(members[i][0], members[i][1], (segment,), seed)
        return [
            Group(prompt, tuple(found[i] for i in range(p * size, (p + 1) * size))) for p, prompt in enumerate(prompts)
        ]

    def _check(self, prompt: Prompt) -> None:
        named = f"prompt {prompt.id!r}"
        if prompt.output != ("image",):
            raise InputError(f"{named}: this model draws and writes nothing: ask for an image alone")
        images = sum(not isinstance(part, str) for part in prompt.parts)
        if images and "edit" not in self.tasks:
            raise InputError(f"{named}: this model draws from text alone, not from a picture: leave the picture out")
        if images > 1:
            raise InputError(f"{named}: has {images} pictures: this model edits one: leave the others out")
        try:
            self.check_text(_text(prompt))
        except InputError as error:
            raise InputError(f"{named}: {error}") from None

    def _parts(self, prompts: Sequence[Prompt], grid: Grid, guidance: Guidance) -> list[list[int]]:
        """Indices of the prompts of each forward pass, with a source image or without.

        Sampling and replay are split alike, so that both compute the same bits.
        """
        branches = 1 + (guidance.scale != 1 and self.pipeline.guidance == "classifier_free")
        found = []
        for images in (1, 2):
            rows = [i for i, prompt in enumerate(prompts) if 1 + (_source(prompt) is not None) == images]
            each = branches * (images * grid[0] * grid[1] + self.pipeline.prompt_tokens())
            at_once = max(1, self.max_tokens // each)
            found += [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        return found

    # --- velocities ---

    def _velocity_of(self, prompts: Sequence[Prompt], grid: Grid, guidance: Guidance) -> Velocity:
        """The guided velocity of images after their prompts, all with a source image or none."""
        rows = [_row(prompt) for prompt in prompts]

        def at_state(x_t: torch.Tensor, t: torch.Tensor, at: float) -> torch.Tensor:
            times = t.expand(len(x_t))
            if not guidance.active(at) or self.pipeline.guidance != "classifier_free":
                return self._call(rows, x_t, times, grid, guidance.scale)
            return self._guided(rows, x_t, times, grid, guidance)

        return at_state

    def _guided(
        self, rows: Sequence[Row], x_t: torch.Tensor, t: torch.Tensor, grid: Grid, guidance: Guidance
    ) -> torch.Tensor:
        """Both branches of classifier-free guidance, mixed: one pass, or two where one of them has no gradient."""
        if guidance.scale == 1:
            return self._call(rows, x_t, t, grid, 1.0)
        empty = self._without_text(rows)
        if guidance.detach_uncond:
            v = self._call(rows, x_t, t, grid, 1.0)
            with guidance.unguided():
                v_no_text = self._call(empty, x_t, t, grid, 1.0)
        else:
            both = torch.cat([x_t, x_t]), torch.cat([t, t])
            v, v_no_text = self._call([*rows, *empty], *both, grid, 1.0).chunk(2)
        return guide(v, v_no_text, None, guidance.scale, 1.0, guidance.renorm, guidance.renorm_min)

    def _without_text(self, rows: Sequence[Row]) -> list[Row]:
        return [(self.pipeline.empty_prompt, source) for _, source in rows]

    def _call(self, rows: Sequence[Row], x_t: torch.Tensor, t: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
        """One pass of the transformer, float32 (B, N, C)."""
        dtype = self._weight.dtype
        condition = dict(self.pipeline.conditions([text for text, _ in rows], self.device))
        sources = [self.pipeline.encode_source(source, grid) for _, source in rows if source is not None]
        if sources:
            condition["source"] = torch.stack(sources).to(self.device)
        condition = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        embedded = scale if self.pipeline.guidance == "embedded" else None
        with self.autocast():
            v = self.pipeline.velocity(self.transformer, x_t.to(dtype), t, condition, grid, embedded)
        return v.float()

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """See ``FlowPolicy.velocity``.

        Embedded guidance: the scale is an input, and 0 is the empty prompt at scale 1.
        """
        segment = _segment(trajectories[0])
        grid = self.pipeline.grid((segment.image.shape[1], segment.image.shape[2]))
        prompts = [trajectory.prompt for trajectory in trajectories]
        guidance = Guidance(guidance_scale or 1.0, 1.0, "none")
        found: dict[int, torch.Tensor] = {}
        for part in self._parts(prompts, grid, guidance):
            rows = [_row(prompts[i]) for i in part]
            rows = self._without_text(rows) if guidance_scale == 0 else rows
            if self.pipeline.guidance == "classifier_free":
                v = self._guided(rows, x_t[part], t[part], grid, guidance)
            else:
                v = self._call(rows, x_t[part], t[part], grid, guidance.scale)
            found |= zip(part, v, strict=True)
        return torch.stack([found[i] for i in range(len(prompts))])

    # --- replay ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """See ``Policy.logprobs``; images of equal settings are replayed together."""
        found: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        alike: dict[Hashable, list[int]] = {}
        for i, trajectory in enumerate(trajectories) if "flow" in kinds else ():
            alike.setdefault(replay_settings(_segment(trajectory)), []).append(i)
        for same in alike.values():
            first = _segment(trajectories[same[0]])
            guidance = guidance_of(first)
            grid = self.pipeline.grid((first.image.shape[1], first.image.shape[2]))
            for part in self._parts([trajectories[i].prompt for i in same], grid, guidance):
                chosen = [trajectories[same[k]] for k in part]
                velocity = self._velocity_of([trajectory.prompt for trajectory in chosen], grid, guidance)
                again = bool(self.transformer.is_gradient_checkpointing)
                flows = replay_steps(velocity, [_segment(t) for t in chosen], self.device, again)
                for k, logprobs, means in zip(part, flows.logprobs, flows.means, strict=True):
                    found[same[k]].append(SegmentLogprobs(logprobs, means=means, stds=flows.stds))
        return found

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
    """A pipeline that also edits: the prompt has one source image, which is resized to the size of the drawing."""

    tasks: tuple[TaskKind, ...] = ("generate", "edit")


GUIDANCE: Mapping[str, str] = {
    "embedded": "a guidance scale as an input, and one branch",
    "none": "no guidance",
}
"""How pipelines without classifier-free guidance are guided."""


def _text(prompt: Prompt) -> str:
    return " ".join(part for part in prompt.parts if isinstance(part, str))


def _source(prompt: Prompt) -> Image | None:
    return next((part for part in prompt.parts if not isinstance(part, str)), None)


def _row(prompt: Prompt) -> Row:
    return _text(prompt), _source(prompt)


def _segment(trajectory: Trajectory) -> FlowSegment:
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    return segment
