"""Per-task gradients: audit of their norms and cosines per expert and layer, and mixing of conflicting gradients.

Metrics: ``gradient/norm/TASK/PART`` and ``gradient/cosine/TASK+TASK/PART``, where PART is ``all``, an expert
(understand, generate, shared), or a layer of an expert (``understand/layer_2``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lvrpo.algorithms import balance_weights, combine_gradients, cosine_matrix, gram_matrix, projection_weights
from lvrpo.config import Config
from lvrpo.distributed import local, sum_over_ranks
from lvrpo.policies.base import Policy
from lvrpo.training.losses.base import Metrics
from lvrpo.types import TASKS, TaskKind

Mixing = Literal["sum", "pcgrad", "norm_balanced"]


class GradientAuditConfig(Config):
    """The gradient audit."""

    every: int = Field(default=0, ge=0)
    """Steps between two audits, logged under gradient/; 0: never. It does not change the update, and stores one more
    gradient per task. With several phases (different lr_scale) a task's gradient is the sum over phases."""


class GradientsByTask:
    """The gradients of one update by task, over all phases (``TrainConfig.phases``).

    With several ranks: this rank's shards of the reduced gradients.
    """

    def __init__(self, policy: Policy) -> None:
        """``policy``: outside ``whole_weights`` if sharded."""
        assert isinstance(policy, nn.Module)
        expert_of = {id(p): expert for expert, params in policy.parameter_groups().items() for p in params}
        self.parameters = {name: p for name, p in policy.named_parameters() if id(p) in expert_of}
        self.expert_of = {name: expert_of[id(p)] for name, p in self.parameters.items()}
        self.tasks: dict[TaskKind, dict[str, Tensor]] = {}
        self.total: dict[str, Tensor] = {}
        """Sum over tasks since the last ``write_mixed``."""

    def store(self, task: TaskKind) -> None:
        """Moves the parameters' gradients to those of the task.

        The total is summed in the order of autograd's accumulation, so it is bitwise equal.
        """
        of_task = self.tasks.setdefault(task, {})
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            for gradients in (of_task, self.total):
                if name in gradients:
                    gradients[name].add_(parameter.grad)
                else:
                    gradients[name] = parameter.grad.clone()
            parameter.grad = None

    def write_mixed(self, mixing: Mixing, seed: int) -> None:
        """Writes the mixed gradient to the parameters, mixed separately in each expert.

        ``sum``: the gradients stored since the last call; other methods mix all stored gradients.
        """
        for expert in dict.fromkeys(self.expert_of.values()) if mixing != "sum" else ():
            names = [name for name in self.total if self.expert_of[name] == expert]
            if not names:
                continue
            gradients = [self._dense(of_task, names) for of_task in self.tasks.values()]
            gram = sum_over_ranks(gram_matrix(gradients))
            weights = projection_weights(gram, seed) if mixing == "pcgrad" else balance_weights(gram)
            for name, mixed in zip(names, combine_gradients(gradients, weights), strict=True):
                local(self.total[name]).copy_(mixed)
        for name, gradient in self.total.items():
            self.parameters[name].grad = gradient
        self.total = {}

    def report(self, metrics: Metrics) -> None:
        """Logs norms and cosines of every part that has a gradient."""
        tasks = sorted(self.tasks, key=TASKS.index)
        by_task = [self.tasks[task] for task in tasks]
        grams: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(tasks), len(tasks), dtype=torch.float64))
        for name in dict.fromkeys(name for gradients in by_task for name in gradients):
            gram = gram_matrix([self._dense(gradients, [name]) for gradients in by_task])
            for part in self._parts(name):
                grams[part] += gram
        for part, local_gram in grams.items():
            gram = sum_over_ranks(local_gram)
            cosines = cosine_matrix(gram)
            for i, task in enumerate(tasks):
                metrics.add(f"gradient/norm/{task}/{part}", float(gram[i, i].sqrt()))
            for i, j in combinations(range(len(tasks)), 2):
                if cosines[i, j].isfinite():
                    metrics.add(f"gradient/cosine/{tasks[i]}+{tasks[j]}/{part}", float(cosines[i, j]))

    def _parts(self, name: str) -> list[str]:
        expert = self.expert_of[name]
        layer = re.search(r"\.layers\.(\d+)\.", name)
        return ["all", expert, *([f"{expert}/layer_{layer[1]}"] if layer else [])]

    def _dense(self, gradients: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
        """This rank's shards, with zeros for missing gradients."""
        return [
            local(gradients[name]) if name in gradients else torch.zeros_like(local(self.parameters[name]))
            for name in names
        ]
