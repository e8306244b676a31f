"""Muon on sharded matrices: momentum on the shards, each matrix orthogonalized whole by one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lvrpo.distributed.sharding import local, map_matrices_


class ShardedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` with the rates of its ``adjust_lr_fn="original"``, for whole or sharded matrices.

        B <- mu B + (1 - mu) G,  U <- orthogonalize(mu B + (1 - mu) G)
        W <- (1 - lr * weight_decay) W - lr * sqrt(max(1, M / N)) U

    Differs from torch's: ``orthogonalize``, (M, N) -> (M, N), is an argument, and each whole matrix is computed by one
    rank (``map_matrices_``). For equal gradients the step is bitwise that of one process. All ranks call ``step``, with
    gradients of the same parameters. Source: https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, params: Any, orthogonalize: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> None:
        """``params`` and ``options`` as for ``torch.optim.Muon``. Any: torch's own types."""
        super().__init__(params, **options)
        self.orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; parameters without a gradient are skipped. The gradients are overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updated = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, group in updated:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradient, momentum = local(p.grad), local(self.state[p]["momentum_buffer"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(momentum, group["momentum"])
        map_matrices_(self.orthogonalize, [p.grad for p, _ in updated])
        for p, group in updated:
            weight = local(p.detach())
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(local(p.grad), alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return loss
