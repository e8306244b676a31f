"""A base class of policies that write by masked decoding, as LLaDA does (arXiv:2502.09992).

Letters: B texts, N places of an answer, L tokens of its text, n scored places of a pass, R passes, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lvrpo.errors import ContractError
from lvrpo.policies.base import Sampling
from lvrpo.policies.decoding import computes_last_step_alone
from lvrpo.policies.defaults import TokenPolicy
from lvrpo.sampling import (
    block_steps,
    choose_revealed,
    derive_seed,
    masked_input,
    sample_tokens,
    token_logprobs,
    token_scores,
    uniform_noise,
)
from lvrpo.types import MaskedTextSegment, Segment, SegmentLogprobs, TextSegment


class MaskedPass(NamedTuple):
    """One pass over an answer."""

    tokens: torch.Tensor
    """int64 (N,): its places, -1 where masked."""
    places: torch.Tensor
    """int64 (n,): those whose tokens are predicted."""


class MaskedTextPolicy(TokenPolicy):
    """A ``TokenPolicy`` whose texts are decoded block by block, the most confident tokens of a block first.

    Every step samples all masked places of the block at the temperature and fixes those with the highest probability
    (at temperature 1). A text ends at its first end token; later blocks are not decoded. Its log-probs are those of the
    recorded path or of random masks (``MaskedScoring``). A plain ``TextSegment`` is scored from left to right.
    """

    masked_text: bool = True
    end_ids: Collection[int]
    """The tokens that end a text."""

    @abstractmethod
    def answer_logits(self, contexts: Sequence[Sequence[int]], passes: Sequence[MaskedPass]) -> Iterator[torch.Tensor]:
        """Yields logits (n, V) of the tokens at the places of each pass over an answer that follows its context."""

    def next_logits(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Texts are not written token after token."""
        raise ContractError(f"{type(self).__name__} writes by masked decoding: use answer_logits")

    def _sample_text(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        B, N = len(contexts), sampling.max_new_tokens
        tokens = torch.zeros(B, N, dtype=torch.int64)
        steps = torch.full_like(tokens, N)
        allowed, waiting, before = self.text_tokens.to(self.device), list(range(B)), range(0)
        plan = block_steps(N, sampling.block_length, sampling.tokens_per_step)
        for s, (block, left) in enumerate(plan):
            if block != before:
                waiting = [b for b in waiting if not self._has_ended(tokens[b, : block.start])]
                before = block
            if not waiting:
                break
            u = uniform_noise([derive_seed(seeds[b], "write", s) for b in waiting], (len(block),)).to(self.device)
            own = slice(block.start, block.stop)
            seen = masked_input(tokens[waiting], steps[waiting], s, -1)
            passes = [MaskedPass(row, own.start + (row[own] < 0).nonzero()[:, 0]) for row in seen]
            found = self.answer_logits([contexts[b] for b in waiting], passes)
            for k, (b, logits) in enumerate(zip(waiting, found, strict=True)):
                places = passes[k].places
                sampled = sample_tokens(logits, u[k, (places - own.start).to(u.device)], sampling.temperature, allowed)
                confidence = token_logprobs(logits, sampled, 1.0, allowed)[None]
                fixed = choose_revealed(confidence, torch.ones_like(confidence, dtype=torch.bool), left)[0].cpu()
                tokens[b, places[fixed]] = sampled.cpu()[fixed]
                steps[b, places[fixed]] = s
            if computes_last_step_alone():  # the first has the most places
                tokens[:], steps[:] = self._any_token(), _from_left_to_right(plan)
                break
        for b in range(B):
            yield self._segment(tokens[b], steps[b], seeds[b], sampling)

    def _has_ended(self, tokens: torch.Tensor) -> bool:
        return any(token in self.end_ids for token in tokens.tolist())

    def _any_token(self) -> int:
        """One that ends no text."""
        return next(i for i in self.text_tokens.nonzero()[:, 0].tolist() if i not in self.end_ids)

    def _length(self, tokens: torch.Tensor) -> int:
        """Tokens up to the first end token, itself included."""
        ids = tokens.tolist()
        return next((i + 1 for i, token in enumerate(ids) if token in self.end_ids), len(ids))

    def _segment(self, decoded: torch.Tensor, steps: torch.Tensor, seed: int, sampling: Sampling) -> MaskedTextSegment:
        scoring, length = sampling.masked, self._length(decoded)
        own, path = decoded[:length], scoring.likelihood == "path"
        scored = (
            torch.ones(length, dtype=torch.bool) if path else scoring.masks([derive_seed(seed, "masks")], length)[0]
        )
        reached = steps < len(steps)
        return MaskedTextSegment(
            own,
            torch.zeros(scored.shape),
            sampling.temperature,
            self.decode_text(own.tolist()),
            int(own[-1]) in self.end_ids,
            decoded=decoded,
            reveal_steps=torch.where(reached, steps // scoring.steps_per_pass, len(steps)),
            scored=scored,
            likelihood="path" if path else "monte_carlo",
        )

    # --- replay ---

    def text_passes(self, segment: TextSegment) -> list[MaskedPass]:
        """The passes in which the tokens of a text are scored."""
        length = len(segment.tokens)
        if not isinstance(segment, MaskedTextSegment):
            return _path(segment.tokens, torch.arange(length), length)
        if segment.likelihood == "path":
            return _path(segment.decoded, segment.reveal_steps, length)
        whole = torch.full_like(segment.decoded, -1)
        passes = []
        for scored in segment.scored:
            tokens = whole.clone()
            tokens[:length] = torch.where(scored, -1, segment.tokens)
            passes.append(MaskedPass(tokens, scored.nonzero()[:, 0]))
        return passes

    def _score(self, contexts: list[list[int]], segments: Sequence[Any]) -> Iterable[SegmentLogprobs]:
        """Segments of one kind and setting. Any: as in ``TokenPolicy``."""
        if segments[0].kind != "text":
            yield from super()._score(contexts, segments)
            return
        passes = [self.text_passes(segment) for segment in segments]
        rows = [context for context, own in zip(contexts, passes, strict=True) for _ in own]
        logits = self.answer_logits(rows, [one for own in passes for one in own])
        for segment, own in zip(segments, passes, strict=True):
            yield self._scored(segment, own, logits)

    def _scored(
        self, segment: TextSegment, passes: Sequence[MaskedPass], logits: Iterator[torch.Tensor]
    ) -> SegmentLogprobs:
        draws = isinstance(segment, MaskedTextSegment) and segment.likelihood == "monte_carlo"
        length = len(segment.tokens)
        size = (len(passes) if draws else 1) * length
        whole, allowed = segment.tokens.to(self.device), self.text_tokens.to(self.device)
        found, indices = [], []
        for r, one in enumerate(passes):
            places = one.places.to(self.device)
            found.append(token_scores(next(logits), whole[places], segment.temperature, allowed))
            indices.append(places + (r * length if draws else 0))
        index = torch.cat(indices)
        logprobs, entropy = (
            part.new_zeros(size).index_copy(0, index, part).view(segment.behavior_logprobs.shape)
            for part in (torch.cat([pair[k] for pair in found]) for k in range(2))
        )
        return SegmentLogprobs(logprobs, entropy)


def _from_left_to_right(plan: Sequence[tuple[range, int]]) -> torch.Tensor:
    """int64 (N,): the steps of ``block_steps`` at which places are decoded that are chosen in order."""
    steps: list[int] = []
    for s, (block, left) in enumerate(plan):
        steps += [s] * (block.stop - left - len(steps))
    return torch.tensor(steps)


def _path(decoded: torch.Tensor, steps: torch.Tensor, length: int) -> list[MaskedPass]:
    """The passes that score the first ``length`` places, each at its step."""
    own, passes = steps[:length], []
    for step in own.unique().tolist():
        (tokens,) = masked_input(decoded[None], steps[None], step, -1)
        passes.append(MaskedPass(tokens, (own == step).nonzero()[:, 0]))
    return passes
