"""Writing and scoring text with a Mixture-of-Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lvrpo.policies.mot.context import Contexts, Row
from lvrpo.policies.mot.decoding import Decoder, at_once
from lvrpo.policies.mot.transformer import Cache
from lvrpo.sampling import sample_tokens


@dataclass(frozen=True)
class Written:
    """A sampled text."""

    tokens: tuple[int, ...]
    """The end token is included when the text ended by itself."""
    ended: bool


@dataclass(frozen=True)
class TextScores:
    """Scores of a batch of texts, one entry per row; the tensors of row b are (L_b,)."""

    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor]
    cache: Cache
    """The contexts, extended by the texts where these were closed."""


def write(
    contexts: Contexts, cache: Cache, owner: Sequence[int], uniforms: torch.Tensor, temperature: float
) -> list[Written]:
    """Samples one text per member: member m continues row ``owner[m]`` of the cache, with uniforms (B, max tokens).

    Members that have written the same so far share one row, so a step costs the number of distinct prefixes; of more
    members than fit into the buffers, one part after another.
    """
    together = at_once(contexts.transformer, cache, uniforms.shape[1])
    if len(owner) <= together:
        return _write(contexts, cache, owner, uniforms, temperature)
    out = []
    for start in range(0, len(owner), together):
        part = slice(start, start + together)
        rows = sorted(set(owner[part]))
        places = [rows.index(row) for row in owner[part]]
        out += _write(contexts, cache.select(rows), places, uniforms[part], temperature)
    return out


@torch.no_grad()
def _write(
    contexts: Contexts, cache: Cache, owner: Sequence[int], uniforms: torch.Tensor, temperature: float
) -> list[Written]:
    """Members that are written together. A step waits for the card once, for its tokens, as long as rows stay apart."""
    eos = contexts.words.eos_id
    forbidden = contexts.words.forbidden().to(uniforms.device)
    decoder = Decoder(contexts.transformer, cache, uniforms.shape[1])
    written: list[list[int]] = [[] for _ in owner]
    active, row_of = list(range(len(owner))), list(owner)  # members that still write, and the row of each
    feed = torch.full((len(cache.rope),), contexts.words.bos_id, device=uniforms.device)
    for position in range(uniforms.shape[1]):
        logits = allowed_logits(contexts, decoder.step(contexts.towers.embed_tokens(feed)), forbidden)
        tokens = sample_tokens(_take(logits, row_of), uniforms[:, position], temperature)
        prefixes: dict[tuple[int, int], int] = {}
        still: list[int] = []  # places in ``active``
        first: list[int] = []  # the place of the first member of every prefix
        fed = tokens.tolist()
        for place, token in enumerate(fed):
            written[active[place]].append(token)
            if token != eos:
                if prefixes.setdefault((row_of[place], token), len(prefixes)) == len(first):
                    first.append(place)
                still.append(place)
        if not still or position + 1 == uniforms.shape[1]:
            break
        decoder.select([parent for parent, _ in prefixes])
        feed, uniforms = _take(tokens, first), _take(uniforms, still)
        active, row_of = [active[p] for p in still], [prefixes[row_of[p], fed[p]] for p in still]
    return [Written(tuple(tokens), bool(tokens) and tokens[-1] == eos) for tokens in written]


def _take(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of x; all of them in order are no copy, and no index that travels to the card."""
    if list(rows) == list(range(len(x))):
        return x
    return x.index_select(0, torch.tensor(rows, dtype=torch.int64, device=x.device))


def score(
    contexts: Contexts, cache: Cache, owner: Sequence[int], texts: Sequence[Written], temperature: float, closed: bool
) -> TextScores:
    """Log-prob of every token of text b after row ``owner[b]`` of the cache, differentiable.

    ``closed`` feeds the end token too, so that the returned contexts can be continued. Equal texts after the same
    context are computed once.
    """
    keys = list(zip(owner, texts, strict=True))
    places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    rows: list[Row] = []
    positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    start = 0
    for _, text in places:
        ids = text.tokens[:-1] if text.ended else text.tokens
        piece = contexts.text(ids) if closed else contexts.open_text(ids)
        rows.append((piece,))
        positions += range(start, start + len(text.tokens))
        targets += text.tokens
        counts.append(len(text.tokens))
        start += piece.span.length
    hidden = contexts.run(rows, cache.select([parent for parent, _ in places]), extend=closed)
    device = hidden.reading.device
    selected = hidden.reading.index_select(0, torch.tensor(positions, device=device))
    logits = allowed_logits(contexts, selected, contexts.words.forbidden().to(device))
    # at temperature 0 the density is a point: the plain distribution is scored instead
    distribution = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    chosen = distribution.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution.masked_fill(distribution == -torch.inf, 0)).sum(-1)
    logprobs, entropies = chosen.split(counts), entropy.split(counts)
    order = [places[key] for key in keys]
    extended = hidden.cache.select(order) if closed else hidden.cache
    return TextScores([logprobs[i] for i in order], [entropies[i] for i in order], extended)


def allowed_logits(contexts: Contexts, hidden: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Logits over the vocabulary, those of tokens that are never written being -inf."""
    return contexts.towers.text_logits(hidden).masked_fill(forbidden, -torch.inf)
