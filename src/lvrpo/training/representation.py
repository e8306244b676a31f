"""Representation alignment (REPA, arXiv:2410.06940) as a term of supervised training.

States of the drawing expert over a noisy picture are pulled toward what the frozen reading side makes of the clean one.
No encoder is added: the teacher is a frozen copy of the policy that training started from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lvrpo.algorithms import repa_loss
from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.training.checkpoint import load_optimizer_state, optimizer_state
from lvrpo.types import Image


class RepresentationConfig(Config):
    """What is aligned, and how strongly."""

    weight: float = Field(default=0.0, ge=0)
    """Of the loss in the sum; 0: none. About 0.5 in the paper."""
    layer: int = Field(default=2, ge=1)
    """States of the drawing expert after so many layers ..."""
    target_layer: int = Field(default=0, ge=0)
    """... toward those of the frozen reading side after so many; 0: the output of its tower."""
    head_width: int = Field(default=256, ge=1, le=65_536)
    """Hidden width of the head between the two, which is trained along and thrown away."""


class Representation(nn.Module):
    """The head, its optimizer and the frozen teacher; called by ``MoTPolicy.supervised_losses``."""

    def __init__(self, config: RepresentationConfig, policy: MoTPolicy, lr: float, seed: int) -> None:
        super().__init__()
        depth = policy.transformer.config.depth
        if max(config.layer, config.target_layer) > depth:
            raise InputError(
                f"representation.layer={config.layer}, target_layer={config.target_layer}: the policy has {depth} "
                f"layers: use at most {depth}"
            )
        self.config = config
        self.layer = config.layer
        self.teacher = policy.frozen()
        width = policy.transformer.config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(width, config.head_width), nn.SiLU(), nn.Linear(config.head_width, width)
            ).to(policy.device)
        self.lr = lr
        self.named = [(name, p) for name, p in self.head.named_parameters()]
        self.optimizer = torch.optim.AdamW([p for _, p in self.named], lr=lr, weight_decay=0.0)

    def forward(self, features: Tensor, images: Sequence[Image]) -> Tensor:
        """features (B, N, D) of noisy pictures and the clean ones, to a loss per picture (B,)."""
        targets = self.teacher.reading_features(images, self.config.target_layer)
        return repa_loss(self.head(features), targets)

    def step(self, rate: float) -> None:
        """Steps the head at a share of its learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the teacher is the start of the run."""
        return {"head": dict(self.head.state_dict()), "optimizer": optimizer_state(self.optimizer, self.named)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        self.head.load_state_dict(dict(state["head"]))
        load_optimizer_state(self.optimizer, self.named, state["optimizer"])
