"""The state of an alignment run: what a checkpoint holds, so that a resumed run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from lvrpo.distributed import on_main, relay_errors
from lvrpo.policies.base import Policy
from lvrpo.training.checkpoint import STATE, load_state, save_state, verify_checkpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import Judge
from lvrpo.training.methods import asks_for_old
from lvrpo.training.objective import Policies, policy_module
from lvrpo.training.offload import Offloaded, OffloadedOptimizers, Shards
from lvrpo.training.optimizer import Optimizers, Stepping, average_into, load_trained, trained_weights
from lvrpo.training.turn import Turn
from lvrpo.typed_json import Record, shaped, typed
from lvrpo.types import Task

ANOTHER = "use another checkpoint"


class GuardRecord(Record):
    """Of a saved state: what the guard remembers."""

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
    guard: GuardRecord


@dataclass
class GuardState:
    """What the guard remembers."""

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
    optimizers: Sequence[Stepping]
    """One per phase of an update (``TrainConfig.phases``)."""
    shards: Shards | None = None
    """What this process keeps of the policies, where they are offloaded."""
    step: int = 0
    """Steps done."""
    guard: GuardState = field(default_factory=GuardState)
    bad_gradients: int = 0
    """Steps in a row, up to now, whose gradient was not finite."""
    seconds: float = 0.0
    """Training seconds so far, over all resumptions."""
    judge: Judge | None = None
    """None: the reference judges."""
    turn: Turn | None = None
    """None: nobody looks for the turn."""

    @classmethod
    def start(cls, policy: Policy, config: TrainConfig) -> TrainState:
        """The state before the first step: all four policies are the given one, copied where they will part from it."""
        turn = None if config.guard.turn is None else Turn(config.guard.turn)
        if config.offload:
            shards = Shards(policy, config)
            live, reference, average = (Offloaded(shards, name) for name in ("live", "reference", "average"))
            old = Offloaded(shards, "old") if "old" in shards.kept else live
            phases = [OffloadedOptimizers(shards, phase) for phase in range(len(shards.optimizers))]
            stand_ins = cast(Any, (live, old, reference, average))
            return cls(Policies(*stand_ins), phases, shards, turn=turn)
        reference = policy.frozen()
        judge = Judge.start(policy, config.judge) if config.judge.moves else None
        policies = Policies(
            live=policy,
            old=policy.twin() if asks_for_old(config, policy.writes) else policy,
            reference=reference,
            average=policy.twin(),
            judging=None if judge is None else judge.policy,
        )
        optimizers = [Optimizers(policy, config.optimizer, config.steps) for _ in config.phases(policy.writes)]
        return cls(policies, optimizers, judge=judge, turn=turn)

    @property
    def best_steps(self) -> set[int]:
        """The steps whose checkpoints are kept, whatever comes after them."""
        return {self.guard.best_step, *([] if self.turn is None else [self.turn.best_step])}

    def average(self, name: Literal["old", "average"], decay: float) -> None:
        """Moves an average towards the live weights."""
        if self.shards is not None:
            self.shards.average(name, "live", decay)
            return
        slow = {"old": self.policies.old, "average": self.policies.average}[name]
        average_into(policy_module(slow), policy_module(self.policies.live), decay)

    def write(self, folder: Path) -> None:
        """Writes the averaged policy in Hub layout, and the state beside it."""
        on_main((folder / STATE).mkdir)
        if self.shards is None:
            on_main(lambda: self.policies.average.save(folder))
        else:
            self.shards.write("average", folder)
            self.shards.save(folder / STATE)
        on_main(lambda: save_state(folder / STATE, self._tree()))

    def load(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint; raises InputError if it is damaged."""
        where = str(checkpoint / STATE / "state.json")
        with relay_errors():
            verify_checkpoint(checkpoint)
            tree = load_state(checkpoint / STATE, finite=True)
            typed(tree, StateRecord, where, ANOTHER)
        with shaped(where, ANOTHER):
            self._take(tree, checkpoint)

    def _take(self, tree: dict[str, Any], checkpoint: Path) -> None:
        if self.shards is not None:
            self.shards.load(checkpoint / STATE)
        else:
            for name, policy in self._moving().items():
                load_trained(policy, tree["policies"][name])
            for optimizers, saved in zip(self._own_optimizers(), tree["optimizers"], strict=True):
                optimizers.load_state(saved)
        self.step = tree["step"]
        self.seconds = tree["seconds"]
        self.bad_gradients = tree["bad_gradients"]
        self.guard = GuardState(**tree["guard"])
        if self.judge is not None:
            self.judge.load(tree["judge"])
        if self.turn is not None:
            self.turn.load(tree["turn"])

    def load_average(self, checkpoint: Path) -> None:
        """The averaged weights of a checkpoint, and nothing else; raises InputError if it is damaged."""
        with relay_errors():
            verify_checkpoint(checkpoint)
        if self.shards is not None:
            self.shards.load(checkpoint / STATE, ("average",))
        else:
            saved = load_state(checkpoint / STATE, finite=True)["policies"]["average"]
            load_trained(policy_module(self.policies.average), saved)

    def _moving(self) -> dict[str, nn.Module]:
        """The policies whose weights change, by name."""
        policies = {"live": self.policies.live, "old": self.policies.old, "average": self.policies.average}
        if self.policies.old is self.policies.live:
            del policies["old"]
        return {name: policy_module(policy) for name, policy in policies.items()}

    def _own_optimizers(self) -> list[Optimizers]:
        return [optimizers for optimizers in self.optimizers if isinstance(optimizers, Optimizers)]

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "bad_gradients": self.bad_gradients,
            "guard": vars(self.guard),
        }
        if self.shards is None:
            tree["policies"] = {name: trained_weights(policy) for name, policy in self._moving().items()}
            tree["optimizers"] = [optimizers.state() for optimizers in self._own_optimizers()]
        if self.judge is not None:
            tree["judge"] = self.judge.state()
        if self.turn is not None:
            tree["turn"] = self.turn.state()
        return tree
