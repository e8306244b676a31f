"""Memory estimates of which some phases alone are measured: a phase on fake weights takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lvrpo.policies.base import Sampling
from lvrpo.training.losses.base import Objective
from lvrpo.training.memory_estimate import NAMES, StepMemory
from lvrpo.types import Group, Prompt


def measure_only(patch: pytest.MonkeyPatch, *phases: str) -> None:
    """Leaves out the other phases of a step but the rollout, whose outputs they take; without any, that too."""
    if not phases:
        patch.setattr(StepMemory, "_measure_phases", lambda *_: None)
        return
    sample, replay = StepMemory._sample, StepMemory._replay

    def sample_some(self: StepMemory, name: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return sample(self, name, prompts, sampling) if name == "rollout" else []

    def replay_some(self: StepMemory, objective: Objective, groups: Sequence[Group]) -> None:
        if f"replay of {NAMES[objective.output]}" in phases:
            replay(self, objective, groups)

    patch.setattr(StepMemory, "_sample", sample_some)
    patch.setattr(StepMemory, "_replay", replay_some)
