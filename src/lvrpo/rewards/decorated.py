"""A reward of one's own from one function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lvrpo.errors import InputError, LvrpoError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.foreign import described
from lvrpo.types import TASKS, Group, OutputKind, Prompt, Task, Trajectory


def reward(
    *, outputs: Sequence[OutputKind], tasks: Sequence[Task] = TASKS
) -> Callable[[Callable[..., float | None]], Callable[..., DecoratedReward]]:
    """Turns ``f(trajectory, **options) -> float | None`` into a reward.

        from lvrpo.rewards.decorated import reward

        @reward(outputs=["image"])
        def brightness(trajectory, target=0.5):
            return -abs(float(trajectory.image.mean()) - target)

    In the configuration: ``rewards: [{name: "my_package.my_rewards:brightness", options: {target: 0.6}}]``.

    ``outputs``: the kinds of output that it is about; it applies to prompts that ask for one of them, in ``tasks``.
    None or an exception masks that one output, with its reason; nothing else is ever put in its place.
    """
    known = set(outputs) <= {"text", "image"} and set(tasks) <= set(TASKS)
    if not known or not outputs or isinstance(outputs, str):
        raise InputError(f"reward(outputs={outputs!r}, tasks={tasks!r}): outputs are text and image, tasks {TASKS}")

    def decorate(function: Callable[..., float | None]) -> Callable[..., DecoratedReward]:
        signature = inspect.signature(function)

        def build(**options: Any) -> DecoratedReward:  # Any: each function has its own options
            signature.bind(None, **options)  # a TypeError here is a wrong option of the configuration
            return DecoratedReward(function, options, tuple(outputs), tuple(tasks))

        build.__doc__, build.__name__ = function.__doc__, function.__name__
        return build

    return decorate


class DecoratedReward:
    """Calls a function for every output."""

    sides = ()

    def __init__(
        self,
        function: Callable[..., float | None],
        options: dict[str, Any],
        judges: tuple[OutputKind, ...],
        tasks: tuple[Task, ...],
    ) -> None:
        self.function, self.options, self.judges, self.tasks = function, options, judges, tasks

    def applies(self, prompt: Prompt) -> bool:
        return prompt.task in self.tasks and any(kind in prompt.output for kind in self.judges)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                found = self._of(trajectory)
                if isinstance(found, str):
                    failures[p, g] = found
                else:
                    values[p, g] = found
        return Scores(values, failures)

    def _of(self, trajectory: Trajectory) -> float | str:
        """The score, or why there is none."""
        try:
            found = self.function(trajectory, **self.options)
            return "the function gave no score" if found is None else float(found)
        except LvrpoError:
            raise
        except (Exception, SystemExit) as error:  # anybody's function may raise anything
            return described(error)
