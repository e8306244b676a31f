"""The configuration of ``lvrpo reproduce``: rows of a results table, bases, seeds, jobs and the config of each run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lvrpo.atomic_io import write_atomic
from lvrpo.config import Config, config_differences, load_config, parse_section, read_tree, tree_sha256
from lvrpo.data.scenes import CleanPromptsConfig
from lvrpo.errors import InputError
from lvrpo.evaluation.reproduce.compute import AnyConfig, RunCost, count_cost
from lvrpo.evaluation.suite import SAMPLING
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.reading import Record, path_exists, validate_type
from lvrpo.records import read_record
from lvrpo.report.evidence import RowPlan, TablePlan
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run_directory import json_text
from lvrpo.types import TaskKind

RowGroup = Literal["ours", "rival", "oracle", "inference", "base"]


class BaseConfig(Config):
    """A pretrained base: an existing one, or one to pretrain."""

    model: str | None = None
    """A built-in name or a folder; None: pretrained by a job, in OUT/bases."""
    config: str = "pretrain"
    seed: int = Field(default=0, ge=0)
    overrides: tuple[str, ...] = ()


class RowConfig(Config):
    """A row of the table."""

    about: str
    """A short description for the table."""
    group: RowGroup
    config: str | None = None
    """The training configuration; None: nothing is trained."""
    overrides: tuple[str, ...] = ()
    tune: tuple[tuple[str, ...], ...] = ()
    """The hyperparameter grid, each member as overrides; compared on validation with the seed of ``tuning``."""
    untuned: str | None = None
    """The reason why a trained row has no grid."""
    start: Literal["base", "scratch"] = "base"
    """scratch: pretraining from random weights, longer than that of the base by the budget."""
    runs: str = "others"
    """An entry of ``Experiment.runs``."""
    of: str | None = None
    """The row whose evaluations it reads, in place of a run of its own."""
    best_of: int | None = Field(default=None, ge=2)
    """With ``of``: best of n images, judged by the model itself."""
    settings: Literal["tuned", "plain"] = "tuned"
    """With ``of``: tuned guidance and temperature, or unguided and greedy."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.of is not None and (self.config is not None or self.tune):
            raise ValueError(f"of={self.of}: is read from another row, so it has no config and no grid: leave them out")
        if (self.best_of is not None or self.settings == "plain") and self.of is None:
            raise ValueError("best_of and settings are of a row that is read from another: set of")
        if self.config is None and (self.tune or self.overrides):
            raise ValueError("tune and overrides need a config to change: set config")
        return self

    @property
    def trained(self) -> bool:
        """Whether it trains."""
        return self.config is not None


class BudgetConfig(Config):
    """The compute budget of every trained row: that of one of them at its configured steps."""

    row: str
    steps: int | None = Field(default=None, ge=1)
    """Steps that replace its configured steps."""


class TuningConfig(Config):
    """Tuning of grids, guidance and temperature, on the validation split with a separate seed."""

    base: str
    seed: int = Field(ge=0)
    prompts: int = Field(default=280, ge=1)
    """Validation prompts of each task."""
    members: int | None = Field(default=None, ge=1)
    """Use the first n members of each grid; None: all."""


class TestConfig(Config):
    """The evaluation on the test split."""

    benchmarks: tuple[str, ...] = ("generate", "understand", "edit", "reason")
    sizes: dict[str, int] = Field(default_factory=dict)
    """Prompts per benchmark, where it is not the default."""
    sampled_prompts: int = Field(default=280, ge=0)
    """Prompts per benchmark that are sampled 16 times, for pass@k and best of n."""
    num_steps: int = Field(default=SAMPLING.num_steps, ge=1)
    """Sampling steps per image, on the validation split too."""

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters of every benchmark, apart from its temperature and guidance."""
        return replace(SAMPLING, num_steps=self.num_steps)


class Experiment(Config):
    """A results table and everything it is computed from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    evidence: bool = True
    """False: a smoke test, labeled as such."""
    bases: dict[str, BaseConfig] = Field(min_length=1)
    runs: dict[str, tuple[tuple[str, int], ...]]
    """Lists of (base, seed) that rows name."""
    budget: BudgetConfig
    tuning: TuningConfig
    test: TestConfig = TestConfig()
    rows: dict[str, RowConfig] = Field(min_length=1)
    only: tuple[str, ...] | None = None
    """The rows to use; None: all."""

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        known = ", ".join(self.bases)
        for name, runs in self.runs.items():
            for base, seed in runs:
                if base not in self.bases:
                    raise ValueError(f"runs.{name}: base {base!r} is not among the bases: {known}")
                if seed == self.tuning.seed:
                    raise ValueError(f"runs.{name}: seed {seed} is the one that grids are tuned with: take another")
        if self.tuning.base not in self.bases:
            raise ValueError(f"tuning.base={self.tuning.base}: is not among the bases: {known}")
        if self.budget.row not in self.rows or not self.rows[self.budget.row].trained:
            raise ValueError(f"budget.row={self.budget.row}: must be a row that trains")
        for name in self.only or ():
            if name not in self.rows:
                raise ValueError(f"only: {name!r} is no row: use some of {', '.join(self.rows)}")
        for name, row in self.rows.items():
            self._check_row(name, row)
        return self

    def _check_row(self, name: str, row: RowConfig) -> None:
        if row.runs not in self.runs:
            raise ValueError(f"rows.{name}.runs={row.runs}: is not among runs: {', '.join(self.runs)}")
        if row.of is not None and (row.of not in self.rows or self.rows[row.of].of is not None):
            raise ValueError(f"rows.{name}.of={row.of}: must be a row with runs of its own")
        used = [base for base, _ in self.runs[row.runs]]
        if row.start == "scratch" and len({*used}) < len(used):
            raise ValueError(
                f"rows.{name}.runs={row.runs}: start=scratch takes the seed of the base: give each base once"
            )
        size = len(self.rows[self.budget.row].tune)
        if row.trained and row.untuned is None and len(row.tune) != size:
            raise ValueError(
                f"rows.{name}.tune has {len(row.tune)} members and rows.{self.budget.row}.tune {size}: give every row "
                "the same number, or say in untuned why not"
            )

    @property
    def used(self) -> Mapping[str, RowConfig]:
        """The rows of the table, in order."""
        return {name: row for name, row in self.rows.items() if self.only is None or name in self.only}

    def members(self, row: str) -> tuple[tuple[str, ...], ...]:
        """The grid of a row; () where there is nothing to compare."""
        grid = self.rows[row].tune[: self.tuning.members]
        return grid if len(grid) > 1 else ()

    def table(self) -> TablePlan:
        """The table for the results page."""
        rows = {
            name: RowPlan(row.about, row.group, self.runs[row.runs], row.of, row.best_of, row.settings, row.untuned)
            for name, row in self.used.items()
        }
        return TablePlan(self.name, self.evidence, rows, self.budget.row)


@dataclass(frozen=True)
class Job:
    """A resumable unit of work: pretrain a base, train a grid member, or train and test a row."""

    kind: Literal["base", "tune", "run"]
    row: str
    """Name of the row; for a base, of the base."""
    base: str
    seed: int
    member: int | None = None
    """Index in the grid."""

    @property
    def name(self) -> str:
        """Name of the folder and of the summary."""
        if self.kind == "base":
            return self.row
        return f"{self.row}-tune{self.member}" if self.kind == "tune" else f"{self.row}-{self.base}-{self.seed}"

    @property
    def folder(self) -> str:
        """Run directory inside OUT."""
        return f"{ {'base': 'bases', 'tune': 'tuning', 'run': 'runs'}[self.kind] }/{self.name}"

    def depends_on(self, other: Job) -> bool:
        """Whether the other job must be done first: runs need the grid of their row, and both need their base."""
        if other.kind == "base":
            return self.kind != "base" and self.base == other.base
        return other.kind == "tune" and self.kind == "run" and self.row == other.row


def load_experiment(path: Path) -> Experiment:
    """The experiment of a YAML file; raises InputError with one line."""
    return load_config(Experiment, path)


def list_jobs(
    experiment: Experiment, rows: Collection[str] | None = None, seeds: Collection[int] | None = None
) -> list[Job]:
    """All jobs in order: bases, then for each row its grid and its runs.

    ``rows`` and ``seeds`` select; raises InputError for an unknown row, and where no job is left.
    """
    for name in rows or ():
        if name not in experiment.used:
            raise InputError(f"--rows {name}: is no row: use some of {', '.join(experiment.used)}")
    wanted = {name: row for name, row in experiment.used.items() if row.of is None and (rows is None or name in rows)}
    for name, row in experiment.used.items():  # rows that read the runs of another
        if row.of is not None and (rows is None or name in rows):
            wanted.setdefault(row.of, experiment.rows[row.of])
    jobs: list[Job] = []
    tuning = experiment.tuning
    for name, row in wanted.items():
        runs = [(base, seed) for base, seed in experiment.runs[row.runs] if seeds is None or seed in seeds]
        if runs:
            members = range(len(experiment.members(name)))
            jobs += [Job("tune", name, tuning.base, tuning.seed, member) for member in members]
            jobs += [Job("run", name, base, seed) for base, seed in runs]
    if not jobs:
        raise InputError(f"--seeds {', '.join(map(str, seeds or ()))}: no row has such a seed: see runs of the YAML")
    needed = dict.fromkeys([tuning.base, *(job.base for job in jobs)])
    made = [name for name in needed if experiment.bases[name].model is None]
    return [*(Job("base", name, name, experiment.bases[name].seed) for name in made), *jobs]


CODE_FILES = ("*.py", "*.yaml")
RECIPE_REMEDY = "delete it to run it again, or restore what it was made with"
Tree = dict[str, Any]
"""Any: of JSON."""
CONSTANTS: Tree = {
    "reference_eval_group_size": 2,
    "validation.max_rollbacks": 3,
    "validation.rollback_lr": 0.5,
    "data.scenes.held_out_share": 0.2,
    "data.jsonl.cached_images": 1024,
    "representation.head_width": 256,
}
"""Settings of earlier versions, which are constants now, with their values: a recipe that has them is the same."""


class RecipeRecord(Record):
    """``recipe`` of a summary."""

    config: dict[str, Any] | None
    base: str | dict[str, Any]
    test: dict[str, Any]


class Recipes:
    """The configurations of an experiment's rows, and their cost."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        find_config: Callable[[str], Path],
        log: Callable[[str], None] = lambda line: None,
        device: str = "auto",
    ) -> None:
        self.experiment, self.out, self.find_config, self.log, self.device = experiment, out, find_config, log, device
        self._identities: dict[str, str] = {}

    # --- bases ---

    def base_config(self, name: str) -> PretrainConfig:
        """The pretraining configuration of a base."""
        base = self.experiment.bases[name]
        config = load_config(PretrainConfig, self.find_config(base.config), base.overrides)
        return config.model_copy(update={"seed": base.seed, "device": self.device})

    def base_model(self, name: str) -> str:
        """The MODEL of a base."""
        return self.experiment.bases[name].model or str(self.out / "bases" / name)

    def base_identity(self, name: str) -> str | Tree:
        """Identifies a base: the hash of its weights where they are given, else its pretraining configuration."""
        model = self.experiment.bases[name].model
        if model is None:
            return self.base_config(name).model_copy(update={"device": "auto"}).model_dump(mode="json")
        if name not in self._identities:
            self._identities[name] = judge_fingerprint(load_policy(model))
        return self._identities[name]

    # --- rows ---

    def config(self, row: str, member: Sequence[str], base: str, seed: int) -> AnyConfig:
        """The configuration of a run, with the steps of its file."""
        plan = self.experiment.rows[row]
        assert plan.config is not None
        path, overrides = self.find_config(plan.config), [*plan.overrides, *member]
        if plan.start == "scratch":
            own = self.experiment.bases[base]
            config = load_config(PretrainConfig, path, [*own.overrides, *overrides])
            return config.model_copy(update={"init": None, "seed": own.seed, "device": self.device})
        common: dict[str, Any] = {"seed": seed, "device": self.device}
        if set(read_tree(path, TrainConfig)) <= set(TrainConfig.model_fields):
            return load_config(TrainConfig, path, overrides).model_copy(
                update={**common, "policy": self.base_model(base)}
            )
        config = load_config(PretrainConfig, path, overrides)
        if config.rows == "prompts":
            common["prompts"] = self._budget_prompts(seed)
        return config.model_copy(update={**common, "init": self.base_model(base)})

    def _budget_prompts(self, seed: int) -> CleanPromptsConfig:
        """The prompts of the budget row with this seed."""
        reference = self.reference()
        counts: dict[TaskKind, int] = {task: n * reference.steps for task, n in reference.data.prompts_per_step.items()}
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
    def budget(self) -> float:
        """The budget of every row, FLOPs."""
        config = self.reference()
        return self.cost(config, self.experiment.tuning.base).total(config.steps)

    def within_budget(self, row: str, member: Sequence[str], base: str, seed: int) -> tuple[AnyConfig, RunCost]:
        """The configuration of a run with the largest number of steps within the budget, and its cost."""
        config = self.config(row, member, base, seed)
        if self.experiment.rows[row].start == "scratch":
            cost, own = self.cost(config, base), self.base_config(base).steps
            steps = cost.steps_within(self.budget + cost.total(own))
        else:
            first = self.experiment.tuning.base  # the same number of steps for all bases and seeds
            cost = self.cost(self.config(row, member, first, 0), first)
            steps = cost.steps_within(self.budget)
        return config.model_copy(update={"steps": steps}), cost

    def recipe(self, config: AnyConfig | None, base: str) -> Tree:
        """Identifies a run, apart from its seed, its steps and the hardware."""
        return {
            "config": None if config is None else self._without_seed(config, base).model_dump(mode="json"),
            "base": self.base_identity(base),
            "test": self.experiment.test.model_dump(mode="json"),
        }

    def _without_seed(self, config: AnyConfig, base: str) -> AnyConfig:
        same: dict[str, Any] = {"steps": 1, "device": "auto", "threads": 1, "seed": 0, "name": "row"}
        if isinstance(config, TrainConfig):
            return config.model_copy(update={**same, "policy": base})
        prompts = config.prompts.model_copy(update={"seed": 0})
        return config.model_copy(update={**same, "init": config.init and base, "prompts": prompts})

    def require_same_recipe(self, found: object, config: AnyConfig | None, base: str, path: Path) -> None:
        """Raises InputError, naming the first key, where a summary's recipe differs from the current one.

        ``found``: the ``recipe`` of the summary. A field that did not exist then counts as its default.
        """
        kinds = {"config": type(config) if config else PretrainConfig, "base": PretrainConfig, "test": TestConfig}
        given, wanted = validate_type(found, RecipeRecord, f"{path}: recipe", RECIPE_REMEDY), self.recipe(config, base)
        for name, kind in kinds.items():
            stored, current = given[name], wanted[name]
            if isinstance(stored, dict) and isinstance(current, dict):
                stored = parse_section(kind, _without_constants(stored), f"{path}: recipe: {name}").model_dump(
                    mode="json"
                )
                differences = config_differences(stored, current)
            else:
                differences = [] if stored == current else [f"{stored} against {current}"]
            if differences:
                where = f"{path}: is of another recipe than the experiment says now"
                raise InputError(f"{where}: {name}: {differences[0]}: {RECIPE_REMEDY}")

    def cost(self, config: AnyConfig, base: str) -> RunCost:
        """The cost of a recipe, counted once and then cached in OUT/costs."""
        # learning rates do not change the cost
        same_rates = config.model_copy(update={"optimizer": type(config)().optimizer})
        recipe = {**self.recipe(same_rates, base), "test": None}
        path = self.out / "costs" / f"{tree_sha256(recipe)[:16]}.json"
        if not path_exists(path):
            self.log(f"counting the operations of a step of {config.name}")
            found = count_cost(config)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json_text(asdict(found)).encode())
        return read_record(RunCost, path, "delete it to count again")


def _without_constants(tree: Tree, at: str = "") -> Tree:
    """A recorded configuration without the entries of ``CONSTANTS``; ``at``: the path of ``tree``, with its dot."""
    return {
        key: _without_constants(value, f"{at}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{at}{key}" not in CONSTANTS or value != CONSTANTS[f"{at}{key}"]
    }


def code_version() -> str:
    """The release and a hash of the package's source files."""
    import lvrpo

    folder = Path(lvrpo.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(each for pattern in CODE_FILES for each in folder.rglob(pattern)):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return f"{lvrpo.__version__}+{digest.hexdigest()}"
