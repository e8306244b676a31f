"""A reward of your own from one function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, overload

from lvrpo.errors import InputError, LvrpoError, describe_error
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Scores, score_each
from lvrpo.types import TASKS, Group, OutputKind, Prompt, TaskKind, Trajectory

Function = Callable[..., float | None]
Builder = Callable[..., "FunctionReward"]

PARAMETERS: dict[str, Callable[[Trajectory], Any]] = {
    "trajectory": lambda trajectory: trajectory,
    "prompt": lambda trajectory: trajectory.prompt.text,
    "answer": lambda trajectory: trajectory.prompt.answer,
    "metadata": lambda trajectory: trajectory.prompt.metadata,
    "text": lambda trajectory: trajectory.text,
    "image": lambda trajectory: trajectory.image,
}
"""Arguments of a function by the names of its parameters: the whole trajectory, the words of the prompt, its right
answer, the further values of its row, the generated text, the generated picture."""
LISTS = frozenset({"completions", "images", "prompts"})
"""Parameters of reward functions of other libraries, which score a whole batch."""
OUTPUTS: tuple[OutputKind, ...] = ("text", "image")


@overload
def reward(function: Function, /) -> Builder: ...


@overload
def reward(
    *, outputs: Sequence[OutputKind] | None = None, tasks: Sequence[TaskKind] = TASKS, waits: bool = False
) -> Callable[[Function], Builder]: ...


def reward(
    function: Function | None = None,
    /,
    *,
    outputs: Sequence[OutputKind] | None = None,
    tasks: Sequence[TaskKind] = TASKS,
    waits: bool = False,
) -> Builder | Callable[[Function], Builder]:
    """Turns a function that returns a number (or None) into a reward.

        @lvrpo.reward
        def brightness(image, target=0.5):
            return -abs(float(image.mean()) - target)

    In the configuration: ``rewards: [{name: "./my_rewards.py:brightness", options: {target: 0.6}}]``. There the
    decorator may be left out. Its parameters select its arguments (``PARAMETERS``); all others are options. One of
    ``image`` is about pictures, one of ``text`` about texts, and prompts that ask for no such output are not scored;
    ``outputs`` and ``tasks`` narrow it further. ``waits``: it waits for another program, such as a server, and may be
    called in a thread while further groups are sampled (see ``Reward``).

    None or an exception masks that one output, with its reason; nothing else is ever put in its place.
    """
    if outputs is not None and (not outputs or isinstance(outputs, str) or not set(outputs) <= set(OUTPUTS)):
        raise InputError(f"reward(outputs={outputs!r}): must be of text and image, such as ['image']")
    if isinstance(tasks, str) or not set(tasks) <= set(TASKS):
        raise InputError(f"reward(tasks={tasks!r}): must be of {', '.join(TASKS)}")

    def decorate(function: Function) -> Builder:
        handed = _parameter_names(function)
        needs: tuple[OutputKind, ...] = tuple(kind for kind in OUTPUTS if kind in handed)
        judges: tuple[OutputKind, ...] = tuple(kind for kind in OUTPUTS if kind in (outputs or needs or OUTPUTS))
        signature = inspect.signature(function)

        def build(**options: Any) -> FunctionReward:  # Any: each function has its own options
            mine = dict.fromkeys(name for name in handed if name in signature.parameters)
            signature.bind(*([] if mine else [None]), **mine, **options)  # a TypeError here is a wrong option
            return FunctionReward(function, options, judges, tuple(tasks), needs, waits)

        build.__doc__, build.__name__ = function.__doc__, function.__name__
        vars(build)["makes"] = FunctionReward  # by which the registry knows that this function builds a reward
        return build

    return decorate if function is None else decorate(function)


def _parameter_names(function: Function) -> tuple[str, ...]:
    """Parameters of a function that are filled in; ("trajectory",) if its first parameter has another name.

    Raises InputError for a function that takes nothing or lists of outputs, and for a coroutine.
    """
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    found = tuple(name for name in names if name in PARAMETERS)
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {function.__name__!r}: is async, and nothing would wait for it: write it without")
    lists = [name for name in names if name in LISTS and parameters[name].default is inspect.Parameter.empty]
    if lists:
        raise InputError(
            f"reward {function.__name__!r}: takes {lists[0]}, a list, and is called for one output at a time: write "
            f"def {function.__name__}(text), or another of {', '.join(PARAMETERS)}, and return one number"
        )
    if not names:
        raise InputError(
            f"reward {function.__name__!r}: takes nothing: write def {function.__name__}(image), or another of "
            f"{', '.join(PARAMETERS)}"
        )
    return found or ("trajectory",)


def as_reward(found: Any) -> Any:
    """A plain function as the builder of a reward; any other object as it is. Any: an object of the user."""
    return reward(found) if inspect.isfunction(found) and "makes" not in vars(found) else found


class FunctionReward:
    """Calls a function for every output."""

    sides = ()

    def __init__(
        self,
        function: Function,
        options: dict[str, Any],
        judges: tuple[OutputKind, ...],
        tasks: tuple[TaskKind, ...],
        needs: tuple[OutputKind, ...] = (),
        waits: bool = False,
    ) -> None:
        self.waits = waits
        self.function, self.options, self.judges, self.tasks, self.needs = function, options, judges, tasks, needs
        parameters = inspect.signature(function).parameters
        self.handed = [name for name in _parameter_names(function) if name in parameters]

    def applies(self, prompt: Prompt) -> bool:
        made = prompt.output
        return prompt.task in self.tasks and {*self.needs} <= {*made} and any(kind in made for kind in self.judges)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        return score_each(groups, self._of)

    def _of(self, trajectory: Trajectory) -> float | str:
        """The score, or why there is none."""
        own = {name: PARAMETERS[name](trajectory) for name in self.handed}
        first = () if own else (trajectory,)
        try:
            found = self.function(*first, **own, **self.options)
            return "the function gave no score" if found is None else float(found)
        except LvrpoError:
            raise
        except (Exception, SystemExit) as error:  # code of the user may raise anything
            return describe_error(error)
