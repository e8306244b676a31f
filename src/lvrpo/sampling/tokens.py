"""Sampling tokens and scoring them. Temperature 0 is greedy; its log-probs are those of temperature 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["sample_tokens", "token_entropy", "token_logprobs", "token_scores"]


def sample_tokens(
    logits: Float[Tensor, "B V"],
    uniforms: Float[Tensor, " B"],
    temperature: float = 1.0,
    allowed: Bool[Tensor, "*#B V"] | None = None,
) -> Int[Tensor, " B"]:
    """Draws one token per row by inverting the cumulative distribution at the row's own uniform number.

    token = min { j : sum_{i <= j} p_i > u },  p = softmax(logits / temperature) over the allowed tokens; argmax for 0.

    A row's token depends on its logits and its number alone, never on the batch. No top-k or top-p: the density that is
    replayed is the full one.

    Shapes: logits (B, V), uniforms (B,) in [0, 1) as from ``uniform_noise``, allowed (V,) or (B, V), to int64 (B,).
    Raises: InputError for a negative temperature. At least one token of each row has to be allowed.
    Differs from the paper: no paper given.
    """
    scaled = _scaled(logits, temperature, allowed)
    if temperature == 0:
        return scaled.argmax(dim=-1)
    cumulative = torch.softmax(scaled.double(), dim=-1).cumsum(dim=-1)
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]  # below the last value, so a token always exists
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def token_logprobs(
    logits: Float[Tensor, "*B V"],
    tokens: Int[Tensor, "*B"],
    temperature: float = 1.0,
    allowed: Bool[Tensor, "*#B V"] | None = None,
) -> Float[Tensor, "*B"]:
    """The log-prob of given tokens under the distribution that ``sample_tokens`` samples from.

    log softmax(logits / temperature)[token], over the allowed tokens; temperature 0 counts as 1.

    Shapes: logits (..., V), tokens (...), allowed broadcastable to the logits, to float32 (...). Range: <= 0.
    Raises: InputError for a negative temperature.
    Differs from the paper: no paper given.
    """
    return _scores(logits, tokens, temperature, allowed, False)[0]


def token_entropy(
    logits: Float[Tensor, "*B V"], temperature: float = 1.0, allowed: Bool[Tensor, "*#B V"] | None = None
) -> Float[Tensor, "*B"]:
    """The entropy of the token distributions.

    H = -sum_j p_j log p_j,  p = softmax(logits / temperature) over the allowed tokens; temperature 0 counts as 1.

    Shapes: logits (..., V), allowed broadcastable to them, to float32 (...). Range: [0, log V], in nats.
    Raises: InputError for a negative temperature.
    Differs from the paper: no paper given.
    """
    return _entropy(torch.log_softmax(_scaled(logits, temperature, allowed), dim=-1))


def token_scores(
    logits: Float[Tensor, "*B V"],
    tokens: Int[Tensor, "*B"],
    temperature: float = 1.0,
    allowed: Bool[Tensor, "*#B V"] | None = None,
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """``token_logprobs`` and ``token_entropy`` of the same distributions, for one normalization of them.

    log p[token] and H = -sum_j p_j log p_j,  p = softmax(logits / temperature) over the allowed tokens. Many rows
    are normalized in parts, in the backward pass again, so that nothing of the size of the logits is kept beside them.

    Shapes: logits (..., V), tokens (...), allowed broadcastable to the logits, to float32 (...) twice.
    Raises: InputError for a negative temperature.
    Differs from the paper: no paper given.
    """
    logprobs, entropy = _scores(logits, tokens, temperature, allowed, True)
    assert entropy is not None
    return logprobs, entropy


PART_BYTES = {"cpu": 4 << 20}
"""Of logits in float32 that are normalized at a time, so that they stay in the cache of a CPU."""
OTHER_PART_BYTES = 256 << 20
"""The same on other devices."""


@contextmanager
def parts_as_on(device: str) -> Iterator[None]:
    """Inside, tensors on a CPU are normalized in parts as large as on another device: for estimates of memory."""
    before = PART_BYTES["cpu"]
    PART_BYTES["cpu"] = PART_BYTES.get(device, OTHER_PART_BYTES)
    try:
        yield
    finally:
        PART_BYTES["cpu"] = before


def _scores(
    logits: Tensor, tokens: Tensor, temperature: float, allowed: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs have the bits of one normalization of all rows."""
    if temperature < 0:
        raise InputError(f"temperature={temperature}: use 0 (greedy) or a positive number")
    V = logits.shape[-1]
    flat, chosen = logits.reshape(-1, V), tokens.reshape(-1, 1)
    forbidden = (
        None if allowed is None else torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, -torch.inf)
    )
    if forbidden is not None and forbidden.ndim > 1:
        forbidden = forbidden.expand(logits.shape).reshape(-1, V)
    count = max(1, PART_BYTES.get(logits.device.type, OTHER_PART_BYTES) // (4 * V))
    found = []
    for i, part in enumerate(flat.split(count)):
        rows = slice(i * count, (i + 1) * count)
        own = forbidden[rows] if forbidden is not None and forbidden.ndim > 1 else forbidden
        given = part, chosen[rows], temperature, own, with_entropy
        if torch.is_grad_enabled() and len(flat) > count:
            found.append(checkpoint(_score_part, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_score_part(*given))
    logprobs = torch.cat([part for part, _ in found]).view(tokens.shape)
    return logprobs, torch.cat([part for _, part in found]).view(tokens.shape) if with_entropy else None


def _score_part(
    logits: Tensor, tokens: Tensor, temperature: float, forbidden: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    scaled = _scaled(logits, temperature, None)
    # one sum, where filling under a mask would be a copy and a slow pass
    distribution = torch.log_softmax(scaled if forbidden is None else scaled + forbidden, dim=-1)
    logprobs = distribution.gather(-1, tokens)[:, 0]
    return logprobs, _entropy(distribution) if with_entropy else logprobs.new_empty(0)


def _entropy(logprobs: Tensor) -> Tensor:
    finite = logprobs.clamp(min=-1e4)  # where p is 0 in float32: 0 log 0 = 0, also in the gradient
    return -(logprobs.exp() * finite).sum(dim=-1)


def _scaled(logits: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    """float32 logits at the temperature, -inf where not allowed."""
    if temperature < 0:
        raise InputError(f"temperature={temperature}: use 0 (greedy) or a positive number")
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    return scaled if allowed is None else scaled.masked_fill(~allowed, -torch.inf)
