"""Runs a Mixture-of-Transformers: embeds text and images, prefills shared contexts once, splits batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch

from lvrpo.policies.mot.attention import Span, SpanKind, pack
from lvrpo.policies.mot.transformer import Cache, Hidden, MoT
from lvrpo.types import Image, Parts

IMAGE_TOKEN = -1
"""Placeholder for a vision-encoder token in a list of token ids."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One span of a row with its content."""

    span: Span
    ids: tuple[int, ...]
    """Ids of the span's understanding-expert tokens, markers included; IMAGE_TOKEN for vision-encoder tokens."""
    image: Image | None = None
    grid: Grid = (0, 0)
    """Rows and columns of an image's tokens, markers excluded."""
    state: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of a "clean" or "noise" span with a known latent: (x_t (N, C), t ())."""

    @property
    def key(self) -> Hashable:
        """Equal for pieces with the same content."""
        return self.span.kind, self.ids, id(self.image)


Row = tuple[Piece, ...]
T = TypeVar("T")


def row_tokens(row: Row) -> int:
    """The number of tokens, markers included."""
    return sum(piece.span.length for piece in row)


class ModelRunner:
    """Builds rows from parts and runs them through the transformer."""

    def __init__(self, transformer: MoT, encoders: Encoders, tokenizer: Tokenizer) -> None:
        self.transformer, self.encoders, self.tokenizer = transformer, encoders, tokenizer

    def text(self, ids: Sequence[int]) -> Piece:
        """A complete text: [bos] ids [eos]."""
        whole = (self.tokenizer.bos_id, *ids, self.tokenizer.eos_id)
        return Piece(Span("text", len(whole)), whole)

    def open_text(self, ids: Sequence[int]) -> Piece:
        """A text to continue or to score: [bos] ids."""
        whole = (self.tokenizer.bos_id, *ids)
        return Piece(Span("text", len(whole)), whole)

    def option(self, ids: Sequence[int]) -> Piece:
        """One of several texts scored after the same context: [bos] ids."""
        whole = (self.tokenizer.bos_id, *ids)
        return Piece(Span("option", len(whole)), whole)

    def image(self, image: Image, kind: SpanKind) -> Piece:
        """An image as vision-encoder tokens ("read") or as clean latent tokens ("clean")."""
        grid = self.encoders.vision_grid(image) if kind == "read" else self.encoders.latent_grid(image)
        n = grid[0] * grid[1]
        inside = (IMAGE_TOKEN,) * n if kind == "read" else ()
        return Piece(
            Span(kind, n + 2), (self.tokenizer.image_start_id, *inside, self.tokenizer.image_end_id), image, grid
        )

    def noise(self, grid: Grid) -> Piece:
        """The latent tokens of an image to generate."""
        length = grid[0] * grid[1] + 2
        return Piece(Span("noise", length), (self.tokenizer.image_start_id, self.tokenizer.image_end_id), grid=grid)

    def row(self, parts: Parts, draws: bool) -> Row:
        """The pieces of a context; with ``draws``, images are both latent and vision-encoder tokens, in this order."""
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, str):
                pieces.append(self.text(self.tokenizer.encode(part)))
            else:
                if draws:
                    pieces.append(self.image(part, "clean"))
                pieces.append(self.image(part, "read"))
        return tuple(pieces)

    def without_text(self, row: Row) -> Row:
        """The context of the no-text branch of guidance: without a text at its end."""
        return row[:-1] if row and row[-1].span.kind == "text" else row

    def without_images(self, row: Row) -> Row:
        """The context of the no-image branch of guidance: the texts alone."""
        return tuple(piece for piece in row if piece.span.kind == "text")

    def run(
        self,
        rows: Sequence[Row],
        cache: Cache,
        noisy: tuple[torch.Tensor, torch.Tensor] | None = None,
        keep_layers: bool = False,
        extend: bool = True,
        outputs: torch.Tensor | Literal["generation"] | None = None,
    ) -> Hidden:
        """Appends rows to their contexts; ``noisy`` is (x_t (B, N, C), t (B,)) where every row is one noise piece.

        Without ``extend`` the cache is unchanged. ``outputs``: indices of the understanding tokens to return states of,
        or the latent tokens; None: all tokens of both experts.
        """
        packing = pack([tuple(piece.span for piece in row) for row in rows], self.transformer.inv_freq.device)
        pieces = [piece for row in rows for piece in row]
        understanding = self.embed_understanding(pieces)
        latent_pieces = [piece for piece in pieces if piece.span.kind in ("clean", "noise")]
        if noisy is not None:
            generation = self.encoders.embed_latents(*noisy, latent_pieces[0].grid).flatten(0, 1)
        elif latent_pieces:
            generation = _by_grid(latent_pieces, self._embed_latent_pieces)
        else:
            generation = understanding.new_zeros(0, understanding.shape[-1])
        return self.transformer(understanding, generation, packing, cache, keep_layers, extend, outputs)

    def embed_understanding(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Input embeddings (Nu, D) of the understanding expert: text, markers, vision-encoder tokens."""
        device = self.transformer.inv_freq.device
        ids = [i for piece in pieces for i in piece.ids]
        known = torch.tensor([max(i, 0) for i in ids], dtype=torch.int64, device=device)
        understanding = self.encoders.embed_tokens(known)
        read = [piece for piece in pieces if piece.span.kind == "read"]
        if read:
            tokens = _by_grid(read, self._read)
            places = torch.tensor([place for place, i in enumerate(ids) if i == IMAGE_TOKEN], device=device)
            understanding = understanding.index_put((places,), tokens.to(understanding.dtype))
        return understanding

    def _read(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Vision-encoder tokens (B, N, D) of images of one grid; an image that repeats is encoded once."""
        images = [piece.image for piece in pieces if piece.image is not None]
        distinct, index = _distinct(images, id)
        tokens = self.encoders.encode_images(distinct)
        if len(distinct) != len(images):
            tokens = tokens.index_select(0, torch.tensor(index, device=tokens.device))
        return tokens

    def _embed_latent_pieces(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Latent tokens (B, N, D) of one grid: all from ``state``, or all encoded from clean images."""
        states = [piece.state for piece in pieces if piece.state is not None]
        if states:
            assert len(states) == len(pieces), "of one grid either every latent is given or none"
            x_t, t = torch.stack([x for x, _ in states]), torch.stack([time for _, time in states])
            return self.encoders.embed_latents(x_t, t, pieces[0].grid)
        latents = self.encoders.encode_latents([piece.image for piece in pieces if piece.image is not None])
        return self.encoders.embed_latents(latents, latents.new_zeros(len(latents)), pieces[0].grid)

    def prefill(self, rows: Sequence[Row]) -> Cache:
        """The cache of all rows; leading images that rows share are prefilled once."""
        cache, rest = self.begin(rows)
        return self._append(rest, cache)

    def begin(self, rows: Sequence[Row]) -> tuple[Cache, list[Row]]:
        """The cache of shared leading images, and the rest of every row.

        One pass per depth at which the tree of shared prefixes branches.
        """
        heads = [_leading_images(row) for row in rows]
        parting = [
            _distinct([head[:k] for head in heads], _row_key) for k in range(max(map(len, heads), default=0) + 1)
        ]
        counts = [*(len(distinct) for distinct, _ in parting[1:]), len(rows)]
        cache, place, start = self.transformer.empty_cache(len(parting[0][0])), parting[0][1], 0
        for stop, (distinct, index) in enumerate(parting[1:], start=1):
            if counts[stop - 1] == counts[stop]:
                continue
            before = [place[index.index(i)] for i in range(len(distinct))]
            cache = self._append([head[start:stop] for head in distinct], cache.spread(before))
            place, start = index, stop
        return cache.spread(place), [(*head[start:], *row[len(head) :]) for head, row in zip(heads, rows, strict=True)]

    def prefill_shared(self, rows: Sequence[Row]) -> tuple[Cache, list[int]]:
        """The cache of the U distinct contexts, and the index of each row's context, (B,)."""
        distinct, index = distinct_rows(rows)
        return self.prefill(distinct), index

    def _append(self, rows: Sequence[Row], cache: Cache) -> Cache:
        if not any(rows):
            return cache
        none = torch.zeros(0, dtype=torch.int64, device=self.transformer.inv_freq.device)
        return self.run(rows, cache, outputs=none).cache


def leading_spans(row: Row) -> tuple[Span, ...]:
    """The spans of the images at the start of a row."""
    return tuple(piece.span for piece in _leading_images(row))


def _leading_images(row: Row) -> Row:
    count = next((i for i, piece in enumerate(row) if piece.span.kind == "text"), len(row))
    return row[:count]


def _by_grid(pieces: Sequence[Piece], embed: Callable[[Sequence[Piece]], torch.Tensor]) -> torch.Tensor:
    """Tokens (total, D) of images in order, embedded in one batch per grid."""
    grids, _ = _distinct([piece.grid for piece in pieces], lambda grid: grid)
    if len(grids) == 1:
        return embed(pieces).flatten(0, 1)
    found: dict[int, torch.Tensor] = {}
    for grid in grids:
        places = [i for i, piece in enumerate(pieces) if piece.grid == grid]
        found.update(zip(places, embed([pieces[i] for i in places]), strict=True))
    return torch.cat([found[i] for i in range(len(pieces))])


def distinct_rows(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The distinct rows, and the index of each row among them."""
    return _distinct(rows, _row_key)


def _row_key(row: Row) -> Hashable:
    return tuple(piece.key for piece in row)


def _distinct(items: Sequence[T], key: Callable[[T], Hashable]) -> tuple[list[T], list[int]]:
    """The distinct items, in order of first appearance, and the index of each item among them."""
    places: dict[Hashable, int] = {}
    distinct: list[T] = []
    index = []
    for item in items:
        place = places.setdefault(key(item), len(distinct))
        if place == len(distinct):
            distinct.append(item)
        index.append(place)
    return distinct, index


Grid = tuple[int, int]
"""Rows and columns of an image's tokens."""


class Tokenizer(Protocol):
    """A tokenizer with begin and end tokens of text and images."""

    bos_id: int
    eos_id: int
    image_start_id: int
    image_end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids without markers; raises InputError on text outside the vocabulary."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, markers skipped."""
        ...

    def suppressed_tokens(self) -> torch.Tensor:
        """bool (V,): tokens that are never sampled."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer files."""
        ...


class Encoders(Protocol):
    """Embeddings and output heads of text, vision encoder and latents. Images of a batch have one grid: no padding.

    Letters: D width, N image tokens, C channels of a latent token.
    """

    channels: int
    """C."""

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (n,) -> (n, D)."""
        ...

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the understanding expert (n, D) -> (n, V)."""
        ...

    def vision_grid(self, image: Image) -> Grid:
        """The grid of vision-encoder tokens of an image."""
        ...

    def latent_grid(self, image: Image) -> Grid:
        """The grid of latent tokens of an input image."""
        ...

    def output_grid(self, height: int, width: int) -> Grid:
        """The grid of a generated image of this size in pixels."""
        ...

    def default_grid(self, image_size: tuple[int, int] | None) -> Grid:
        """The grid of an image generated without a source image; raises InputError for a size that does not fit."""
        ...

    def encode_images(self, images: Sequence[Image]) -> torch.Tensor:
        """Images of one ``vision_grid`` -> (B, N, D) tokens of the understanding expert."""
        ...

    def encode_latents(self, images: Sequence[Image]) -> torch.Tensor:
        """Images of one ``latent_grid`` -> latents (B, N, C) in token layout."""
        ...

    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latents (B, N, C) -> images (B, 3, height, width) in [0, 1]."""
        ...

    def embed_latents(self, latents: torch.Tensor, t: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latents (B, N, C) at times (B,) -> (B, N, D) tokens of the generation expert."""
        ...

    def velocity(self, hidden: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Hidden states of the generation expert (B, N, D) at states (B, N, C), times (B,) -> velocity (B, N, C)."""
        ...


MAX_ROWS = 512
"""Most rows of a forward pass."""


def run_ids(keys: Sequence[object]) -> list[int]:
    """Numbers the runs of equal adjacent keys: a a b a -> 0 0 1 2."""
    out: list[int] = []
    for i, key in enumerate(keys):
        out.append(out[-1] + (key != keys[i - 1]) if out else 0)
    return out


def group_equal(keys: Sequence[object], size: int) -> list[list[int]]:
    """Indices grouped by equal key, in order of first appearance, at most ``size`` per group."""
    classes: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        classes.setdefault(key, []).append(i)
    return [indices[i : i + size] for indices in classes.values() for i in range(0, len(indices), size)]


def split_by_tokens(
    groups: Sequence[Hashable], contexts: Sequence[int], new: Sequence[int], limit: int
) -> list[list[int]]:
    """Splits members into consecutive parts of at most ``limit`` tokens; adjacent members of a group share a context.

    Tokens of a part: its contexts, each padded to the longest, and the new tokens of its members. A member that exceeds
    the limit is a part of its own. A group is split only where it does not fit into one part.
    """
    members: list[list[int]] = [[] for _ in range(run_ids(groups)[-1] + 1)] if groups else []
    for i, group in enumerate(run_ids(groups)):
        members[group].append(i)
    parts: list[list[int]] = []
    longest = held = added = 0
    for group in members:
        context, own = contexts[group[0]], sum(new[i] for i in group)
        if parts and max(longest, context) * (held + 1) + added + own <= limit:
            parts[-1] += group
            longest, held, added = max(longest, context), held + 1, added + own
            continue
        for k, i in enumerate(group):
            if k == 0 or context + added + new[i] > limit:
                parts.append([])
                longest, held, added = context, 1, 0
            parts[-1].append(i)
            added += new[i]
    return parts
