"""A reward of your own from one function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, overload

from lvrpo.errors import InputError, LvrpoError, describe_error
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Failures, SampleIndex, Scores, image_problem, score_each
from lvrpo.types import TASKS, Group, OutputKind, Prompt, TaskKind, TextSegment, Trajectory

Function = Callable[..., Any]
"""Any: a number or None, or a list of them, or what converts to either."""
Builder = Callable[..., "FunctionReward"]


def _tokens(trajectory: Trajectory) -> list[int]:
    """The tokens of the last sampled text, with its end token."""
    return next(s.tokens.tolist() for s in reversed(trajectory.segments) if isinstance(s, TextSegment))


PARAMETERS: dict[str, Callable[[Trajectory], Any]] = {
    "trajectory": lambda trajectory: trajectory,
    "prompt": lambda trajectory: trajectory.prompt.text,
    "answer": lambda trajectory: trajectory.prompt.answer,
    "metadata": lambda trajectory: trajectory.prompt.metadata,
    "text": lambda trajectory: trajectory.text,
    "image": lambda trajectory: trajectory.image,
}
"""Arguments of a function by the names of its parameters: the whole trajectory, the words of the prompt, its right
answer, the further values of its row, the generated text, the generated image."""
BATCH_PARAMETERS: dict[str, Callable[[Trajectory], Any]] = {
    "trajectories": PARAMETERS["trajectory"],
    "prompts": PARAMETERS["prompt"],
    "answers": PARAMETERS["answer"],
    "metadata": PARAMETERS["metadata"],
    "texts": PARAMETERS["text"],
    "completions": lambda trajectory: [{"role": "assistant", "content": trajectory.text}],
    "completion_ids": _tokens,
    "images": PARAMETERS["image"],
}
"""Arguments of a function of all outputs at once, each a list with an entry for every output; ``completions`` are texts
as TRL gives those of image-text models, conversations of one message, and ``completion_ids`` their tokens."""
BATCH = frozenset({"trajectories", "prompts", "texts", "completions", "completion_ids", "images"})
"""A required parameter of this name makes a function one of all outputs at once."""
NEEDS: dict[str, OutputKind] = {
    "text": "text",
    "texts": "text",
    "completions": "text",
    "completion_ids": "text",
    "image": "image",
    "images": "image",
}
"""The output without which an argument has no value."""
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
    ``image`` is about images, one of ``text`` about texts, and prompts that ask for no such output are not scored;
    ``outputs`` and ``tasks`` narrow it further. ``waits``: it waits for another program, such as a server, and may be
    called in a thread while further groups are sampled (see ``Reward``).

    None or an exception masks that one output, with its reason; nothing else is ever put in its place.

    A function with a required parameter of ``BATCH`` is called once with lists of all outputs and returns as many
    numbers, which suits a model on a GPU. Parameters without a default that are neither in ``BATCH_PARAMETERS`` nor
    options are lists of that value of ``metadata``, as the reward functions of TRL have them; ``**kwargs`` takes all
    others, None where a row has no such value:

        def accuracy(completions, solution, **kwargs):
            return [float(done[0]["content"] == right) for done, right in zip(completions, solution)]

    An exception in it, or another number of scores, masks all of its outputs; None among the scores masks one.
    """
    if outputs is not None and (not outputs or isinstance(outputs, str) or not set(outputs) <= set(OUTPUTS)):
        raise InputError(f"reward(outputs={outputs!r}): must be of text and image, such as ['image']")
    if isinstance(tasks, str) or not set(tasks) <= set(TASKS):
        raise InputError(f"reward(tasks={tasks!r}): must be of {', '.join(TASKS)}")

    def decorate(function: Function) -> Builder:
        handed = _parameter_names(function)
        is_batch = bool(BATCH & {*handed})
        needs: tuple[OutputKind, ...] = tuple(kind for kind in OUTPUTS if kind in {NEEDS.get(name) for name in handed})
        judges: tuple[OutputKind, ...] = tuple(kind for kind in OUTPUTS if kind in (outputs or needs or OUTPUTS))
        signature = inspect.signature(function)

        def build(**options: Any) -> FunctionReward:  # Any: each function has its own options
            columns = _columns(function, {*handed, *options}) if is_batch else ()
            given = dict.fromkeys(name for name in (*handed, *columns) if name in signature.parameters)
            signature.bind(*([] if given else [None]), **given, **options)  # a TypeError here is a wrong option
            kind = BatchFunctionReward if is_batch else FunctionReward
            return kind(function, options, judges, tuple(tasks), needs, waits, columns)

        build.__doc__, build.__name__ = function.__doc__, _name(function)
        vars(build)["makes"] = FunctionReward  # by which the registry knows that this function builds a reward
        return build

    return decorate if function is None else decorate(function)


def _parameter_names(function: Function) -> tuple[str, ...]:
    """Parameters of a function that are filled in; ("trajectory",) if its first parameter has another name.

    Raises InputError for a function that takes nothing, or takes one of these by its place alone, and for a coroutine.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of functions written in C
        name = _name(function)
        raise InputError(f"reward {name!r}: its parameters are not known: write a def that calls it") from None
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    is_batch = any(name in BATCH for name in required)
    found = tuple(name for name in parameters if name in (BATCH_PARAMETERS if is_batch else PARAMETERS))
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {_name(function)!r}: is async, and nothing would wait for it: write it without")
    if all(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise InputError(
            f"reward {_name(function)!r}: takes nothing: write def {_name(function)}(image), or another of "
            f"{', '.join(PARAMETERS)}"
        )
    for name in (*found, *(required if is_batch else ())):
        if parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
            raise InputError(f"reward {_name(function)!r}: {name!r} is given by its name: take the / after it out")
    return found or ("trajectory",)


def _columns(function: Function, others: set[str]) -> tuple[str, ...]:
    """Parameters of a function of all outputs that are lists of a value of ``metadata``."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind in named and name not in others
    )


def as_reward(found: Any) -> Any:
    """A function, or another object that can be called, as the builder of a reward; classes, rewards and such builders
    as they are. Any: an object of the user."""
    is_made = isinstance(found, type) or any(hasattr(found, name) for name in ("applies", "score", "makes"))
    return reward(found) if callable(found) and not is_made else found


def _name(function: Function) -> str:
    """The name of a function, of that within a ``functools.partial``, or of the class of another object."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", type(function).__name__)


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
        columns: tuple[str, ...] = (),
    ) -> None:
        self.waits, self.columns = waits, columns
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


class BatchFunctionReward(FunctionReward):
    """Calls a function once for all outputs of a step to which it applies."""

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        found: dict[SampleIndex, Trajectory] = {}
        failures: Failures = {}
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                problem = self._problem(trajectory)
                if problem:
                    failures[p, g] = problem
                else:
                    found[p, g] = trajectory
        values: dict[SampleIndex, float] = {}
        for index, score in zip(found, self._of_all(list(found.values())), strict=True):
            if isinstance(score, str):
                failures[index] = score
            else:
                values[index] = score
        return Scores.of(groups, values, failures)

    def _problem(self, trajectory: Trajectory) -> str | None:
        """Why the function is not given an output; None where it is."""
        if "image" in self.needs and (problem := image_problem(trajectory)):
            return problem
        missing = [name for name in self.columns if name not in trajectory.prompt.metadata]
        return f"its row has no value {missing[0]!r}" if missing else None

    def _column_names(self, trajectories: Sequence[Trajectory]) -> Sequence[str]:
        """The values of ``metadata`` that the function takes."""
        parameters = inspect.signature(self.function).parameters
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return self.columns
        known = dict.fromkeys(name for trajectory in trajectories for name in trajectory.prompt.metadata)
        return [*self.columns, *(name for name in known if name not in {*parameters, *self.options})]

    def _of_all(self, trajectories: Sequence[Trajectory]) -> list[float | str]:
        """The scores, or why there is none."""
        if not trajectories:
            return []
        own = {name: [BATCH_PARAMETERS[name](trajectory) for trajectory in trajectories] for name in self.handed}
        own |= {name: [t.prompt.metadata.get(name) for t in trajectories] for name in self._column_names(trajectories)}
        try:
            given = self.function(**own, **self.options)
            if isinstance(given, Mapping | Set | str):  # they have another order, or keys in place of scores
                why = f"the function gave a {type(given).__name__}: return a list with a number for each output"
                return [why] * len(trajectories)
            found = list(given)
            if len(found) != len(trajectories):
                return [f"the function gave {len(found)} scores for {len(trajectories)} outputs"] * len(trajectories)
            return ["the function gave no score" if one is None else float(one) for one in found]
        except LvrpoError:
            raise
        except (Exception, SystemExit) as error:  # code of the user may raise anything
            return [describe_error(error)] * len(trajectories)
