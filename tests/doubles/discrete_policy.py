"""A small real policy that writes words and draws with discrete tokens, in order or masked, with guidance.

One transformer over one vocabulary: a row is the prompt, then what was written or drawn. Text and image tokens see what
came before; masked image tokens see their whole picture. Beside it prompts and rewards, for whole runs.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lvrpo.errors import InputError
from lvrpo.policies.base import FeatureLoss, Sampling, TokenCounts
from lvrpo.rewards.base import Scores
from lvrpo.sampling import (
    choose_revealed,
    derive_seed,
    guide_logits,
    mask_draws,
    masked_counts,
    masked_input,
    monte_carlo_logprob,
    path_logprobs,
    sample_tokens,
    token_entropy,
    token_logprobs,
    uniform_noise,
)
from lvrpo.types import (
    SEGMENT_KINDS,
    Example,
    Group,
    Image,
    ImageTokenSegment,
    MaskedSegment,
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

WORDS = ("draw", "say", "think", "red", "green", "blue", "yes", "no")
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.float32)
BOS, EOS, OPEN, MASK = range(4)
FIRST_WORD = 4
FIRST_CODE = FIRST_WORD + len(WORDS)
VOCABULARY = FIRST_CODE + len(PALETTE)
SIDE = 4
N = SIDE * SIDE
"""Tokens of a picture."""
LONGEST = 64


class Layer(nn.Module):
    """Attention and a perceptron, each on normed states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B, L, D); seen bool (B, L, L): which keys a query sees."""
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, L, 3, 2, D // 2).permute(2, 0, 3, 1, 4)  # two heads
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, D))
        return x + self.mlp(self.norm_mlp(x))


class DiscretePolicy(nn.Module):
    """Writes text; its k-th picture is drawn in the k-th of the given ways."""

    image_size = 2 * SIDE

    def __init__(self, draws: Sequence[SegmentKind] = ("tokens",), width: int = 32, depth: int = 2, seed: int = 0):
        super().__init__()
        self.draws = tuple(draws)
        self.sizes = {"width": width, "depth": depth}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(VOCABULARY, width)
            self.places = nn.Embedding(LONGEST, width)
            self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        tokens = torch.arange(VOCABULARY)
        self.may_write = (tokens == EOS) | ((tokens >= FIRST_WORD) & (tokens < FIRST_CODE))

    @property
    def segment_kinds(self) -> tuple[SegmentKind, ...]:
        return ("text", *dict.fromkeys(self.draws))

    # --- sampling ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        rows = [
            (prompt, member, derive_seed(seed, "member", member))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for member in range(sampling.group_size)
        ]
        made: list[list[Segment]] = [[] for _ in rows]
        for k in range(max(len(prompt.output) for prompt in prompts)):
            waiting: dict[SegmentKind, list[int]] = defaultdict(list)
            for i, (prompt, _, _) in enumerate(rows):
                if k < len(prompt.output):
                    waiting[self._kind(prompt.output, k)].append(i)
            for kind, chosen in waiting.items():
                make = {"text": self._write, "tokens": self._draw, "masked": self._reveal}[kind]
                contexts = [self._context(rows[i][0], made[i]) for i in chosen]
                own = [derive_seed(rows[i][2], k) for i in chosen]
                for i, segment in zip(chosen, make(contexts, own, sampling), strict=True):
                    made[i].append(segment)
        trajectories = [Trajectory(p, m, tuple(made[i]), seed) for i, (p, m, seed) in enumerate(rows)]
        size, scored = sampling.group_size, []
        for trajectory, own in zip(trajectories, self.logprobs(trajectories), strict=True):
            pairs = zip(trajectory.segments, own, strict=True)
            segments = tuple(replace(segment, behavior_logprobs=row.logprobs) for segment, row in pairs)
            scored.append(replace(trajectory, segments=segments))
        return [Group(prompt, tuple(scored[p * size : (p + 1) * size])) for p, prompt in enumerate(prompts)]

    def _kind(self, output: Sequence[OutputKind], k: int) -> SegmentKind:
        if output[k] == "text":
            return "text"
        return self.draws[sum(kind == "image" for kind in output[:k]) % len(self.draws)]

    def _write(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        u = uniform_noise([derive_seed(seed, "write") for seed in seeds], (sampling.max_new_tokens,))
        rows = [list(context) for context in contexts]
        for i in range(sampling.max_new_tokens):
            last = torch.stack([logits[-1] for logits in self._logits(rows)])
            tokens = sample_tokens(last, u[:, i], sampling.temperature, self.may_write)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
        for row, context in zip(rows, contexts, strict=True):
            written = row[len(context) :]
            ended = EOS in written
            tokens = torch.tensor(written[: written.index(EOS) + 1] if ended else written)
            text = " ".join(WORDS[t - FIRST_WORD] for t in tokens.tolist() if t != EOS)
            yield TextSegment(tokens, torch.zeros(len(tokens)), sampling.temperature, text, ended)

    def _draw(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        u = uniform_noise([derive_seed(seed, "draw") for seed in seeds], (N,))
        tokens = torch.zeros(len(contexts), 0, dtype=torch.int64)
        for i in range(N):
            logits = self._drawn_logits(contexts, tokens, False, sampling.guidance_scale)[:, -1]
            drawn = sample_tokens(logits, u[:, i], sampling.image_temperature)
            tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        for row in tokens:
            yield ImageTokenSegment(
                row,
                torch.zeros(N),
                sampling.image_temperature,
                sampling.guidance_scale,
                decoded(row),
                sampling.guided_logprobs,
            )

    def _reveal(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        B, scoring, temperature = len(contexts), sampling.masked, sampling.image_temperature
        tokens, steps = torch.zeros(B, N, dtype=torch.int64), torch.full((B, N), sampling.num_steps)
        for s, left in enumerate(masked_counts(N, sampling.num_steps)):
            u = uniform_noise([derive_seed(seed, "reveal", s) for seed in seeds], (2, N))
            seen = masked_input(tokens, steps, s, -1)
            logits = self._drawn_logits(contexts, seen, True, sampling.guidance_scale)
            drawn = sample_tokens(logits.flatten(0, 1), u[:, 0].flatten(), temperature).view(B, N)
            logprobs = token_logprobs(logits, drawn, temperature)
            fixed = choose_revealed(logprobs, steps == sampling.num_steps, left, u[:, 1], sampling.choice_temperature)
            tokens, steps = torch.where(fixed, drawn, tokens), torch.where(fixed, s, steps)
        masks = torch.ones(B, 1, N, dtype=torch.bool)
        if scoring.likelihood == "monte_carlo":
            masks = mask_draws([derive_seed(seed, "masks") for seed in seeds], N, scoring.draws, scoring.schedule)
        for b in range(B):
            yield MaskedSegment(
                tokens[b],
                steps[b],
                masks[b],
                torch.zeros(masks[b].shape),
                scoring.likelihood,
                temperature,
                sampling.guidance_scale,
                decoded(tokens[b]),
                sampling.guided_logprobs,
            )

    # --- replay ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        found: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        lengths = [len(segments_through(t, kinds)) for t in trajectories]
        for k in range(max(lengths, default=0)):
            alike: dict[Hashable, list[int]] = defaultdict(list)
            for i, t in enumerate(trajectories):
                if k < lengths[i]:
                    alike[_settings(t.segments[k])].append(i)
            for chosen in alike.values():
                contexts = [self._context(trajectories[i].prompt, trajectories[i].segments[:k]) for i in chosen]
                scored = self._score(contexts, [trajectories[i].segments[k] for i in chosen])
                for i, row in zip(chosen, scored, strict=True):
                    found[i].append(row)
        return found

    def _score(self, contexts: list[list[int]], segments: Sequence[Any]) -> Iterable[SegmentLogprobs]:
        """Segments of one kind and setting."""
        tokens, first = [segment.tokens for segment in segments], segments[0]
        if first.kind == "text":
            rows = [[*context, *row.tolist()[:-1]] for context, row in zip(contexts, tokens, strict=True)]
            for context, row, logits in zip(contexts, tokens, self._logits(rows), strict=True):
                own = logits[len(context) - 1 :]
                scored = (score(own, *given, first.temperature, self.may_write) for score, given in _scores(row))
                yield SegmentLogprobs(*scored)
            return
        guidance = (first.guidance_scale, first.guided_logprobs)
        drawn = torch.stack(tokens)
        if first.kind == "tokens":
            logits = self._drawn_logits(contexts, drawn[:, :-1], False, *guidance)
            scored = [score(logits, *given, first.temperature) for score, given in _scores(drawn)]
            yield from map(SegmentLogprobs, *scored)
            return
        path = first.likelihood == "path"
        steps = torch.stack([segment.reveal_steps for segment in segments])
        scored = torch.stack([segment.scored for segment in segments])  # (B, R, N)
        rounds = int(steps.max()) + 1 if path else scored.shape[1]
        seen = [
            masked_input(drawn, steps, r, -1) if path else drawn.masked_fill(scored[:, r], -1) for r in range(rounds)
        ]
        every = [self._drawn_logits(contexts, inputs, True, *guidance) for inputs in seen]
        entropy = [token_entropy(logits, first.temperature) for logits in every]
        if path:
            logprobs = sum(path_logprobs(logits, drawn, steps, r, first.temperature) for r, logits in enumerate(every))
            spread = sum(torch.where(steps == r, H, 0.0) for r, H in enumerate(entropy))
            yield from (SegmentLogprobs(row[None], H[None]) for row, H in zip(logprobs, spread, strict=True))
            return
        logprobs = torch.stack([token_logprobs(logits, drawn, first.temperature) for logits in every], dim=1)
        yield from map(SegmentLogprobs, logprobs * scored, torch.stack(entropy, dim=1) * scored)

    # --- the transformer ---

    def _context(self, prompt: Prompt, segments: Sequence[Segment]) -> list[int]:
        row = _row(prompt.parts)
        for segment in segments:
            if isinstance(segment, TextSegment):
                row += segment.tokens.tolist()
            elif isinstance(segment, ImageTokenSegment | MaskedSegment):
                row += [OPEN, *(segment.tokens + FIRST_CODE).tolist()]
        return row

    def _states(self, rows: Sequence[Sequence[int]], together: int = 0, depth: int | None = None) -> Tensor:
        """(B, L, D), padded on the right; the last ``together`` tokens of each row see one another."""
        B, L = len(rows), max(map(len, rows))
        ids = torch.tensor([[*row, *[EOS] * (L - len(row))] for row in rows], device=self.head.weight.device)
        length = torch.tensor([len(row) for row in rows])[:, None]
        place = torch.arange(L).expand(B, L)
        block = (place >= length - together) & (place < length)
        seen = (place[:, :, None] >= place[:, None, :]) | (block[:, :, None] & block[:, None, :])
        x = self.words(ids) + self.places(place.to(ids))
        for layer in self.layers[:depth]:
            x = layer(x, seen.to(x.device))
        return x

    def _logits(self, rows: Sequence[Sequence[int]], together: int = 0) -> list[Tensor]:
        """Of every row (L, V)."""
        logits = self.head(self.norm(self._states(rows, together)))
        return [logits[b, : len(row)] for b, row in enumerate(rows)]

    def _drawn_logits(
        self, contexts: list[list[int]], tokens: Tensor, masked: bool, scale: float, mode: Any = "joint"
    ) -> Tensor:
        """Of image tokens: of the ones after each token, (B, n + 1, V), or of those in their places, (B, n, V).

        A token of -1 is masked.
        """
        codes = torch.where(tokens < 0, MASK, tokens + FIRST_CODE).tolist()
        unguided = scale == 1 or mode == "none"
        rows = [[*context, OPEN, *row] for context, row in zip(contexts, codes, strict=True)]
        rows += [] if unguided else [[BOS, OPEN, *row] for row in codes]
        n = tokens.shape[1] + (not masked)
        logits = torch.stack([own[-n:, FIRST_CODE:] for own in self._logits(rows, tokens.shape[1] if masked else 0)])
        B = len(contexts)
        return guide_logits(logits[:B], None if unguided else logits[B:], scale, mode)

    # --- the judge, and what is left of the contract ---

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: Tensor, t: Tensor, guidance_scale: float = 1.0
    ) -> Tensor:
        raise InputError("this policy draws with tokens: it has no velocity")

    def timestep_shift(self) -> float:
        raise InputError("this policy draws with tokens: it has no times")

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        text = sum(len(s.tokens) for s in trajectory.segments if isinstance(s, TextSegment))
        return TokenCounts(len(_row(trajectory.prompt.parts)), text, N if trajectory.image is not None else 0)

    def limit_tokens(self, limit: int | None) -> None:
        """Rows are short: all go at once."""

    def check_text(self, text: str) -> None:
        """Anything."""

    def checkpoint_gradients(self, on: bool) -> None:
        """There is nothing worth computing twice."""

    def default_sampling(self, task: Task) -> Sampling:
        return Sampling(num_steps=4, max_new_tokens=4)

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> Tensor:
        tokens = [torch.tensor([FIRST_WORD + WORDS.index(word) for word in text.split()] + [EOS]) for text in texts]
        segments = [TextSegment(row, torch.zeros(len(row)), 1.0, "", True) for row in tokens]
        rows = self._score([_row(parts) for parts in contexts], segments)
        return torch.stack([row.logprobs.mean() for row in rows])

    @torch.no_grad()
    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        rows, codes = [_row(parts) for parts in contexts], torch.stack([encoded(image) for image in images])
        if self.draws[0] == "tokens":
            logits = self._drawn_logits(rows, codes[:, :-1], False, 1.0)
            return token_logprobs(logits, codes).sum(dim=1, keepdim=True).expand(-1, draws)
        masks = mask_draws(list(seeds), N, draws, "uniform")
        seen = [codes.masked_fill(masks[:, k], -1) for k in range(draws)]
        logprobs = [token_logprobs(self._drawn_logits(rows, inputs, True, 1.0), codes) for inputs in seen]
        each = [monte_carlo_logprob(row[:, None], masks[:, k, None], "elbo") for k, row in enumerate(logprobs)]
        return torch.stack(each, dim=1)

    @torch.no_grad()
    def reading_states(self, parts: Sequence[Part], layer: int) -> list[Tensor]:
        if not 0 <= layer <= len(self.layers):
            raise InputError(f"layer={layer}: the policy has {len(self.layers)} layers")
        return [self._states([_row([part])], depth=layer)[0, 1:] for part in parts]

    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: FeatureLoss | None = None
    ) -> Mapping[str, Tensor]:
        raise InputError("this policy is aligned from random weights: it is not pretrained")

    def make_reference(self) -> Self:
        return copy.deepcopy(self).requires_grad_(False)

    twin = make_reference

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"understand": [], "generate": [], "shared": list(self.parameters())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "discrete_policy:DiscretePolicy", "draws": self.draws, **self.sizes}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(dict(self.state_dict()), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        config = json.loads((folder / "config.json").read_text())
        del config["model_type"]
        policy = cls(**config)
        policy.load_state_dict(load_file(folder / "model.safetensors"))
        return policy.to(device, dtype)


def decoded(codes: Tensor) -> Image:
    """The picture of N codes: a square of two by two pixels each."""
    pixels = PALETTE[codes].view(SIDE, SIDE, 3).permute(2, 0, 1)
    return pixels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def encoded(image: Image) -> Tensor:
    """The codes of a picture, (N,): the nearest colors."""
    pixels = image[:, ::2, ::2].flatten(1).T
    return torch.cdist(pixels, PALETTE).argmin(dim=1)


def _row(parts: Parts) -> list[int]:
    row = [BOS]
    for part in parts:
        if isinstance(part, str):
            row += [FIRST_WORD + WORDS.index(word) for word in part.split()]
        else:
            row += [OPEN, *(encoded(part) + FIRST_CODE).tolist()]
    return row


def _scores(tokens: Tensor) -> tuple[Any, ...]:
    """The two functions of ``sampling/tokens.py`` that score logits, with what they are given first."""
    return (token_logprobs, (tokens,)), (token_entropy, ())


def _settings(segment: Any) -> Hashable:
    """What has to agree for segments to be scored together."""
    if segment.kind == "text":
        return "text", segment.temperature
    shared = (segment.kind, segment.temperature, segment.guidance_scale, segment.guided_logprobs)
    return (*shared, segment.likelihood, len(segment.scored)) if segment.kind == "masked" else shared


# --- prompts and rewards for whole runs ---


class Colors:
    """Prompts that ask for a color: to be said, drawn, or thought about and drawn."""

    tasks: tuple[Task, ...] = ("understand", "generate", "reason")

    def __init__(self, section: object, split: str, seed: int) -> None:
        self.split = split

    def prompt(self, task: Task, index: int) -> Prompt:
        color = WORDS[3 + index % 3]
        verb, output = {"understand": ("say", ("text",)), "generate": ("draw", ("image",))}.get(
            task, ("think draw", ("text", "image"))
        )
        return Prompt(f"{self.split}/{task}/{index}", task, (f"{verb} {color}",), output)

    def prompts(self, task: Task, n: int, start: int = 0) -> list[Prompt]:
        return [self.prompt(task, start + i) for i in range(n)]

    def example(self, task: Task, index: int) -> Example:
        raise InputError("these prompts have no outputs to imitate")


class ShareOfColor:
    """The share of a drawing that has one color of the palette."""

    judges = ("image",)

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output

    def score(self, groups: Sequence[Group], judge: object) -> Scores:
        return Scores(
            torch.tensor(
                [[float((encoded(t.image) == self.code).float().mean()) for t in g.trajectories] for g in groups]
            )
        )


class Says:
    """The share of the words of a text that are one word."""

    judges = ("text",)

    def __init__(self, word: str = "yes") -> None:
        self.word = word

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def score(self, groups: Sequence[Group], judge: object) -> Scores:
        words = [[(t.text or "").split() for t in g.trajectories] for g in groups]
        return Scores(torch.tensor([[row.count(self.word) / max(1, len(row)) for row in rows] for rows in words]))
