"""The state of an alignment run: what a checkpoint holds, so that a resumed run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lvrpo.policies.base import Policy
from lvrpo.training.checkpoint import checkpoint_writer, load_state, save_state, verify_checkpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import Judge
from lvrpo.training.methods import asks_for_old
from lvrpo.training.objective import Policies, policy_module
from lvrpo.training.optimizer import Optimizers, load_trained, trained_weights
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.turn import Turn
from lvrpo.types import Task

STATE = "state"
"""Folder of a checkpoint that holds everything but the policy to use."""


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
class RunState:
    """Everything that changes while a run goes on."""

    policies: Policies
    optimizers: Sequence[Optimizers]
    """One per phase of an update (``TrainConfig.phases``)."""
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
    def start(cls, policy: Policy, config: TrainConfig) -> RunState:
        """The state before the first step: all four policies are the given one, copied where they will part from it."""
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
        turn = None if config.guard.turn is None else Turn(config.guard.turn)
        return cls(policies, optimizers, judge=judge, turn=turn)

    def save(self, run: RunDirectory) -> Path:
        """Writes checkpoints/step_NNNNNN: the averaged policy in Hub layout, and the state beside it."""
        path = run.checkpoint_dir(self.step)
        with checkpoint_writer(path) as folder:
            self.policies.average.save(folder)
            (folder / STATE).mkdir()
            save_state(folder / STATE, self._tree())
        return path

    def load(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint; raises InputError if it is damaged."""
        verify_checkpoint(checkpoint)
        tree = load_state(checkpoint / STATE)
        for name, policy in self._moving().items():
            load_trained(policy, tree["policies"][name])
        for optimizers, saved in zip(self.optimizers, tree["optimizers"], strict=True):
            optimizers.load_state(saved)
        self.step = tree["step"]
        self.seconds = tree["seconds"]
        self.bad_gradients = tree["bad_gradients"]
        self.guard = GuardState(**tree["guard"])
        if self.judge is not None:
            self.judge.load(tree["judge"])
        if self.turn is not None:
            self.turn.load(tree["turn"])

    def _moving(self) -> dict[str, nn.Module]:
        """The policies whose weights change, by name."""
        policies = {"live": self.policies.live, "old": self.policies.old, "average": self.policies.average}
        if self.policies.old is self.policies.live:
            del policies["old"]
        return {name: policy_module(policy) for name, policy in policies.items()}

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "bad_gradients": self.bad_gradients,
            "policies": {name: trained_weights(policy) for name, policy in self._moving().items()},
            "optimizers": [optimizers.state() for optimizers in self.optimizers],
            "guard": vars(self.guard),
        }
        if self.judge is not None:
            tree["judge"] = self.judge.state()
        if self.turn is not None:
            tree["turn"] = self.turn.state()
        return tree
