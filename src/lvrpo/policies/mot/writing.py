"""Writing and scoring text with a Mixture-of-Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lvrpo.policies.mot.context import Contexts, Piece, Row, distinct_rows, row_tokens
from lvrpo.policies.mot.sequence import Span
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

    Members that have written the same so far share one row, so a step costs the number of distinct prefixes.
    """
    eos = contexts.words.eos_id
    row_of = list(owner)
    shared = len(cache.parts)
    written: list[list[int]] = [[] for _ in row_of]
    active = list(range(len(row_of)))
    feed = [contexts.words.bos_id] * len(cache.rope)
    for position in range(uniforms.shape[1]):
        hidden = contexts.run(_single_tokens(contexts, feed), cache)
        logits = _allowed_logits(contexts, hidden.reading)
        rows = torch.tensor([row_of[m] for m in active], device=logits.device)
        tokens = sample_tokens(logits.index_select(0, rows), uniforms[active, position], temperature).tolist()
        prefixes: dict[tuple[int, int], int] = {}
        still = []
        for m, token in zip(active, tokens, strict=True):
            written[m].append(token)
            if token != eos:
                row_of[m] = prefixes.setdefault((row_of[m], token), len(prefixes))
                still.append(m)
        active = still
        if not active:
            break
        cache = hidden.cache.select([parent for parent, _ in prefixes]).joined(shared)
        feed = [token for _, token in prefixes]
    return [Written(tuple(tokens), bool(tokens) and tokens[-1] == eos) for tokens in written]


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
    logits = _allowed_logits(contexts, selected)
    # at temperature 0 the density is a point: the plain distribution is scored instead
    distribution = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    chosen = distribution.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution.masked_fill(distribution == -torch.inf, 0)).sum(-1)
    logprobs, entropies = chosen.split(counts), entropy.split(counts)
    order = [places[key] for key in keys]
    extended = hidden.cache.select(order) if closed else hidden.cache
    return TextScores([logprobs[i] for i in order], [entropies[i] for i in order], extended)


def score_once(contexts: Contexts, rows: Sequence[Row], texts: Sequence[Written]) -> list[torch.Tensor]:
    """Log-prob (L_b,) of every token of text b after the context ``rows[b]``, at temperature 1; as ``score``, cheaper.

    A context and its few short texts are one row of one pass, each text an option that no other one sees, so a context
    is neither kept nor copied for its texts. One that has more of them is read first, and each text continues it.
    """
    distinct, owner = distinct_rows(rows)
    texts_of: list[dict[Written, torch.Tensor | None]] = [{} for _ in distinct]
    for u, text in zip(owner, texts, strict=True):
        texts_of[u][text] = None
    together = [u for u, own in enumerate(texts_of) if _fit_together(distinct[u], list(own))]
    if together:
        found = iter(_score_options(contexts, [distinct[u] for u in together], [list(texts_of[u]) for u in together]))
        for u in together:
            texts_of[u] = {text: next(found) for text in texts_of[u]}
    apart = [b for b, u in enumerate(owner) if u not in set(together)]
    if apart:
        cache, index = contexts.prefill_shared([rows[b] for b in apart])
        scores = score(contexts, cache, index, [texts[b] for b in apart], 1.0, closed=False)
        for b, logprobs in zip(apart, scores.logprobs, strict=True):
            texts_of[owner[b]][texts[b]] = logprobs
    out = [texts_of[u][text] for u, text in zip(owner, texts, strict=True)]
    return [logprobs for logprobs in out if logprobs is not None]


def _fit_together(row: Row, texts: Sequence[Written]) -> bool:
    """Whether a pass of the context with all its texts is at most twice one with none, pictures aside."""
    words = row_tokens(tuple(piece for piece in row if piece.span.kind == "text"))
    return len(texts) == 1 or sum(len(text.tokens) for text in texts) <= words


def _score_options(
    contexts: Contexts, rows: Sequence[Row], texts: Sequence[Sequence[Written]]
) -> Sequence[torch.Tensor]:
    """Log-probs of all texts, those of one context after those of the one before."""
    cache, rest = contexts.begin(rows)
    positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    start, whole = 0, []
    for row, own in zip(rest, texts, strict=True):
        start += row_tokens(row)
        options = [contexts.option(text.tokens[:-1] if text.ended else text.tokens) for text in own]
        for text, option in zip(own, options, strict=True):
            positions += range(start, start + len(text.tokens))
            targets += text.tokens
            counts.append(len(text.tokens))
            start += option.span.length
        whole.append((*row, *options))
    device = cache.rope.device
    hidden = contexts.run(whole, cache, extend=False, outputs=torch.tensor(positions, device=device))
    distribution = torch.log_softmax(_allowed_logits(contexts, hidden.reading).float(), dim=-1)
    return distribution.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0].split(counts)


def _single_tokens(contexts: Contexts, tokens: Sequence[int]) -> list[Row]:
    return [(Piece(Span("text", 1), (token,)),) for token in tokens]


def _allowed_logits(contexts: Contexts, hidden: torch.Tensor) -> torch.Tensor:
    logits = contexts.towers.text_logits(hidden)
    return logits.masked_fill(contexts.words.forbidden().to(logits.device), -torch.inf)
