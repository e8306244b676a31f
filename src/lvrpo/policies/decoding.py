"""Autoregressive decoding with a KV cache of ``transformers``: sampled texts and image tokens.

Letters: R rows, L places so far, n new places, D what the model gives per place (states or logits), B members,
N tokens of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from lvrpo.sampling import guide_logits, sample_tokens
from lvrpo.types import TextSegment

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Ids (R,) to what the model is fed per row."""
Head = Callable[[torch.Tensor], torch.Tensor]
"""The last outputs (R, D) to logits (R, V)."""


class Forward(Protocol):
    """A model that reads new places of rows after those of its cache."""

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """New places (R, n, ...) at their positions (..., R, n), to (R, n, D); ``mask`` is 0 on padding, (R, L + n).

        Any: a cache of an optional package.
        """
        ...


class Decoder:
    """Rows whose first places are padding, if they have any; repeated rows share what was computed for them."""

    def __init__(
        self, forward: Forward, cache: Any, mask: torch.Tensor, positions: torch.Tensor, last: torch.Tensor
    ) -> None:
        """After the places of ``mask`` int64 (R, L) went through the model; Any: a cache of an optional package.

        ``positions`` (..., R, 1): of the newest place of each row, ``last`` (R, D): what the model gave there.
        """
        self.forward, self.cache, self.mask, self.positions, self.last = forward, cache, mask, positions, last
        self.padded = not bool(mask.all())
        self.most = mask.shape[1]
        """Places for which there is room, of ``reserve``."""

    def copy(self) -> Decoder:
        """The same rows, to grow by themselves; what was computed is shared."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        return Decoder(self.forward, cache, self.mask, self.positions, self.last)

    def reserve(self, places: int) -> None:
        """Makes room for so many more places, which are then written without a copy of earlier ones.

        Without gradient. Layers that keep a window or a state are left as they are.
        """
        from transformers.cache_utils import DynamicLayer

        from lvrpo.policies.growing_cache import GrowingLayer

        layers = self.cache.layers
        self.most = self.mask.shape[1] + places
        self.cache.layers = [GrowingLayer(old, places) if type(old) is DynamicLayer else old for old in layers]

    def select(self, rows: Sequence[int]) -> None:
        """Repeats, drops or reorders the rows, which copies their keys and values."""
        if list(rows) == list(range(len(self.mask))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.mask.device)
        for layer in self.cache.layers:
            if hasattr(layer, "select"):  # of transformers' own classes none has it
                layer.select(rows)
            else:
                layer.reorder_cache(index)
        self.mask, self.last = self.mask[index], self.last[index]
        self.positions = self.positions.index_select(-2, index)

    def skip(self, left: int = 1) -> None:
        """Fills all reserved places but the last ones with any keys and values, which takes no pass: for estimates."""
        places = self.most - left - self.mask.shape[1]
        if places < 1:
            return
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None:  # a layer of transformers may keep a state instead
                layer.update(*(x[:, :, :1].expand(-1, -1, places, -1) for x in (layer.keys, layer.values)))
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), places)], dim=1)
        self.positions = self.positions + places

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One more place per row, fed (R, ...), to (R, D)."""
        self.extend(x[:, None])
        return self.last

    def extend(self, x: torch.Tensor) -> torch.Tensor:
        """n more places per row, fed (R, n, ...), to (R, n, D)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(x.shape[:2])], dim=1)
        positions = self.positions + torch.arange(1, x.shape[1] + 1, device=x.device)
        out = self.forward(x, self.mask if self.padded else None, positions, self.cache)
        self.positions, self.last = positions[..., -1:], out[:, -1]
        return out


def read_rows(
    transformer: Any,
    x: torch.Tensor,
    valid: torch.Tensor,
    positions: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> Decoder:
    """Reads contexts (R, L, D), padded on the left where ``valid`` int64 (R, L) is 0.

    ``transformer``: a decoder of transformers. ``positions`` int64 (R, L): other ones than the number of valid places
    before each; ``seen`` bool (R, 1, L, L): which places see which, where it is not those before them. Any: an optional
    package.
    """
    from transformers import DynamicCache

    def forward(x: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        out = transformer(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state

    if positions is None:
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
    mask = seen if seen is not None else None if bool(valid.all()) else valid
    cache = DynamicCache(config=transformer.config)
    states = forward(x, mask, positions, cache)
    return Decoder(forward, cache, valid, positions[:, -1:], states[:, -1])


class TokenDecoder(Protocol):
    """Rows that grow by a token, as ``Decoder``."""

    last: torch.Tensor
    """What the model gave at the newest place of each row, (R, D)."""

    def select(self, rows: Sequence[int]) -> None:
        """Repeats, drops or reorders the rows."""
        ...

    def skip(self) -> None:
        """Fills all reserved places but the last, for estimates of memory."""
        ...

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One more place per row, fed (R, ...), to (R, D), which is then ``last``."""
        ...


TOKENS_PER_WAIT = 8
"""On a GPU, tokens of a text between two waits for it; rows that ended meanwhile go on until then."""


@torch.no_grad()
def generate_text(
    decoder: TokenDecoder,
    owner: Sequence[int],
    embed: Embed,
    head: Head,
    end_ids: Collection[int],
    uniforms: torch.Tensor,
    temperature: float,
    allowed: torch.Tensor | None = None,
    tokens_per_wait: int | None = None,
) -> list[list[int]]:
    """Samples one text per member: member m continues row ``owner[m]``, with uniforms (B, max tokens).

    The end token is included where a text ended by itself. ``allowed`` bool (V,): the tokens that a text may contain;
    None: all. Members with the same prefix share one row, so a step costs the number of distinct prefixes, and
    texts that ended leave the batch. ``tokens_per_wait``: after so many tokens they are fetched from the device; None:
    1 on a CPU, ``TOKENS_PER_WAIT`` on a GPU. With more than 1, members part at their first token.
    """
    if _LAST_STEP_ALONE.get():
        return _last_step_of_text(decoder, owner, embed, head, end_ids, uniforms, temperature, allowed)
    wait = tokens_per_wait or (TOKENS_PER_WAIT if uniforms.is_cuda else 1)
    texts: list[list[int]] = [[] for _ in owner]
    active, row_of = list(range(len(owner))), list(owner)  # members without an end token, and the row of each
    for start in range(0, uniforms.shape[1], wait):
        drawn: list[torch.Tensor] = []
        for i in range(start, min(start + wait, uniforms.shape[1])):
            if drawn:
                decoder.select(row_of)
                row_of = list(range(len(row_of)))
                decoder.step(embed(drawn[-1]))
            drawn.append(sample_tokens(_take(head(decoder.last), row_of), uniforms[:, i], temperature, allowed))
        prefixes: dict[tuple[int, ...], int] = {}  # the place of the first member of every prefix
        still: list[tuple[int, tuple[int, ...]]] = []  # members and their prefixes
        for place, tokens in enumerate(torch.stack(drawn, dim=1).tolist()):
            end = next((k for k, token in enumerate(tokens) if token in end_ids), None)
            texts[active[place]] += tokens if end is None else tokens[: end + 1]
            if end is None:
                prefix = (row_of[place], *tokens)
                prefixes.setdefault(prefix, place)
                still.append((place, prefix))
        if not still or start + wait >= uniforms.shape[1]:
            break
        order = fill_gaps([prefix[0] for prefix in prefixes])
        kept = [list(prefixes)[k] for k in order]
        decoder.select([prefix[0] for prefix in kept])
        decoder.step(embed(_take(drawn[-1], [prefixes[prefix] for prefix in kept])))
        rows = {prefix: row for row, prefix in enumerate(kept)}
        uniforms = _take(uniforms, [place for place, _ in still])
        active, row_of = [active[place] for place, _ in still], [rows[prefix] for _, prefix in still]
    return texts


def text_segment(
    ids: Sequence[int], end_ids: Collection[int], temperature: float, decode: Callable[[Sequence[int]], str]
) -> TextSegment:
    """A sampled text, with log-probs of 0; ``decode``: ids to text, the end token left out, whose outer spaces go."""
    ended = ids[-1] in end_ids
    text = decode(ids[:-1] if ended else ids).strip()
    return TextSegment(torch.tensor(ids, dtype=torch.int64), torch.zeros(len(ids)), temperature, text, ended)


def generate_image_tokens(
    decoder: Decoder,
    embed: Callable[[torch.Tensor, int], torch.Tensor],
    head: Head,
    uniforms: torch.Tensor,
    temperature: float,
    guidance_scale: float,
) -> torch.Tensor:
    """Samples the tokens of an image per member with uniforms (B, N), to int64 (B, N).

    The rows of the decoder: B contexts; under guidance (a scale other than 1) B more of the unconditional branch, which
    are fed the same tokens. ``embed``: tokens (R,) and their index in the image to what the model is fed after them
    (R, n, D): the token, and what ends its line.
    """
    B, N = uniforms.shape
    alone = _LAST_STEP_ALONE.get()
    drawn: list[torch.Tensor] = []
    for i in range(N):
        if drawn:
            x = embed(drawn[-1].repeat(len(decoder.mask) // B), N - 1 if alone else i - 1)
            if alone:
                decoder.skip(x.shape[1])  # the end of a line takes more memory than another place: two queries, a mask
            decoder.extend(x)
        logits = head(decoder.last)
        guided = guide_logits(logits[:B], logits[B:] if len(logits) > B else None, guidance_scale)
        drawn.append(sample_tokens(guided, uniforms[:, i], temperature))
        if alone and i == 1:
            return torch.stack([*drawn, *drawn[:1] * (N - 2)], dim=1)
    return torch.stack(drawn, dim=1)


_LAST_STEP_ALONE: ContextVar[bool] = ContextVar("last_step_alone", default=False)


@contextmanager
def last_step_alone() -> Iterator[None]:
    """Inside, texts and image tokens compute only their first and last step, masked tokens the first, and flows the
    steps that differ in memory, for estimates of it; tokens are arbitrary, and texts have their full length."""
    token = _LAST_STEP_ALONE.set(True)
    try:
        yield
    finally:
        _LAST_STEP_ALONE.reset(token)


def computes_last_step_alone() -> bool:
    """Whether ``last_step_alone`` is on."""
    return _LAST_STEP_ALONE.get()


def _last_step_of_text(
    decoder: TokenDecoder,
    owner: Sequence[int],
    embed: Embed,
    head: Head,
    end_ids: Collection[int],
    uniforms: torch.Tensor,
    temperature: float,
    allowed: torch.Tensor | None,
) -> list[list[int]]:
    """``generate_text`` inside ``last_step_alone``; takes as much memory, with members that part at once."""
    B, N = uniforms.shape
    logits = _take(head(decoder.last), owner)
    tokens = sample_tokens(logits, uniforms[:, 0], temperature, allowed)
    if N > 1:
        decoder.select(owner)
        decoder.skip()
        decoder.step(embed(tokens))
        logits = head(decoder.last)
        sample_tokens(logits, uniforms[:, 1], temperature, allowed)
        decoder.select(range(B)[::-1])  # texts that end make others move
    free = torch.ones(logits.shape[-1], dtype=torch.bool) if allowed is None else allowed.cpu().clone()
    free[list(end_ids)] = False
    ids = free.nonzero()[:, 0].tolist()
    return [[ids[(m * N + i) % len(ids)] for i in range(N)] for m in range(B)]


def fill_gaps(rows: Sequence[int]) -> list[int]:
    """An order of rows that leaves most of them where they are: the last ones take the places of those that are gone.

    Rows 0 3 4 5 to the order 0 3 2 1, that is 0 5 4 3: only the last two move, to places 1 and 2. Repeated rows keep
    their order.
    """
    n = len(rows)
    if len(set(rows)) < n:
        return list(range(n))
    home = {row: k for k, row in enumerate(rows) if row < n}
    away = [k for k, row in enumerate(rows) if row >= n]
    return [home[place] if place in home else away.pop() for place in range(n)]


def _take(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of x; x itself for all rows in order."""
    if list(rows) == list(range(len(x))):
        return x
    return x.index_select(0, torch.tensor(rows, dtype=torch.int64, device=x.device))
