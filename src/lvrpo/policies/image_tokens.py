"""Models of ``transformers`` that generate text and image tokens autoregressively by one transformer.

Letters: R rows, L places of a row, D width, B members, N tokens of an image, h lines of w tokens each, K codes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lvrpo.policies.base import Sampling, TokenCounts, announce, with_seeds
from lvrpo.policies.decoding import Decoder, generate_image_tokens, generate_text, read_rows, text_segment
from lvrpo.policies.defaults import replay_settings, with_behavior_logprobs
from lvrpo.policies.supervised import token_losses
from lvrpo.policies.transformers_policy import (
    THINK_THEN_ANSWER,
    THINK_THEN_DRAW,
    TransformersPolicy,
    require_drawn_from_text,
    require_layer,
    require_room,
)
from lvrpo.sampling import derive_seed, guide_logits, token_logprobs, token_scores, uniform_noise
from lvrpo.types import (
    SEGMENT_KINDS,
    Example,
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
    TaskKind,
    TextSegment,
    Trajectory,
    segments_through,
)

ANSWER: tuple[OutputKind, ...] = ("text",)


@dataclass(frozen=True, eq=False)
class Row:
    """Input of the transformer: ids, whose meaning is the policy's."""

    ids: tuple[int, ...]
    images: tuple[Image, ...] = ()
    """Images for the understanding encoder, in order."""

    @property
    def key(self) -> Hashable:
        """The same for rows of the same content."""
        return self.ids, tuple(map(id, self.images))


@dataclass(frozen=True, eq=False)
class _Scored:
    """A segment within its row: the states that its tokens are predicted from."""

    segment: Segment
    places: torch.Tensor
    """int64 (N,), on the CPU."""
    unguided: Row | None = None
    """The row of the unconditional branch, where guidance mixes it in; it ends with the same token."""
    shift: int = 0
    """How much shorter it is than the row."""


class ImageTokenPolicy(TransformersPolicy):
    """A policy of texts and image tokens. A model says how its rows look and what heads it has.

    Text or image tokens follow the prompt; with ``("text", "image")`` the image follows the text, as one answer.
    Guidance is classifier-free: both branches are rows of one batch, fed the same image tokens.
    """

    segment_kinds: tuple[SegmentKind, ...] = ("text", "tokens")
    tasks: tuple[TaskKind, ...] = ("understand", "generate", "reason")
    """Without ``edit``: images follow text alone."""
    kind: ClassVar[str]
    """Name of the model in messages, such as "a Janus"."""
    end_id: int
    """The token that ends a text."""
    pad_id: int
    token_side: int
    """Pixels along a side of an image token."""
    line_end: int | None = None
    """The token after each line of image tokens; None: there is none."""
    text_tokens: torch.Tensor | None = None
    """bool (V,): the tokens that a text may contain; None: all."""

    # --- what a model says ---

    @property
    @abstractmethod
    def transformer(self) -> Any:
        """The decoder of transformers, fed embeddings. Any: of an optional package."""

    @abstractmethod
    def drawn_size(self, sampling: Sampling) -> tuple[int, int]:
        """Height and width of an image in pixels; raises InputError for a size that it cannot draw."""

    @abstractmethod
    def context(self, parts: Parts, output: Sequence[OutputKind]) -> Row:
        """The row of a prompt, up to the first token of its answer or of ``start_image``."""

    @abstractmethod
    def start_image(self, size: tuple[int, int]) -> list[int]:
        """Ids that precede the first image token of an image of this height and width in pixels."""

    @abstractmethod
    def without_prompt(self, row: Row, size: tuple[int, int]) -> Row:
        """The row of the unconditional branch, for a row that ends with ``start_image``."""

    @abstractmethod
    def code_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Maps codes of image tokens to their ids in a row."""

    @abstractmethod
    def image_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Maps final states (..., D) to logits of the codes (..., K)."""

    @abstractmethod
    def answer_ids(self, parts: Parts, text: str) -> list[int]:
        """Ids of a text as the answer to a prompt, end token included."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """Decodes the ids of a sampled text, given without the end token."""

    @abstractmethod
    def encode_image(self, image: Image) -> torch.Tensor:
        """Quantizes an image: int64 codes (h, w), on the CPU."""

    @abstractmethod
    def decode_images(self, codes: torch.Tensor) -> list[Image]:
        """Decodes codes int64 (B, h, w) to images on the CPU."""

    @abstractmethod
    def input_row(self, part: Part) -> tuple[Row, list[int]]:
        """The row of one text or image alone, and the positions of its tokens or patches."""

    def embed(self, ids: torch.Tensor, images: Sequence[Image]) -> torch.Tensor:
        """Embeds ids (R, L) as the input of the transformer (R, L, D); ``images``: those of the rows."""
        return self.model.get_input_embeddings()(ids)

    # --- sizes ---

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises InputError for a size that it cannot draw."""
        self.drawn_size(sampling)

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """See ``PolicyDefaults.check_prompt``."""
        self._check(prompt, sampling, self.drawn_size(sampling))

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """Each member's row holds the prompt by itself; under guidance an image has two rows."""
        row, scored = self._scored_row(trajectory, SEGMENT_KINDS)
        branches = [one.unguided.ids for one in scored if one.unguided is not None]
        return TokenCounts(0, len(row.ids), sum(map(len, branches)))

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.token_side, size[1] // self.token_side

    def _drawing(self, size: tuple[int, int]) -> int:
        """Length of an image in a row: its start, its tokens and the ends of its lines."""
        h, w = self._grid(size)
        return len(self.start_image(size)) + h * (w + (self.line_end is not None))

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; raises InputError for what the model cannot do."""
        size, members, pixels = sampling.group_size, [], self.drawn_size(sampling)
        for prompt, seed in with_seeds(prompts, seeds):
            self._check(prompt, sampling, pixels)
            members += [(prompt, m, derive_seed(seed, m)) for m in range(size)]
        made: list[tuple[Segment, ...]] = [() for _ in members]
        with self.autocast():
            for kind in ("text", "image"):
                waiting = [i for i, (prompt, _, _) in enumerate(members) if kind in prompt.output]
                draws = pixels if kind == "image" else None
                rows = [self._row(members[i][0], made[i], draws) for i in waiting]
                new = self._drawing(pixels) if draws else sampling.max_new_tokens
                branches = 2 if draws and sampling.guidance_scale != 1 else 1
                for part in self.cut([branches * (len(row.ids) + new) for row in rows]):
                    own = [derive_seed(members[waiting[k]][2], kind) for k in part]
                    some = [rows[k] for k in part]
                    found = self._draw(some, own, sampling, pixels) if draws else self._write(some, own, sampling)
                    for k, segment in zip(part, found, strict=True):
                        made[waiting[k]] += (segment,)
                    done = [(made[i], *members[i]) for i in (waiting[k] for k in part)]
                    announce([Trajectory(p, m, own, s) for own, p, m, s in done if len(own) == len(p.output)])
        drawn = [Trajectory(p, m, made[i], seed) for i, (p, m, seed) in enumerate(members)]
        scored = [with_behavior_logprobs(t, rows) for t, rows in zip(drawn, self.logprobs(drawn), strict=True)]
        return [Group(prompt, tuple(scored[p * size : (p + 1) * size])) for p, prompt in enumerate(prompts)]

    def _check(self, prompt: Prompt, sampling: Sampling, size: tuple[int, int]) -> None:
        require_drawn_from_text(prompt, self.kind)
        new = sampling.max_new_tokens * ("text" in prompt.output)
        new += self._drawing(size) if "image" in prompt.output else 0
        require_room(prompt, len(self._row(prompt, ()).ids), new, self.positions)

    def _write(self, rows: Sequence[Row], seeds: Sequence[int], sampling: Sampling) -> Iterator[Segment]:
        u = uniform_noise(seeds, (sampling.max_new_tokens,)).to(self.device)
        embed, head = self.model.get_input_embeddings(), self.model.lm_head
        decoder, owner = self._decoder(rows)
        decoder.reserve(sampling.max_new_tokens)
        for ids in generate_text(decoder, owner, embed, head, {self.end_id}, u, sampling.temperature, self._allowed()):
            yield text_segment(ids, {self.end_id}, sampling.temperature, self.decode_text)

    def _draw(
        self, rows: Sequence[Row], seeds: Sequence[int], sampling: Sampling, size: tuple[int, int]
    ) -> Iterator[Segment]:
        h, w = self._grid(size)
        u = uniform_noise(seeds, (h * w,)).to(self.device)
        scale, temperature = sampling.guidance_scale, sampling.image_temperature
        branches = [*rows, *(self.without_prompt(row, size) for row in rows if scale != 1)]

        def embed(codes: torch.Tensor, place: int) -> torch.Tensor:
            ids = self.code_ids(codes)[:, None]
            if self.line_end is not None and (place + 1) % w == 0:
                ids = torch.cat([ids, torch.full_like(ids, self.line_end)], dim=1)
            return self.embed(ids, ())

        decoder, owner = self._decoder(branches)
        decoder.select(owner)
        decoder.reserve(h * (w + 1))  # line ends are places too
        codes = generate_image_tokens(decoder, embed, self.image_logits, u, temperature, scale).cpu()
        for tokens, image in zip(codes, self.decode_images(codes.view(-1, h, w)), strict=True):
            none = torch.zeros(len(tokens))
            yield ImageTokenSegment(tokens, none, temperature, scale, image, sampling.guided_logprobs)

    def _decoder(self, rows: Sequence[Row]) -> tuple[Decoder, list[int]]:
        """Reads every different row once; which of them each row is."""
        distinct = {row.key: row for row in rows}
        places = {key: i for i, key in enumerate(distinct)}
        decoder = read_rows(self.transformer, *self._embedded(list(distinct.values()), left=True))
        return decoder, [places[row.key] for row in rows]

    def _allowed(self) -> torch.Tensor | None:
        return None if self.text_tokens is None else self.text_tokens.to(self.device)

    # --- rows ---

    def _row(self, prompt: Prompt, before: Sequence[Segment], draws: tuple[int, int] | None = None) -> Row:
        """The prompt, and what was written before; ``draws``: with the start of an image of this size."""
        parts = prompt.parts
        if prompt.task == "reason":
            parts = (THINK_THEN_DRAW if "image" in prompt.output else THINK_THEN_ANSWER, *parts)
        row = self.context(parts, prompt.output)
        ids = row.ids
        for segment in before:
            assert isinstance(segment, TextSegment)
            ids += tuple(segment.tokens[: -1 if segment.ended else None].tolist())
        return replace(row, ids=(*ids, *self.start_image(draws)) if draws is not None else ids)

    def _scored_row(self, t: Trajectory, kinds: Collection[SegmentKind]) -> tuple[Row, list[_Scored]]:
        """A trajectory as one row, up to the last segment of these kinds, and the positions of its segments."""
        done, found = [], []
        row = self._row(t.prompt, ())
        for segment in segments_through(t, kinds):
            if isinstance(segment, ImageTokenSegment):
                size = (segment.image.shape[1], segment.image.shape[2])
                row = self._row(t.prompt, done, size)
                ids, places = self._placed(segment.tokens, size)
                other, shift = None, 0
                if segment.guidance_scale != 1 and segment.guided_logprobs != "none":
                    free = self.without_prompt(row, size)
                    other, shift = replace(free, ids=(*free.ids, *ids)), len(row.ids) - len(free.ids)
                found.append(_Scored(segment, len(row.ids) - 1 + places, other, shift))
                row = replace(row, ids=(*row.ids, *ids))
            else:
                assert isinstance(segment, TextSegment)
                row = self._row(t.prompt, done)
                found.append(_Scored(segment, len(row.ids) - 1 + torch.arange(len(segment.tokens))))
                row = replace(row, ids=(*row.ids, *segment.tokens[:-1].tolist()))
            done.append(segment)
        return row, found

    def _placed(self, codes: torch.Tensor, size: tuple[int, int]) -> tuple[list[int], torch.Tensor]:
        """Ids of codes (N,) except the last, and the offset (N,) at which each code is predicted."""
        w, places = self._grid(size)[1], torch.arange(len(codes))
        ends = 0 if self.line_end is None else 1
        ids = self.image_ids(codes.view(-1, w))
        return ids[: len(ids) - 1 - ends].tolist(), places + ends * (places // w)

    def image_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Ids of the codes (h, w) of an image, ends of lines included, on the CPU."""
        ids = self.code_ids(codes.to(self.device)).cpu()
        if self.line_end is not None:
            ids = torch.cat([ids, ids.new_full((len(ids), 1), self.line_end)], dim=1)
        return ids.flatten()

    def _embedded(self, rows: Sequence[Row], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds rows (R, L, D), padded on the right or the left; the second result, int64 (R, L), is 0 on padding."""
        most = max(len(row.ids) for row in rows)
        filled, mask = [], []
        for row in rows:
            missing = most - len(row.ids)
            filled.append([self.pad_id] * missing * left + [*row.ids] + [self.pad_id] * missing * (not left))
            mask.append([0] * missing * left + [1] * len(row.ids) + [0] * missing * (not left))
        x = self.embed(torch.tensor(filled, device=self.device), [p for row in rows for p in row.images])
        return x, torch.tensor(mask, device=self.device)

    def _states(self, rows: Sequence[Row]) -> torch.Tensor:
        """The final states of rows (R, L, D), padded on the right, which causal attention never looks at."""
        self.require_positions(len(row.ids) for row in rows)
        x, _ = self._embedded(rows)
        return self.transformer(inputs_embeds=x, use_cache=False).last_hidden_state

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
        """Scores a segment, given the states of its row (L, D) and of the row of the unconditional branch."""
        segment, places = one.segment, one.places.to(states.device)
        assert isinstance(segment, TextSegment | ImageTokenSegment)
        tokens = segment.tokens.to(states.device)
        if isinstance(segment, TextSegment):
            logits = self.model.lm_head(states[places]).float()
            return SegmentLogprobs(*token_scores(logits, tokens, segment.temperature, self._allowed()))
        other = None if unguided is None else self.image_logits(unguided[places - one.shift])
        logits = guide_logits(self.image_logits(states[places]), other, segment.guidance_scale, segment.guided_logprobs)
        return SegmentLogprobs(*token_scores(logits, tokens, segment.temperature))

    # --- supervised ---

    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: None = None
    ) -> Mapping[str, torch.Tensor]:
        """See ``SupervisedPolicy.supervised_losses``: cross-entropies per token of text and per image token."""
        return token_losses(self, examples, generator)

    # --- judging ---

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Mean log-prob per token of each text as the answer to its context; see ``Policy.text_logprob``."""
        rows = [self.context(parts, ANSWER) for parts in contexts]
        answers = [torch.tensor(self.answer_ids(*pair)) for pair in zip(contexts, texts, strict=True)]
        found = torch.zeros(len(rows))
        whole = [replace(row, ids=(*row.ids, *ids[:-1].tolist())) for row, ids in zip(rows, answers, strict=True)]
        with self.autocast():
            for part in self.cut([len(row.ids) for row in whole]):
                states = self._states([whole[i] for i in part])
                for k, i in enumerate(part):
                    start, ids = len(rows[i].ids) - 1, answers[i].to(states.device)
                    logits = self.model.lm_head(states[k, start : start + len(ids)]).float()
                    found[i] = token_logprobs(logits, ids, 1.0, self._allowed()).mean().cpu()
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
        """See ``Policy.image_logprob``; exact and unguided, so all draws are equal."""
        prompts = [Prompt("judged", "generate", tuple(parts), ("image",)) for parts in contexts]
        trajectories = []
        for prompt, image in zip(prompts, images, strict=True):
            codes = self.encode_image(image)
            size = (codes.shape[0] * self.token_side, codes.shape[1] * self.token_side)
            self._check(prompt, Sampling(), size)
            tokens = codes.flatten()
            segment = ImageTokenSegment(tokens, torch.zeros(len(tokens)), 1.0, 1.0, image.new_zeros(3, *size))
            trajectories.append(Trajectory(prompt, 0, (segment,), 0))
        each = torch.stack([rows[0].logprobs.sum().cpu() for rows in self.logprobs(trajectories)])
        return each[:, None].expand(-1, draws)

    @torch.no_grad()
    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Policy.hidden_states``; after the last layer the states are normed."""
        require_layer(layer, len(self.transformer.layers))
        found = []
        with self.autocast():
            for part in parts:
                row, places = self.input_row(part)
                x, _ = self._embedded([row])
                out = self.transformer(inputs_embeds=x, use_cache=False, output_hidden_states=True)
                found.append(out.hidden_states[layer][0, places])
        return found
