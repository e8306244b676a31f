"""The declared evidence: rows of a results table, the bases and seeds they run on, and the jobs that this makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lvrpo.config import Config, load_config
from lvrpo.errors import InputError
from lvrpo.report.evidence import RowPlan, TablePlan

RowGroup = Literal["ours", "rival", "oracle", "inference", "base"]


class BaseConfig(Config):
    """A pretrained base: one that is there, or one to be made by ``lvrpo pretrain``."""

    model: str | None = None
    """A built-in name or a folder; None: pretrained by a job, in OUT/bases."""
    config: str = "pretrain"
    seed: int = Field(default=0, ge=0)
    overrides: tuple[str, ...] = ()


class RowConfig(Config):
    """A row of the table."""

    about: str
    """What it is, in a few words of the table."""
    group: RowGroup
    config: str | None = None
    """The configuration that it trains with; None: nothing is trained."""
    overrides: tuple[str, ...] = ()
    tune: tuple[tuple[str, ...], ...] = ()
    """Members of its grid, each as overrides; compared on validation with the seed of ``tuning`` at the same budget."""
    untuned: str | None = None
    """Why a row that is trained has no grid."""
    start: Literal["base", "scratch"] = "base"
    """scratch: the budget is added to the steps of the base's own pretraining, from random weights, with its seed."""
    runs: str = "others"
    """An entry of ``Experiment.runs``."""
    of: str | None = None
    """Read from the evaluations of another row, in place of a run of its own."""
    best_of: int | None = Field(default=None, ge=2)
    """Of that row: the best of so many drawings by the model's own reader."""
    settings: Literal["tuned", "plain"] = "tuned"
    """Of that row: at guidance and temperature chosen on validation, or unguided and greedy."""

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
    """What every row that trains may spend: the compute of one of them at its configured steps."""

    row: str
    steps: int | None = Field(default=None, ge=1)
    """In place of its configured steps."""


class TuningConfig(Config):
    """How grids are compared, and guidance and temperature chosen: on the validation split, with a seed of its own."""

    base: str
    seed: int = Field(ge=0)
    prompts: int = Field(default=280, ge=1)
    """Validation prompts of each task."""
    members: int | None = Field(default=None, ge=1)
    """So many of each grid, the first; None: all."""


class TestConfig(Config):
    """What is measured on the test split."""

    benchmarks: tuple[str, ...] = ("generate", "understand", "edit", "reason")
    sizes: dict[str, int] = Field(default_factory=dict)
    """Prompts of a benchmark; its own number where absent."""
    sampled_prompts: int = Field(default=280, ge=0)
    """So many prompts are sampled 16 times, for pass@k and best of n."""


class Experiment(Config):
    """A results table and all that it needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    evidence: bool = True
    """False: a trial of the machinery, which says so."""
    bases: dict[str, BaseConfig] = Field(min_length=1)
    runs: dict[str, tuple[tuple[str, int], ...]]
    """Lists of (base, seed) that rows name."""
    budget: BudgetConfig
    tuning: TuningConfig
    test: TestConfig = TestConfig()
    rows: dict[str, RowConfig] = Field(min_length=1)
    only: tuple[str, ...] | None = None
    """So many of the rows; None: all."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
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
        """The grid of a row; () where nothing is chosen."""
        grid = self.rows[row].tune[: self.tuning.members]
        return grid if len(grid) > 1 else ()

    def table(self) -> TablePlan:
        """What the page of results shows, without how it is made."""
        rows = {
            name: RowPlan(row.about, row.group, self.runs[row.runs], row.of, row.best_of, row.settings, row.untuned)
            for name, row in self.used.items()
        }
        return TablePlan(self.name, self.evidence, rows, self.budget.row)


@dataclass(frozen=True)
class Job:
    """A piece of work that can be interrupted and goes on."""

    kind: Literal["base", "tune", "run"]
    row: str
    """Of a base: its name."""
    base: str
    seed: int
    member: int | None = None
    """Of a grid."""

    @property
    def name(self) -> str:
        """Of its folder and of its summary."""
        if self.kind == "base":
            return self.row
        return f"{self.row}-tune{self.member}" if self.kind == "tune" else f"{self.row}-{self.base}-{self.seed}"

    @property
    def folder(self) -> str:
        """Its run directory inside OUT."""
        return f"{ {'base': 'bases', 'tune': 'tuning', 'run': 'runs'}[self.kind] }/{self.name}"

    def waits_for(self, other: Job) -> bool:
        """Whether it cannot be done without the other one: runs wait for the grid of their row, both for their base."""
        if other.kind == "base":
            return self.kind != "base" and self.base == other.base
        return other.kind == "tune" and self.kind == "run" and self.row == other.row


def load_experiment(path: Path) -> Experiment:
    """The experiment of a YAML file; raises InputError with one line."""
    return load_config(Experiment, path)


def list_jobs(
    experiment: Experiment, rows: Collection[str] | None = None, seeds: Collection[int] | None = None
) -> list[Job]:
    """Everything to do, in order: bases first, then row by row its grid and its runs.

    ``rows`` and ``seeds`` select; raises InputError for a name that is no row, and where nothing is left.
    """
    for name in rows or ():
        if name not in experiment.used:
            raise InputError(f"--rows {name}: is no row: use some of {', '.join(experiment.used)}")
    wanted = {name: row for name, row in experiment.used.items() if row.of is None and (rows is None or name in rows)}
    for name, row in experiment.used.items():  # the runs that a row is read from
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


__all__ = ["BaseConfig", "Experiment", "Job", "RowConfig", "list_jobs", "load_experiment"]
