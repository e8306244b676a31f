"""Muon with its iteration in float32 on CPUs, where bfloat16 is no faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lvrpo.distributed import ShardedMuon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic x <- a x + b x^3 + c x^5, torch's own: singular values end in about [0.7, 1.2]."""
ITERATIONS = 5


def orthogonalize(matrix: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Newton-Schulz: roughly U V^T of a matrix U S V^T, in the dtype of the input.

        X <- X / |X|_F,  then 5 times  X <- a X + (b A + c A^2) X  with A = X X^T

    ``matrix`` (M, N) -> (M, N). Source: https://kellerjordan.github.io/posts/muon
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(ShardedMuon):
    """``torch.optim.Muon``, which iterates in bfloat16; on a CPU the same in float32.

    A CPU without instructions for bfloat16 multiplies it some twenty times slower than float32 (decision 86). State,
    rates and defaults are torch's.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        """As ``torch.optim.Muon``. Any: what torch takes."""
        super().__init__(params, orthogonalize, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; parameters without a gradient stay. On a CPU it works in the memory of the gradients."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return torch.optim.Muon.step(self, closure)
        return super().step(closure)
