"""A dry run: the memory estimate, the preflight checks on a few prompts, and the time of one small step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lvrpo.distributed import POLICY
from lvrpo.policies.base import Policy
from lvrpo.rewards.success import SUCCESS_ONLY
from lvrpo.rewards.table import score_groups
from lvrpo.training.advantages import segment_advantages
from lvrpo.training.components import Components, held_out_source, training_source, validation_prompts
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import NO_JUDGE_ROWS
from lvrpo.training.losses import objectives_of
from lvrpo.training.memory import MemoryEstimate, peak_memory_gib
from lvrpo.training.preflight import Check, preflight_checks
from lvrpo.training.rollout import prompts_of_step, rollout
from lvrpo.training.rollout_engine import EngineSampler, open_engine
from lvrpo.training.setup import estimate_run_memory, open_policy, require_judge
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import train_step
from lvrpo.training.validation import Validator

STEP_DIVISOR = 4
"""The timed step has 1 / ``STEP_DIVISOR`` of the prompts of each task."""


@dataclass(frozen=True)
class DryRun:
    """Measurements of a dry run, and the estimates for the run."""

    checks: Sequence[Check]
    step_seconds: float
    """Estimate for a full step."""
    seconds: float
    """Estimate for the whole run, with validation."""
    peak_memory_gib: float
    """Measured peak of the dry run itself."""
    disk_mib: float


def memory_needed(config: TrainConfig, device: torch.device | None = None) -> MemoryEstimate:
    """``estimate_run_memory`` of a configuration."""
    source = training_source(config)
    validation, test = (held_out_source(config, split) for split in ("validation", "test"))
    validator = Validator(validation_prompts(config, validation, None), config)
    return estimate_run_memory(
        config, Components(source, (), validator, NO_JUDGE_ROWS, SUCCESS_ONLY, validation, test), device
    )


def dry_run(config: TrainConfig, components: Components) -> DryRun:
    """Loads the policy of a run, runs the preflight checks and times one small step and a validation."""
    torch.set_num_threads(config.threads)
    require_judge(config, components)
    policy, base = open_policy(config)
    components.require_readable(policy)
    components.require_possible(policy, config)
    state = TrainState.start(policy, config)
    with _engine(config, policy, base) as engine:
        return _dry_run(config, components, state, engine)


@contextmanager
def _engine(config: TrainConfig, policy: Policy, base: Path) -> Iterator[EngineSampler | None]:
    """``open_engine`` without a run directory: a new adapter is saved to a temporary folder."""
    if config.adapter is None:
        with open_engine(config, policy, base) as engine:
            yield engine
        return
    with tempfile.TemporaryDirectory() as scratch:
        policy.save(Path(scratch) / "adapter")
        with open_engine(config, policy, Path(scratch) / "adapter") as engine:
            yield engine


def _dry_run(config: TrainConfig, components: Components, state: TrainState, engine: EngineSampler | None) -> DryRun:
    source, rewards, validator, policy = (
        components.source,
        components.rewards,
        components.validator,
        state.policies.policy,
    )
    checks = preflight_checks(config, state.policies, source, rewards, engine)
    if not all(check.ok for check in checks):
        return DryRun(checks, 0.0, 0.0, peak_memory_gib(), 0.0)

    counts = config.data.prompts_per_step
    few = {task: -(-count // STEP_DIVISOR) for task, count in counts.items()}
    small = config.model_copy(update={"data": config.data.model_copy(update={"prompts_per_step": few})})
    started = time.perf_counter()
    groups = rollout(state.policies, prompts_of_step(source, small, 0), small, 0, engine)
    with state.policies.use("judge") as judge:
        table = score_groups(rewards, groups, judge)
    advantages = segment_advantages(table, groups, config.advantages)
    objectives = objectives_of(config, policy.segment_kinds)
    train_step(state.policies, objectives, state.optimizers, groups, advantages, small, 0)
    step_seconds = (time.perf_counter() - started) * sum(counts.values()) / sum(few.values())

    started = time.perf_counter()
    validator.score(state.policies)
    validation_seconds = time.perf_counter() - started
    num_validations = config.steps // config.validation.every + 2
    weights = sum(tensor.numel() * 4 for tensor in state.policies.weights[POLICY].values())
    disk = weights * 7 * (config.keep_checkpoints + 1) / 2**20
    seconds = config.steps * step_seconds + num_validations * validation_seconds
    return DryRun(checks, step_seconds, seconds, peak_memory_gib(), disk)
