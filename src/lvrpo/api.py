"""The Python API: a run in one call, with prompts and rewards as objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvrpo.commands.inputs import read_config
from lvrpo.commands.progress import Progress
from lvrpo.config import dump_config, load_config, parse_section
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import (
    TEST_ROWS,
    Experiment,
    Plan,
    held_out_plan,
    warn_without_test,
)
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.reading import unused_path
from lvrpo.rewards.base import Reward
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.function import as_reward
from lvrpo.rewards.table import IN_PYTHON
from lvrpo.training.components import CustomComponents, PromptList
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer
from lvrpo.types import TASKS, Prompt, Split, TaskKind

RewardLike = str | Mapping[str, Any] | RewardConfig | Reward | Callable[..., Any]
"""A name, a reward, a function that returns a number, or a row of the configuration with one of them as its name."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    run: Path
    summary: Mapping[str, Any]
    """``summary.json``: before, after, difference, each with intervals."""

    @property
    def report(self) -> Path:
        """The page with the results."""
        return self.run / "report.html"

    def policy(self, device: str = "cpu") -> Policy:
        """The weights that were best on validation."""
        return load_policy(self.run, device)


def train(
    config: TrainConfig | Path | str = "quickstart",
    *overrides: str,
    prompts: Sequence[Prompt] | None = None,
    validation: Sequence[Prompt] | None = None,
    test: Sequence[Prompt] | None = None,
    rewards: Sequence[RewardLike] | None = None,
    success: Callable[..., float | None] | None = None,
    out: Path | str | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a policy as ``lvrpo train`` does; returns the run directory and the results.

        import lvrpo

        def brightness(image):
            return -abs(float(image.mean()) - 0.6)

        prompts = [lvrpo.Prompt(f"p{i}", "generate", (f"{n} red circles",), ("image",)) for i, n in enumerate("234")]
        done = lvrpo.train("quickstart", "steps=4", prompts=prompts, validation=prompts[:1], rewards=[brightness])
        print(done.summary["validation"], done.report)

    ``config``: a configuration, a YAML file or a built-in name, changed by ``overrides`` (``section.key=value``).
    ``prompts``: the training prompts, instead of those of the configuration; validation scores ``validation``, and
    ``test`` is measured before and after. ``rewards``: the rewards, instead of those of the configuration, each a name,
    a function, a ``Reward``, or a dict like a row of the configuration, whose ``name`` may also be a function or a
    ``Reward``: ``{"name": brightness, "weight": 2}``. ``success``: a function that says whether an
    output of these prompts is right, with the parameters of a reward function. ``out``: the run directory (default:
    runs/NAME, with a number if that exists). Raises InputError before anything is written.
    """
    lists: dict[Split, Sequence[Prompt] | None] = {"train": prompts, "validation": validation, "test": test}
    sources: dict[Split, PromptList] = {
        split: PromptList(rows, success) for split, rows in lists.items() if rows is not None
    }
    if sources and prompts is None:
        raise InputError(
            "validation or test without prompts: they go with a list of training prompts: give prompts too"
        )
    if success is not None and prompts is None:
        raise InputError("success: is of a list of prompts: give prompts too, or name it in data.success")
    own, given = _split_rewards(rewards)
    tree: dict[str, Any] = {} if own is None else {"rewards": own}
    resolved = _resolve_config(config, overrides)
    if success is not None and resolved.data.success is not None:
        raise InputError(
            f"success: data.success names another, {resolved.data.success.name}: leave one of the two out, or set "
            "data.success=null"
        )
    if prompts is not None:
        tree |= _listed_data(resolved, prompts, validation or (), overrides)
    if success is not None:
        named = getattr(success, "__name__", type(success).__name__)
        tree["data"]["success"] = {"name": f"{IN_PYTHON}:{named}"}
    if tree:
        resolved = parse_section(TrainConfig, {**resolved.model_dump(), **tree}, "config")
    folder = Path(out) if out is not None else unused_path(Path("runs") / resolved.name)
    plan = held_out_plan(resolved, ()) if prompts is None else Plan(() if test is None else (TEST_ROWS,))
    trainer = Trainer.start(resolved, folder, custom=CustomComponents(dict(sources), given), files=plan.files())
    if prompts is None:
        warn_without_test(resolved)
    listener = Progress(resolved.steps, quiet=not progress)
    with (
        trainer.run,
        listener as watch,
        Experiment(trainer, plan, watch) as experiment,
        experiment.measured() as interrupted,
    ):
        trainer.train(experiment.observe, interrupted)
    return Trained(folder, experiment.summary)


def _resolve_config(config: TrainConfig | Path | str, overrides: Sequence[str]) -> TrainConfig:
    if not isinstance(config, TrainConfig):
        return read_config(TrainConfig, str(config), overrides)
    if not overrides:
        return config
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        return load_config(TrainConfig, path, overrides)


def _listed_data(
    config: TrainConfig, prompts: Sequence[Prompt], validation: Sequence[Prompt], overrides: Sequence[str]
) -> dict[str, Any]:
    """The sections ``data`` and ``validation`` of a run on listed prompts, with counts capped at the prompts given."""
    counts = dict(config.data.prompts_per_step)
    if not any(override.startswith("data.prompts_per_step") for override in overrides):
        available: dict[TaskKind, int] = {task: sum(prompt.task == task for prompt in prompts) for task in TASKS}
        counts = {task: min(counts.get(task, n), n) or n for task, n in available.items()}
    held_out = {task: n for task in TASKS if (n := sum(prompt.task == task for prompt in validation))}
    section = config.validation.model_dump() | ({"prompts": held_out} if held_out else {})
    rule = None if config.data.success is None else config.data.success.model_dump()
    return {"data": {"source": IN_PYTHON, "success": rule, "prompts_per_step": counts}, "validation": section}


def _split_rewards(rewards: Sequence[RewardLike] | None) -> tuple[list[Any] | None, dict[str, Reward]]:
    """The reward rows of the configuration, and the reward objects by name."""
    if rewards is None:
        return None, {}
    rows: list[Any] = []
    given: dict[str, Reward] = {}
    for entry in rewards:
        if isinstance(entry, str):
            rows.append({"name": entry})
        elif isinstance(entry, RewardConfig):
            rows.append(entry.model_dump())
        elif isinstance(entry, Mapping) and isinstance(entry.get("name"), str | None):
            rows.append(dict(entry))
        else:
            row: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"name": entry}
            title, reward = _build_reward(row["name"], row.get("options") or {})
            title = row.get("label") or title
            rows.append({**row, "name": f"{IN_PYTHON}:{title}", "label": title})
            given[title] = reward
    return rows, given


def _build_reward(entry: Any, options: Mapping[str, Any]) -> tuple[str, Reward]:
    """The name of a function or reward, and the reward. Any: an object of the caller."""
    reward = as_reward(entry)
    title = getattr(reward, "__name__", type(entry).__name__)
    if isinstance(reward, type) or hasattr(reward, "makes"):
        try:
            reward = reward(**options)
        except TypeError as error:
            raise InputError(f"rewards: {title!r}: options: {error}") from None
    elif options:
        raise InputError(f"rewards: {title!r}: options: it is made already: leave them out")
    for method in ("applies", "score"):
        if not callable(getattr(reward, method, None)):  # an object of any class
            raise InputError(f"rewards: {title!r} has no method {method!r}: give a function, a name or a Reward")
    return title, reward
