"""The configuration of a reward, the reward that is made from it, and its scores with failed ones masked."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from lvrpo.config import Config, parse_section
from lvrpo.errors import ContractError, InputError, LvrpoError, describe_error
from lvrpo.policies.base import Judge
from lvrpo.policies.loading import load_policy
from lvrpo.registry import is_file, resolve
from lvrpo.rewards import OLD_NAMES, REWARDS
from lvrpo.rewards.async_scoring import AsyncScores
from lvrpo.rewards.base import SIDES, Reward, Scores, Side, join_judges, judge_fingerprint
from lvrpo.rewards.function import as_reward
from lvrpo.rewards.secrets import is_secret_name, looks_like_secret
from lvrpo.types import Group, OutputKind, Prompt, TaskKind

METHODS = ("applies", "score")
"""Methods that the class of a reward must have."""


class RayConfig(Config):
    """Actors of a reward in a Ray cluster."""

    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each replica; a fraction shares a GPU."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for each replica."""
    replicas: int = Field(default=1, ge=1)
    """Number of actors that score groups in parallel; all processes of a run share them."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Limit for one group in seconds; then its actor is restarted, and the group has no scores of this reward."""

    @model_validator(mode="after")
    def _whole_cards(self) -> Self:
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus={self.num_gpus}: must be a whole number above 1: only one card can be shared")
        return self


class WhereConfig(Config):
    """Placement of a reward outside the training processes."""

    ray: RayConfig


class WeightSchedule(Config):
    """Schedule of a reward's weight over completed steps: a list of [step, factor] points."""

    kind: Literal["constant", "linear", "step"] = "linear"
    """linear: straight between the points; step: the last point that was reached; both level outside. constant: one."""
    points: tuple[tuple[int, float], ...] = Field(min_length=1)
    """[step, factor] pairs, steps rising; the factor multiplies the weight of the row."""

    @model_validator(mode="after")
    def _points_fit(self) -> Self:
        steps = [step for step, _ in self.points]
        if any(step < 0 for step in steps) or steps != sorted(set(steps)):
            raise ValueError(f"points={[list(p) for p in self.points]}: steps must rise from 0 or later")
        if any(not 0 <= factor < math.inf for _, factor in self.points):
            raise ValueError(f"points={[list(p) for p in self.points]}: factors must be numbers >= 0")
        if self.kind == "constant" and len(self.points) > 1:
            raise ValueError("kind=constant: has one point: use linear or step for more")
        return self

    def factor(self, step: int) -> float:
        """Factor of the weight at the step after ``step`` steps."""
        before = [point for point in self.points if point[0] <= step]
        after = [point for point in self.points if point[0] > step]
        if not before or not after or self.kind != "linear":
            return before[-1][1] if before else after[0][1]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def _name_of_today(name: str) -> str:
    if name in OLD_NAMES:
        raise ValueError(OLD_NAMES[name])
    return name


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Options are written into run directories."""
    _refuse_secrets(options)
    return options


class SuccessConfig(Config):
    """A rule that says whether an output is right: with it validation, evaluation and curves count success."""

    name: str
    """./my_file.py:NAME, a function that returns True or False, or an entry of REWARDS whose scores are 0 or 1."""
    options: dict[str, Any] = Field(default={})
    """Its options. Any: each rule has its own."""

    _by_its_name_of_today = field_validator("name")(_name_of_today)
    _without_keys = field_validator("options")(_without_secrets)


class RewardConfig(Config):
    """Each row is one reward: its options, its weight, and what a failed score does."""

    name: str
    """An entry of REWARDS; a class or function of your own: my_package.module:Name, ./my_file.py:Name; or task, the
    reward of the task that ``data.source`` names."""
    weight: float = Field(default=1.0, ge=0)
    """0: scored and recorded, never trained on; a held-out scorer for ``lvrpo audit``."""
    tasks: tuple[TaskKind, ...] | None = None
    """Only these tasks; None: every task whose prompts it applies to."""
    label: str | None = None
    """Name in tables and curves; by default ``name``."""
    options: dict[str, Any] = Field(default={})
    """Arguments of the reward's class. Any: each class has its own."""
    segments: tuple[OutputKind, ...] | None = Field(default=None, min_length=1)
    """Segments it scores in trajectories of several (``advantages.stages: per_segment``); None: as its class says."""
    on_failure: Literal["mask", "stop"] = "mask"
    """Handling of a failed score: mask it with its reason, or stop the run."""
    max_failed: float | None = Field(default=None, ge=0, le=1)
    """Maximum share of failed scores of the reward, in the step-0 checks and in each step; a larger share stops the
    run. None: no score may fail in the step-0 checks, more than half failing in a step stops the run, and a run with
    more than ``health.max_failed`` failed scores in total is not healthy (exit code 3)."""
    clip: tuple[float | None, float | None] | None = None
    """[low, high], bounds of the raw score, either may be null; the share of clipped scores is recorded."""
    normalize: Literal["group", "batch", "none"] | None = None
    """Normalization before rewards are summed; null: as ``advantages.kind`` defines. group: by the group's std;
    batch: by the std of all groups of the task; none: not at all."""
    schedule: WeightSchedule | None = None
    """Factors of ``weight`` by step, such as {kind: linear, points: [[0, 1], [100, 0]]}."""
    judge: str | None = None
    """Another frozen model (a folder, a run, a built-in name) that judges for this row; null: the run's own judge."""
    where: WhereConfig | None = None
    """Placement in actors of a Ray cluster, such as {ray: {num_gpus: 1, replicas: 2}}; null: in each process."""

    _by_its_name_of_today = field_validator("name")(_name_of_today)
    _without_keys = field_validator("options")(_without_secrets)

    @field_validator("clip")
    @classmethod
    def _ends_fit(cls, clip: tuple[float | None, float | None] | None) -> tuple[float | None, float | None] | None:
        if clip is not None:
            low, high = (end for end in clip)
            if (low is None and high is None) or (low is not None and high is not None and not low < high):
                raise ValueError("give [low, high] with low < high; one of them may be null")
        return clip

    @property
    def title(self) -> str:
        return self.label or (self.name.rpartition(":")[2] if is_file(self.name) else self.name)

    def weight_at(self, step: int) -> float:
        """The weight of the step after ``step`` steps."""
        return self.weight if self.schedule is None else self.weight * self.schedule.factor(step)


@runtime_checkable
class SupportsPrefetch(Protocol):
    """A reward that asks another process whether it applies to prompts."""

    def prefetch_applies(self, prompts: Sequence[Prompt], keep: bool = False) -> None:
        """Asks about all prompts at once; ``keep``: and remembers what it knew."""
        ...


@dataclass(frozen=True)
class ConfiguredReward:
    """A reward with its configuration."""

    config: RewardConfig
    reward: Reward
    judge: Judge | None = None
    """A judge that replaces the run's judge."""
    async_scores: AsyncScores = field(default_factory=AsyncScores, compare=False, repr=False)
    """Scores of groups of ``submit``."""

    def scores(self, prompt: Prompt) -> bool:
        """Whether it has a say in the outputs of a prompt."""
        tasks = self.config.tasks
        try:
            return (tasks is None or prompt.task in tasks) and bool(self.reward.applies(prompt))
        except LvrpoError:
            raise
        except (Exception, SystemExit) as error:  # code of the user may raise anything
            raise ContractError(
                f"reward {self.config.title!r}: applies failed on prompt {prompt.id!r}: {describe_error(error)}"
            ) from error

    @property
    def foreign(self) -> bool:
        """Whether it is the user's code, which may modify its arguments and gets a copy; an actor has a copy anyway."""
        return self.config.name not in REWARDS and self.config.where is None

    @property
    def waits(self) -> bool:
        """Whether it waits for another program and may do so in a thread, while the policy samples."""
        own = bool(getattr(self.reward, "waits", False))  # optional in a class of the user
        return self.config.where is not None or (own and not self.sides)

    def submit(self, groups: Sequence[Group]) -> None:
        """Begins to score groups; ``checked_scores`` takes the scores."""

        def score(submitted: Sequence[Group]) -> tuple[Sequence[Group], Scores]:
            nobody: Any = None  # a reward without sides asks no judge
            if isinstance(self.reward, SupportsPrefetch):
                self.reward.prefetch_applies([group.prompt for group in submitted], keep=True)
            chosen = [group for group in submitted if self.scores(group.prompt)]
            return chosen, self.score(chosen, nobody) if chosen else Scores(torch.zeros(0, len(submitted[0])))

        self.async_scores.submit(groups, score)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        """``Reward.score``, of a copy where the reward is the user's code."""
        return self.reward.score(copy.deepcopy(groups) if self.foreign else groups, judge)

    @property
    def judged_by(self) -> str:
        """The model that judges in addition to the run's judge or in its place; "" for none."""
        return join_judges("" if self.judge is None else judge_fingerprint(self.judge), self.reward)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides of the run's judge that it uses; none if another model judges."""
        return () if self.judge is not None else getattr(self.reward, "sides", SIDES)  # optional in a class of the user

    @property
    def relative(self) -> bool:
        """Whether a score says only how an output compares with the others of its group."""
        return bool(getattr(self.reward, "relative", False))  # optional in a class of the user

    @property
    def judges(self) -> tuple[OutputKind, ...]:
        """The kinds of segments that it judges where a trajectory has several."""
        own = getattr(self.reward, "judges", ("text", "image"))  # optional in a class of the user
        return self.config.segments or own


def _refuse_secrets(options: Any, name: str = "", secret: bool = False) -> None:
    """Raises ValueError, which does not show it, where a key stands among options. Any: whatever YAML may hold.

    ``secret``: whether they stand under a name of keys, where any text is one.
    """
    if isinstance(options, Mapping):
        for key, value in options.items():
            _refuse_secrets(str(key), "the name of an option")
            _refuse_secrets(value, str(key), secret or is_secret_name(str(key)))
    elif isinstance(options, list | tuple):
        for value in options:
            _refuse_secrets(value, name, secret)
    elif isinstance(options, str) and (secret or looks_like_secret(options)):
        raise ValueError(
            f"{name}: looks like a key, and options are written to run directories: put it into an environment "
            "variable and name that in key_env"
        )


def configured_reward(config: RewardConfig, device: str = "cpu", given: Reward | None = None) -> ConfiguredReward:
    """A row whose reward is made in this process, or ``given``; ``device``: of a judge of its own."""
    reward = make_reward(config) if given is None else given
    if config.judge is None:
        return ConfiguredReward(config, reward)
    if not getattr(reward, "sides", SIDES):  # optional in a class of the user
        raise InputError(f"rewards.{config.title}.judge={config.judge}: this reward asks no judge: leave it out")
    return ConfiguredReward(config, reward, load_policy(config.judge, device).make_reference())


def make_reward(config: RewardConfig, section: str = "") -> Reward:
    """The object of a row; ``section``: of the configuration, in messages."""
    section = section or f"rewards.{config.title}"
    cls = resolve("reward", config.name, REWARDS, METHODS, adapt=as_reward)
    if isinstance(cls, type) and issubclass(cls, Config):
        reward: Any = parse_section(cls, config.options, f"{section}.options")
        join_judges(reward)  # reads the property, which makes endpoints and members: their faults are reported here
        return reward
    try:
        return cls(**config.options)
    except TypeError as error:
        # names alone: a value in a wrong place may be a key
        named = ", ".join(config.options) or "none"
        parameters = inspect.signature(cls).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = f"there are {', '.join(names)}" if names else f"see {config.name}"
        raise InputError(f"{section}.options ({named}): {error}: {known}") from None
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # code of the user may raise anything
        raise InputError(
            f"{section}: {config.name} cannot be made: {describe_error(error)}: correct its options, or the class"
        ) from error


def checked_scores(source: ConfiguredReward, groups: Sequence[Group], judge: Judge) -> Scores:
    """The scores of one reward, with every cell that is no number among the failures."""
    P, G, title = len(groups), len(groups[0]), source.config.title
    try:
        with _preserve_global_state():
            result = source.async_scores.take(groups) or source.score(groups, judge)
        values = torch.as_tensor(result.values, dtype=torch.float32).detach().cpu()
        failures = dict(result.failures)
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # code of the user may raise anything: masked or a stop, as configured
        values = torch.full((P, G), math.nan)
        failures = {(p, g): describe_error(error) for p in range(P) for g in range(G)}
    if values.shape != (P, G):
        raise ContractError(
            f"reward {title!r} returned shape {tuple(values.shape)} for {P} groups of {G}: return float ({P}, {G})"
        )
    for p, g in (~values.isfinite()).nonzero().tolist():
        failures.setdefault((p, g), f"the score is {float(values[p, g])}")
    if failures and source.config.on_failure == "stop":
        (p, g), reason = min(failures.items())  # whatever order they were found in
        raise ContractError(f"reward {title!r} failed on prompt {groups[p].prompt.id!r}, member {g}: {reason}")
    return Scores(values, failures)


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    """Puts back what code can change for the whole process: generators, gradients on or off, dtype, threads."""
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
        if cards:
            torch.cuda.set_rng_state_all(cards)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
