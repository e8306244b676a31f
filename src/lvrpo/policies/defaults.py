"""Base classes for your own policy: ``PolicyDefaults`` for any model, ``TokenPolicy`` for one of discrete tokens."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from lvrpo.policies.base import Sampling, TokenCounts, missing_method, with_seeds
from lvrpo.policies.decoding import computes_last_step_alone
from lvrpo.policies.supervised import token_losses
from lvrpo.sampling import (
    choose_revealed,
    derive_seed,
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
    TASKS,
    Example,
    Group,
    Image,
    ImageTokenSegment,
    LogitGuidance,
    MaskedSegment,
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


class PolicyDefaults(nn.Module, ABC):
    """A base class: write ``segment_kinds``, ``sample``, ``logprobs``, ``save`` and ``load``.

    ``velocity`` and the methods of ``Judge`` raise InputError with their name until they are written.
    """

    segment_kinds: tuple[SegmentKind, ...]
    """The kinds of segments in its outputs."""
    draws_after_text: bool = True
    """Whether it can draw after a text of its own; a run that needs it is refused otherwise before it starts."""
    tasks: tuple[TaskKind, ...] = TASKS
    """Supported tasks; a run that needs others is refused before it starts."""
    masked_text: bool = False
    """Whether its texts are of masked tokens (``MaskedTextSegment``)."""
    judging_sides: tuple[Literal["read", "draw"], ...] = ("read", "draw")
    """The sides that it judges outputs with; a run with a reward that asks another one is refused before it starts."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``."""

    @abstractmethod
    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """See ``Policy.logprobs``."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes config.json, whose ``model_type`` is this class as my_package.module:Class, and the weights."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads what ``save`` wrote."""

    # --- what has a default ---

    @property
    def image_size(self) -> int | None:
        """None: images of any size."""
        return None

    def make_reference(self) -> Self:
        """A frozen copy."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the first parameter."""
        return next(self.parameters()).dtype

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All trainable parameters under "shared"."""
        return {"understand": [], "generate": [], "shared": [p for p in self.parameters() if p.requires_grad]}

    def default_sampling(self, task: TaskKind) -> Sampling:
        """``Sampling()``."""
        return Sampling()

    def timestep_shift(self) -> float:
        """1: no shift."""
        return 1.0

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """An estimate: a token per four characters and per 16 x 16 pixels."""
        texts = sum(len(part) for part in trajectory.prompt.parts if isinstance(part, str))
        pixels = sum(part[0].numel() for part in trajectory.prompt.parts if not isinstance(part, str))
        image = 0 if trajectory.image is None else trajectory.image[0].numel()
        return TokenCounts(texts // 4 + pixels // 256 + 1, len(trajectory.text or "") // 4 + 1, image // 256)

    def limit_tokens(self, limit: int | None) -> None:
        """Does nothing: a batch is one forward pass."""

    def checkpoint_gradients(self, on: bool) -> None:
        """Does nothing: activations are kept."""

    def check_text(self, text: str) -> None:
        """Accepts every text."""

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises InputError for a prompt that ``sample`` would refuse, such as one that is too long; accepts all."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Accepts all settings."""

    # --- optional methods without a default ---

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """See ``FlowPolicy.velocity``."""
        raise missing_method(self, "velocity")

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """See ``Judge.text_logprob``."""
        raise missing_method(self, "text_logprob")

    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """See ``Judge.image_logprob``."""
        raise missing_method(self, "image_logprob")

    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Judge.hidden_states``."""
        raise missing_method(self, "hidden_states")


class TokenPolicy(PolicyDefaults):
    """A policy whose text and images are discrete tokens: text, image tokens in order, or masked image tokens.

    Sampling, replay and judging follow from the logits of the network. Left to write: the abstract members,
    ``segment_kinds``, ``save`` and ``load``. Images of several kinds are generated in turn, in the order of
    ``segment_kinds``. Nothing is cached: every token takes a pass over its whole row.

    Letters: B rows, L tokens of a row, V vocabulary of text, N tokens of an image, K codes of an image token.
    """

    end_id: int
    """The token that ends a text."""
    image_tokens: int
    """N."""
    text_tokens: torch.Tensor
    """bool (V,): the tokens that a text may contain."""

    @abstractmethod
    def context_ids(self, parts: Parts, segments: Sequence[Segment] = ()) -> list[int]:
        """Input ids of a prompt and the segments after it."""

    @abstractmethod
    def next_logits(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits (L, V) after every token of each row of input ids."""

    @abstractmethod
    def image_logits(
        self, contexts: Sequence[Sequence[int]], tokens: torch.Tensor, masked: bool, scale: float, mode: LogitGuidance
    ) -> torch.Tensor:
        """Guided logits of image tokens ``tokens`` (B, n), -1 where masked, after their contexts.

        Of the token after each of the n, (B, n + 1, K); where ``masked``, of those in their places, (B, n, K).
        """

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Ids without the end token."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids, the end token skipped."""

    @abstractmethod
    def encode_image(self, image: Image) -> torch.Tensor:
        """Codes, int64 (N,)."""

    @abstractmethod
    def decode_image(self, codes: torch.Tensor) -> Image:
        """The image of codes (N,)."""

    # --- what has a default ---

    def segment_context(self, prompt: Prompt, segments: Sequence[Segment], kind: SegmentKind) -> list[int]:
        """Input ids before a segment of this kind, as in ``context_ids``."""
        return self.context_ids(prompt.parts, segments)

    def choice_temperature(self, sampling: Sampling, step: int) -> float:
        """Temperature of the choice of masked tokens to reveal in a step, shared by all."""
        return sampling.choice_temperature

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    # --- sampling ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; behavior log-probs are those of a replay in the same batch."""
        rows = [
            (prompt, member, derive_seed(seed, "member", member))
            for prompt, seed in with_seeds(prompts, seeds)
            for member in range(sampling.group_size)
        ]
        made: list[list[Segment]] = [[] for _ in rows]
        for k in range(max(len(prompt.output) for prompt in prompts)):
            waiting: dict[SegmentKind, list[int]] = defaultdict(list)
            for i, (prompt, _, _) in enumerate(rows):
                if k < len(prompt.output):
                    waiting[self._kind(prompt.output, k)].append(i)
            for kind, chosen in waiting.items():
                make = {"text": self._sample_text, "tokens": self._sample_image, "masked": self._sample_masked}[kind]
                contexts = [self.segment_context(rows[i][0], made[i], kind) for i in chosen]
                own = [derive_seed(rows[i][2], k) for i in chosen]
                for i, segment in zip(chosen, make(contexts, own, sampling), strict=True):
                    made[i].append(segment)
        trajectories = [Trajectory(p, m, tuple(made[i]), seed) for i, (p, m, seed) in enumerate(rows)]
        size, scored = sampling.group_size, []
        for trajectory, own in zip(trajectories, self.logprobs(trajectories), strict=True):
            scored.append(with_behavior_logprobs(trajectory, own))
        return [Group(prompt, tuple(scored[p * size : (p + 1) * size])) for p, prompt in enumerate(prompts)]

    def _kind(self, output: Sequence[OutputKind], k: int) -> SegmentKind:
        if output[k] == "text":
            return "text"
        kinds: list[SegmentKind] = [kind for kind in self.segment_kinds if kind != "text"]
        return kinds[sum(kind == "image" for kind in output[:k]) % len(kinds)]

    def _sample_text(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        u = uniform_noise([derive_seed(seed, "write") for seed in seeds], (sampling.max_new_tokens,))
        rows = [list(context) for context in contexts]
        for i in range(sampling.max_new_tokens):
            last = torch.stack([logits[-1] for logits in self.next_logits(rows)])
            tokens = sample_tokens(last, u[:, i], sampling.temperature, self.text_tokens.to(last.device))
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
        for row, context in zip(rows, contexts, strict=True):
            sampled = row[len(context) :]
            ended = self.end_id in sampled
            ids = sampled[: sampled.index(self.end_id) + 1] if ended else sampled
            yield TextSegment(
                torch.tensor(ids), torch.zeros(len(ids)), sampling.temperature, self.decode_text(ids), ended
            )

    def _sample_image(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        u = uniform_noise([derive_seed(seed, "draw") for seed in seeds], (self.image_tokens,))
        tokens, scale = torch.zeros(len(contexts), 0, dtype=torch.int64), sampling.guidance_scale
        for i in range(self.image_tokens):
            logits = self.image_logits(contexts, tokens, False, scale, "joint")[:, -1]
            sampled = sample_tokens(logits, u[:, i], sampling.image_temperature).cpu()
            tokens = torch.cat([tokens, sampled[:, None]], dim=1)
        for row in tokens:
            image, none = self.decode_image(row), torch.zeros(len(row))
            yield ImageTokenSegment(row, none, sampling.image_temperature, scale, image, sampling.guided_logprobs)

    def _sample_masked(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        B, N, temperature, scale = len(contexts), self.image_tokens, sampling.image_temperature, sampling.guidance_scale
        scoring = sampling.masked
        tokens = torch.zeros(B, N, dtype=torch.int64, device=self.device)
        steps = torch.full_like(tokens, sampling.num_steps)
        for s, left in enumerate(masked_counts(N, sampling.num_steps)):
            u = uniform_noise([derive_seed(seed, "reveal", s) for seed in seeds], (2, N)).to(self.device)
            logits = self.image_logits(contexts, masked_input(tokens, steps, s, -1), True, scale, "joint")
            sampled = sample_tokens(logits.flatten(0, 1), u[:, 0].flatten(), temperature).view(B, N)
            logprobs = token_logprobs(logits, sampled, temperature)
            fixed = choose_revealed(
                logprobs, steps == sampling.num_steps, left, u[:, 1], self.choice_temperature(sampling, s)
            )
            tokens, steps = torch.where(fixed, sampled, tokens), torch.where(fixed, s, steps)
            if computes_last_step_alone():  # all take the same memory
                break
        tokens, steps = tokens.cpu(), steps.cpu()
        path = scoring.likelihood == "path"
        masks = torch.ones(B, 1, N, dtype=torch.bool)
        if not path:
            masks = scoring.masks([derive_seed(seed, "masks") for seed in seeds], N)
        for b in range(B):
            yield MaskedSegment(
                tokens[b],
                steps[b] // scoring.steps_per_pass,
                masks[b],
                torch.zeros(masks[b].shape),
                "path" if path else "monte_carlo",
                temperature,
                scale,
                self.decode_image(tokens[b]),
                sampling.guided_logprobs,
            )

    # --- replay ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """See ``Policy.logprobs``; segments of equal settings are replayed together, those of other kinds are nan."""
        found = [[_not_replayed(segment) for segment in segments_through(t, kinds)] for t in trajectories]
        for k in range(max(map(len, found), default=0)):
            equal: dict[Hashable, list[int]] = defaultdict(list)
            for i, t in enumerate(trajectories):
                if k < len(found[i]) and t.segments[k].kind in kinds:
                    equal[replay_settings(t.segments[k])].append(i)
            for chosen in equal.values():
                before = [trajectories[i] for i in chosen]
                contexts = [self.segment_context(t.prompt, t.segments[:k], t.segments[k].kind) for t in before]
                scored = self._score(contexts, [t.segments[k] for t in before])
                for i, row in zip(chosen, scored, strict=True):
                    found[i][k] = row
        return found

    def _score(self, contexts: list[list[int]], segments: Sequence[Any]) -> Iterable[SegmentLogprobs]:
        """Segments of one kind and setting. Any: the kind is checked here."""
        tokens, first = [segment.tokens.to(self.device) for segment in segments], segments[0]
        if first.kind == "text":
            rows = [[*context, *row.tolist()[:-1]] for context, row in zip(contexts, tokens, strict=True)]
            for context, row, logits in zip(contexts, tokens, self.next_logits(rows), strict=True):
                own, among = logits[len(context) - 1 :], (first.temperature, self.text_tokens.to(row.device))
                yield SegmentLogprobs(token_logprobs(own, row, *among), token_entropy(own, *among))
            return
        guidance, temperature, codes = (
            (first.guidance_scale, first.guided_logprobs),
            first.temperature,
            torch.stack(tokens),
        )
        if first.kind == "tokens":
            logits = self.image_logits(contexts, codes[:, :-1], False, *guidance)
            scored = token_logprobs(logits, codes, temperature), token_entropy(logits, temperature)
            yield from map(SegmentLogprobs, *scored)
            return
        path = first.likelihood == "path"
        steps = torch.stack([segment.reveal_steps for segment in segments]).to(self.device)
        scored = torch.stack([segment.scored for segment in segments]).to(self.device)  # (B, R, N)
        rounds = int(steps.max()) + 1 if path else scored.shape[1]
        seen = [
            masked_input(codes, steps, r, -1) if path else codes.masked_fill(scored[:, r], -1) for r in range(rounds)
        ]
        every = [self.image_logits(contexts, inputs, True, *guidance) for inputs in seen]
        entropy = [token_entropy(logits, temperature) for logits in every]
        if path:
            zero = torch.zeros((), device=codes.device)
            logprobs = sum((path_logprobs(x, codes, steps, r, temperature) for r, x in enumerate(every)), zero)
            spread = sum((torch.where(steps == r, H, 0.0) for r, H in enumerate(entropy)), zero)
            yield from (SegmentLogprobs(row[None], H[None]) for row, H in zip(logprobs, spread, strict=True))
            return
        logprobs = torch.stack([token_logprobs(logits, codes, temperature) for logits in every], dim=1)
        yield from map(SegmentLogprobs, logprobs * scored, torch.stack(entropy, dim=1) * scored)

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """See ``Policy.count_tokens``."""
        text = sum(len(s.tokens) for s in trajectory.segments if isinstance(s, TextSegment))
        image = self.image_tokens if trajectory.image is not None else 0
        return TokenCounts(len(self.context_ids(trajectory.prompt.parts)), text, image)

    # --- supervised ---

    def answer_ids(self, parts: Parts, text: str) -> list[int]:
        """Ids of a text as the answer to a prompt, end token included."""
        return [*self.encode_text(text), self.end_id]

    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: None = None
    ) -> Mapping[str, torch.Tensor]:
        """As ``SupervisedPolicy.supervised_losses``: cross-entropies per token, of the masked ones where masked."""
        return token_losses(self, examples, generator)

    # --- judging ---

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """See ``Judge.text_logprob``."""
        tokens = [torch.tensor(self.answer_ids(parts, text)) for parts, text in zip(contexts, texts, strict=True)]
        segments = [TextSegment(row, torch.zeros(len(row)), 1.0, "", True) for row in tokens]
        rows = self._score([self.context_ids(parts) for parts in contexts], segments)
        return torch.stack([row.logprobs.mean() for row in rows])

    @torch.no_grad()
    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """See ``Judge.image_logprob``: exact for image tokens in order, a bound by random masks for masked ones."""
        kind = self._kind(("image",), 0)
        prompts = [Prompt("judged", "generate", tuple(parts), ("image",)) for parts in contexts]
        rows = [self.segment_context(prompt, (), kind) for prompt in prompts]
        codes = torch.stack([self.encode_image(image) for image in images]).to(self.device)
        if kind == "tokens":
            logits = self.image_logits(rows, codes[:, :-1], False, 1.0, "joint")
            return token_logprobs(logits, codes).sum(dim=1, keepdim=True).expand(-1, draws)
        masks = mask_draws(list(seeds), self.image_tokens, draws, "uniform").to(self.device)
        seen = [codes.masked_fill(masks[:, k], -1) for k in range(draws)]
        logprobs = [token_logprobs(self.image_logits(rows, inputs, True, 1.0, "joint"), codes) for inputs in seen]
        each = [monte_carlo_logprob(row[:, None], masks[:, k, None], "elbo") for k, row in enumerate(logprobs)]
        return torch.stack(each, dim=1)


def with_behavior_logprobs(trajectory: Trajectory, rows: Sequence[SegmentLogprobs]) -> Trajectory:
    """The trajectory with the log-probs of its own replay as those of sampling, on the CPU."""
    pairs = zip(trajectory.segments, rows, strict=True)
    segments = tuple(replace(segment, behavior_logprobs=row.logprobs.cpu()) for segment, row in pairs)
    return replace(trajectory, segments=segments)


def _not_replayed(segment: Segment) -> SegmentLogprobs:
    return SegmentLogprobs(torch.full_like(segment.behavior_logprobs, math.nan))


def replay_settings(segment: Any) -> Hashable:
    """Segments with equal settings are replayed in one batch. Any: a segment of any kind."""
    if segment.kind == "text":
        return "text", segment.temperature
    shared = (segment.kind, segment.temperature, segment.guidance_scale, segment.guided_logprobs)
    return (*shared, segment.likelihood, len(segment.scored)) if segment.kind == "masked" else shared
