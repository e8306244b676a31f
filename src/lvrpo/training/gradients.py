"""The gradient audit: how the tasks' gradients agree, per expert and layer; and what is done where they do not.

Metrics: ``gradient/norm/TASK/PART`` and ``gradient/cosine/TASK+TASK/PART``, where PART is ``all``, an expert (reading,
drawing, shared), or a layer of one (``reading/layer_2``).
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
from lvrpo.types import TASKS, Task

Mixing = Literal["sum", "pcgrad", "norm_balanced"]

EXPERTS: Mapping[str, str] = {"understand": "reading", "generate": "drawing"}
"""The words for ``Policy.parameter_groups`` in the metrics."""


class GradientAuditConfig(Config):
    """When the tasks' gradients are compared."""

    every: int = Field(default=0, ge=0)
    """Every so many steps, into the metrics under gradient/; 0: never. It changes no weight; it keeps one more gradient
    per task in memory. Where texts and drawings are stepped in turn, a task's gradient is the sum over both."""


class TaskGradients:
    """The gradients of one update, kept apart by task; of all phases, where kinds of segments are stepped in turn.

    On several ranks those of this rank's shards, summed over the ranks before they are taken.
    """

    def __init__(self, policy: Policy) -> None:
        """``policy``: its weights not made whole, where they are divided."""
        assert isinstance(policy, nn.Module)
        expert_of = {
            id(p): EXPERTS.get(expert, expert) for expert, params in policy.parameter_groups().items() for p in params
        }
        self.parameters = {name: p for name, p in policy.named_parameters() if id(p) in expert_of}
        self.expert_of = {name: expert_of[id(p)] for name, p in self.parameters.items()}
        self.tasks: dict[Task, dict[str, Tensor]] = {}
        self.total: dict[str, Tensor] = {}
        """Of all tasks, since the last ``give_back``."""

    def take(self, task: Task) -> None:
        """Moves the gradient in the parameters to the task's account.

        The total is added up in the order in which autograd would have, so it is the same to the last bit.
        """
        own = self.tasks.setdefault(task, {})
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            for account in (own, self.total):
                if name in account:
                    account[name].add_(parameter.grad)
                else:
                    account[name] = parameter.grad.clone()
            parameter.grad = None

    def give_back(self, mixing: Mixing, seed: int) -> None:
        """Leaves the mixed gradient in the parameters; conflicts and norms are those of each expert alone.

        With ``sum`` that is what was taken since the last call; the others mix all that was ever taken.
        """
        for expert in dict.fromkeys(self.expert_of.values()) if mixing != "sum" else ():
            names = [name for name in self.total if self.expert_of[name] == expert]
            if not names:
                continue
            gradients = [self._dense(account, names) for account in self.tasks.values()]
            gram = sum_over_ranks(gram_matrix(gradients))
            weights = projection_weights(gram, seed) if mixing == "pcgrad" else balance_weights(gram)
            for name, mixed in zip(names, combine_gradients(gradients, weights), strict=True):
                local(self.total[name]).copy_(mixed)
        for name, gradient in self.total.items():
            self.parameters[name].grad = gradient
        self.total = {}

    def report(self, metrics: Metrics) -> None:
        """Norms and cosines of every part that has a gradient."""
        tasks = sorted(self.tasks, key=TASKS.index)
        accounts = [self.tasks[task] for task in tasks]
        grams: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(tasks), len(tasks), dtype=torch.float64))
        for name in dict.fromkeys(name for account in accounts for name in account):
            gram = gram_matrix([self._dense(account, [name]) for account in accounts])
            for part in self._parts(name):
                grams[part] += gram
        for part, own in grams.items():
            gram = sum_over_ranks(own)
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

    def _dense(self, account: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
        """Of this rank's shards."""
        return [
            local(account[name]) if name in account else torch.zeros_like(local(self.parameters[name]))
            for name in names
        ]
