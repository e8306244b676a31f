"""Show-o2 as a policy: reads images and answers, and draws latents of Wan 2.1 by a flow.

Show-o2's own time runs from 0 (noise) to 1 (data); here, as everywhere in lvrpo, t = 1 is noise and t = 0 data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Self

import torch

from lvrpo.errors import InputError
from lvrpo.images import middle_square
from lvrpo.policies.adapter import Expert, Modules
from lvrpo.policies.base import Sampling, TokenCounts, announce, with_seeds
from lvrpo.policies.decoding import Decoder, generate_text, read_rows, text_segment
from lvrpo.policies.defaults import with_behavior_logprobs
from lvrpo.policies.flow import sampling_grid
from lvrpo.policies.flow_policy import Grid, LatentFlowPolicy
from lvrpo.policies.latent_cache import LatentCache
from lvrpo.policies.showo2.checkpoint import TOKENS, Parts, load_parts, save_parts
from lvrpo.policies.showo2.model import Rows, Showo2Model, place_rows, to_latents
from lvrpo.policies.transformers_policy import (
    THINK_THEN_ANSWER,
    TransformersPolicy,
    require_layer,
    require_one_image,
    require_room,
)
from lvrpo.policies.video_frames import decode_frames, encode_frames
from lvrpo.sampling import derive_seed, token_entropy, token_logprobs, uniform_noise
from lvrpo.types import (
    Group,
    Image,
    Part,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    TaskKind,
    TextSegment,
    Trajectory,
)
from lvrpo.types import Parts as PromptParts

SYSTEM = "system\nYou are a helpful assistant.<|im_end|>"
USER, ASSISTANT = "\n<|im_start|>user\n", "\n<|im_start|>assistant\n"
DECODED = 4
"""Latents that go through the autoencoder at once."""
SHIFT = 3.0


class Showo2Policy(LatentFlowPolicy[str], TransformersPolicy):
    """Show-o2 of any size. It draws from text alone and answers questions about images; its autoencoder is frozen.

    The unguided branch of an image has an empty prompt; both branches are one batch.
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

    expert_prefixes: ClassVar[Mapping[Expert, tuple[str, ...]]] = {
        "understand": ("image_embedder_und.", "position_embedding.", "und_trans."),
        "generate": ("diffusion_head", "diff_proj.", "time_embed"),
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
        """Side of images in pixels."""
        return self.model.sizes.grid[0] * self._stride

    @property
    def _stride(self) -> int:
        """Pixels along a side of an image token."""
        return self.model.sizes.patch * 2 ** len(self.vae.config.temperal_downsample)

    def latent_grid(self, image_size: tuple[int, int] | None) -> Grid:
        """See ``LatentFlowPolicy.latent_grid``."""
        if image_size is None:
            return self.model.sizes.grid
        if any(side % self._stride for side in image_size):
            raise InputError(
                f"image_size={image_size}: sides must be multiples of {self._stride}: use {self.image_size}"
            )
        return image_size[0] // self._stride, image_size[1] // self._stride

    def latent_shape(self, grid: Grid) -> tuple[int, int]:
        """See ``LatentFlowPolicy.latent_shape``."""
        return grid[0] * grid[1], self.model.sizes.channels * self.model.sizes.patch**2

    def row(self, prompt: Prompt) -> str:
        """See ``LatentFlowPolicy.row``: the text."""
        return prompt.text

    def without_text(self, row: str) -> str:
        """See ``LatentFlowPolicy.without_text``: an empty prompt."""
        return ""

    def row_tokens(self, row: str, grid: Grid) -> int:
        """See ``LatentFlowPolicy.row_tokens``; a place of an image is its time."""
        return len(self._drawn(row)) + 1 + grid[0] * grid[1]

    def default_sampling(self, task: TaskKind) -> Sampling:
        """49 steps of Euler and guidance 5, as published; texts of up to 512 tokens."""
        return Sampling(max_new_tokens=self.longest_text, guidance_scale=5.0, num_steps=49, solver="euler")

    def timestep_shift(self) -> float:
        """3, as published."""
        return SHIFT

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        if found := next((marker for marker in TOKENS if marker in text), None):
            raise InputError(f"{text[:40]!r}: holds {found}, a marker of the model: leave it out")

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """See ``Policy.count_tokens``; every row holds its prompt by itself."""
        text = sum(len(s.tokens) for s in trajectory.segments if isinstance(s, TextSegment))
        if trajectory.image is None:
            return TokenCounts(0, self._length(self._question(trajectory.prompt)) + text, 0)
        return TokenCounts(0, 0, self.row_tokens(trajectory.prompt.text, self._drawn_grid(trajectory)))

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``. Raises InputError for what a Show-o2 cannot do."""
        for prompt in prompts:
            self.check_prompt(prompt, sampling)
        pairs = with_seeds(prompts, seeds)
        with self.autocast():
            drawn = self.draw([pair for pair in pairs if pair[0].output == ("image",)], sampling)
            written = self._write([pair for pair in pairs if pair[0].output == ("text",)], sampling)
        scored = [with_behavior_logprobs(t, rows) for t, rows in zip(written, self.logprobs(written), strict=True)]
        made = {"image": iter(drawn), "text": iter(scored)}
        return [Group(prompt, tuple(islice(made[prompt.output[0]], sampling.group_size))) for prompt in prompts]

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """See ``PolicyDefaults.check_prompt``."""
        named = f"prompt {prompt.id!r}"
        images = [part for part in prompt.parts if isinstance(part, torch.Tensor)]
        for part in prompt.parts:
            if isinstance(part, str):
                self.check_text(part)
        if prompt.output not in (("text",), ("image",)):
            raise InputError(f"{named}: a Show-o2 answers or draws, not {' and '.join(prompt.output)}: ask for one")
        if prompt.output == ("image",):
            if images:
                raise InputError(f"{named}: a Show-o2 draws from text alone, not from an image: leave the image out")
            grid = self.latent_grid(sampling.image_size)
            length, new = len(self._drawn(prompt.text)), 1 + grid[0] * grid[1]
        else:
            require_one_image(named, prompt.parts, "a Show-o2")
            length, new = self._length(self._question(prompt)), sampling.max_new_tokens
        require_room(prompt, length, new, self.positions)

    def _write(self, pairs: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Trajectory]:
        """``sampling.group_size`` answers to each prompt, given with its seed."""
        members = [(prompt, m, derive_seed(seed, m)) for prompt, seed in pairs for m in range(sampling.group_size)]
        questions = [self._question(prompt) for prompt, _, _ in members]
        new, eos, found = sampling.max_new_tokens, self.parts.ids["<|im_end|>"], list[Trajectory]()
        embed = self.model.get_input_embeddings()
        for part in self.cut([self._length(parts) + new for parts in questions]):
            own = [members[k] for k in part]
            u = uniform_noise([derive_seed(each, "text") for _, _, each in own], (new,)).to(self.device)
            decoder, owner = self._decoder([questions[k] for k in part])
            decoder.reserve(new)
            texts = generate_text(decoder, owner, embed, self.model.showo.lm_head, {eos}, u, sampling.temperature)
            for (prompt, member, each), ids in zip(own, texts, strict=True):
                segment = text_segment(ids, {eos}, sampling.temperature, self.parts.tokenizer.decode)
                found.append(Trajectory(prompt, member, (segment,), each))
            announce(found[-len(own) :])
        return found

    def _decoder(self, questions: Sequence[PromptParts]) -> tuple[Decoder, list[int]]:
        """Reads every different question once; which of them each is."""
        keys = [tuple(p if isinstance(p, str) else id(p) for p in parts) for parts in questions]
        distinct = dict(zip(keys, questions, strict=True))
        places = {key: i for i, key in enumerate(distinct)}
        rows = self._read_rows(list(distinct.values()))
        valid = torch.arange(1 - rows.x.shape[1], 1, device=self.device) >= -rows.positions[:, -1:]
        decoder = read_rows(self.model.showo.model, rows.x, valid.long(), rows.positions, rows.attention)
        return decoder, [places[key] for key in keys]

    # --- rows ---

    def _encode(self, text: str) -> list[int]:
        return list(self.parts.tokenizer.encode(text, add_special_tokens=False).ids)

    def _drawn(self, text: str) -> list[int]:
        """Ids before an image; an empty text is the unguided branch."""
        return [self.parts.ids["<|im_start|>"], *self._encode(text), self.parts.ids["<|vision_start|>"]]

    def _question(self, prompt: Prompt) -> PromptParts:
        return (THINK_THEN_ANSWER, *prompt.parts) if prompt.task == "reason" else prompt.parts

    def _question_ids(self, parts: PromptParts) -> tuple[list[int], list[int]]:
        """Ids before the image, or of the whole row without one, and after it; the image comes first."""
        text = " ".join(part for part in parts if isinstance(part, str))
        require_one_image(f"{text[:40]!r}", parts, "a Show-o2")
        start, end = self.parts.ids["<|vision_start|>"], self.parts.ids["<|vision_end|>"]
        before = [self.parts.ids["<|im_start|>"], *self._encode(SYSTEM), *self._encode(USER)]
        asked = self._encode(text) + self._encode(ASSISTANT)
        if any(isinstance(part, torch.Tensor) for part in parts):
            return [*before, start], [end, *asked]
        return [*before, *asked], []

    def _length(self, parts: PromptParts) -> int:
        rows, columns = self.model.sizes.grid
        images = sum(isinstance(part, torch.Tensor) for part in parts)
        return sum(map(len, self._question_ids(parts))) + images * (1 + rows * columns)

    def _read_rows(self, questions: Sequence[PromptParts], answers: Sequence[Sequence[int]] | None = None) -> Rows:
        """Questions, each with the tokens of its answer so far."""
        given = [next((p for p in parts if isinstance(p, torch.Tensor)), None) for parts in questions]
        read = iter(self._read_images([image for image in given if image is not None]))
        images = [None if image is None else next(read) for image in given]
        before, after = zip(*map(self._question_ids, questions), strict=True)
        rows = [[*ids, *answer] for ids, answer in zip(after, answers or [()] * len(after), strict=True)]
        return self._placed(before, images, rows)

    def _read_images(self, images: Sequence[Image]) -> Sequence[torch.Tensor]:
        """The places (1 + N, D) of each."""
        if not images:
            return ()
        latents = self.encode_images(images)
        return list(self.model.embed_images(latents, latents.new_ones(len(latents))))

    def _placed(
        self, before: Sequence[Sequence[int]], images: Sequence[torch.Tensor | None], after: Sequence[Sequence[int]]
    ) -> Rows:
        """See ``place_rows``. All ids are embedded at once, as every lookup has a gradient of the whole table."""
        rows = [*before, *after]
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64, device=self.device)
        x = self.model.get_input_embeddings()(ids).split([len(row) for row in rows])
        return place_rows(x[: len(before)], images, x[len(before) :])

    # --- images ---

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> torch.Tensor:
        """Latents (M, C, h, w): the mode of the autoencoder's posterior, normalized; kept by image."""
        return torch.stack([self._latents.get(image, self.device, self._encoded) for image in images])

    def _encoded(self, image: Image) -> torch.Tensor:
        image = middle_square(image, self.image_size)
        with torch.autocast(self.device.type, enabled=False):
            return encode_frames(self.vae, (image.to(self.device) * 2 - 1)[None].to(self.vae.dtype))[0].float()

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> list[Image]:
        """Images of tokens (B, N, patch * patch * C), on the CPU."""
        found: list[Image] = []
        with torch.autocast(self.device.type, enabled=False):
            for part in self._latents_of(latents, grid).split(DECODED):
                pixels = decode_frames(self.vae, part.to(self.vae.dtype)).float()
                found += list(((pixels + 1) / 2).clamp(0, 1).cpu())
        return found

    def _latents_of(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        sizes = self.model.sizes
        return to_latents(tokens, (grid[0] * sizes.patch, grid[1] * sizes.patch), sizes.channels)

    # --- velocities ---

    def times(self, sampling: Sampling, grid: Grid) -> torch.Tensor:
        """See ``LatentFlowPolicy.times``."""
        return sampling_grid(replace(sampling, timestep_shift=sampling.timestep_shift or SHIFT))

    def flow(self, rows: Sequence[str], x_t: torch.Tensor, t: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
        """See ``LatentFlowPolicy.flow``; latents of several branches are embedded once."""
        repeats = len(rows) // len(x_t)
        with self.autocast(), self.checkpointing():
            images = self.model.embed_images(self._latents_of(x_t, grid), 1 - t).repeat(repeats, 1, 1)
            placed = self._placed([self._drawn(row) for row in rows], list(images), [()] * len(rows))
            return -self.model.velocity(placed, (1 - t).repeat(repeats)).float()

    # --- replay ---

    def replay_texts(self, trajectories: Sequence[Trajectory]) -> list[SegmentLogprobs]:
        """See ``LatentFlowPolicy.replay_texts``."""
        segments = [segment for t in trajectories for segment in t.segments if isinstance(segment, TextSegment)]
        questions = [self._question(trajectory.prompt) for trajectory in trajectories]
        return self._score(questions, [segment.tokens for segment in segments], segments[0].temperature)

    def _score(
        self, questions: Sequence[PromptParts], answers: Sequence[torch.Tensor], temperature: float
    ) -> list[SegmentLogprobs]:
        found: list[SegmentLogprobs] = []
        lengths = [self._length(parts) + len(ids) for parts, ids in zip(questions, answers, strict=True)]
        self.require_positions(length - 1 for length in lengths)  # the last token is not read
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
    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Judge.hidden_states``; after the last layer the states are normed."""
        require_layer(layer, len(self.model.showo.model.layers))
        found, ids = [], self.parts.ids
        with self.autocast():
            for part in parts:
                drawn = isinstance(part, torch.Tensor)
                begin = [ids["<|im_start|>"], *([ids["<|vision_start|>"]] if drawn else [])]
                read = self._read_images([part])[0] if drawn else None
                states = self.model.states(self._placed([begin], [read], [() if drawn else self._encode(part)]), layer)
                found.append(states[0, len(begin) + drawn :])  # an image begins with the place of its time
        return found

    # --- weights ---

    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``load`` reads; the frozen autoencoder is linked where the file system can."""
        save_parts(self.model, self.parts, folder)

    @classmethod
    def read_folder(cls, folder: Path, dtype: torch.dtype, *, weights: bool) -> Self:
        """See ``TransformersPolicy.read_folder``; the layout is that of docs/guides/showo2.md, safetensors only."""
        return cls(*load_parts(folder, dtype, weights=weights))
