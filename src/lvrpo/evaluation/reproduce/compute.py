"""Compute budgets: FLOPs of a training step, and the number of steps within a budget.

Counts the forward and backward passes of all models (policy, averages, judge, reference), without the optimizer.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from lvrpo.errors import InputError
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.trainer import Trainer, reference_rollout


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    """FLOPs of attention with queries (B, H, L, E), keys (B, K, S, E) and values (B, K, S, F): 2 B H L S (E + F).

    Shapes, as ``FlopCounterMode`` gives them; masked scores count, as they are computed.
    """
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    """FLOPs of its backward pass: scores again, and the gradients of scores, values, queries and keys.

    2 B H L S (3 E + 2 F): five products where the forward pass has two.
    """
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


_ATEN = torch.ops.aten
ATTENTION = {
    **dict.fromkeys(
        (
            _ATEN._scaled_dot_product_flash_attention_for_cpu,
            _ATEN._scaled_dot_product_flash_attention,
            _ATEN._scaled_dot_product_efficient_attention,
            _ATEN._scaled_dot_product_cudnn_attention,
        ),
        attention_flops,
    ),
    **dict.fromkeys(
        (
            _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
            _ATEN._scaled_dot_product_flash_attention_backward,
            _ATEN._scaled_dot_product_efficient_attention_backward,
            _ATEN._scaled_dot_product_cudnn_attention_backward,
        ),
        _attention_backward_flops,
    ),
}
"""torch counts neither the CPU kernel nor grouped-query attention."""


class FlopCounter:
    """A context manager that counts the FLOPs of all models; ``now`` is the count so far.

    They are those of matrix products, convolutions and attention; a multiply-add is two.
    """

    def __init__(self) -> None:
        self._flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        self._left_out = 0
        self._before_step = 0
        self._hooks: list[Any] = []  # handles of torch, of several private classes

    @property
    def now(self) -> int:
        """Since the context was entered."""
        return self._flops.get_total_flops() - self._left_out

    def __enter__(self) -> Self:
        self._hooks = [
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        self._flops.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flops.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()

    def _begin_step(self, *_: object) -> None:
        self._before_step = self._flops.get_total_flops()

    def _end_step(self, *_: object) -> None:
        self._left_out += self._flops.get_total_flops() - self._before_step


AnyConfig = TrainConfig | PretrainConfig

AVERAGED_STEPS = 2
"""Steps to average; the first step, which does more, is left out."""


@dataclass(frozen=True)
class RunCost:
    """The FLOPs of a run as a function of its steps."""

    step: float
    """A step without validation: rollout, judge, reference, old policy and update."""
    start: float = 0.0
    """Once per run: the preflight checks."""
    validation: float = 0.0
    """A validation."""
    reference_eval: float = 0.0
    """A rollout of the reference."""
    validation_every: int = 1
    reference_eval_every: int = 1

    def total(self, steps: int) -> float:
        """Cost of ``steps`` steps, with validations at the start, every ``validation_every`` steps and at the end."""
        validations = 1 + -(-steps // self.validation_every)
        evals = -(-steps // self.reference_eval_every)
        return self.start + self.step * steps + self.validation * validations + self.reference_eval * evals

    def steps_within(self, budget: float) -> int:
        """The largest number of steps within the budget; raises InputError where it is 0."""
        if self.total(1) > budget:
            raise InputError(
                f"budget of {budget:.3g} FLOPs: one step takes {self.total(1):.3g}: give budget.steps more"
            )
        most = 2
        while self.total(most) <= budget:
            most *= 2
        return bisect_right(range(most), budget, key=self.total) - 1


def count_cost(config: AnyConfig) -> RunCost:
    """Counts the first steps of a run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, PretrainConfig):
            return _count_supervised(config, Path(folder) / "probe")
        return _count_alignment(config, Path(folder) / "probe")


def _count_supervised(config: PretrainConfig, folder: Path) -> RunCost:
    marks: list[int] = []
    trainer = Pretrainer.start(config.model_copy(update={"steps": AVERAGED_STEPS + 1, "held_out_every": 0}), folder)
    with trainer.run, FlopCounter() as counter:
        trainer.train(lambda row: marks.append(counter.now))
    return RunCost((marks[-1] - marks[0]) * (1 / AVERAGED_STEPS))


def _count_alignment(config: TrainConfig, folder: Path) -> RunCost:
    last = AVERAGED_STEPS + 2  # the last step validates
    changed = config.validation.model_copy(update={"every": last, "action": "warn", "overoptimization": None})
    rare = {"validation": changed, "reference_eval_every": last, "samples_every": last, "checkpoint_every": last}
    marks: list[int] = []
    trainer = Trainer.start(config.model_copy(update={**rare, "steps": last}), folder)
    with trainer.run, FlopCounter() as counter:
        trainer.train(lambda row: marks.append(counter.now))
        before = counter.now
        trainer.validator.score(trainer.state.policies)
        validation = counter.now - before
        prompts = prompts_of_step(trainer.source, config, 0)
        reference_rollout(trainer.state.policies, prompts, config, 0)
        reference_eval = counter.now - before - validation
    step = (marks[AVERAGED_STEPS] - marks[0]) * (1 / AVERAGED_STEPS)
    start = marks[0] - step - validation - reference_eval
    cost = RunCost(step, start, validation, reference_eval, config.validation.every, config.reference_eval_every)
    return cost if start >= 0 else replace(cost, start=0.0)
