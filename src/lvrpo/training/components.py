"""The components of a run: task, rewards, held-out prompts and success, each validated before the run starts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from lvrpo.data.base import DATASETS, Task
from lvrpo.data.rows import RowPrompts, require_texts
from lvrpo.errors import InputError, LvrpoError, describe_error
from lvrpo.policies.base import READS_ONLY, Policy, can_draw, check_text
from lvrpo.policies.loading import can_draw_after_text, possible_tasks, stored_image_size
from lvrpo.registry import resolve
from lvrpo.rewards import function
from lvrpo.rewards.base import Reward
from lvrpo.rewards.config import ConfiguredReward, RewardConfig, make_reward
from lvrpo.rewards.success import HeldOutScorer
from lvrpo.rewards.table import IN_PYTHON, TASK_REWARD, build_rewards
from lvrpo.training.config import ROW_SOURCES, TrainConfig
from lvrpo.training.judge import JudgeRows, build_judge_rows, require_judge_used
from lvrpo.training.validation import Validator
from lvrpo.types import Example, Prompt, Split, TaskKind

REWARD_CHECK_PROMPTS = 32
"""Prompts per task on which the rewards are checked before a run starts."""

MAX_JUDGE_IMAGES = 64
"""Maximum number of held-out images on which a new judge is evaluated."""

TEST_PROMPTS_PER_TASK = 256
"""Test prompts per task from a source of unknown length."""


@dataclass(frozen=True)
class CustomComponents:
    """Objects that a Python caller passes instead of naming them in a configuration."""

    sources: Mapping[Split, Task] = field(default_factory=dict)
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    """Rewards by the title of their entry in the configuration."""


NO_CUSTOM_COMPONENTS = CustomComponents()


@dataclass(frozen=True)
class Components:
    """All components of an alignment run except its policy."""

    source: Task
    rewards: Sequence[ConfiguredReward]
    validator: Validator
    judge_rows: JudgeRows
    """Held-out rows on which a new judge is evaluated."""
    scorer: HeldOutScorer
    """Scores held-out prompts in validation and evaluation."""
    validation: Task | None
    test: Task | None

    @property
    def rows(self) -> dict[Split, RowPrompts]:
        """The splits that are rows of the user."""
        splits: dict[Split, Task | None] = {
            "train": self.source,
            "validation": self.validation,
            "test": None if self.test is self.validation else self.test,
        }
        return {split: rows for split, rows in splits.items() if isinstance(rows, RowPrompts)}

    def require_readable(self, policy: Policy) -> None:
        """Raises InputError, with file and line, for a row with text that the policy cannot tokenize."""
        uses_judge = any(source.sides for source in self.rewards)
        for rows in (self.source, self.validation, self.test):
            if isinstance(rows, RowPrompts | PromptList):
                rows.require_readable(partial(check_text, policy), everything=uses_judge)

    def require_possible(self, policy: Policy, config: TrainConfig) -> None:
        """Raises InputError for a row that the policy would refuse to sample, such as one that is too long."""
        check, sampling = getattr(policy, "check_prompt", None), config.sampling(0)  # the method is optional
        trained = {task for task, count in config.data.prompts_per_step.items() if count}
        for rows in (self.source, self.validation, self.test):
            if check is not None and isinstance(rows, RowPrompts | PromptList):
                rows.require_possible(lambda prompt: check(prompt, sampling), trained)

    def test_prompts(self) -> Sequence[Prompt]:
        """All test rows of a file or list; the first ``TEST_PROMPTS_PER_TASK`` per task of another source."""
        rows = self.test
        if rows is None:
            return []
        if isinstance(rows, RowPrompts | PromptList):
            return rows.in_order()
        found = [prompt for task in rows.tasks for prompt in rows.prompts(task, TEST_PROMPTS_PER_TASK)]
        return list({prompt.id: prompt for prompt in found}.values())


def open_components(config: TrainConfig, custom: CustomComponents = NO_CUSTOM_COMPONENTS) -> Components:
    """Opens and validates all components that the configuration names; raises InputError. Writes nothing."""
    source = training_source(config, custom)
    tasks = policy_tasks(config)
    if tasks is not None:
        config.require_tasks(tasks)
    rewards = scoring_rewards(config, source, custom)
    scorer = HeldOutScorer(tuple(rewards), success_metric(config, source))
    validation, test = (held_out_source(config, split, custom) for split in ("validation", "test"))
    if test is None and config.data.source == "datasets" and not custom.sources:
        test = validation  # as the command line says
    held_out_scorer = scorer
    if config.validation.rewards:
        held_out_scorer = replace(scorer, rewards=tuple(task_rewards(config, source, section="validation.rewards")))
    validator = Validator(validation_prompts(config, validation, held_out_scorer), config, held_out_scorer)
    if tasks is not None:
        require_outputs(config, tasks, source, validator)
    if tasks is not None and not can_draw(tasks):
        require_text_rewards(config, rewards)
    rows = build_judge_rows(config.judge, rewards, validator.prompts, lambda: held_out_images(validation))
    return Components(source, rewards, validator, rows, scorer, validation, test)


def open_source(config: TrainConfig, split: Split, seed: int, custom: CustomComponents = NO_CUSTOM_COMPONENTS) -> Task:
    """One split of the task."""
    if split in custom.sources:
        return custom.sources[split]
    data = config.data
    if data.source == IN_PYTHON:
        raise InputError(
            "data.source=python: its prompts were handed over in Python and are not on record: put them into a file of "
            "rows, or call lvrpo.train again"
        )
    build: Any = task_class(data.source)  # each class has its own section
    if data.source in ROW_SOURCES:
        rows = data.jsonl if data.source == "jsonl" else data.datasets
        return build(rows, split, seed, stored_image_size(config.policy))
    if data.source == "scenes":
        return build(data.scenes, split, seed)
    try:
        return build(data.options, split, seed)
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # code of the user may raise anything
        raise InputError(
            f"data.source={data.source}: the {split} split cannot be made: {describe_error(error)}: correct "
            "data.options, or the class"
        ) from error


def task_class(name: str) -> type[Task]:
    """The class that ``data.source`` names; raises InputError for one that is no ``Task``."""
    found = resolve("data source", name, DATASETS, ("prompt",))
    if not issubclass(found, Task):
        raise InputError(f"data.source={name}: is no task: write class {found.__name__}(lvrpo.Task)")
    if missing := sorted(found.__abstractmethods__):
        raise InputError(f"data.source={name}: has no {' and no '.join(missing)}: define what lvrpo.Task asks for")
    return found


def training_source(config: TrainConfig, custom: CustomComponents = NO_CUSTOM_COMPONENTS) -> Task:
    """The training prompts; raises InputError if a task of ``prompts_per_step`` is missing."""
    source = open_source(config, "train", config.seed, custom)
    for task, count in config.data.prompts_per_step.items():
        if count and task not in source.tasks:
            raise InputError(
                f"data.prompts_per_step.{task}={count}: {config.data.source} has no rows of task '{task}': set it to 0"
            )
    return source


def held_out_source(config: TrainConfig, split: Split, custom: CustomComponents = NO_CUSTOM_COMPONENTS) -> Task | None:
    """The validation or test split; None if there is none."""
    if custom.sources and split not in custom.sources:
        return None
    if config.data.source in ROW_SOURCES and not custom.sources and not config.data.has_split(split):
        return None
    try:
        return open_source(config, split, 0, custom)
    except InputError as error:
        if config.data.source in DATASETS:
            raise
        warnings.warn(f"data.source={config.data.source}: gives no {split} rows ({error})", stacklevel=2)
        return None


def scoring_rewards(
    config: TrainConfig, source: Task, custom: CustomComponents = NO_CUSTOM_COMPONENTS
) -> list[ConfiguredReward]:
    """The rewards; raises InputError if no reward of positive weight scores the prompts of a task."""
    rewards = task_rewards(config, source, custom)
    require_judge_used(config.judge, rewards)
    for task, count in config.data.prompts_per_step.items():
        prompts = source.prompts(task, min(count, REWARD_CHECK_PROMPTS)) if count else []
        if prompts and not any(r.config.weight and r.scores(prompt) for r in rewards for prompt in prompts):
            raise InputError(
                f"data.prompts_per_step.{task}={count}: no reward scores these prompts, all would be masked: add one "
                "that does to rewards, or ask for 0"
            )
    return rewards


def task_rewards(
    config: TrainConfig,
    task: Task | None,
    custom: CustomComponents = NO_CUSTOM_COMPONENTS,
    section: Literal["rewards", "validation.rewards"] = "rewards",
) -> list[ConfiguredReward]:
    """The rewards of a section, and the task's own reward where one is called ``TASK_REWARD``."""
    given = dict(custom.rewards) if section == "rewards" else {}
    rows = config.rewards if section == "rewards" else config.validation.rewards
    for row in rows:
        if row.name == TASK_REWARD:
            if row.where is not None:
                raise InputError(f"{section}.{row.title}.where: a task scores in this process: leave where out")
            if task is None or task.reward is None:
                raise InputError(
                    f"{section}.{row.title}: data.source={config.data.source} has no reward of its own: name another "
                    "reward, or a task that has one"
                )
            given[row.title] = _function_reward(task.reward, row, f"{section}.{row.title}.options")
    return build_rewards(rows, given)


def success_metric(config: TrainConfig, task: Task | None) -> ConfiguredReward | None:
    """The metric of success of ``data.success``, else of the task; None: the prompts' answers and facts."""
    named = config.data.success
    if named is not None and named.name.startswith(f"{IN_PYTHON}:"):
        if config.data.source != IN_PYTHON or task is None or task.success is None:
            raise InputError(
                f"data.success.name={named.name}: was handed over in Python, and only its name is on record: name "
                "a file, ./my_rules.py:NAME, or call lvrpo.train again"
            )
    elif named is not None:
        row = RewardConfig(name=named.name, options=named.options)
        found = ConfiguredReward(row, make_reward(row, "data.success"))
        if found.sides:
            raise InputError(f"data.success.name={named.name}: asks a model for its verdict: name a rule")
        return found
    if task is None or task.success is None:
        return None
    row = RewardConfig(name=f"{config.data.source}.success", label="success")
    return ConfiguredReward(row, _function_reward(task.success, row, f"data.source={config.data.source}: its success"))


def _function_reward(rule: function.Function, row: RewardConfig, where: str) -> Reward:
    """A method of a task as a reward, whose options are its other parameters; errors begin with ``where``."""
    build = function.reward(rule)
    try:
        return build(**row.options)
    except TypeError as error:
        raise InputError(f"{where}: {error}: give the parameters of the task's function") from None


def task_scorer(config: TrainConfig) -> HeldOutScorer:
    """How a run scores held-out outputs, for an evaluation apart from the run."""
    task = None
    if config.data.source not in (*DATASETS, IN_PYTHON):
        rewarded = any(row.name == TASK_REWARD for row in config.rewards)
        if rewarded or (config.data.success is None and task_class(config.data.source).success is not None):
            task = open_source(config, "train", config.seed)
    return HeldOutScorer(tuple(task_rewards(config, task)), success_metric(config, task))


def policy_tasks(config: TrainConfig) -> tuple[TaskKind, ...] | None:
    """The tasks of the policy; None where its folder is missing or damaged, which loading it reports."""
    with suppress(InputError):
        return possible_tasks(config.policy)
    return None


def require_outputs(config: TrainConfig, tasks: Sequence[TaskKind], source: Task, validator: Validator) -> None:
    """Raises InputError for prompts that ask for an image, or for one after a text, if the policy cannot draw it."""
    draws, after_text = can_draw(tasks), can_draw_after_text(config.policy)
    asked = "an image after a text" if draws else "an image"
    why = f"policy={config.policy} {'draws after a prompt alone' if draws else READS_ONLY}"
    remedy = "set data.scenes.weights={reason/draw_answer: 0}" if config.data.source == "scenes" else "leave it out"
    for task, count in config.data.prompts_per_step.items():
        rows = source.prompts(task, min(count, REWARD_CHECK_PROMPTS)) if count else []
        for prompt in [*rows, *validator.prompts.get(task, [])]:
            if "image" in prompt.output and not (draws and (after_text or len(prompt.output) == 1)):
                named = f"data.prompts_per_step.{task}={count}: prompt {prompt.id!r}"
                raise InputError(f"{named} asks for {asked}, and {why}: {remedy}")


def require_text_rewards(config: TrainConfig, rewards: Sequence[ConfiguredReward]) -> None:
    """Raises InputError for rewards that score images alone, for a policy that does not draw."""
    why = f"policy={config.policy} {READS_ONLY}"
    for reward in rewards:
        if "text" not in reward.judges:
            raise InputError(f"rewards.{reward.config.title}: scores images that are drawn, and {why}: leave it out")


def validation_prompts(
    config: TrainConfig, source: Task | None, scorer: HeldOutScorer | None
) -> dict[TaskKind, list[Prompt]]:
    """The scorable validation prompts of every trained task; warns if a task has none.

    ``scorer``: scores them (None: all prompts count, without warnings).
    """
    counts = config.data.prompts_per_step
    trained: list[TaskKind] = [task for task, count in config.validation.prompts.items() if count and counts.get(task)]
    found: dict[TaskKind, list[Prompt]] = {}
    for task in trained:
        available = source is not None and task in source.tasks
        rows = source.prompts(task, config.validation.prompts[task]) if source is not None and available else []
        by_id = {p.id: p for p in rows if scorer is None or scorer.metric(p) is not None}
        if by_id:
            found[task] = list(by_id.values())
    if scorer is not None and len(found) < len(trained):
        warnings.warn(
            missing_validation_message(config, source, [task for task in trained if task not in found]), stacklevel=3
        )
    return found


def missing_validation_message(config: TrainConfig, source: Task | None, tasks: Sequence[TaskKind]) -> str:
    """The warning about tasks without validation prompts, with a remedy."""
    named = ", ".join(tasks)
    if source is None:
        of_rows = config.data.source in ROW_SOURCES
        where = f"data.{config.data.source}.validation is not set" if of_rows else "there are no validation rows"
        return f"{where}: validation has no held-out rows and keeps the last weights: give it a file of rows"
    if not set(tasks) & set(source.tasks):
        return f"validation has no rows of {named}: it is not watched: add some"
    return (
        f"no validation row of {named} can be scored, so it is not watched: give the rows an answer, name "
        "data.success, or add a reward that scores single outputs"
    )


def held_out_images(source: Task | None) -> list[Example]:
    """Up to ``MAX_JUDGE_IMAGES`` held-out images with their descriptions; none without validation rows."""
    found: dict[str, Example] = {}
    for i in range(MAX_JUDGE_IMAGES if source is not None and "generate" in source.tasks else 0):
        with suppress(InputError):  # a row without a target
            example = source.example("generate", i)  # type: ignore[union-attr]  # a range of 0 without a source
            found.setdefault(example.prompt.id, example)
    return list(found.values())


class PromptList(Task):
    """A task of a list in memory, in its order, without shuffling."""

    def __init__(self, prompts: Sequence[Prompt], success: function.Function | None = None) -> None:
        """Raises InputError for an empty list and for duplicate ids."""
        if not prompts:
            raise InputError("prompts: the list is empty: give at least one lvrpo.Prompt")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, Prompt):
                raise InputError(f"prompts[{i}]: is {type(prompt).__name__}: give lvrpo.Prompt objects")
        name, count = Counter(prompt.id for prompt in prompts).most_common(1)[0]
        if count > 1:
            raise InputError(f"prompts: {count} have the id {name!r}: ids must be unique")
        self._prompts, self.success = list(prompts), success
        self._by_task: dict[TaskKind, list[Prompt]] = {}
        for prompt in prompts:
            self._by_task.setdefault(prompt.task, []).append(prompt)

    @property
    def tasks(self) -> tuple[TaskKind, ...]:
        """The tasks of the list."""
        return tuple(self._by_task)

    def prompt(self, task: TaskKind, index: int) -> Prompt:
        """The prompt at an index >= 0, modulo the number of prompts of the task."""
        rows = self._by_task[task]
        return rows[index % len(rows)]

    def in_order(self) -> list[Prompt]:
        """The list."""
        return list(self._prompts)

    def require_possible(self, check: Callable[[Prompt], None], tasks: Collection[str]) -> None:
        """See ``RowPrompts.require_possible``; all prompts are checked, and the errors are those of ``check``."""
        for prompt in self._prompts:
            if prompt.task in tasks:
                check(prompt)

    def require_readable(self, check: Any, everything: bool = False) -> None:
        """See ``RowPrompts.require_readable``; errors name the id instead of file and line."""
        for prompt in self._prompts:
            texts = [part for part in prompt.parts if isinstance(part, str)]
            require_texts(check, f"prompt {prompt.id!r}", texts, prompt if everything else None)
