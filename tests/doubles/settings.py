"""Overrides and sections that several tests start from."""

from __future__ import annotations

from typing import Any

SMALL = (
    "steps=2",
    "device=cpu",
    "data.prompts_per_step={generate: 2, understand: 4, edit: 0, reason: 2}",
    "rollout={group_size: 4, num_steps: 3}",
    "rewards=[{name: self_vqa}, {name: exact_answer}]",
    "advantages.std_floor=1e-6",
    "validation.prompts={generate: 2, understand: 4, reason: 2}",
)
"""Of a run that takes seconds."""
FLOW_GRPO: dict[str, Any] = {
    "kind": "flow_grpo",
    "top_bottom_k": 2,
    "clip_low": 1e-3,
    "clip_high": 1e-3,
    "kl": "velocity",
    "step_weighting": "level",
}
"""The section of flows, with bounds that small numbers reach."""
