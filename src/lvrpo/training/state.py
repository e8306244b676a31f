"""The state of an alignment run: what a checkpoint holds, so that a resumed run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from lvrpo.reading import Record, shaped, typed
from lvrpo.training.checkpoint import STATE, load_state, save_state, verify_checkpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import Judge
from lvrpo.training.losses import uses_old_policy
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.overoptimization import Overoptimization
from lvrpo.training.policies import Policies, SetName, shard_dtype
from lvrpo.types import Task

ANOTHER = "use another checkpoint"


class ValidationRecord(Record):
    """Of a saved state: what validation remembers."""

    best_step: int
    best_scores: dict[str, list[float]]
    top: float
    rollbacks: int
    lr_scale: float


class StateRecord(Record):
    """The tree of a saved state, as far as every run has it."""

    step: int
    seconds: float
    bad_gradients: int
    validation: ValidationRecord


@dataclass
class ValidationState:
    """What validation remembers."""

    best_step: int = 0
    best_scores: dict[Task, list[float]] = field(default_factory=dict)
    """Per task, the score of every held-out prompt under the best weights."""
    top: float = 0.0
    """The highest mean of tasks that any remembered weights had."""
    rollbacks: int = 0
    lr_scale: float = 1.0


@dataclass
class TrainState:
    """Everything that changes while a run goes on."""

    policies: Policies
    optimizers: Sequence[Optimizers]
    """One per phase of an update (``TrainConfig.phases``)."""
    step: int = 0
    """Steps done."""
    validation: ValidationState = field(default_factory=ValidationState)
    bad_gradients: int = 0
    """Steps in a row, up to now, whose gradient was not finite."""
    seconds: float = 0.0
    """Training seconds so far, over all resumptions."""
    judge: Judge | None = None
    """None: the reference judges."""
    overoptimization: Overoptimization | None = None
    """None: nobody watches."""

    @classmethod
    def start(cls, policy: Policy, config: TrainConfig) -> TrainState:
        """The state before the first step: all sets of weights are those of the given policy."""
        sets: list[SetName] = ["old"] if uses_old_policy(config, policy.segment_kinds) else []
        judge = Judge(config.judge) if config.judge.moves else None
        if judge is not None:
            sets += judge.sets
        policies = Policies(policy, sets, compute_dtype=shard_dtype(policy, config), offload=config.offload)
        optimizers = [Optimizers(policy, config.optimizer, config.steps) for _ in config.phases(policy.segment_kinds)]
        watched = (
            None if config.validation.overoptimization is None else Overoptimization(config.validation.overoptimization)
        )
        return cls(policies, optimizers, judge=judge, overoptimization=watched)

    @property
    def best_steps(self) -> set[int]:
        """The steps whose checkpoints are kept, whatever comes after them."""
        return {
            self.validation.best_step,
            *([] if self.overoptimization is None else [self.overoptimization.best_step]),
        }

    def write(self, folder: Path) -> AsyncSave:
        """Writes the state and the averaged policy in Hub layout beside it; arrays go on being written.

        Only weights that are divided among ranks and no adapter are not written once more: ``load_policy`` reads them
        from the state.
        """
        state = folder / STATE
        on_main(lambda: (state / TENSORS).mkdir(parents=True))
        tensors, moments = self._tensors(), self._other_moments()
        saving = save_sharded_async(state / TENSORS, tensors)
        on_main(lambda: save_state(state, {**self._tree(), "moments": moments}))
        policies = self.policies
        if not policies.sharded or "reference" in policies.weights.base_only_sets:
            with policies.use("ema") as policy:
                on_main(lambda: policy.save(folder))
        return saving

    def load(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint; raises InputError if it is damaged."""
        where = str(checkpoint / STATE / "state.json")
        with relay_errors():
            verify_checkpoint(checkpoint, split_between_ranks)
            tree = load_state(checkpoint / STATE, finite=True)
            typed(tree, StateRecord, where, ANOTHER)
        with shaped(where, ANOTHER):
            self._take(tree, checkpoint)

    def _take(self, tree: dict[str, Any], checkpoint: Path) -> None:
        folder = checkpoint / STATE / TENSORS
        with relay_errors():
            self._begin_moments(stored_tensors(folder), tree["moments"])
        load_sharded(folder, self._tensors(), finite=True)
        self.step = tree["step"]
        self.seconds = tree["seconds"]
        self.bad_gradients = tree["bad_gradients"]
        self.validation = ValidationState(**tree["validation"])
        if self.judge is not None:
            self.judge.load(tree["judge"])
        if self.overoptimization is not None:
            self.overoptimization.load(tree["overoptimization"])

    def load_average(self, checkpoint: Path) -> None:
        """The averaged weights of a checkpoint, and nothing else; raises InputError if it is damaged."""
        with relay_errors():
            verify_checkpoint(checkpoint, split_between_ranks)
        load_sharded(checkpoint / STATE / TENSORS, self._weights("ema"), finite=True)

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """A set of weights under the names of a checkpoint."""
        return {f"{name}/{key}": tensor for key, tensor in self.policies.weights[name].items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint, each sharded as it is kept: sets of weights that move, and moments."""
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
        """What optimizers remember beside them, by parameter: Adam's count of steps, scales of moments in 8 bits."""
        return [
            {
                name: {key: t for key, t in own.items() if _shape(t) != self.policies.weights.parameters[name].shape}
                for name, own in optimizer.moments().items()
            }
            for optimizer in self.optimizers
        ]

    def _begin_moments(self, stored: Mapping[str, TensorStorageMetadata], others: Sequence[dict[str, Any]]) -> None:
        """The other moments of a checkpoint, and room for its tensors, which are read in place."""
        parameters = self.policies.weights.parameters
        for i, (optimizer, kept) in enumerate(zip(self.optimizers, others, strict=True)):
            moments: dict[str, dict[str, Any]] = {}
            for name, own in kept.items():
                device = parameters[name].device  # Adam's count of steps stays on the host
                moments[name] = {key: t.to(device) if len(_shape(t) or ()) else t for key, t in own.items()}
            for path, entry in stored.items():
                place, _, rest = path.partition("/")
                name, _, key = rest.rpartition("/")
                if place == f"optimizer_{i}" and name in parameters:
                    room = torch.zeros_like(parameters[name], dtype=entry.properties.dtype)
                    moments.setdefault(name, {})[key] = room.detach()
            optimizer.set_moments(moments)

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
