"""From a row of the table to the configuration of one run: base, seed, member of the grid, and the steps that fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lvrpo.atomic_io import write_whole
from lvrpo.config import config_differences, load_config, parse_section, read_tree, tree_sha256
from lvrpo.data.scenes import CleanPromptsConfig
from lvrpo.errors import InputError
from lvrpo.evaluation.compute import Compute
from lvrpo.evaluation.reproduce.budget import AnyConfig, RunCost, count_cost
from lvrpo.evaluation.reproduce.plan import Experiment, TestConfig
from lvrpo.policies.loading import load_policy
from lvrpo.reading import Record, is_there, read_json_object, typed
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run_directory import json_text
from lvrpo.types import Task

CODE_FILES = ("*.py", "*.yaml")
ANOTHER = "delete it to run it again, or restore what it was made with"
Tree = dict[str, Any]
"""Any: of JSON."""


class RecipeRecord(Record):
    """``recipe`` of a summary."""

    config: dict[str, Any] | None
    base: str | dict[str, Any]
    test: dict[str, Any]


class Recipes:
    """The configurations of an experiment's rows, and what they cost."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        find_config: Callable[[str], Path],
        say: Callable[[str], None] = lambda line: None,
        device: str = "auto",
    ) -> None:
        self.experiment, self.out, self.find_config, self.say, self.device = experiment, out, find_config, say, device
        self._identities: dict[str, str] = {}

    # --- bases ---

    def base_config(self, name: str) -> PretrainConfig:
        """How a base is, or was, pretrained."""
        base = self.experiment.bases[name]
        config = load_config(PretrainConfig, self.find_config(base.config), base.overrides)
        return config.model_copy(update={"seed": base.seed, "device": self.device})

    def base_model(self, name: str) -> str:
        """The MODEL of a base."""
        return self.experiment.bases[name].model or str(self.out / "bases" / name)

    def base_identity(self, name: str) -> str | Tree:
        """What tells one base from another: its weights where they are given, its recipe where a job makes them."""
        model = self.experiment.bases[name].model
        if model is None:
            return self.base_config(name).model_copy(update={"device": "auto"}).model_dump(mode="json")
        if name not in self._identities:
            self._identities[name] = judge_fingerprint(load_policy(model))
        return self._identities[name]

    # --- rows ---

    def config(self, row: str, member: Sequence[str], base: str, seed: int) -> AnyConfig:
        """The configuration of a run, at the steps that the file says."""
        plan = self.experiment.rows[row]
        assert plan.config is not None
        path, overrides = self.find_config(plan.config), [*plan.overrides, *member]
        if plan.start == "scratch":
            own = self.experiment.bases[base]
            config = load_config(PretrainConfig, path, [*own.overrides, *overrides])
            return config.model_copy(update={"init": None, "seed": own.seed, "device": self.device})
        common: dict[str, Any] = {"seed": seed, "device": self.device}
        if not is_supervised(path):
            return load_config(TrainConfig, path, overrides).model_copy(
                update={**common, "policy": self.base_model(base)}
            )
        config = load_config(PretrainConfig, path, overrides)
        if config.rows == "prompts":
            common["prompts"] = self._asked(seed)
        return config.model_copy(update={**common, "init": self.base_model(base)})

    def _asked(self, seed: int) -> CleanPromptsConfig:
        """The prompts that the row of the budget asks with this seed."""
        reference = self.reference()
        counts: dict[Task, int] = {task: n * reference.steps for task, n in reference.data.prompts_per_step.items()}
        return CleanPromptsConfig(seed=seed, counts=counts)

    def reference(self) -> TrainConfig:
        """The configuration whose compute is the budget."""
        budget = self.experiment.budget
        plan = self.experiment.rows[budget.row]
        assert plan.config is not None
        config = load_config(TrainConfig, self.find_config(plan.config), plan.overrides)
        base = self.experiment.tuning.base
        steps = budget.steps or config.steps
        return config.model_copy(update={"steps": steps, "policy": self.base_model(base), "device": self.device})

    @cached_property
    def budget(self) -> Compute:
        """What every row may spend."""
        config = self.reference()
        return self.cost(config, self.experiment.tuning.base).total(config.steps)

    def fitted(self, row: str, member: Sequence[str], base: str, seed: int) -> tuple[AnyConfig, RunCost]:
        """The configuration of a run with as many steps as the budget buys, and its cost."""
        config = self.config(row, member, base, seed)
        if self.experiment.rows[row].start == "scratch":
            cost, own = self.cost(config, base), self.base_config(base).steps
            steps = cost.steps_within(self.budget, cost.total(own))
        else:
            first = self.experiment.tuning.base  # one number of steps for all bases and seeds
            cost = self.cost(self.config(row, member, first, 0), first)
            steps = cost.steps_within(self.budget)
        return config.model_copy(update={"steps": steps}), cost

    def recipe(self, config: AnyConfig | None, base: str) -> Tree:
        """What a run is, apart from its seed, its steps and the machine that it runs on."""
        return {
            "config": None if config is None else self._of_any_seed(config, base).model_dump(mode="json"),
            "base": self.base_identity(base),
            "test": self.experiment.test.model_dump(mode="json"),
        }

    def _of_any_seed(self, config: AnyConfig, base: str) -> AnyConfig:
        same: dict[str, Any] = {"steps": 1, "device": "auto", "threads": 1, "seed": 0, "name": "row"}
        if isinstance(config, TrainConfig):
            return config.model_copy(update={**same, "policy": base})
        asked = config.prompts.model_copy(update={"seed": 0})
        return config.model_copy(update={**same, "init": config.init and base, "prompts": asked})

    def require_same_recipe(self, found: object, config: AnyConfig | None, base: str, path: Path) -> None:
        """Raises InputError, with the first key, where a summary is of another recipe than the experiment says now.

        ``found``: what ``recipe`` gave when the summary was written. A field that there was not then counts as its
        default, which leaves everything as it was; a default that has changed since is a difference.
        """
        kinds = {"config": type(config) if config else PretrainConfig, "base": PretrainConfig, "test": TestConfig}
        given, wanted = typed(found, RecipeRecord, f"{path}: recipe", ANOTHER), self.recipe(config, base)
        for name, kind in kinds.items():
            had, has = given[name], wanted[name]
            if isinstance(had, dict) and isinstance(has, dict):
                had = parse_section(kind, had, f"{path}: recipe: {name}").model_dump(mode="json")
                found_apart = config_differences(had, has)
            else:
                found_apart = [] if had == has else [f"{had} against {has}"]
            if found_apart:
                where = f"{path}: is of another recipe than the experiment says now"
                raise InputError(f"{where}: {name}: {found_apart[0]}: {ANOTHER}")

    def cost(self, config: AnyConfig, base: str) -> RunCost:
        """Counted once for every recipe, then kept in OUT/costs."""
        same_rates = config.model_copy(update={"optimizer": type(config)().optimizer})  # rates cost nothing
        recipe = {**self.recipe(same_rates, base), "test": None}
        path = self.out / "costs" / f"{tree_sha256(recipe)[:16]}.json"
        if not is_there(path):
            self.say(f"counting the operations of a step of {config.name}")
            found = count_cost(config)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json_text(found.as_dict()).encode())
        return RunCost.from_dict(read_json_object(path, "delete it to count again"))


def is_supervised(path: Path) -> bool:
    """Whether a file, or one that it extends, has keys of supervised training."""
    return bool(set(read_tree(path, TrainConfig)) - set(TrainConfig.model_fields))


def code_version() -> str:
    """The release, and a hash of the package's sources: what ran, with or without a checkout."""
    import lvrpo

    folder = Path(lvrpo.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(each for pattern in CODE_FILES for each in folder.rglob(pattern)):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return f"{lvrpo.__version__}+{digest.hexdigest()}"


__all__ = ["Recipes", "code_version", "is_supervised"]
