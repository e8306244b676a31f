"""The gradients of a training step without the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import Advantages, Metrics
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.policies import Policies
from lvrpo.training.trainer import train_step
from lvrpo.types import Group


class NoStep:
    """An optimizer that leaves weights and gradients as they are."""

    def rate(self, step: int) -> float:
        return 1.0

    def step(self, step: int, scale: float = 1.0) -> dict[str, float]:
        return {}


def differentiate(
    policies: Policies,
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int = 0,
) -> Metrics:
    """Adds the gradients of the step to those of the policy."""
    segment_kinds = policies.policy.segment_kinds
    still = [NoStep() for _ in config.phases(segment_kinds)]
    optimizers = cast(list[Optimizers], still)
    return train_step(policies, objectives_of(config, segment_kinds), optimizers, groups, advantages, config, step)
