"""Janus as a policy: reads pictures and answers, thinks, and draws image tokens one after another, with guidance."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.adapter import Modules
from lvrpo.policies.base import Sampling, TokenCounts
from lvrpo.policies.decoding import Decoder, generate_text
from lvrpo.policies.defaults import replay_settings, with_behavior_logprobs
from lvrpo.policies.janus.generate import generate_image_tokens, read_rows
from lvrpo.policies.janus.processor import PATCH, THINK_THEN_DRAW, Processor, Row
from lvrpo.policies.transformers_checkpoint import CONFIG, load_model, save_model
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, TransformersPolicy
from lvrpo.reading import read_json_object
from lvrpo.sampling import derive_seed, guide_logits, token_logprobs, token_scores, uniform_noise
from lvrpo.types import (
    SEGMENT_KINDS,
    Group,
    Image,
    ImageTokenSegment,
    OutputKind,
    Part,
    Parts,
    Prompt,
    Segment,
    SegmentKind,
    SegmentLogprobs,
    Task,
    TextSegment,
    Trajectory,
    segments_through,
)

DECODED = 16
"""Pictures that go through the autoencoder at once."""
OUTPUTS: tuple[tuple[OutputKind, ...], ...] = (("text",), ("image",), ("text", "image"))


@dataclass(frozen=True)
class _Scored:
    """A segment within its row: the states that its tokens are predicted from."""

    segment: Segment
    start: int
    """The first of them: the place before its first token."""
    unguided: Row | None = None
    """The row without the prompt, where guidance mixes it in; as long as the row up to this segment's end."""


class JanusPolicy(TransformersPolicy):
    """Janus and Janus-Pro of any size, as ``JanusForConditionalGeneration`` of transformers computes them.

    Text or image tokens follow the prompt; with ``("text", "image")`` the image follows the text, as one answer.
    Guidance is classifier-free: the unconditional branch has padding in the place of the prompt.
    """

    segment_kinds: tuple[SegmentKind, ...] = ("text", "tokens")
    tasks: tuple[Task, ...] = ("understand", "generate", "reason")
    """Without ``edit``, which it was not trained for."""
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.model\.(?P<expert>language_model)\.layers\.\d+\.self_attn\.[qkvo]_proj",
        "mlp": r"model\.model\.(?P<expert>language_model)\.layers\.\d+\.mlp\.(gate|up|down)_proj",
        "connector": r"model\.model\.(?P<expert>aligner|generation_aligner)\.(fc1|hidden_layers\.\d+)",
        "head": r"model\.(model\.)?(?P<expert>lm_head|generation_head)(\.proj_out|\.vision_head)?",
        "tower": r"model\.model\.(?P<expert>vision_model)\..+",
    }

    def __init__(self, model: Any, processor: Processor) -> None:
        """``model``: a JanusForConditionalGeneration. Any: of an optional package. Its autoencoder stays frozen."""
        super().__init__(model)
        self.processor = processor
        model.model.vqmodel.requires_grad_(False)

    # --- sizes ---

    @property
    def drawn_side(self) -> int:
        """Side of a drawing in pixels."""
        return int(self.model.config.vision_config.image_size)

    @property
    def image_tokens(self) -> int:
        """N: of a drawing."""
        return int(self.model.config.vision_config.num_image_tokens)

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """Each member's row holds the prompt by itself; under guidance a drawing has two rows."""
        row, scored = self._scored_row(trajectory, SEGMENT_KINDS)
        branches = [one.unguided.ids for one in scored if one.unguided is not None]
        return TokenCounts(0, len(row.ids), sum(map(len, branches)))

    def default_sampling(self, task: Task) -> Sampling:
        """Guidance 5, as published; texts of up to 512 tokens, or of half the positions of a small model."""
        return Sampling(max_new_tokens=self.longest_text, guidance_scale=5.0)

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        self.processor.check_text(text)

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """Draws a group for every prompt; see ``Policy.sample``. Raises InputError for what a Janus cannot do."""
        size, members = sampling.group_size, []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self._check(prompt, sampling)
            members += [(prompt, m, derive_seed(seed, m)) for m in range(size)]
        made: list[tuple[Segment, ...]] = [() for _ in members]
        with self.autocast():
            for kind in ("text", "image"):
                waiting = [i for i, (prompt, _, _) in enumerate(members) if kind in prompt.output]
                rows = [self._row(members[i][0], made[i], draws=kind == "image") for i in waiting]
                new = self.image_tokens if kind == "image" else sampling.max_new_tokens
                branches = 2 if kind == "image" and sampling.guidance_scale != 1 else 1
                for part in self.cut([branches * (len(row.ids) + new) for row in rows]):
                    own = [derive_seed(members[waiting[k]][2], kind) for k in part]
                    make = self._draw if kind == "image" else self._write
                    found = make([rows[k] for k in part], own, sampling)
                    for k, segment in zip(part, found, strict=True):
                        made[waiting[k]] += (segment,)
        drawn = [Trajectory(p, m, made[i], seed, self.version) for i, (p, m, seed) in enumerate(members)]
        scored = [with_behavior_logprobs(t, rows) for t, rows in zip(drawn, self.logprobs(drawn), strict=True)]
        return [Group(prompt, tuple(scored[p * size : (p + 1) * size])) for p, prompt in enumerate(prompts)]

    def _check(self, prompt: Prompt, sampling: Sampling) -> None:
        named = f"prompt {prompt.id!r}"
        pictures = any(isinstance(part, torch.Tensor) for part in prompt.parts)
        if prompt.output not in OUTPUTS:
            raise InputError(f"{named}: a Janus answers, draws, or thinks and draws, not {', '.join(prompt.output)}")
        if "image" in prompt.output and pictures:
            raise InputError(f"{named}: a Janus draws from text alone, not from a picture: leave the picture out")
        if prompt.task == "understand" and not pictures:
            raise InputError(f"{named}: task 'understand' needs a picture: give one")
        side = self.drawn_side
        if "image" in prompt.output and sampling.image_size not in (None, (side, side)):
            raise InputError(f"image_size={sampling.image_size}: this model draws {side} x {side}: leave the size out")
        new = sampling.max_new_tokens * ("text" in prompt.output) + (self.image_tokens + 1) * ("image" in prompt.output)
        length = len(self._row(prompt, ()).ids)
        if length + new > self.positions:
            raise InputError(
                f"{named}: {length} tokens and {new} after them, the limit is {self.positions}: shorten it, or "
                "write less (max_new_tokens)"
            )

    def _write(self, rows: Sequence[Row], seeds: Sequence[int], sampling: Sampling) -> Iterator[Segment]:
        u = uniform_noise(seeds, (sampling.max_new_tokens,)).to(self.device)
        eos = self.processor.ids["eos_token"]
        embed = self.model.get_input_embeddings()
        for ids in generate_text(self._decoder(rows), embed, self.model.lm_head, (eos,), u, sampling.temperature):
            ended = ids[-1] == eos
            text = self.processor.decode(ids[:-1] if ended else ids)
            tokens = torch.tensor(ids, dtype=torch.int64)
            yield TextSegment(tokens, torch.zeros(len(ids)), sampling.temperature, text, ended)

    def _draw(self, rows: Sequence[Row], seeds: Sequence[int], sampling: Sampling) -> Iterator[Segment]:
        u = uniform_noise(seeds, (self.image_tokens,)).to(self.device)
        scale, temperature = sampling.guidance_scale, sampling.image_temperature
        branches = [*rows, *(self._without_prompt(row) for row in rows if scale != 1)]
        embed = self.model.prepare_embeddings_for_image_generation
        head = self.model.model.generation_head
        codes = generate_image_tokens(self._decoder(branches), embed, head, u, temperature, scale).cpu()
        for tokens, image in zip(codes, self.decode_images(codes), strict=True):
            yield ImageTokenSegment(
                tokens, torch.zeros(len(tokens)), temperature, scale, image, sampling.guided_logprobs
            )

    def _decoder(self, rows: Sequence[Row]) -> Decoder:
        """Reads every different row once, then holds one row per member."""
        distinct = {row.key: row for row in rows}
        places = {key: i for i, key in enumerate(distinct)}
        x, mask = self._embedded(list(distinct.values()), left=True)
        decoder = read_rows(self.model.model.language_model, x, mask)
        decoder.select([places[row.key] for row in rows])
        return decoder

    @torch.no_grad()
    def decode_images(self, codes: torch.Tensor) -> list[Image]:
        """The pictures of image tokens int64 (B, N), on the CPU."""
        vqmodel, found = self.model.model.vqmodel, []
        with torch.autocast(self.device.type, enabled=False):
            for part in codes.to(self.device).split(DECODED):
                found += list(self.processor.pictures.images(vqmodel.decode(part)).cpu())
        return found

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> torch.Tensor:
        """The image tokens of pictures, int64 (B, N), as the model's own autoencoder quantizes them."""
        vqmodel, found = self.model.model.vqmodel, []
        pixels = self.processor.pictures.pixels(images)
        with torch.autocast(self.device.type, enabled=False):
            for part in pixels.split(DECODED):
                on_device = part.to(self.device, self.model.lm_head.weight.dtype)
                found.append(vqmodel.encode(on_device).image_tokens.view(len(part), -1).cpu())
        return torch.cat(found)

    # --- rows ---

    def _row(self, prompt: Prompt, before: Sequence[Segment], draws: bool = False) -> Row:
        """The prompt, and what was written before; ``draws``: with the start of a picture."""
        parts = prompt.parts
        if prompt.task == "reason":
            parts = (THINK_THEN_DRAW if "image" in prompt.output else THINK_THEN_ANSWER, *parts)
        row = self._context(parts, "image" in prompt.output)
        ids = row.ids
        for segment in before:
            assert isinstance(segment, TextSegment)
            ids += tuple(segment.tokens[: -1 if segment.ended else None].tolist())
        return replace(row, ids=(*ids, self.processor.ids["boi_token"]) if draws else ids)

    def _context(self, parts: Parts, draws: bool) -> Row:
        pictures = tuple(part for part in parts if isinstance(part, torch.Tensor))
        return Row(tuple(self.processor.prompt(parts, draws)), pictures)

    def _without_prompt(self, row: Row) -> Row:
        """The unconditional branch of guidance: all but the markers of start and image is padding."""
        markers = self.processor.ids
        kept = (markers["bos_token"], markers["boi_token"])
        vocabulary = self.processor.vocabulary_size
        return Row(tuple(i if i in kept or i >= vocabulary else markers["pad_token"] for i in row.ids))

    def _scored_row(self, t: Trajectory, kinds: Collection[SegmentKind]) -> tuple[Row, list[_Scored]]:
        """A trajectory as one row, up to the last segment of these kinds, and the positions of its segments."""
        done, found = [], []
        row = self._row(t.prompt, ())
        for segment in segments_through(t, kinds):
            row = self._row(t.prompt, done, draws=isinstance(segment, ImageTokenSegment))
            start, unguided = len(row.ids) - 1, None
            if isinstance(segment, ImageTokenSegment):
                codes = (segment.tokens[:-1] + self.processor.vocabulary_size).tolist()
                row = replace(row, ids=(*row.ids, *codes))
                if segment.guidance_scale != 1 and segment.guided_logprobs != "none":
                    unguided = self._without_prompt(row)
            else:
                assert isinstance(segment, TextSegment)
                row = replace(row, ids=(*row.ids, *segment.tokens[:-1].tolist()))
            found.append(_Scored(segment, start, unguided))
            done.append(segment)
        return row, found

    def _embedded(self, rows: Sequence[Row], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as the transformer is fed (R, L, D), padded on the right or the left, and int64 (R, L), 0 on padding."""
        pad, most = self.processor.ids["pad_token"], max(len(row.ids) for row in rows)
        filled, mask = [], []
        for row in rows:
            missing = most - len(row.ids)
            filled.append([pad] * missing * left + [*row.ids] + [pad] * missing * (not left))
            mask.append([0] * missing * left + [1] * len(row.ids) + [0] * missing * (not left))
        ids, vocabulary = torch.tensor(filled, device=self.device), self.processor.vocabulary_size
        x = self.model.get_input_embeddings()(ids.clamp(0, vocabulary - 1))
        drawn, read = ids >= vocabulary, ids == PATCH
        if drawn.any():
            codes = self.model.prepare_embeddings_for_image_generation(ids[drawn] - vocabulary)
            x = x.masked_scatter(drawn[..., None], codes.to(x.dtype))
        if read.any():
            x = x.masked_scatter(read[..., None], self._read([p for row in rows for p in row.pictures]).to(x.dtype))
        return x, torch.tensor(mask, device=self.device)

    def _read(self, pictures: Sequence[Image]) -> torch.Tensor:
        """Encodes pictures for reading: (B * patches, D). Each distinct picture is encoded once."""
        distinct = {id(picture): picture for picture in pictures}
        places = {key: i for i, key in enumerate(distinct)}
        pixels = self.processor.pictures.pixels(list(distinct.values())).to(self.device)
        features = self.model.model.get_image_features(pixels).pooler_output
        order = torch.tensor([places[id(picture)] for picture in pictures], device=self.device)
        return features.index_select(0, order).flatten(0, 1)

    def _states(self, rows: Sequence[Row]) -> torch.Tensor:
        """The final states of rows (R, L, D), padded on the right, which causal attention never looks at."""
        x, _ = self._embedded(rows)
        return self.model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state

    # --- replay ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """Differentiable replay, one pass per batch of rows with the same settings; see ``Policy.logprobs``."""
        rows = [self._scored_row(trajectory, kinds) for trajectory in trajectories]
        alike: dict[Hashable, list[int]] = {}
        for i, (_, scored) in enumerate(rows):
            alike.setdefault(tuple(replay_settings(one.segment) for one in scored), []).append(i)
        out: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        with self.autocast(), self.checkpointing():
            for settings, same in alike.items():
                if not settings:
                    continue
                guided = rows[same[0]][1][-1].unguided is not None
                for part in self.cut([(1 + guided) * len(rows[i][0].ids) for i in same]):
                    indices = [same[k] for k in part]
                    for i, found in zip(indices, self._replay([rows[i] for i in indices]), strict=True):
                        out[i] = found
        return out

    def _replay(self, rows: Sequence[tuple[Row, list[_Scored]]]) -> list[list[SegmentLogprobs]]:
        """Rows whose segments are of the same kinds and settings."""
        B, full = len(rows), [row for row, _ in rows]
        unguided = [one.unguided for _, scored in rows for one in scored if one.unguided is not None]
        last = rows[0][1][-1].segment
        held = isinstance(last, ImageTokenSegment) and last.guided_logprobs == "detach_uncond"
        states = self._states(full if held else [*full, *unguided])
        if unguided and held:
            with torch.no_grad():
                other = self._states(unguided)
        else:
            other = states[B:]
        out: list[list[SegmentLogprobs]] = [[] for _ in rows]
        for b, (_, scored) in enumerate(rows):
            for one in scored:
                out[b].append(self._score(one, states[b], other[b] if one.unguided is not None else None))
        return out

    def _score(self, one: _Scored, states: torch.Tensor, unguided: torch.Tensor | None) -> SegmentLogprobs:
        """Scores a segment, given the states of its row (L, D) and of the row without the prompt."""
        segment = one.segment
        assert isinstance(segment, TextSegment | ImageTokenSegment)
        tokens = segment.tokens.to(states.device)
        places = slice(one.start, one.start + len(tokens))
        if isinstance(segment, TextSegment):
            logits = self.model.lm_head(states[places]).float()
        else:
            head = self.model.model.generation_head
            other = None if unguided is None else head(unguided[places])
            logits = guide_logits(head(states[places]), other, segment.guidance_scale, segment.guided_logprobs)
        return SegmentLogprobs(*token_scores(logits, tokens, segment.temperature))

    # --- judging ---

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Mean log-prob per token of each text as the answer to its context; see ``Policy.text_logprob``."""
        rows = [self._context(parts, draws=False) for parts in contexts]
        answers = [torch.tensor(self.processor.answer(text)) for text in texts]
        found = torch.zeros(len(rows))
        whole = [replace(row, ids=(*row.ids, *ids[:-1].tolist())) for row, ids in zip(rows, answers, strict=True)]
        with self.autocast():
            for part in self.cut([len(row.ids) for row in whole]):
                states = self._states([whole[i] for i in part])
                for k, i in enumerate(part):
                    start, ids = len(rows[i].ids) - 1, answers[i].to(states.device)
                    logits = self.model.lm_head(states[k, start : start + len(ids)]).float()
                    found[i] = token_logprobs(logits, ids).mean().cpu()
        return found

    @torch.no_grad()
    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """Log-prob of the image tokens of each picture after its context, unguided; nothing of it is left to chance."""
        codes = self.encode_images(images)
        prompts = [Prompt("judged", "generate", tuple(parts), ("image",)) for parts in contexts]
        for prompt in prompts:
            self._check(prompt, Sampling())
        segments = [ImageTokenSegment(row, torch.zeros(len(row)), 1.0, 1.0, image)
                    for row, image in zip(codes, images, strict=True)]  # fmt: skip
        trajectories = [Trajectory(prompt, 0, (s,), 0) for prompt, s in zip(prompts, segments, strict=True)]
        each = torch.stack([rows[0].logprobs.sum().cpu() for rows in self.logprobs(trajectories)])
        return each[:, None].expand(-1, draws)

    @torch.no_grad()
    def reading_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Policy.reading_states``; after the last layer the states are normed."""
        depth, markers = len(self.model.model.language_model.layers), self.processor.ids
        if not 0 <= layer <= depth:
            raise InputError(f"layer={layer}: the policy has {depth} layers")
        found = []
        with self.autocast():
            for part in parts:
                ids = self.processor.tokenize(part) if isinstance(part, str) else []
                begin = [markers["bos_token"], *([] if isinstance(part, str) else [markers["boi_token"]])]
                inner = ids if isinstance(part, str) else [PATCH] * self.processor.patches
                pictures = () if isinstance(part, str) else (part,)
                x, _ = self._embedded([Row((*begin, *inner), pictures)])
                out = self.model.model.language_model(inputs_embeds=x, use_cache=False, output_hidden_states=True)
                found.append(out.hidden_states[layer][0, len(begin) :])
        return found

    # --- weights ---

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """understand: vision encoder and lm_head; generate: embedding and head of image tokens; shared: the Llama."""
        groups: dict[str, list[nn.Parameter]] = {"understand": [], "generate": [], "shared": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[_expert_of(name)].append(parameter)
        return groups

    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``JanusForConditionalGeneration.from_pretrained`` reads too."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder)
        self.processor.save(folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads a folder in the layout of transformers, in one file of weights or in shards.

        ``dtype``: None is float32 on a CPU, bfloat16 elsewhere. Raises InputError, one line, for another model's
        folder, missing or damaged files, tensors that are missing or do not fit, and without transformers.
        """
        folder, device = Path(folder), torch.device(device)
        kind = read_json_object(folder / CONFIG).get("model_type")
        if kind != "janus":
            raise InputError(f"{folder}: holds a model of type {kind!r}, not 'janus': give another one")
        default = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_model(folder, dtype or default, "a Janus")
        vision, vocabulary = model.config.vision_config, model.config.text_config.vocab_size
        processor = Processor.load(folder, vision.num_image_tokens, vision.image_size, vocabulary)
        return cls(model, processor).to(device)


def _expert_of(name: str) -> str:
    if name.startswith(("model.vision_model.", "model.aligner.", "lm_head.")):
        return "understand"
    return "generate" if name.startswith("model.generation_") else "shared"
