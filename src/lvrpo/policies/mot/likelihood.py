"""Likelihoods of texts and of images (a bound) under a Mixture-of-Transformers, supervised losses, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lvrpo.errors import InputError
from lvrpo.policies.mot import flow_sampler, generate, model_runner
from lvrpo.policies.mot.generate import TokenizedText
from lvrpo.policies.mot.model_runner import (
    Grid,
    ModelRunner,
    Row,
    distinct_rows,
    group_equal,
    leading_spans,
    row_tokens,
)
from lvrpo.policies.mot.transformer import Cache
from lvrpo.sampling import derive_seed, flow_time, normal_noise
from lvrpo.types import Example, Image, Part, Parts

JUDGE_TIMES = (0.5, 0.85)
"""Default times of ``image_logprob``: few draws tell images apart best there."""


class Limits(Protocol):
    """The limits of a policy on a forward pass."""

    def check_length(self, name: str, row: Row, new: int, remedy: str = "") -> None:
        """Raises InputError where a context and ``new`` tokens after it exceed the policy's length limit."""
        ...

    def split_rows(self, rows: Sequence[Row], new: Sequence[int]) -> list[list[int]]:
        """Splits rows, each followed by ``new`` tokens, into forward passes, as indices."""
        ...


# --- text ---


def text_logprob(runner: ModelRunner, limits: Limits, given: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
    """Mean log-prob per token, end token included, of each text after its context ``given``, (B,)."""
    rows = [runner.row(parts, draws=False) for parts in given]
    tokenized = [TokenizedText((*runner.tokenizer.encode(text), runner.tokenizer.eos_id), True) for text in texts]
    for row, text in zip(rows, tokenized, strict=True):
        limits.check_length("text to judge", row, len(text.tokens))  # fed are its begin and all but its end
    scores: dict[int, torch.Tensor] = {}
    for part in limits.split_rows(rows, [len(text.tokens) for text in tokenized]):
        # images are then never padded
        for same in model_runner.group_equal([leading_spans(rows[i]) for i in part], model_runner.MAX_ROWS):
            indices = [part[k] for k in same]
            found = score_once(runner, [rows[i] for i in indices], [tokenized[i] for i in indices])
            scores.update((i, logprobs.mean()) for i, logprobs in zip(indices, found, strict=True))
    return torch.stack([scores[i] for i in range(len(rows))])


def score_once(runner: ModelRunner, rows: Sequence[Row], texts: Sequence[TokenizedText]) -> list[torch.Tensor]:
    """Log-prob (L_b,) of every token of text b after the context ``rows[b]``, at temperature 1.

    As ``generate.score_text``, cheaper: a context and its few short texts are one row of one pass, each text an option
    that no other one attends to, so a context is neither cached nor copied for its texts. One that has more of them is
    prefilled first, and each text continues it.
    """
    distinct, owner = distinct_rows(rows)
    texts_of: list[dict[TokenizedText, torch.Tensor | None]] = [{} for _ in distinct]
    for u, text in zip(owner, texts, strict=True):
        texts_of[u][text] = None
    together = [u for u, own in enumerate(texts_of) if _fit_together(distinct[u], list(own))]
    if together:
        found = iter(_score_options(runner, [distinct[u] for u in together], [list(texts_of[u]) for u in together]))
        for u in together:
            texts_of[u] = {text: next(found) for text in texts_of[u]}
    apart = [b for b, u in enumerate(owner) if u not in set(together)]
    if apart:
        cache, index = runner.prefill_shared([rows[b] for b in apart])
        scores = generate.score_text(runner, cache, index, [texts[b] for b in apart], 1.0, closed=False)
        for b, logprobs in zip(apart, scores.logprobs, strict=True):
            texts_of[owner[b]][texts[b]] = logprobs
    out = [texts_of[u][text] for u, text in zip(owner, texts, strict=True)]
    return [logprobs for logprobs in out if logprobs is not None]


def _fit_together(row: Row, texts: Sequence[TokenizedText]) -> bool:
    """Whether a pass of the context with all its texts is at most twice one with none, images aside."""
    text_tokens = row_tokens(tuple(piece for piece in row if piece.span.kind == "text"))
    return len(texts) == 1 or sum(len(text.tokens) for text in texts) <= text_tokens


def _score_options(
    runner: ModelRunner, rows: Sequence[Row], texts: Sequence[Sequence[TokenizedText]]
) -> Sequence[torch.Tensor]:
    """Log-probs of all texts, those of one context after those of the one before."""
    cache, rest = runner.begin(rows)
    positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    start, whole = 0, []
    for row, own in zip(rest, texts, strict=True):
        start += row_tokens(row)
        options = [runner.option(text.tokens[:-1] if text.ended else text.tokens) for text in own]
        for text, option in zip(own, options, strict=True):
            positions += range(start, start + len(text.tokens))
            targets += text.tokens
            counts.append(len(text.tokens))
            start += option.span.length
        whole.append((*row, *options))
    device = cache.rope.device
    hidden = runner.run(whole, cache, extend=False, outputs=torch.tensor(positions, device=device))
    logits = generate.text_logits(runner, hidden.understanding, runner.tokenizer.suppressed_tokens().to(device))
    distribution = torch.log_softmax(logits.float(), dim=-1)
    return distribution.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0].split(counts)


# --- images ---


def image_logprob(
    runner: ModelRunner,
    limits: Limits,
    given: Sequence[Parts],
    images: Sequence[Image],
    draws: int,
    seeds: Sequence[int],
    times: tuple[float, float],
) -> torch.Tensor:
    """The part of the likelihood bound of each image between two times, one column per draw.

    log p(x_0 | c) = const - E int (1 - t)/t |v - v_hat(x_t, c)|^2 dt, the flow loss weighted as the likelihood
    weighs it (information-theoretic diffusion, arXiv:2302.03792, for x_t = (1 - t) x_0 + t noise); the constant is
    the image's own. A draw is one noise at one time, the middle of its part of the span.

    Shapes: (B,) rows to float32 (B, draws), in nats summed over the image; average over the draws.
    """
    rows = [runner.row(parts, draws=True) for parts in given]
    grids = [runner.encoders.latent_grid(image) for image in images]
    for row, grid in zip(rows, grids, strict=True):
        limits.check_length("image to judge", row, runner.noise(grid).span.length)
    scores: dict[int, torch.Tensor] = {}
    for part in limits.split_rows(rows, [height * width + 2 for height, width in grids]):
        # contexts of different kinds of spans go apart, else most of a row would be padding
        keys = [(grids[i], tuple(piece.span.kind for piece in rows[i])) for i in part]
        for same in model_runner.group_equal(keys, model_runner.MAX_ROWS):
            indices = [part[k] for k in same]
            cache, owner = runner.prefill_shared([rows[i] for i in indices])
            own = cache.select(owner)
            x_0 = _latents(runner, [images[i] for i in indices])
            of_rows = [seeds[i] for i in indices]
            scored = _draw_logprob(runner, own, x_0, grids[indices[0]], draws, of_rows, times)
            scores.update(zip(indices, scored, strict=True))
    return torch.stack([scores[i] for i in range(len(images))])


def _latents(runner: ModelRunner, images: Sequence[Image]) -> torch.Tensor:
    """Latents (B, N, C) of images of one grid, an image shared by several rows is encoded once."""
    distinct = {id(image): image for image in images}
    place = {key: i for i, key in enumerate(distinct)}
    return runner.encoders.encode_latents(list(distinct.values()))[[place[id(image)] for image in images]]


def _draw_logprob(
    runner: ModelRunner,
    cache: Cache,
    x_0: torch.Tensor,
    grid: Grid,
    draws: int,
    seeds: Sequence[int],
    times: tuple[float, float],
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
        error = (flow_sampler.velocity(runner, cache, x_t, t, grid) - (noise - x_0)).square().sum(dim=(1, 2))
        columns.append(-(high - low) * (1 - at) / at * error)
    return torch.stack(columns, dim=1)


# --- states ---


def image_features(runner: ModelRunner, images: Sequence[Image], layer: int) -> torch.Tensor:
    """States (B, N, D) of images after ``layer`` layers of the understanding expert; 0: of the vision encoder."""
    if layer == 0:
        return runner.encoders.encode_images(images)
    rows = [(runner.image(image, "read"),) for image in images]
    states = _layer_states(runner, rows, layer)
    return states.unflatten(0, (len(rows), -1))[:, 1:-1]  # without the two markers


def hidden_states(runner: ModelRunner, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
    """States (N, D) of texts and images, each a row of its own, after ``layer`` layers; 0: input embeddings."""
    depth = runner.transformer.config.depth
    if not 0 <= layer <= depth:
        raise InputError(f"layer={layer}: the policy has {depth} layers: use 0 to {depth}")
    states: list[torch.Tensor] = []
    for start in range(0, len(parts), model_runner.MAX_ROWS):
        rows = [runner.row((part,), draws=False) for part in parts[start : start + model_runner.MAX_ROWS]]
        split = _layer_states(runner, rows, layer).split([row_tokens(row) for row in rows])
        states += [row[1:-1] for row in split]  # without the two markers
    return states


def _layer_states(runner: ModelRunner, rows: Sequence[Row], layer: int) -> torch.Tensor:
    """(Nu, D): states of rows without latent tokens."""
    if layer == 0:
        return runner.embed_understanding([piece for row in rows for piece in row])
    cache = runner.transformer.empty_cache(len(rows))
    return runner.run(rows, cache, keep_layers=True).layers[layer - 1][0]


def context_states(runner: ModelRunner, given: Sequence[Parts]) -> torch.Tensor:
    """Mean final state of the understanding expert over each context, float32 (B, D)."""
    rows = [runner.row(parts, draws=False) for parts in given]
    hidden = runner.run(rows, runner.transformer.empty_cache(len(rows)))
    split = hidden.understanding.float().split([row_tokens(row) for row in rows])
    return torch.stack([states.mean(dim=0) for states in split])


def generation_states(
    runner: ModelRunner, given: Sequence[Parts], images: Sequence[Image], t: float, seed: int
) -> torch.Tensor:
    """Mean final state of the generation expert over each noisy image after its context ``given``, float32 (B, D).

    All rows have the same noise; images are of one size. At t = 1 the input is noise alone, so that the states depend
    on the context and the size.
    """
    cache, owner = runner.prefill_shared([runner.row(parts, draws=True) for parts in given])
    x_0 = _latents(runner, images)
    noise = normal_noise([derive_seed(seed, "states")], x_0.shape[1:]).to(x_0)
    x_t = (1 - t) * x_0 + t * noise
    depth, grid = runner.transformer.config.depth, runner.encoders.latent_grid(images[0])
    times = x_0.new_full((len(x_0),), t)
    _, states = flow_sampler.velocity_and_features(runner, cache.select(owner), x_t, times, grid, depth)
    return states.float().mean(dim=1)


class FeatureLoss(Protocol):
    """A loss on hidden states of the generation expert."""

    layer: int
    """The number of layers before the states."""

    def __call__(self, features: torch.Tensor, images: Sequence[Image]) -> torch.Tensor:
        """States (B, N, D) over noisy images and the clean images, to a loss per image (B,)."""
        ...


@dataclass(frozen=True)
class FlowLossTimes:
    """Distribution and weight of the times of the flow loss."""

    shift: float
    min_time: float
    """The loss is multiplied by (t / min_time)^2 below it."""


def supervised_losses(
    runner: ModelRunner,
    rows: Sequence[Row],
    examples: Sequence[Example],
    generator: torch.Generator,
    times: FlowLossTimes,
    represent: FeatureLoss | None,
) -> Mapping[str, torch.Tensor]:
    """ "text": cross-entropy per token; "image": flow loss at logit-normal times, of examples after their contexts
    ``rows``; with ``represent``, "representation": its loss. Means over what is there."""
    text_losses: list[torch.Tensor] = []
    image_losses: list[torch.Tensor] = []
    feature_losses: list[torch.Tensor] = []
    for indices in group_equal([example.prompt.output for example in examples], len(examples)):
        batch = [examples[i] for i in indices]
        cache, owner = runner.prefill_shared([rows[i] for i in indices])
        for s, kind in enumerate(batch[0].prompt.output):
            outputs = [example.outputs[s] for example in batch]
            if kind == "text":
                texts = [
                    TokenizedText((*runner.tokenizer.encode(str(o)), runner.tokenizer.eos_id), True) for o in outputs
                ]
                closed = s + 1 < len(batch[0].prompt.output)
                scores = generate.score_text(runner, cache, owner, texts, 1.0, closed)
                text_losses += [-logprobs for logprobs in scores.logprobs]
                if closed:
                    cache, owner = scores.cache, list(range(len(batch)))
            else:
                images = [o for o in outputs if isinstance(o, torch.Tensor)]
                loss, features = _flow_loss(runner, cache.select(owner), images, generator, times, represent)
                image_losses.append(loss)
                if represent is not None and features is not None:
                    feature_losses.append(represent(features, images))
    losses = {"text": text_losses, "image": image_losses, "representation": feature_losses}
    return {name: torch.cat(terms).mean() for name, terms in losses.items() if terms}


def _flow_loss(
    runner: ModelRunner,
    cache: Cache,
    images: Sequence[Image],
    generator: torch.Generator,
    times: FlowLossTimes,
    represent: FeatureLoss | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The flow loss (B,) of images, and the states (B, N, D) for ``represent``."""
    x_0 = runner.encoders.encode_latents(images)
    noise = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = flow_time(torch.randn(len(x_0), generator=generator), times.shift).to(x_0)
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    features, grid = None, runner.encoders.latent_grid(images[0])
    if represent is None:
        v = flow_sampler.velocity(runner, cache, x_t, t, grid)
    else:
        v, features = flow_sampler.velocity_and_features(runner, cache, x_t, t, grid, represent.layer)
    weight = (t / t.clamp(min=times.min_time)).square()
    return weight * (v - (noise - x_0)).square().mean(dim=(1, 2)), features
