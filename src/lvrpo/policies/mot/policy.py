"""The interface ``lvrpo.policies.base.Policy`` on the Mixture-of-Transformers core."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import ClassVar, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdaptablePolicy
from lvrpo.policies.base import Sampling, TokenCounts, announce, with_seeds
from lvrpo.policies.flow import flow_segments, guidance_of
from lvrpo.policies.mot import flow_sampler, generate, likelihood, model_runner
from lvrpo.policies.mot.likelihood import JUDGE_TIMES, FeatureLoss
from lvrpo.policies.mot.model_runner import Encoders, Grid, ModelRunner, Row, Tokenizer, row_tokens
from lvrpo.policies.mot.trajectory import (
    replay_flows,
    replay_settings,
    temperature_of,
    text_segments,
    tokenized_text,
)
from lvrpo.policies.mot.transformer import Cache, MoT
from lvrpo.sampling import derive_seed, guide, uniform_noise
from lvrpo.types import (
    SEGMENT_KINDS,
    Example,
    Group,
    Image,
    Part,
    Parts,
    Prompt,
    Segment,
    SegmentKind,
    SegmentLogprobs,
    TextSegment,
    Trajectory,
    segments_through,
)

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
PolicyT = TypeVar("PolicyT", bound="MoTPolicy")


def with_autocast(
    method: Callable[Concatenate[PolicyT, Arguments], T],
) -> Callable[Concatenate[PolicyT, Arguments], T]:
    """Runs a method of a policy under ``policy.autocast()``."""

    @wraps(method)
    def run(policy: PolicyT, *args: Arguments.args, **kwargs: Arguments.kwargs) -> T:
        with policy.autocast():
            return method(policy, *args, **kwargs)

    return run


MAX_ROW_TOKENS = 4096
"""Default length limit of a row: the memory of attention grows with its square."""


@dataclass(frozen=True)
class _Member:
    """One output to sample."""

    prompt: Prompt
    seed: int
    prompt_seed: int
    member: int


class MoTPolicy(AdaptablePolicy):
    """A policy that understands and generates images with any ``Encoders``."""

    model_type = "lvrpo_mot"
    segment_kinds: tuple[SegmentKind, ...] = ("text", "flow")
    has_condition_dropout = False
    """Whether ``supervised_losses`` drops conditions at random (for classifier-free guidance)."""
    former_names: ClassVar[Mapping[str, str]] = {
        "encoders.patch_": "towers.read_",
        "encoders.vit_position": "towers.read_position",
        "encoders.vit.": "towers.read_vit.",
        "encoders.connector_": "towers.read_connector_",
        "encoders.": "towers.",
        ".understanding": ".reading",
        ".generation": ".drawing",
    }
    """See ``lvrpo.policies.base.former_name``."""

    def __init__(self, transformer: MoT, encoders: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.transformer = transformer
        self.encoders: Encoders = encoders  # type: ignore[assignment]  # a Module that keeps the protocol
        self.tokenizer = tokenizer
        self._autocast: torch.dtype | None = None

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Turns autocast on at this dtype; off where it is the dtype of the weights."""
        self._autocast = None if dtype == self.transformer.understanding_norm.weight.dtype else dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context of ``set_compute_dtype``."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The autocast dtype, else that of the weights."""
        return self._autocast or self.transformer.understanding_norm.weight.dtype

    def check_text(self, text: str) -> None:
        """Raises InputError where the tokenizer cannot encode a text."""
        self.tokenizer.encode(text)

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """See ``PolicyDefaults.check_prompt``."""
        self._row(prompt)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises InputError for a size that it cannot draw."""
        self.encoders.default_grid(sampling.image_size)

    @property
    def runner(self) -> ModelRunner:
        return ModelRunner(self.transformer, self.encoders, self.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.transformer.inv_freq.device

    # ---------------------------------------------------------------- rollout
    @torch.no_grad()
    @with_autocast
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``."""
        g = sampling.group_size
        members = [_Member(prompt, derive_seed(seed, m), seed, m) for prompt, seed in with_seeds(prompts, seeds)
                 for m in range(g)]  # fmt: skip
        out: dict[int, Trajectory] = {}
        keys = [(prompt.output, self._grid(prompt, sampling)) for prompt in prompts for _ in range(g)]
        for same in model_runner.group_equal(keys, len(members)):
            for part in self._cut([members[i].prompt for i in same], keys[same[0]][1]):
                indices = [same[k] for k in part]
                batch = self._sample_batch([members[i] for i in indices], sampling)
                out.update(zip(indices, batch, strict=True))
                announce(batch)
        return [Group(prompt, tuple(out[p * g + m] for m in range(g))) for p, prompt in enumerate(prompts)]

    @torch.no_grad()
    @with_autocast
    def sample_member(self, prompt: Prompt, sampling: Sampling, seed: int, member: int) -> Trajectory:
        """One member of the group that ``sample`` returns for the prompt and the seed."""
        return self._sample_batch([_Member(prompt, derive_seed(seed, member), seed, member)], sampling)[0]

    def _sample_batch(self, members: Sequence[_Member], sampling: Sampling) -> list[Trajectory]:
        """Members of prompts with the same output kinds and grid; members of a prompt are adjacent."""
        if sampling.timestep_shift is None:
            sampling = replace(sampling, timestep_shift=self.timestep_shift())
        runner = self.runner
        owner = model_runner.run_ids([(id(one.prompt), one.prompt_seed) for one in members])
        prompts = [members[owner.index(p)].prompt for p in range(owner[-1] + 1)]
        grid = self._grid(prompts[0], sampling)
        prompt_rows = [self._row(prompt) for prompt in prompts]
        of_prompt = owner
        cache = runner.prefill(prompt_rows)
        member_seeds = [one.seed for one in members]
        segments: list[list[Segment]] = [[] for _ in members]
        for kind in prompts[0].output:
            if kind == "text":
                uniforms = uniform_noise([derive_seed(s, "text") for s in member_seeds], (sampling.max_new_tokens,))
                texts = generate.generate_text(runner, cache, owner, uniforms.to(self.device), sampling.temperature)
                closed = len(prompts[0].output) > 1
                scores = generate.score_text(runner, cache, owner, texts, sampling.temperature, closed)
                new: Sequence[Segment] = text_segments(runner, texts, scores.logprobs, sampling.temperature)
                if closed:
                    cache, owner = scores.cache, list(range(len(members)))
            else:
                noise_seeds = [one.prompt_seed for one in members] if sampling.shared_noise else member_seeds
                flows = flow_sampler.sample_flow(
                    runner,
                    self._branches(cache.spread(owner), [prompt_rows[p] for p in of_prompt], sampling),
                    sampling,
                    noise_seeds=[derive_seed(s, "noise") for s in noise_seeds],
                    step_seeds=[derive_seed(s, "steps") for s in member_seeds],
                    grid=grid,
                )
                new = flow_segments(flows, self.encoders.decode_latents(flows.latents, grid).cpu(), sampling)
            for segment_list, segment in zip(segments, new, strict=True):
                segment_list.append(segment)
        return [Trajectory(one.prompt, one.member, tuple(segments[b]), one.seed) for b, one in enumerate(members)]

    def _row(self, prompt: Prompt) -> Row:
        row = self.runner.row(prompt.parts, draws="image" in prompt.output)
        self.check_length(f"prompt {prompt.id!r}", row, 1)
        return row

    def max_row_tokens(self) -> int:
        """Length limit of a row, context and output together."""
        return MAX_ROW_TOKENS

    def check_length(self, name: str, row: Row, new: int, remedy: str = "") -> None:
        """Raises InputError where a row and ``new`` tokens after it are too long."""
        length, limit = row_tokens(row), self.max_row_tokens()
        if length + new > limit:
            after = f" and {new} after them" if new > 1 else ""
            raise InputError(f"{name}: {length} tokens{after}, the limit is {limit}: shorten it{remedy}")

    def _grid(self, prompt: Prompt, sampling: Sampling) -> Grid:
        """Token grid of the generated image: that of the last source image, else of ``sampling.image_size``."""
        if "image" not in prompt.output:
            return 0, 0
        sources = [part for part in prompt.parts if isinstance(part, torch.Tensor)]
        return self.encoders.latent_grid(sources[-1]) if sources else self.encoders.default_grid(sampling.image_size)

    def _cut(self, prompts: Sequence[Prompt], grid: Grid) -> list[list[int]]:
        """Splits members into forward passes, as indices into ``prompts``, which has one entry per member.

        A rollout and its replay are split alike, so that both compute the same bits.
        """
        each = [1] * len(prompts)
        return model_runner.split_by_tokens(
            [prompt.id for prompt in prompts], [0] * len(prompts), each, model_runner.MAX_ROWS
        )

    def split_rows(self, rows: Sequence[Row], new: Sequence[int]) -> list[list[int]]:
        """Splits rows, each followed by ``new`` tokens, into forward passes, as indices."""
        return [list(range(len(rows)))]

    def _branches(self, full: Cache, rows: Sequence[Row], sampling: Sampling) -> flow_sampler.GuidanceCaches:
        return flow_sampler.prefill_guidance(self.runner, full, rows, guidance_of(sampling))

    # ---------------------------------------------------------------- replay
    @with_autocast
    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """See ``Policy.logprobs``."""
        out: dict[int, list[SegmentLogprobs]] = {}
        settings = [(t.prompt.output, replay_settings(t)) for t in trajectories]
        for same in model_runner.group_equal(settings, len(trajectories)):
            # cut where sampling cut, or log-probs of a rollout's own batch would differ in the last bit
            first = trajectories[same[0]]
            grid = self._output_grid(first) if "image" in first.prompt.output else (0, 0)
            for part in self._cut([trajectories[i].prompt for i in same], grid):
                indices = [same[k] for k in part]
                batch = self._replay_batch([trajectories[i] for i in indices], kinds)
                out.update(zip(indices, batch, strict=True))
        return [out[i] for i in range(len(trajectories))]

    def _replay_batch(
        self, trajectories: list[Trajectory], kinds: Collection[SegmentKind]
    ) -> list[list[SegmentLogprobs]]:
        runner = self.runner
        prompt_rows = [self._row(t.prompt) for t in trajectories]
        cache, owner = runner.prefill_shared(prompt_rows)
        out: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        for s in range(len(segments_through(trajectories[0], kinds))):
            segments = [t.segments[s] for t in trajectories]
            if segments[0].kind == "text":
                texts = [tokenized_text(segment) for segment in segments]
                closed = s + 1 < len(trajectories[0].segments)
                scores = generate.score_text(runner, cache, owner, texts, temperature_of(segments[0]), closed)
                for row, logprobs, entropy in zip(out, scores.logprobs, scores.entropies, strict=True):
                    row.append(SegmentLogprobs(logprobs, entropy))
                if closed:
                    cache, owner = scores.cache, list(range(len(trajectories)))
            else:
                flows = replay_flows(runner, cache.select(owner), prompt_rows, segments)
                for row, logprobs, means in zip(out, flows.logprobs, flows.means, strict=True):
                    row.append(SegmentLogprobs(logprobs, means=means, stds=flows.stds))
        return out

    @with_autocast
    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """See ``Policy.velocity``; the context is the prompt and all text segments."""
        rows, runner = [self._row(trajectory.prompt) for trajectory in trajectories], self.runner
        grid = self._output_grid(trajectories[0])
        if guidance_scale == 0:
            return self._velocity([runner.without_text(row) for row in rows], x_t, t, grid)
        thought = [(*row, *self._thoughts(trajectory)) for row, trajectory in zip(rows, trajectories, strict=True)]
        v = self._velocity(thought, x_t, t, grid)
        if guidance_scale == 1:
            return v
        v_no_text = self._velocity([runner.without_text(row) for row in rows], x_t, t, grid)
        return guide(v, v_no_text, None, guidance_scale)

    def _thoughts(self, trajectory: Trajectory) -> Row:
        """The text segments before the image."""
        thoughts = [tokenized_text(s) for s in trajectory.segments if isinstance(s, TextSegment)]
        return tuple(self.runner.text(text.tokens[: -1 if text.ended else None]) for text in thoughts)

    def _velocity(self, rows: Sequence[Row], x_t: torch.Tensor, t: torch.Tensor, grid: Grid) -> torch.Tensor:
        runner, out = self.runner, []
        for part in self.split_rows(rows, [runner.noise(grid).span.length] * len(rows)):
            cache, owner = runner.prefill_shared([rows[i] for i in part])
            out.append(flow_sampler.velocity(runner, cache.select(owner), x_t[part], t[part], grid))
        return torch.cat(out)

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """See ``Policy.count_tokens``; begin and end tokens are counted."""
        texts = [len(s.tokens) + 2 for s in trajectory.segments if isinstance(s, TextSegment)]
        image_tokens = 0
        if trajectory.image is not None:
            image_tokens = self.runner.noise(self._output_grid(trajectory)).span.length
        return TokenCounts(row_tokens(self._row(trajectory.prompt)), sum(texts), image_tokens)

    @abstractmethod
    def pixels_per_token(self) -> int:
        """Pixels per latent token along a side."""

    def _output_grid(self, trajectory: Trajectory) -> Grid:
        assert trajectory.image is not None
        return self.encoders.output_grid(*trajectory.image.shape[1:])

    # ---------------------------------------------------------------- judge
    @torch.no_grad()
    @with_autocast
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """See ``Judge.text_logprob``."""
        return likelihood.text_logprob(self.runner, self, contexts, texts)

    @torch.no_grad()
    @with_autocast
    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = JUDGE_TIMES,
    ) -> torch.Tensor:
        """See ``Judge.image_logprob``; the formula is at ``likelihood.image_logprob``."""
        return likelihood.image_logprob(self.runner, self, contexts, images, draws, seeds, times)

    @torch.no_grad()
    @with_autocast
    def image_features(self, images: Sequence[Image], layer: int) -> torch.Tensor:
        """States (B, N, D) of images after ``layer`` layers of the understanding expert; 0: of the vision encoder."""
        return likelihood.image_features(self.runner, images, layer)

    @torch.no_grad()
    @with_autocast
    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Judge.hidden_states``."""
        return likelihood.hidden_states(self.runner, parts, layer)

    @torch.no_grad()
    @with_autocast
    def context_states(self, contexts: Sequence[Parts]) -> torch.Tensor:
        """Mean final state of the understanding expert over each context, float32 (B, D)."""
        return likelihood.context_states(self.runner, contexts)

    @torch.no_grad()
    @with_autocast
    def generation_states(
        self, contexts: Sequence[Parts], images: Sequence[Image], t: float, seed: int
    ) -> torch.Tensor:
        """Mean final state of the generation expert over each noisy image; see ``likelihood.generation_states``."""
        return likelihood.generation_states(self.runner, contexts, images, t, seed)

    # ---------------------------------------------------------------- supervised
    @with_autocast
    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: FeatureLoss | None = None
    ) -> Mapping[str, torch.Tensor]:
        """The pretraining losses of a batch: "text" (cross-entropy per token) and "image" (flow loss).

        With ``represent``, also "representation": its loss on the states of the noisy images.
        """
        rows = [self._row(remaining(example)) for example in examples]
        times = likelihood.FlowLossTimes(self.timestep_shift(), self.min_time())
        return likelihood.supervised_losses(self.runner, rows, examples, generator, times, represent)

    def min_time(self) -> float:
        """The flow loss is multiplied by (t / min_time)^2 at times below this one."""
        return 0.0

    def checkpoint_gradients(self, on: bool) -> None:
        """Gradient checkpointing: about a third more time, a fraction of the memory."""
        self.transformer.checkpointing = on

    # ---------------------------------------------------------------- weights
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by expert; embeddings that both experts use are "shared"."""
        groups: dict[str, list[nn.Parameter]] = {"understand": [], "generate": [], "shared": []}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            groups[_expert_of(name)].append(parameter)
        return groups

    @classmethod
    @abstractmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """The policy of ``load`` with random weights, on the CPU; under FakeTensorMode it allocates nothing."""


def remaining(example: Example) -> Prompt:
    """The prompt of an example without what is dropped."""
    prompt, dropped = example.prompt, example.dropped
    if not dropped:
        return prompt
    kept = tuple(part for part in prompt.parts if isinstance(part, str) == (dropped == "image"))
    return Prompt(f"{prompt.id}/no {dropped}", prompt.task, kept, prompt.output)


def _expert_of(name: str) -> str:
    if re.search(r"\.understanding\.|understanding_norm|encoders\.(patch|connector|vit)|lm_head", name):
        return "understand"
    if re.search(r"\.generation\.|generation_norm|encoders\.(latent|time)", name):
        return "generate"
    return "shared"
