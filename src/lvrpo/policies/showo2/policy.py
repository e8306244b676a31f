"""Show-o2 as a policy: reads pictures and answers, and draws latents of Wan 2.1 by a flow.

Show-o2's own time runs from 0 (noise) to 1 (data); here, as everywhere in lvrpo, t = 1 is noise and t = 0 data.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.adapter import Modules
from lvrpo.policies.base import Sampling, TokenCounts
from lvrpo.policies.decoding import Decoder, generate_text
from lvrpo.policies.defaults import replay_settings as text_settings
from lvrpo.policies.defaults import with_behavior_logprobs
from lvrpo.policies.flow import (
    Guidance,
    Velocity,
    draw_noise,
    flow_segments,
    guidance_of,
    integrate,
    replay_settings,
    replay_steps,
    sampling_grid,
)
from lvrpo.policies.latent_cache import LatentCache
from lvrpo.policies.showo2.checkpoint import Parts, load_parts, save_parts
from lvrpo.policies.showo2.model import Rows, Showo2Model, place_rows, to_latents
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, TransformersPolicy, default_dtype
from lvrpo.sampling import derive_seed, guide, token_entropy, token_logprobs, uniform_noise
from lvrpo.types import (
    SEGMENT_KINDS,
    FlowSegment,
    Group,
    Image,
    Part,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    TaskKind,
    TextSegment,
    Trajectory,
    segments_through,
)
from lvrpo.types import Parts as PromptParts

SYSTEM = "system\nYou are a helpful assistant.<|im_end|>"
USER, ASSISTANT = "\n<|im_start|>user\n", "\n<|im_start|>assistant\n"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
DECODED = 4
"""Latents that go through the autoencoder at once."""
SHIFT = 3.0


class Showo2Policy(TransformersPolicy):
    """Show-o2 of any size. It draws from text alone and answers questions about pictures; its autoencoder is frozen.

    The unguided branch of a drawing has an empty prompt; both branches are one batch.
    """

    segment_kinds: tuple[SegmentKind, ...] = ("text", "flow")
    draws_after_text = False
    tasks: tuple[TaskKind, ...] = ("understand", "generate", "reason")
    judging_sides = ("read",)
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.(?P<expert>showo)\.model\.layers\.\d+\.self_attn\.[qkvo]_proj",
        "mlp": r"model\.(?P<expert>showo)\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
        "connector": r"model\.(?P<expert>fusion_proj|diff_proj)\.\d+",
        "head": r"model\.(?P<expert>diffusion_head_a)\.\d+\..*",
        "tower": r"model\.(?P<expert>und_trans)\..+",
    }

    def __init__(self, model: Showo2Model, parts: Parts) -> None:
        """``parts``: the tokenizer, the frozen autoencoder, and the files of the folder."""
        super().__init__(model)
        self.parts = parts
        self.vae = parts.vae.eval().requires_grad_(False)
        self._latents = LatentCache()

    # --- sizes ---

    @property
    def image_size(self) -> int:
        """Side of pictures in pixels."""
        return self.model.sizes.grid[0] * self._stride

    @property
    def _stride(self) -> int:
        """Pixels along a side of an image token."""
        return self.model.sizes.patch * 2 ** len(self.vae.config.temperal_downsample)

    def _grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in tokens of an image size in pixels; raises InputError if it is not divisible."""
        if size is None:
            return self.model.sizes.grid
        if any(side % self._stride for side in size):
            raise InputError(f"image_size={size}: sides must be multiples of {self._stride}: use {self.image_size}")
        return size[0] // self._stride, size[1] // self._stride

    def default_sampling(self, task: TaskKind) -> Sampling:
        """49 steps of Euler and guidance 5, as published; texts of up to 512 tokens."""
        return Sampling(max_new_tokens=self.longest_text, guidance_scale=5.0, num_steps=49, solver="euler")

    def timestep_shift(self) -> float:
        """3, as published."""
        return SHIFT

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        if found := next((marker for marker in MARKERS if marker in text), None):
            raise InputError(f"{text[:40]!r}: holds {found}, a marker of the model: leave it out")

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """See ``Policy.count_tokens``; every row holds its prompt by itself."""
        text = sum(len(s.tokens) for s in trajectory.segments if isinstance(s, TextSegment))
        if trajectory.image is None:
            return TokenCounts(0, self._length(self._question(trajectory.prompt)) + text, 0)
        rows, columns = self._grid((trajectory.image.shape[1], trajectory.image.shape[2]))
        return TokenCounts(0, 0, len(self._drawn(trajectory.prompt)) + 1 + rows * columns)

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``. Raises InputError for what a Show-o2 cannot do."""
        size = sampling.group_size
        members = [
            (prompt, m, derive_seed(seed, m), seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for m in range(size)
        ]
        for prompt in prompts:
            self._check(prompt, sampling)
        made: list[Trajectory | None] = [None] * len(members)
        drawing = [i for i, (prompt, *_) in enumerate(members) if prompt.output == ("image",)]
        writing = [i for i in range(len(members)) if members[i][0].output == ("text",)]
        with self.autocast():
            self._draw(members, drawing, sampling, made)
            self._write(members, writing, sampling, made)
        found = [trajectory for trajectory in made if trajectory is not None]
        texts = [t for t in found if t.prompt.output == ("text",)]
        scored = {id(t): with_behavior_logprobs(t, rows) for t, rows in zip(texts, self.logprobs(texts), strict=True)}
        found = [scored.get(id(t), t) for t in found]
        return [Group(prompt, tuple(found[p * size : (p + 1) * size])) for p, prompt in enumerate(prompts)]

    def _check(self, prompt: Prompt, sampling: Sampling) -> None:
        named = f"prompt {prompt.id!r}"
        pictures = [part for part in prompt.parts if isinstance(part, torch.Tensor)]
        for part in prompt.parts:
            if isinstance(part, str):
                self.check_text(part)
        if prompt.output not in (("text",), ("image",)):
            raise InputError(f"{named}: a Show-o2 answers or draws, not {' and '.join(prompt.output)}: ask for one")
        if prompt.output == ("image",):
            if pictures:
                raise InputError(f"{named}: a Show-o2 draws from text alone, not from a picture: leave the picture out")
            rows, columns = self._grid(sampling.image_size)
            length, new = len(self._drawn(prompt)), 1 + rows * columns
        else:
            if len(pictures) > 1:
                raise InputError(f"{named}: {len(pictures)} pictures: a Show-o2 reads one: leave the others out")
            length, new = self._length(self._question(prompt)), sampling.max_new_tokens
        if length + new > self.positions:
            raise InputError(
                f"{named}: {length} tokens and {new} after them, the limit is {self.positions}: shorten it, or write "
                "less (max_new_tokens)"
            )

    def _draw(
        self, members: Sequence[Any], chosen: Sequence[int], sampling: Sampling, made: list[Trajectory | None]
    ) -> None:
        """Puts the drawings of members into ``made``. Any: a tuple of prompt, member and seeds."""
        grid, guidance = self._grid(sampling.image_size), guidance_of(sampling)
        sizes = self.model.sizes
        shape = grid[0] * grid[1], sizes.channels * sizes.patch**2
        for part in self._drawn_parts([members[i][0] for i in chosen], grid, guidance):
            own = [members[chosen[k]] for k in part]
            noise, step_noise = draw_noise(
                sampling,
                [derive_seed(seed if sampling.shared_noise else each, "noise") for _, _, each, seed in own],
                [derive_seed(each, "steps") for _, _, each, _ in own],
                shape,
            )
            step_noise = None if step_noise is None else step_noise.to(self.device)
            velocity = self._velocity_of([prompt for prompt, *_ in own], grid, guidance)
            times = sampling_grid(replace(sampling, timestep_shift=sampling.timestep_shift or SHIFT))
            flows = integrate(velocity, sampling, times, noise.to(self.device), step_noise)
            segments = flow_segments(flows, self.decode_latents(flows.latents, grid), sampling)
            for k, segment, (prompt, member, each, _) in zip(part, segments, own, strict=True):
                made[chosen[k]] = Trajectory(prompt, member, (segment,), each)

    def _write(
        self, members: Sequence[Any], chosen: Sequence[int], sampling: Sampling, made: list[Trajectory | None]
    ) -> None:
        """Puts the answers of members into ``made``. Any: a tuple of prompt, member and seeds."""
        questions = [self._question(members[i][0]) for i in chosen]
        new, eos = sampling.max_new_tokens, self.parts.ids["<|im_end|>"]
        embed = self.model.get_input_embeddings()
        for part in self.cut([self._length(parts) + new for parts in questions]):
            own = [members[chosen[k]] for k in part]
            u = uniform_noise([derive_seed(each, "text") for _, _, each, _ in own], (new,)).to(self.device)
            decoder, owner = self._decoder([questions[k] for k in part])
            decoder.reserve(new)
            texts = generate_text(decoder, owner, embed, self.model.showo.lm_head, {eos}, u, sampling.temperature)
            for k, (prompt, member, each, _), ids in zip(part, own, texts, strict=True):
                ended = ids[-1] == eos
                text = self.parts.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
                segment = TextSegment(torch.tensor(ids), torch.zeros(len(ids)), sampling.temperature, text, ended)
                made[chosen[k]] = Trajectory(prompt, member, (segment,), each)

    def _decoder(self, questions: Sequence[PromptParts]) -> tuple[Decoder, list[int]]:
        """Reads every different question once; which of them each is."""
        from transformers import DynamicCache

        keys = [tuple(p if isinstance(p, str) else id(p) for p in parts) for parts in questions]
        distinct = dict(zip(keys, questions, strict=True))
        places = {key: i for i, key in enumerate(distinct)}
        rows = self._read_rows(list(distinct.values()))
        cache = DynamicCache(config=self.model.config)
        states = self.model.states(rows, cache)
        lengths = rows.positions[:, -1:] + 1
        mask = (torch.arange(rows.x.shape[1], device=self.device) >= rows.x.shape[1] - lengths).long()
        decoder = Decoder(self._extend, cache, mask, rows.positions[:, -1:], states[:, -1])
        return decoder, [places[key] for key in keys]

    def _extend(self, x: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """See ``decoding.Forward``. Any: a cache of an optional package."""
        out = self.model.showo.model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state

    # --- rows ---

    def _encode(self, text: str) -> list[int]:
        return list(self.parts.tokenizer.encode(text, add_special_tokens=False).ids)

    def _drawn(self, prompt: Prompt | None) -> list[int]:
        """Ids before an image; None: those of the unguided branch."""
        text = "" if prompt is None else " ".join(part for part in prompt.parts if isinstance(part, str))
        return [self.parts.ids["<|im_start|>"], *self._encode(text), self.parts.ids["<|vision_start|>"]]

    def _question(self, prompt: Prompt) -> PromptParts:
        return (THINK_THEN_ANSWER, *prompt.parts) if prompt.task == "reason" else prompt.parts

    def _question_ids(self, parts: PromptParts) -> tuple[list[int], list[int]]:
        """Ids before the picture, or of the whole row without one, and after it; the picture comes first."""
        start, end = self.parts.ids["<|vision_start|>"], self.parts.ids["<|vision_end|>"]
        before = [self.parts.ids["<|im_start|>"], *self._encode(SYSTEM), *self._encode(USER)]
        asked = self._encode(" ".join(part for part in parts if isinstance(part, str))) + self._encode(ASSISTANT)
        if any(isinstance(part, torch.Tensor) for part in parts):
            return [*before, start], [end, *asked]
        return [*before, *asked], []

    def _length(self, parts: PromptParts) -> int:
        rows, columns = self.model.sizes.grid
        pictures = sum(isinstance(part, torch.Tensor) for part in parts)
        return sum(map(len, self._question_ids(parts))) + pictures * (1 + rows * columns)

    def _read_rows(self, questions: Sequence[PromptParts], answers: Sequence[Sequence[int]] | None = None) -> Rows:
        """Questions, each with the tokens of its answer so far."""
        pictures = [next((p for p in parts if isinstance(p, torch.Tensor)), None) for parts in questions]
        shown = [picture for picture in pictures if picture is not None]
        read = iter(())
        if shown:
            latents = self.encode_images(shown)
            read = iter(self.model.embed_images(latents, latents.new_ones(len(latents))))
        before, after = [], []
        for k, parts in enumerate(questions):
            one, other = self._question_ids(parts)
            before.append(self._embedded(one))
            after.append(self._embedded([*other, *(answers[k] if answers is not None else ())]))
        return place_rows(before, [None if picture is None else next(read) for picture in pictures], after)

    def _embedded(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64, device=self.device))

    # --- pictures ---

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> torch.Tensor:
        """Latents (M, C, h, w): the mode of the autoencoder's posterior, normalized; kept by picture."""
        return torch.stack([self._latents.get(image, self.device, self._encoded) for image in images])

    def _encoded(self, image: Image) -> torch.Tensor:
        side = self.image_size
        if image.shape[1:] != (side, side):
            from lvrpo.data.images import middle_square

            image = middle_square(image, side)
        mean, std = self._moments()
        with torch.autocast(self.device.type, enabled=False):
            pixels = (image.to(self.device) * 2 - 1)[None, :, None].to(self.vae.dtype)
            latent = self.vae.encode(pixels).latent_dist.mode()[0, :, 0].float()
        return (latent - mean) / std

    @torch.no_grad()
    def decode_latents(self, tokens: torch.Tensor, grid: tuple[int, int]) -> list[Image]:
        """Pictures of image tokens (B, N, patch * patch * C), on the CPU."""
        sizes, (mean, std) = self.model.sizes, self._moments()
        latents = (
            to_latents(tokens.float(), (grid[0] * sizes.patch, grid[1] * sizes.patch), sizes.channels) * std + mean
        )
        found: list[Image] = []
        with torch.autocast(self.device.type, enabled=False):
            for part in latents.split(DECODED):
                pixels = self.vae.decode(part[:, :, None].to(self.vae.dtype)).sample[:, :, 0]
                found += list(((pixels.float() + 1) / 2).clamp(0, 1).cpu())
        return found

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of latents, (C, 1, 1)."""
        config = self.vae.config
        mean, std = (
            torch.tensor(v, device=self.device)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        return mean, std

    # --- velocities ---

    def _drawn_parts(self, prompts: Sequence[Prompt], grid: tuple[int, int], guidance: Guidance) -> list[list[int]]:
        branches = 1 + (guidance.scale != 1)
        return self.cut([branches * (len(self._drawn(prompt)) + 1 + grid[0] * grid[1]) for prompt in prompts])

    def _velocity_of(self, prompts: Sequence[Prompt], grid: tuple[int, int], guidance: Guidance) -> Velocity:
        """The guided velocity of images after their prompts."""

        def at_state(x_t: torch.Tensor, t: torch.Tensor, at: float) -> torch.Tensor:
            times = t.expand(len(x_t))
            if guidance.scale == 1 or not guidance.active(at):
                return self._flow(list(prompts), x_t, times, grid)
            nothing = [None] * len(prompts)
            if guidance.detach_uncond:
                v = self._flow(list(prompts), x_t, times, grid)
                with guidance.unguided():
                    v_no_text = self._flow(nothing, x_t, times, grid)
            else:
                v, v_no_text = self._flow([*prompts, *nothing], x_t, times, grid).chunk(2)
            return guide(v, v_no_text, None, guidance.scale, 1.0, guidance.renorm, guidance.renorm_min)

        return at_state

    def _flow(
        self, prompts: Sequence[Prompt | None], x_t: torch.Tensor, t: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """One pass, float32; ``prompts`` may be several branches of the same states one after another."""
        sizes = self.model.sizes
        latents = to_latents(x_t, (grid[0] * sizes.patch, grid[1] * sizes.patch), sizes.channels)
        repeats = len(prompts) // len(x_t)
        with self.autocast(), self.checkpointing():
            images = self.model.embed_images(latents, 1 - t).repeat(repeats, 1, 1)
            before = [self._embedded(self._drawn(prompt)) for prompt in prompts]
            rows = place_rows(before, list(images), [self._embedded([])] * len(prompts))
            return -self.model.velocity(rows, (1 - t).repeat(repeats)).float()

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """See ``FlowPolicy.velocity``."""
        prompts = [trajectory.prompt for trajectory in trajectories]
        image = _drawing(trajectories[0]).image
        grid = self._grid((image.shape[1], image.shape[2]))
        guidance = Guidance(guidance_scale, 1.0, "none")
        found = []
        for part in self._drawn_parts(prompts, grid, guidance):
            own, x, times = [prompts[k] for k in part], x_t[part], t[part]
            if guidance_scale in (0, 1):
                found.append(self._flow(own if guidance_scale else [None] * len(own), x, times, grid))
                continue
            v, v_no_text = self._flow([*own, *[None] * len(own)], x, times, grid).chunk(2)
            found.append(guide(v, v_no_text, None, guidance_scale, 1.0, "none", 0.0))
        return torch.cat(found)

    # --- replay ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """Differentiable replay of segments with equal settings in one pass; see ``Policy.logprobs``."""
        out: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        alike: dict[Hashable, list[int]] = {}
        for i, trajectory in enumerate(trajectories):
            for segment in segments_through(trajectory, kinds):  # at most one
                settings = replay_settings(segment) if isinstance(segment, FlowSegment) else text_settings(segment)
                alike.setdefault(settings, []).append(i)
        for same in alike.values():
            own = [trajectories[i] for i in same]
            scored = self._replay_flows(own) if own[0].image is not None else self._replay_texts(own)
            for i, found in zip(same, scored, strict=True):
                out[i] = [found]
        return out

    def _replay_flows(self, trajectories: Sequence[Trajectory]) -> list[SegmentLogprobs]:
        first = _drawing(trajectories[0])
        grid, guidance = self._grid((first.image.shape[1], first.image.shape[2])), guidance_of(first)
        prompts, found = [trajectory.prompt for trajectory in trajectories], []
        for part in self._drawn_parts(prompts, grid, guidance):
            velocity = self._velocity_of([prompts[k] for k in part], grid, guidance)
            flows = replay_steps(velocity, [_drawing(trajectories[k]) for k in part], self.device, self.checkpointed)
            for logprobs, means in zip(flows.logprobs, flows.means, strict=True):
                found.append(SegmentLogprobs(logprobs, means=means, stds=flows.stds))
        return found

    def _replay_texts(self, trajectories: Sequence[Trajectory]) -> list[SegmentLogprobs]:
        segments = [trajectory.segments[0] for trajectory in trajectories]
        assert all(isinstance(segment, TextSegment) for segment in segments)
        questions = [self._question(trajectory.prompt) for trajectory in trajectories]
        return self._score(questions, [s.tokens for s in segments], segments[0].temperature)  # type: ignore[union-attr]

    def _score(
        self, questions: Sequence[PromptParts], answers: Sequence[torch.Tensor], temperature: float
    ) -> list[SegmentLogprobs]:
        found: list[SegmentLogprobs] = []
        lengths = [self._length(parts) + len(ids) for parts, ids in zip(questions, answers, strict=True)]
        with self.autocast(), self.checkpointing():
            for part in self.cut(lengths):
                rows = self._read_rows([questions[k] for k in part], [answers[k][:-1].tolist() for k in part])
                states = self.model.states(rows)
                for b, k in enumerate(part):
                    ids = answers[k].to(states.device)
                    logits = self.model.showo.lm_head(states[b, -len(ids) :]).float()
                    found.append(
                        SegmentLogprobs(token_logprobs(logits, ids, temperature), token_entropy(logits, temperature))
                    )
        return found

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[PromptParts], texts: Sequence[str]) -> torch.Tensor:
        """See ``Judge.text_logprob``."""
        answers = [torch.tensor([*self._encode(text), self.parts.ids["<|im_end|>"]]) for text in texts]
        rows = self._score(contexts, answers, 1.0)
        return torch.stack([row.logprobs.mean().cpu() for row in rows]) if rows else torch.zeros(0)

    @torch.no_grad()
    def reading_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Judge.reading_states``; after the last layer the states are normed."""
        depth, found, ids = len(self.model.showo.model.layers), [], self.parts.ids
        if not 0 <= layer <= depth:
            raise InputError(f"layer={layer}: the policy has {depth} layers")
        with self.autocast():
            for part in parts:
                drawn = isinstance(part, torch.Tensor)
                begin = [ids["<|im_start|>"], *([ids["<|vision_start|>"]] if drawn else [])]
                read = self.model.embed_images(z := self.encode_images([part]), z.new_ones(1))[0] if drawn else None
                text = self._embedded([] if drawn else self._encode(part))
                states = self.model.states(place_rows([self._embedded(begin)], [read], [text]), layer=layer)
                found.append(states[0, len(begin) + drawn :])  # an image begins with the place of its time
        return found

    # --- weights ---

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """understand: semantic layers; generate: flow head and time; shared: language model and projections."""
        groups: dict[str, list[nn.Parameter]] = {"understand": [], "generate": [], "shared": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[_expert_of(name)].append(parameter)
        return groups

    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``load`` reads; the frozen autoencoder is linked where the file system can."""
        save_parts(self.model, self.parts, folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads a folder in the layout of docs/guides/showo2.md; safetensors only.

        ``dtype``: None is float32 on a CPU, bfloat16 elsewhere. Raises InputError, one line, for missing or damaged
        files, tensors that are missing or do not fit, and without transformers or diffusers.
        """
        return cls(*load_parts(Path(folder), dtype or default_dtype(device))).to(device)

    @classmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """See ``EstimablePolicy.from_config``."""
        return cls(*load_parts(Path(folder), dtype or default_dtype(device), weights=False))


def _expert_of(name: str) -> str:
    if name.startswith(("image_embedder_und.", "position_embedding.", "und_trans.")):
        return "understand"
    return "generate" if name.startswith(("diffusion_head", "diff_proj.", "time_embed")) else "shared"


def _drawing(trajectory: Trajectory) -> FlowSegment:
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    return segment
