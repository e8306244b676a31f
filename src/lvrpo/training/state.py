"""The state of an alignment run, which a checkpoint saves so that a resumed run is bitwise equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lvrpo.distributed import (
    POLICY,
    AsyncSave,
    load_sharded,
    on_main,
    relay_errors,
    save_sharded_async,
    split_between_ranks,
    stored_tensors,
)
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import TENSORS
from lvrpo.reading import Record, structure_errors, validate_type
from lvrpo.training.checkpoint import STATE, load_state, save_state, verify_checkpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import JudgeRefresh
from lvrpo.training.losses import uses_old_policy
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.overoptimization import Overoptimization
from lvrpo.training.policies import Policies, SetName, shard_dtype
from lvrpo.training.rollout_ahead import RolloutAhead
from lvrpo.types import TaskKind

ANOTHER = "use another checkpoint"


class ValidationRecord(Record):
    """Schema of a saved ``ValidationState``."""

    best_step: int
    best_scores: dict[str, list[float]]
    initial_scores: dict[str, list[float]] = Field(default_factory=dict)
    top: float
    rollbacks: int
    lr_scale: float
    stopped: int = 0


class StateRecord(Record):
    """Schema of a saved state: the fields that all runs have."""

    step: int
    seconds: float
    bad_gradients: int
    validation: ValidationRecord


@dataclass
class ValidationState:
    """The best validation result so far, and the rollbacks."""

    best_step: int = 0
    best_scores: dict[TaskKind, list[float]] = field(default_factory=dict)
    """Per task, the score of every held-out prompt under the best weights."""
    initial_scores: dict[TaskKind, list[float]] = field(default_factory=dict)
    """The same of the initial weights; empty in checkpoints of older versions."""
    top: float = 0.0
    """The highest mean over tasks of any best weights so far."""
    rollbacks: int = 0
    lr_scale: float = 1.0
    stopped: int = 0
    """The configured steps of the run when validation stopped it early; 0 if it did not. A longer run goes on."""


@dataclass
class TrainState:
    """The mutable state of a run."""

    policies: Policies
    optimizers: Sequence[Optimizers]
    """One per phase of an update (``TrainConfig.phases``)."""
    step: int = 0
    """Steps done."""
    validation: ValidationState = field(default_factory=ValidationState)
    bad_gradients: int = 0
    """Number of most recent consecutive steps with a non-finite gradient."""
    seconds: float = 0.0
    """Training time so far, over all resumptions."""
    judge: JudgeRefresh | None = None
    """None: the reference is the judge."""
    overoptimization: Overoptimization | None = None
    """None: not configured."""
    ahead: RolloutAhead | None = None
    """None: every step is sampled when it begins."""

    @classmethod
    def start(cls, policy: Policy, config: TrainConfig) -> TrainState:
        """The state before the first step: all weight sets equal the policy."""
        sets: list[SetName] = ["old"] if uses_old_policy(config, policy.segment_kinds) else []
        judge = JudgeRefresh(config.judge) if config.judge.is_refreshed else None
        if judge is not None:
            sets += judge.sets
        policies = Policies(policy, sets, compute_dtype=shard_dtype(policy, config), offload=config.offload)
        optimizers = [Optimizers(policy, config.optimizer, config.steps) for _ in config.phases(policy.segment_kinds)]
        section = config.validation.overoptimization
        detector = None if section is None else Overoptimization(section)
        ahead = RolloutAhead() if config.rollout.steps_ahead else None
        return cls(policies, optimizers, judge=judge, overoptimization=detector, ahead=ahead)

    @property
    def best_steps(self) -> set[int]:
        """The steps whose checkpoints are never pruned."""
        detector = self.overoptimization
        return {self.validation.best_step, *(() if detector is None else (detector.best_step,))}

    def write(self, folder: Path) -> AsyncSave:
        """Writes the state and the EMA policy in Hub layout; tensors of the state are written asynchronously.

        Sharded full weights are not written twice: ``load_policy`` reads the EMA policy from the state.
        """
        state = folder / STATE
        on_main(lambda: (state / TENSORS).mkdir(parents=True))
        tensors, moments = self._tensors(), self._other_moments()
        saving = save_sharded_async(state / TENSORS, tensors)
        on_main(lambda: save_state(state, {**self._tree(), "moments": moments}))
        if self.ahead is not None:
            with relay_errors():
                self.ahead.save(state, self.step)
        policies = self.policies
        if not policies.sharded or "reference" in policies.weights.base_only_sets:
            with policies.use("ema") as policy:
                on_main(lambda: policy.save(folder))
        return saving

    def load(self, checkpoint: Path) -> None:
        """Restores a checkpoint; raises InputError if it is damaged."""
        where = str(checkpoint / STATE / "state.json")
        with relay_errors():
            verify_checkpoint(checkpoint, split_between_ranks)
            tree = load_state(checkpoint / STATE, finite=True)
            validate_type(tree, StateRecord, where, ANOTHER)
        with structure_errors(where, ANOTHER):
            self._restore(tree, checkpoint)

    def _restore(self, tree: dict[str, Any], checkpoint: Path) -> None:
        folder = checkpoint / STATE / TENSORS
        with relay_errors():
            self._allocate_moments(stored_tensors(folder), tree["moments"])
        load_sharded(folder, self._tensors(), finite=True)
        self.step = tree["step"]
        self.seconds = tree["seconds"]
        self.bad_gradients = tree["bad_gradients"]
        self.validation = ValidationState(**tree["validation"])
        if self.judge is not None:
            self.judge.load(tree["judge"])
        if self.overoptimization is not None:
            self.overoptimization.load(tree["overoptimization"])
        if self.ahead is not None:
            with relay_errors():
                self.ahead.load(checkpoint / STATE, self.step)

    def load_ema(self, checkpoint: Path) -> None:
        """Restores only the EMA weights of a checkpoint; raises InputError if it is damaged."""
        with relay_errors():
            verify_checkpoint(checkpoint, split_between_ranks)
        load_sharded(checkpoint / STATE / TENSORS, self._weights("ema"), finite=True)

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """A weight set under its names in a checkpoint."""
        return {f"{name}/{key}": tensor for key, tensor in self.policies.weights[name].items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The (sharded) tensors of a checkpoint: weight sets except the reference, and optimizer moments."""
        found = self._weights(POLICY)
        for name in self.policies.weights.sets:
            if name != "reference":
                found |= self._weights(name)
        for i, optimizer in enumerate(self.optimizers):
            for name, moments in optimizer.moments().items():
                size = self.policies.weights.parameters[name].shape
                found |= {f"optimizer_{i}/{name}/{key}": t for key, t in moments.items() if _shape(t) == size}
        return found

    def _other_moments(self) -> list[dict[str, dict[str, Any]]]:
        """Optimizer state that has not the shape of its parameter: Adam's step count, scales of 8-bit moments."""
        shapes = {name: p.shape for name, p in self.policies.weights.parameters.items()}
        return [
            {
                name: {key: value for key, value in moments.items() if _shape(value) != shapes[name]}
                for name, moments in optimizer.moments().items()
            }
            for optimizer in self.optimizers
        ]

    def _allocate_moments(self, stored: Mapping[str, TensorStorageMetadata], others: Sequence[dict[str, Any]]) -> None:
        """Sets the other moments of a checkpoint and allocates its tensors, which ``load_sharded`` then fills."""
        for i, (optimizer, saved) in enumerate(zip(self.optimizers, others, strict=True)):
            optimizer.set_moments(saved)
            dtypes: dict[str, dict[str, torch.dtype]] = {}
            for path, entry in stored.items():
                prefix, _, rest = path.partition("/")
                name, _, key = rest.rpartition("/")
                if prefix == f"optimizer_{i}":
                    dtypes.setdefault(name, {})[key] = entry.properties.dtype
            optimizer.allocate_moments(dtypes)

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "bad_gradients": self.bad_gradients,
            "validation": vars(self.validation),
        }
        if self.judge is not None:
            tree["judge"] = self.judge.state()
        if self.overoptimization is not None:
            tree["overoptimization"] = self.overoptimization.state()
        return tree


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, torch.Tensor) else None
