"""Equal compute: what a step of a row costs, counted on a few real ones, and the steps that a budget buys."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lvrpo.errors import InputError
from lvrpo.evaluation.compute import NO_COMPUTE, Compute, ComputeCounter
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.trainer import Trainer, control_rollout

AnyConfig = TrainConfig | PretrainConfig

PLAIN = 2
"""Steps whose mean is that of a plain one; the first, which does more, is left out."""


@dataclass(frozen=True)
class RunCost:
    """The compute of a run as a function of its steps."""

    step: Compute
    """A plain step: rollout, judge, reference, old policy and update."""
    start: Compute = NO_COMPUTE
    """What only the beginning has: the checks before the first step."""
    look: Compute = NO_COMPUTE
    """A validation."""
    control: Compute = NO_COMPUTE
    """The reference's outputs that are drawn beside the curve."""
    look_every: int = 1
    reference_eval_every: int = 1

    def total(self, steps: int) -> Compute:
        """Of a run of so many steps: looks at the start, every so often and at the end."""
        looks = 1 + -(-steps // self.look_every)
        controls = -(-steps // self.reference_eval_every)
        return self.start + self.step * steps + self.look * looks + self.control * controls

    def steps_within(self, budget: Compute, added_to: Compute = NO_COMPUTE) -> int:
        """The most steps whose FLOPs do not exceed the budget; raises InputError if none does."""
        limit = (budget + added_to).flops
        low, high = 0, 1
        while self.total(high).flops <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle).flops <= limit else (low, middle)
        if not low:
            raise InputError(
                f"budget of {limit:.3g} FLOPs: one step takes {self.total(1).flops:.3g}: give budget.steps more"
            )
        return low

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RunCost:
        """What ``as_dict`` gave."""
        parts = {name: Compute(**raw[name]) for name in ("step", "start", "look", "control")}
        return cls(**parts, look_every=raw["look_every"], reference_eval_every=raw["reference_eval_every"])


def count_cost(config: AnyConfig) -> RunCost:
    """Takes the first steps of a run in a folder that is thrown away, and counts them."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, PretrainConfig):
            return _count_supervised(config, Path(folder) / "probe")
        return _count_alignment(config, Path(folder) / "probe")


def _count_supervised(config: PretrainConfig, folder: Path) -> RunCost:
    marks: list[Compute] = []
    trainer = Pretrainer.start(config.model_copy(update={"steps": PLAIN + 1, "held_out_every": 0}), folder)
    with trainer.run, ComputeCounter() as counter:
        trainer.train(lambda row: marks.append(counter.now))
    return RunCost((marks[-1] - marks[0]) * (1 / PLAIN))


def _count_alignment(config: TrainConfig, folder: Path) -> RunCost:
    last = PLAIN + 2  # validation looks at the last step, so that it is no plain one
    validation = config.validation.model_copy(update={"every": last, "action": "warn", "overoptimization": None})
    rare = {"validation": validation, "reference_eval_every": last, "samples_every": last, "checkpoint_every": last}
    marks: list[Compute] = []
    trainer = Trainer.start(config.model_copy(update={**rare, "steps": last}), folder)
    with trainer.run, ComputeCounter() as counter:
        trainer.train(lambda row: marks.append(counter.now))
        before = counter.now
        trainer.validator.score(trainer.state.policies)
        look = counter.now - before
        prompts = prompts_of_step(trainer.source, config, 0)
        control_rollout(trainer.state.policies, prompts, config, 0)
        control = counter.now - before - look
    step = (marks[PLAIN] - marks[0]) * (1 / PLAIN)
    start = marks[0] - step - look - control
    cost = RunCost(step, start, look, control, config.validation.every, config.reference_eval_every)
    return cost if start.flops >= 0 else replace(cost, start=NO_COMPUTE)


__all__ = ["AnyConfig", "RunCost", "count_cost"]
