"""What the processes of ``tests/test_distributed.py`` do."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import lvrpo.policies.bagel.create
import lvrpo.training.muon
from lvrpo import distributed as d
from lvrpo.policies.loading import load_policy
from lvrpo.types import Example, Prompt

Batches = Sequence[str]
"""Micro-batches of a rank: "t0" is the first text, "d2" the third drawing."""


def policy(folder: Path) -> Any:
    """A saved policy without layers of zeros."""
    loaded = cast(Any, load_policy(folder))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return loaded


def loss(model: Any, batch: str, side: int) -> torch.Tensor:
    """Of one micro-batch, whoever computes it."""
    kind, number = batch[0], int(batch[1:])
    picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(number))
    if kind == "t":
        prompt = Prompt(batch, "understand", (picture, "what color"), ("text",))
        output: Any = ("red", "two", "blue circle")[number % 3]
    else:
        prompt = Prompt(batch, "generate", (("red circle", "blue square")[number % 2],), ("image",))
        output = picture
    losses = model.supervised_losses([Example(prompt, (output,))], torch.Generator().manual_seed(number))
    return sum(losses.values(), torch.zeros(()))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(
    folder: Path, side: int, dealt: Sequence[Batches], dtype: torch.dtype | None = None, reductions: int = 1
) -> dict[str, Any]:
    """Gradients of micro-batches that are dealt to the ranks, and the step that follows."""
    model = policy(folder)
    d.shard(model, dtype)
    held = sum(d.local(p).numel() for p in model.parameters())
    for turn in range(reductions):
        with d.whole_weights(model, reduce=True):
            for batch in dealt[d.rank()][turn::reductions]:
                loss(model, batch, side).backward()
    found = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    groups = cast(dict[str, list[nn.Parameter]], model.parameter_groups())
    norms = d.gradient_norms(groups)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n and p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not m for m in matrices)]
    muon = d.ShardedMuon(matrices, lvrpo.training.muon.orthogonalize, lr=0.01)
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, fused=True)
    for optimizer in (muon, adamw):
        optimizer.step()
    return {
        "gradients": found,
        "norms": norms,
        "weights": {name: full(p.detach()) for name, p in model.named_parameters()},
        "held": held,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
