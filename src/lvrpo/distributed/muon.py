"""Muon on sharded matrices: momentum on the shards, each matrix orthogonalized whole by one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _foreach_add_, _foreach_lerp_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]  # of torch.optim

from lvrpo.distributed.sharding import local, map_matrices_


class ShardedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` with the rates of its ``adjust_lr_fn="original"``, for whole or sharded matrices.

        B <- mu B + (1 - mu) G,  U <- orthogonalize(mu B + (1 - mu) G)
        W <- (1 - lr * weight_decay) W - lr * sqrt(max(1, M / N)) U

    Differs from torch's: ``orthogonalize``, (B, M, N) -> (B, M, N), is an argument, and each whole matrix is computed
    by one rank (``map_matrices_``). For equal gradients the step is bitwise that of one process. All ranks call
    ``step``, with gradients of the same parameters. Source: https://kellerjordan.github.io/posts/muon
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
        of_groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        updated = [(group, parameters) for group, parameters in of_groups if parameters]
        for group, parameters in updated:
            for p in parameters:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradients = [local(p.grad) for p in parameters]
            momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
            _foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            _foreach_lerp_(gradients, momenta, group["momentum"])
        map_matrices_(self.orthogonalize, [p.grad for _, parameters in updated for p in parameters])
        for group, parameters in updated:
            _foreach_mul_([local(p.detach()) for p in parameters], 1 - group["lr"] * group["weight_decay"])
            for aspect in {p.shape[0] / p.shape[1] for p in parameters}:
                alike = [p for p in parameters if p.shape[0] / p.shape[1] == aspect]
                weights, steps = [local(p.detach()) for p in alike], [local(p.grad) for p in alike]
                _foreach_add_(weights, steps, alpha=-group["lr"] * max(1.0, aspect) ** 0.5)
        return loss
