"""Memory estimates of which some phases alone are measured: a phase on fake tensors takes seconds."""

from __future__ import annotations

from typing import Any

import pytest

from lvrpo.training.step_memory_mot import MoTStepMemory

MEASURE = MoTStepMemory._measure


def measure_only(patch: pytest.MonkeyPatch, *phases: str) -> None:
    """Leaves out the other phases of a step; persistent memory needs none of them."""

    def measure(self: MoTStepMemory, transient: dict[str, int], name: str, *args: Any, **options: Any) -> None:
        if name in phases:
            MEASURE(self, transient, name, *args, **options)

    patch.setattr(MoTStepMemory, "_measure", measure)
