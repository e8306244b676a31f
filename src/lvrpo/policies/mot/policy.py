"""The Policy contract on the Mixture-of-Transformers core (see ``lvrpo.policies.base``)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.base import FeatureLoss, Sampling, Tokens
from lvrpo.policies.mot import adapter, drawing, writing
from lvrpo.policies.mot.batching import cut, runs
from lvrpo.policies.mot.context import Contexts, Row, leading_spans, row_tokens
from lvrpo.policies.mot.towers import Grid, Towers, Words
from lvrpo.policies.mot.transformer import Cache, MoT
from lvrpo.policies.mot.writing import Written
from lvrpo.sampling import derive_seed, flow_time, normal_noise, uniform_noise
from lvrpo.sampling.guidance import Renorm
from lvrpo.types import (
    Example,
    FlowSegment,
    Group,
    Image,
    Part,
    Parts,
    Prompt,
    Segment,
    SegmentKind,
    SegmentLogprobs,
    Task,
    TextSegment,
    Trajectory,
)

MAX_ROWS = 512
"""Rows that go through the transformer at once when sampling or replaying."""
JUDGE_TIMES = (0.5, 0.85)
"""The drawing side judges between these times: the most telling at few draws."""

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
PolicyT = TypeVar("PolicyT", bound="MoTPolicy")


def computing(
    method: Callable[Concatenate[PolicyT, Arguments], T],
) -> Callable[Concatenate[PolicyT, Arguments], T]:
    """A method of a policy that runs the model: at the precision that ``compute_in`` asked for."""

    @wraps(method)
    def run(policy: PolicyT, *args: Arguments.args, **kwargs: Arguments.kwargs) -> T:
        with policy.autocast():
            return method(policy, *args, **kwargs)

    return run


@dataclass(frozen=True)
class _Asked:
    """One output to sample."""

    prompt: Prompt
    seed: int
    prompt_seed: int
    member: int


class MoTPolicy(nn.Module, ABC):
    """One policy that reads and draws, whatever its towers."""

    model_type = "lvrpo_mot"
    writes: tuple[SegmentKind, ...] = ("text", "flow")
    drops_conditions = False
    """Whether ``supervised_losses`` leaves conditions out by itself."""

    def __init__(self, transformer: MoT, towers: nn.Module, words: Words) -> None:
        super().__init__()
        self.transformer = transformer
        self.towers: Towers = towers  # type: ignore[assignment]  # a Module that keeps the Towers protocol
        self.words = words
        self.version = 0
        self.adapter: adapter.Adapter | None = None
        self.peft_config: dict[str, Any] = {}  # Any: of an optional package
        self._autocast: torch.dtype | None = None

    def compute_in(self, dtype: torch.dtype) -> None:
        """Multiplies matrices in this dtype from now on (autocast), whatever the weights are kept in."""
        self._autocast = None if dtype == self.transformer.reading_norm.weight.dtype else dtype

    def autocast(self) -> AbstractContextManager[object]:
        """What ``compute_in`` asked for, while the model runs."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return self._autocast or self.transformer.reading_norm.weight.dtype

    @property
    @abstractmethod
    def image_size(self) -> int | None:
        """Side in pixels of the square pictures that it reads and draws; None: pictures of any size."""

    @property
    def contexts(self) -> Contexts:
        return Contexts(self.transformer, self.towers, self.words)

    @property
    def device(self) -> torch.device:
        return self.transformer.inv_freq.device

    # ---------------------------------------------------------------- rollout
    @torch.no_grad()
    @computing
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """Draws a group for every prompt; see ``Policy.sample``."""
        g = sampling.group_size
        asked = [_Asked(prompt, derive_seed(seed, m), seed, m) for prompt, seed in zip(prompts, seeds, strict=True)
                 for m in range(g)]  # fmt: skip
        out: dict[int, Trajectory] = {}
        keys = [(prompt.output, self._grid(prompt, sampling)) for prompt in prompts for _ in range(g)]
        for same in _batches(keys, len(asked)):
            for part in self._cut([asked[i].prompt for i in same], keys[same[0]][1]):
                indices = [same[k] for k in part]
                batch = self._sample_batch([asked[i] for i in indices], sampling)
                out.update(zip(indices, batch, strict=True))
        return [Group(prompt, tuple(out[p * g + m] for m in range(g))) for p, prompt in enumerate(prompts)]

    @torch.no_grad()
    @computing
    def sample_member(self, prompt: Prompt, sampling: Sampling, seed: int, member: int) -> Trajectory:
        """One member of the group that ``sample`` gives for the prompt and the seed, by itself."""
        return self._sample_batch([_Asked(prompt, derive_seed(seed, member), seed, member)], sampling)[0]

    def _sample_batch(self, asked: Sequence[_Asked], sampling: Sampling) -> list[Trajectory]:
        """Members of prompts with the same output kinds and grid, those of a prompt in a row."""
        if sampling.timestep_shift is None:
            sampling = replace(sampling, timestep_shift=self.timestep_shift())
        contexts = self.contexts
        owner = runs([(id(one.prompt), one.prompt_seed) for one in asked])
        prompts = [asked[owner.index(p)].prompt for p in range(owner[-1] + 1)]
        grid = self._grid(prompts[0], sampling)
        prompt_rows = [self._row(prompt) for prompt in prompts]
        of_prompt = owner
        cache = contexts.prefill(prompt_rows)
        member_seeds = [one.seed for one in asked]
        segments: list[list[Segment]] = [[] for _ in asked]
        for kind in prompts[0].output:
            if kind == "text":
                uniforms = uniform_noise([derive_seed(s, "text") for s in member_seeds], (sampling.max_new_tokens,))
                texts = writing.write(contexts, cache, owner, uniforms.to(self.device), sampling.temperature)
                closed = len(prompts[0].output) > 1
                scores = writing.score(contexts, cache, owner, texts, sampling.temperature, closed)
                for segment_list, text, logprobs in zip(segments, texts, scores.logprobs, strict=True):
                    segment_list.append(self._text_segment(text, logprobs, sampling.temperature))
                if closed:
                    cache, owner = scores.cache, list(range(len(asked)))
            else:
                noise_seeds = [one.prompt_seed for one in asked] if sampling.shared_noise else member_seeds
                drawn = drawing.draw(
                    contexts,
                    self._branches(cache.select(owner), [prompt_rows[p] for p in of_prompt], sampling),
                    sampling,
                    noise_seeds=[derive_seed(s, "noise") for s in noise_seeds],
                    step_seeds=[derive_seed(s, "steps") for s in member_seeds],
                    grid=grid,
                )
                images = self.towers.decode_latents(drawn.latents, grid)
                for b, segment_list in enumerate(segments):
                    segment_list.append(_flow_segment(drawn, b, images[b], sampling))
        return [
            Trajectory(one.prompt, one.member, tuple(segments[b]), one.seed, self.version)
            for b, one in enumerate(asked)
        ]

    def _text_segment(self, text: Written, logprobs: torch.Tensor, temperature: float) -> TextSegment:
        return TextSegment(
            tokens=torch.tensor(text.tokens, dtype=torch.int64),
            behavior_logprobs=logprobs.detach().cpu(),
            temperature=temperature,
            text=self.words.decode(text.tokens),
            ended=text.ended,
        )

    def _row(self, prompt: Prompt) -> Row:
        return self.contexts.row(prompt.parts, draws="image" in prompt.output)

    def _check_length(self, name: str, row: Row, new: int, remedy: str = "") -> None:
        """Raises InputError where a context with so many new tokens after it is longer than the policy takes."""

    def _grid(self, prompt: Prompt, sampling: Sampling) -> Grid:
        """Of the picture that is drawn: that of the last source picture, else the sampling's or the policy's own."""
        if "image" not in prompt.output:
            return 0, 0
        sources = [part for part in prompt.parts if isinstance(part, torch.Tensor)]
        return self.towers.latent_grid(sources[-1]) if sources else self.towers.free_grid(sampling.image_size)

    def _cut(self, prompts: Sequence[Prompt], grid: Grid) -> list[list[int]]:
        """What goes through the transformer at once, as indices of members given by their prompts.

        The same for a rollout and its replay, so that both compute the same bits.
        """
        each = [1] * len(prompts)
        return cut([prompt.id for prompt in prompts], [0] * len(prompts), each, MAX_ROWS)

    def _within(self, rows: Sequence[Row], new: Sequence[int]) -> list[list[int]]:
        """What goes through the transformer at once, as indices of contexts that so many tokens are added to."""
        return [list(range(len(rows)))]

    def _branches(self, full: Cache, rows: Sequence[Row], sampling: Sampling) -> drawing.Branches:
        return drawing.branches(self.contexts, full, rows, drawing.guidance_of(sampling))

    # ---------------------------------------------------------------- replay
    @computing
    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[list[SegmentLogprobs]]:
        """Differentiable replay of every segment; see ``Policy.logprobs``."""
        out: dict[int, list[SegmentLogprobs]] = {}
        settings = [(t.prompt.output, _replay_settings(t)) for t in trajectories]
        for same in _batches(settings, len(trajectories)):
            # cut where sampling cut, or log-probs of a rollout's own batch would differ in the last bit
            first = trajectories[same[0]]
            grid = self._drawn_grid(first) if "image" in first.prompt.output else (0, 0)
            for part in self._cut([trajectories[i].prompt for i in same], grid):
                indices = [same[k] for k in part]
                batch = self._replay_batch([trajectories[i] for i in indices])
                out.update(zip(indices, batch, strict=True))
        return [out[i] for i in range(len(trajectories))]

    def _replay_batch(self, trajectories: list[Trajectory]) -> list[list[SegmentLogprobs]]:
        contexts = self.contexts
        prompt_rows = [self._row(t.prompt) for t in trajectories]
        cache, owner = contexts.prefill_shared(prompt_rows)
        out: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        for s, kind in enumerate(trajectories[0].prompt.output):
            segments = [t.segments[s] for t in trajectories]
            if kind == "text":
                texts = [as_written(segment) for segment in segments]
                closed = s + 1 < len(trajectories[0].segments)
                scores = writing.score(contexts, cache, owner, texts, _temperature(segments[0]), closed)
                for row, logprobs, entropy in zip(out, scores.logprobs, scores.entropies, strict=True):
                    row.append(SegmentLogprobs(logprobs, entropy))
                if closed:
                    cache, owner = scores.cache, list(range(len(trajectories)))
            else:
                drawn = self._replay_drawing(cache.select(owner), prompt_rows, segments)
                for row, logprobs, means in zip(out, drawn.logprobs, drawn.means, strict=True):
                    row.append(SegmentLogprobs(logprobs, means=means, stds=drawn.stds))
        return out

    def _replay_drawing(
        self, cache: Cache, rows: Sequence[Row], segments: Sequence[Segment]
    ) -> drawing.ReplayedDrawing:
        flows = [segment for segment in segments if isinstance(segment, FlowSegment)]
        first = flows[0]
        renorm = cast(Renorm, first.guidance_renorm)  # recorded from a Sampling
        guidance = drawing.Guidance(
            first.guidance_scale, first.image_guidance_scale, renorm, first.guidance_renorm_min, first.guidance_interval
        )
        return drawing.replay_steps(
            self.contexts,
            drawing.branches(self.contexts, cache, rows, guidance),
            torch.stack([f.states for f in flows]).to(self.device),
            torch.stack([f.next_states for f in flows]).to(self.device),
            first.timesteps.to(self.device),
            first.trained_steps,
            first.sampler,
            first.noise_level,
            first.logprob_reduction,
            guidance,
            self.towers.drawn_grid(*first.image.shape[1:]),
        )

    @computing
    def velocity(self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Unguided velocity of the drawn segment, given the prompt and any text thought before it."""
        contexts = self.contexts
        rows = []
        for trajectory in trajectories:
            thoughts = [s for s in trajectory.segments if isinstance(s, TextSegment)]
            ids = [as_written(s).tokens[: -1 if s.ended else None] for s in thoughts]
            rows.append((*self._row(trajectory.prompt), *(contexts.text(i) for i in ids)))
        grid = self._drawn_grid(trajectories[0])
        out = []
        for part in self._within(rows, [contexts.noise(grid).span.length] * len(rows)):
            cache, owner = contexts.prefill_shared([rows[i] for i in part])
            out.append(drawing.velocity(contexts, cache.select(owner), x_t[part], t[part], grid))
        return torch.cat(out)

    def tokens(self, trajectory: Trajectory) -> Tokens:
        """Markers included."""
        texts = [len(s.tokens) + 2 for s in trajectory.segments if isinstance(s, TextSegment)]
        drawing_tokens = 0
        if trajectory.image is not None:
            drawing_tokens = self.contexts.noise(self._drawn_grid(trajectory)).span.length
        return Tokens(row_tokens(self._row(trajectory.prompt)), sum(texts), drawing_tokens)

    @abstractmethod
    def pixels_per_token(self) -> int:
        """Of a drawing, along a side."""

    def limit_tokens(self, limit: int | None) -> None:
        """This policy is small: it goes by rows."""

    def _drawn_grid(self, trajectory: Trajectory) -> Grid:
        assert trajectory.image is not None
        return self.towers.drawn_grid(*trajectory.image.shape[1:])

    # ---------------------------------------------------------------- judge
    @torch.no_grad()
    @computing
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Reading side as judge: mean log-prob per token, end token included, (batch,)."""
        rows = [self.contexts.row(parts, draws=False) for parts in contexts]
        written = [Written((*self.words.encode(text), self.words.eos_id), True) for text in texts]
        for row, text in zip(rows, written, strict=True):
            self._check_length("text to judge", row, len(text.tokens))  # fed are its begin and all but its end
        scores: dict[int, torch.Tensor] = {}
        for part in self._within(rows, [len(text.tokens) for text in written]):
            for same in _batches([leading_spans(rows[i]) for i in part], MAX_ROWS):  # pictures are then never padded
                indices = [part[k] for k in same]
                found = writing.score_once(self.contexts, [rows[i] for i in indices], [written[i] for i in indices])
                scores.update((i, logprobs.mean()) for i, logprobs in zip(indices, found, strict=True))
        return torch.stack([scores[i] for i in range(len(rows))])

    @torch.no_grad()
    @computing
    def text_states(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """What the reading side makes of texts in their contexts: features for a head, float32 (batch, 2 D + 2).

        The mean of the text's final states, that of its end token, and the mean and the least log-prob of its tokens,
        end token included. Contexts that are equal, or begin with the same pictures, share their computation.
        """
        context_rows = [self.contexts.row(parts, draws=False) for parts in contexts]
        pieces = [self.contexts.text(self.words.encode(text)) for text in texts]
        for row, piece in zip(context_rows, pieces, strict=True):
            self._check_length("text to judge", row, piece.span.length)
        cache, owner = self.contexts.prefill_shared(context_rows)
        hidden = self.contexts.run([(piece,) for piece in pieces], cache.select(owner))
        lengths = [piece.span.length for piece in pieces]
        distributions = torch.log_softmax(self.towers.text_logits(hidden.reading).float(), dim=-1).split(lengths)
        rows = []
        for states, log_p, piece in zip(hidden.reading.float().split(lengths), distributions, pieces, strict=True):
            ids = torch.tensor(piece.ids[1:], device=log_p.device)
            chosen = log_p[:-1].gather(1, ids[:, None])[:, 0]
            rows.append(torch.cat([states.mean(dim=0), states[-1], chosen.mean()[None], chosen.min()[None]]))
        return torch.stack(rows)

    @torch.no_grad()
    @computing
    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = JUDGE_TIMES,
    ) -> torch.Tensor:
        """Drawing side as judge: the part of the likelihood bound between two times, one column per draw.

        log p(x_0 | c) = const - E int (1 - t)/t |v - v_hat(x_t, c)|^2 dt, the flow loss weighted as the likelihood
        weighs it (information-theoretic diffusion, arXiv:2302.03792, for x_t = (1 - t) x_0 + t noise); the constant is
        the picture's own. A draw is one noise at one time, the middle of its part of the span.

        Shapes: (B,) rows to float32 (B, draws), in nats summed over the picture; average over the draws.
        """
        rows = [self.contexts.row(parts, draws=True) for parts in contexts]
        grids = [self.towers.latent_grid(image) for image in images]
        for row, grid in zip(rows, grids, strict=True):
            self._check_length("picture to judge", row, self.contexts.noise(grid).span.length)
        scores: dict[int, torch.Tensor] = {}
        for part in self._within(rows, [height * width + 2 for height, width in grids]):
            # contexts without words, or without a picture, go by themselves: padding would be most of theirs
            for same in _batches([(grids[i], tuple(piece.span.kind for piece in rows[i])) for i in part], MAX_ROWS):
                indices = [part[k] for k in same]
                cache, owner = self.contexts.prefill_shared([rows[i] for i in indices])
                own = cache.select(owner)
                x_0 = self._latents([images[i] for i in indices])
                scored = self._draw_logprob(own, x_0, grids[indices[0]], draws, [seeds[i] for i in indices], times)
                scores.update(zip(indices, scored, strict=True))
        return torch.stack([scores[i] for i in range(len(images))])

    def _latents(self, images: Sequence[Image]) -> torch.Tensor:
        """Latents (B, N, C) of pictures of one grid, a picture that stands for several rows being encoded once."""
        distinct = {id(image): image for image in images}
        place = {key: i for i, key in enumerate(distinct)}
        return self.towers.encode_latents(list(distinct.values()))[[place[id(image)] for image in images]]

    def _draw_logprob(
        self, cache: Cache, x_0: torch.Tensor, grid: Grid, draws: int, seeds: Sequence[int], times: tuple[float, float]
    ) -> torch.Tensor:
        """(B, draws)."""
        low, high = times
        of_seed = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
        columns = []
        for k in range(draws):
            noises = normal_noise([derive_seed(seed, "judge", k) for seed in of_seed], x_0.shape[1:]).to(x_0)
            noise = noises[[of_seed[seed] for seed in seeds]]
            at = low + (high - low) * (k + 0.5) / draws
            t = x_0.new_full((len(x_0),), at)
            x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
            error = (drawing.velocity(self.contexts, cache, x_t, t, grid) - (noise - x_0)).square().sum(dim=(1, 2))
            columns.append(-(high - low) * (1 - at) / at * error)
        return torch.stack(columns, dim=1)

    # ---------------------------------------------------------------- supervised
    @computing
    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: FeatureLoss | None = None
    ) -> Mapping[str, torch.Tensor]:
        """ "text": cross-entropy per token; "image": flow loss at logit-normal times. Means over what is there."""
        contexts = self.contexts
        text_losses: list[torch.Tensor] = []
        image_losses: list[torch.Tensor] = []
        feature_losses: list[torch.Tensor] = []
        for indices in _batches([example.prompt.output for example in examples], len(examples)):
            batch = [examples[i] for i in indices]
            cache, owner = contexts.prefill_shared([self._row(example.prompt) for example in batch])
            for s, kind in enumerate(batch[0].prompt.output):
                outputs = [example.outputs[s] for example in batch]
                if kind == "text":
                    texts = [Written((*self.words.encode(str(o)), self.words.eos_id), True) for o in outputs]
                    closed = s + 1 < len(batch[0].prompt.output)
                    scores = writing.score(contexts, cache, owner, texts, 1.0, closed)
                    text_losses += [-logprobs for logprobs in scores.logprobs]
                    if closed:
                        cache, owner = scores.cache, list(range(len(batch)))
                else:
                    images = [o for o in outputs if isinstance(o, torch.Tensor)]
                    loss, features = self._flow_loss(cache.select(owner), images, generator, represent)
                    image_losses.append(loss)
                    if represent is not None and features is not None:
                        feature_losses.append(represent(features, images))
        losses = {}
        if text_losses:
            losses["text"] = torch.cat(text_losses).mean()
        if image_losses:
            losses["image"] = torch.cat(image_losses).mean()
        if feature_losses:
            losses["representation"] = torch.cat(feature_losses).mean()
        return losses

    def _flow_loss(
        self, cache: Cache, images: Sequence[Image], generator: torch.Generator, represent: FeatureLoss | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The flow loss (B,) of pictures, and the states (B, N, D) that ``represent`` wants."""
        x_0 = self.towers.encode_latents(images)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = flow_time(torch.randn(len(x_0), generator=generator), self.timestep_shift()).to(x_0)
        x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
        features, grid = None, self.towers.latent_grid(images[0])
        if represent is None:
            v = drawing.velocity(self.contexts, cache, x_t, t, grid)
        else:
            v, features = drawing.velocity_and_features(self.contexts, cache, x_t, t, grid, represent.layer)
        weight = (t / t.clamp(min=self.min_time())).square()
        return weight * (v - (noise - x_0)).square().mean(dim=(1, 2)), features

    @torch.no_grad()
    @computing
    def reading_features(self, images: Sequence[Image], layer: int) -> torch.Tensor:
        """What the reading side makes of pictures after so many layers, (B, N, D); 0: its tower alone."""
        if layer == 0:
            return self.towers.read_pictures(images)
        contexts = self.contexts
        rows = [(contexts.picture(image, "read"),) for image in images]
        hidden = contexts.run(rows, self.transformer.empty_cache(len(rows)), keep_layers=True)
        return hidden.layers[layer - 1][0].unflatten(0, (len(rows), -1))[:, 1:-1]  # without the two markers

    @torch.no_grad()
    @computing
    def reading_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """States of texts and pictures, each read alone; see ``Policy.reading_states``."""
        depth = self.transformer.config.depth
        if not 0 <= layer <= depth:
            raise InputError(f"layer={layer}: the policy has {depth} layers: use 0 to {depth}")
        contexts = self.contexts
        states: list[torch.Tensor] = []
        for start in range(0, len(parts), MAX_ROWS):
            rows = [contexts.row((part,), draws=False) for part in parts[start : start + MAX_ROWS]]
            lengths = [sum(piece.span.length for piece in row) for row in rows]
            states += [row[1:-1] for row in self._reading_layer(rows, layer).split(lengths)]  # without the two markers
        return states

    def _reading_layer(self, rows: Sequence[Row], layer: int) -> torch.Tensor:
        """(Nr, D) of rows that the reading expert alone sees."""
        if layer == 0:
            return self.contexts.embed_reading([piece for row in rows for piece in row])
        return self.contexts.run(rows, self.transformer.empty_cache(len(rows)), keep_layers=True).layers[layer - 1][0]

    @torch.no_grad()
    @computing
    def context_states(self, contexts: Sequence[Parts]) -> torch.Tensor:
        """Mean final state of the reading expert over each context, float32 (B, D)."""
        rows = [self.contexts.row(parts, draws=False) for parts in contexts]
        hidden = self.contexts.run(rows, self.transformer.empty_cache(len(rows)))
        lengths = [sum(piece.span.length for piece in row) for row in rows]
        return torch.stack([states.mean(dim=0) for states in hidden.reading.float().split(lengths)])

    @torch.no_grad()
    @computing
    def drawing_states(self, contexts: Sequence[Parts], images: Sequence[Image], t: float, seed: int) -> torch.Tensor:
        """Mean final state of the drawing expert over each noisy picture after its context, float32 (B, D).

        The noise is one for all rows. At t = 1 the picture is noise alone: what the expert is about to draw from the
        context; only the picture's size is then of use. Pictures are of one size.
        """
        cache, owner = self.contexts.prefill_shared([self.contexts.row(parts, draws=True) for parts in contexts])
        x_0 = self._latents(images)
        noise = normal_noise([derive_seed(seed, "states")], x_0.shape[1:]).to(x_0)
        x_t = (1 - t) * x_0 + t * noise
        depth, grid = self.transformer.config.depth, self.towers.latent_grid(images[0])
        times = x_0.new_full((len(x_0),), t)
        _, states = drawing.velocity_and_features(self.contexts, cache.select(owner), x_t, times, grid, depth)
        return states.float().mean(dim=1)

    def min_time(self) -> float:
        """Below this time the flow loss is damped, so that a prediction of the picture keeps a bounded weight."""
        return 0.0

    def timestep_shift(self) -> float:
        """Shift of the times that the flow loss is taken at."""
        return 1.0

    def default_sampling(self, task: Task) -> Sampling:
        """Unguided, in 8 steps; short answers."""
        return Sampling()

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether layers are computed again in the backward pass: a third more time, a fraction of the memory."""
        self.transformer.checkpointing = on

    # ---------------------------------------------------------------- weights
    def frozen(self) -> Self:
        """A copy that no update reaches; with an adapter, the base itself: its tensors are shared, not copied."""
        plain = copy.deepcopy(self) if self.adapter is None else adapter.without_adapter(self)
        plain.requires_grad_(False)
        return plain.eval()

    def twin(self) -> Self:
        """A frozen copy of the present weights; with an adapter, the base's tensors are shared."""
        if self.adapter is None:
            return self.frozen()
        twin = adapter.twin(self)
        twin.requires_grad_(False)
        return twin.eval()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by expert; tokens and positions that both experts read are shared."""
        groups: dict[str, list[nn.Parameter]] = {"understand": [], "generate": [], "shared": []}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            groups[_expert_of(name)].append(parameter)
        return groups

    def stored_name(self, name: str) -> str:
        """The published name of a module, which the files of an adapter use."""
        return name

    def save(self, folder: Path) -> None:
        """Writes a folder that ``load_policy`` reads: the whole model, or the adapter alone where there is one."""
        if self.adapter is None:
            self.save_whole(folder)
        else:
            adapter.save_adapter(self, folder)

    @abstractmethod
    def save_whole(self, folder: Path) -> None:
        """Writes a folder that ``load`` reads."""

    @classmethod
    @abstractmethod
    def skeleton(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """What ``load`` gives, with random weights, on the CPU; without memory in a mode that allocates none."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads what ``save`` wrote, straight to a device."""


def _expert_of(name: str) -> str:
    if ".reading." in name or "reading_norm" in name or "towers.read_" in name or "lm_head" in name:
        return "understand"
    if ".drawing." in name or "drawing_norm" in name or "towers.latent_" in name or "towers.time_" in name:
        return "generate"
    return "shared"


def _batches(keys: Sequence[object], size: int) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance, at most ``size`` each."""
    classes: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        classes.setdefault(key, []).append(i)
    return [indices[i : i + size] for indices in classes.values() for i in range(0, len(indices), size)]


def as_written(segment: Segment) -> Written:
    """A recorded text."""
    assert isinstance(segment, TextSegment)
    return Written(tuple(segment.tokens.tolist()), segment.ended)


def _temperature(segment: Segment) -> float:
    assert isinstance(segment, TextSegment)
    return segment.temperature


def _replay_settings(trajectory: Trajectory) -> tuple[object, ...]:
    """What must agree for two trajectories to be replayed in one batch."""
    out: list[object] = []
    for s in trajectory.segments:
        if isinstance(s, TextSegment):
            out.append(s.temperature)
        elif isinstance(s, FlowSegment):
            out += [s.trained_steps, tuple(s.timesteps.tolist()), s.sampler, s.noise_level, s.logprob_reduction]
            out += [s.guidance_scale, s.image_guidance_scale, s.guidance_renorm, s.guidance_renorm_min]
            out += [s.guidance_interval, tuple(s.image.shape)]
    return tuple(out)


def _flow_segment(drawn: drawing.Drawn, b: int, image: Image, sampling: Sampling) -> FlowSegment:
    stochastic = sampling.sampler != "ode"
    return FlowSegment(
        latent=drawn.latents[b],
        timesteps=drawn.timesteps,
        trained_steps=sampling.window if stochastic else (),
        states=drawn.states[b],
        next_states=drawn.next_states[b],
        behavior_logprobs=drawn.logprobs[b],
        sampler=sampling.sampler,
        noise_level=sampling.noise_level,
        guidance_scale=sampling.guidance_scale,
        image_guidance_scale=sampling.image_guidance_scale,
        guidance_renorm=sampling.guidance_renorm,
        logprob_reduction=sampling.logprob_reduction,
        image=image,
        guidance_renorm_min=sampling.guidance_renorm_min,
        guidance_interval=sampling.guidance_interval,
        means=drawn.means[b] if stochastic else None,
    )
