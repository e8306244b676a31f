"""Sampling tokens and scoring them. Temperature 0 is greedy; its log-probs are those of temperature 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    """In parts of the rows, with the bits of one normalization of all."""
    if temperature < 0:
        raise InputError(f"temperature={temperature}: use 0 (greedy) or a positive number")
    V = logits.shape[-1]
    flat, chosen = logits.reshape(-1, V), tokens.reshape(-1, 1)
    forbidden = (
        None if allowed is None else torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, -torch.inf)
    )
    if forbidden is not None and forbidden.ndim > 1:
        forbidden = forbidden.expand(logits.shape).reshape(-1, V)
    logprobs, entropy = _Scores.apply(flat, chosen, temperature, forbidden, with_entropy)
    return logprobs.view(tokens.shape), entropy.view(tokens.shape) if with_entropy else None


class _Scores(torch.autograd.Function):
    """Log-probs and entropies in parts of the rows, normalized again in the backward pass.

    With the bits of autograd's own gradient of the log-probs. An entropy that nobody differentiates has no part in it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, forbidden: Tensor | None, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Any: torch's context. ``logits`` (N, V), ``tokens`` (N, 1), ``forbidden`` (V,) or (N, V)."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, tokens, forbidden)
        ctx.temperature = temperature
        logprobs = logits.new_empty(len(logits), dtype=torch.float32)
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        for rows in _parts(logits):
            distribution = _distribution(logits[rows], temperature, _rows_of(forbidden, rows))
            logprobs[rows] = distribution.gather(-1, tokens[rows])[:, 0]
            if with_entropy:
                entropy[rows] = _entropy(distribution)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        """Any: torch's context."""
        to_logprobs, to_entropy = grad_outputs
        logits, tokens, forbidden = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _parts(logits):
            distribution = _distribution(logits[rows], ctx.temperature, _rows_of(forbidden, rows))
            grad = torch.zeros_like(distribution)
            if to_logprobs is not None:
                grad.scatter_(-1, tokens[rows], to_logprobs[rows, None])
            if to_entropy is not None:
                grad -= to_entropy[rows, None] * distribution.exp() * (distribution.clamp(min=_LEAST) + 1)
            grad = torch.ops.aten._log_softmax_backward_data(grad, distribution, -1, torch.float32)
            gradient[rows] = grad if ctx.temperature in (0, 1) else grad / ctx.temperature
        return gradient, None, None, None, None


def _parts(logits: Tensor) -> list[slice]:
    count = max(1, PART_BYTES.get(logits.device.type, OTHER_PART_BYTES) // (4 * logits.shape[-1]))
    return [slice(start, start + count) for start in range(0, len(logits), count)]


def _rows_of(forbidden: Tensor | None, rows: slice) -> Tensor | None:
    return forbidden[rows] if forbidden is not None and forbidden.ndim > 1 else forbidden


def _distribution(logits: Tensor, temperature: float, forbidden: Tensor | None) -> Tensor:
    scaled = _scaled(logits, temperature, None)
    # one sum, where filling under a mask would be a copy and a slow pass
    return torch.log_softmax(scaled if forbidden is None else scaled + forbidden, dim=-1)


_LEAST = -1e4
"""Where p is 0 in float32: 0 log 0 = 0, also in the gradient."""


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs.clamp(min=_LEAST)).sum(dim=-1)


def _scaled(logits: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    """float32 logits at the temperature, -inf where not allowed."""
    if temperature < 0:
        raise InputError(f"temperature={temperature}: use 0 (greedy) or a positive number")
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    return scaled if allowed is None else scaled.masked_fill(~allowed, -torch.inf)
