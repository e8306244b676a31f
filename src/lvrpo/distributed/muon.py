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

    Differs from torch's: ``orthogonalize``, (M, N) -> (M, N), is given, and each whole matrix is computed by one rank
    (``map_matrices_``). On the same gradients the step is that of one process bit for bit. ``step`` is called by all
    ranks with gradients of the same parameters. Source: https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, params: Any, orthogonalize: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> None:
        """``params``, ``options``: as torch's. Any: what torch takes."""
        super().__init__(params, **options)
        self.orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; parameters without a gradient stay. It works in the memory of the gradients, which are no more."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chosen = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, group in chosen:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradient, momentum = local(p.grad), local(self.state[p]["momentum_buffer"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(momentum, group["momentum"])
        map_matrices_(self.orthogonalize, [p.grad for p, _ in chosen])
        for p, group in chosen:
            weight = local(p.detach())
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(local(p.grad), alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return loss
