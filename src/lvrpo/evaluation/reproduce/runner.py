"""Doing the jobs of an experiment: each is a run directory that goes on where it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvrpo.atomic_io import write_whole
from lvrpo.config import config_sha256
from lvrpo.evaluation.reproduce.budget import AnyConfig
from lvrpo.evaluation.reproduce.measured import Say, chosen_member, tested, validated, validation_score
from lvrpo.evaluation.reproduce.plan import Experiment, Job, list_jobs
from lvrpo.evaluation.reproduce.recipes import Recipes, code_version
from lvrpo.evaluation.tuned import Tuned
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import FINAL, START, load_policy
from lvrpo.reading import is_there, read_json_object
from lvrpo.report.evidence import TUNING, Summary
from lvrpo.training.checkpoint import SEAL
from lvrpo.training.health import assess
from lvrpo.training.interrupt import Interrupted, Interruption, say_stopping
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import environment, json_text
from lvrpo.training.trainer import Trainer

MEMBER = "member.json"
"""File of a tuning run: what its member of the grid reached on validation."""
TUNED = "tuned.json"
REMEDY = "restore the file, or delete it to run it again"
"""File of a run: guidance and temperature chosen on validation."""


@dataclass(frozen=True)
class Trained:
    """A policy, and what training it took."""

    policy: Policy
    steps: int = 0
    seconds: float = 0.0
    not_well: tuple[str, ...] = ()
    """What its metrics say against it."""


class Runner:
    """The jobs of one experiment, in the folder OUT; summaries land in a folder of their own."""

    def __init__(self, recipes: Recipes, summaries: Path, say: Say) -> None:
        self.recipes, self.summaries, self.say = recipes, summaries, say

    @property
    def experiment(self) -> Experiment:
        """What is reproduced."""
        return self.recipes.experiment

    def pending(self, rows: Collection[str] | None = None, seeds: Collection[int] | None = None) -> list[Job]:
        """The jobs that are left: runs without a summary, the grids that these wait for, the bases of either.

        Raises InputError for a summary of another recipe.
        """
        jobs = list_jobs(self.experiment, rows, seeds)
        runs = [job for job in jobs if job.kind == "run" and not self._summarized(job)]
        waiting = {job.row for job in runs}
        grids = [job for job in jobs if job.kind == "tune" and job.row in waiting and not self._tuned(job)]
        left = [*grids, *runs]
        used = {job.base for job in left} | ({self.experiment.tuning.base} if left else set())
        bases = [job for job in jobs if job.kind == "base" and job.row in used and not self._based(job)]
        kept = {job.name for job in (*bases, *left)}
        return [job for job in jobs if job.name in kept]

    def do(self, job: Job) -> None:
        """Does one job, or what an interruption left of it; raises Interrupted with a checkpoint written."""
        {"base": self._pretrain, "tune": self._tune, "run": self._run}[job.kind](job)

    # --- what is done ---

    def summary_path(self, job: Job) -> Path:
        """Where the summary of a run lands."""
        return self.summaries / f"{job.name}.json"

    def _summarized(self, job: Job) -> bool:
        path = self.summary_path(job)
        if not is_there(path):
            return False
        raw = Summary.read(path).raw
        config = None
        if self.experiment.rows[job.row].trained:
            config = self.recipes.config(job.row, raw.get("member", ()), job.base, job.seed)
        self.recipes.require_same_recipe(raw.get("recipe"), config, job.base, path)
        return True

    def _tuned(self, job: Job) -> bool:
        return is_there(self._grid_path(job.row)) or is_there(self._folder(job) / MEMBER)

    def _based(self, job: Job) -> bool:
        return is_there(self._folder(job) / FINAL)

    def _folder(self, job: Job) -> Path:
        return self.recipes.out / job.folder

    def _grid_path(self, row: str) -> Path:
        return self.summaries / f"{TUNING}{row}.json"

    # --- jobs ---

    def _pretrain(self, job: Job) -> None:
        self._train(self.recipes.base_config(job.base), self._folder(job))

    def _tune(self, job: Job) -> None:
        assert job.member is not None
        member = self.experiment.members(job.row)[job.member]
        config, cost = self.recipes.fitted(job.row, member, job.base, job.seed)
        folder = self._folder(job)
        trained = self._train(config, folder)
        tuned = self._settings(trained.policy, folder)
        found = {
            "overrides": list(member),
            "score": validation_score(tuned),
            "tasks": {task: max(grid.values()) for task, grid in tuned.grid.items()},
            "steps": trained.steps,
            **cost.total(trained.steps).as_dict(),
            "seconds": trained.seconds,
        }
        write_whole(folder / MEMBER, json_text(found).encode())

    def chosen(self, row: str) -> tuple[str, ...]:
        """The member of a grid that validation chose; what all reached is written beside the summaries."""
        members = self.experiment.members(row)
        if not members:
            return next(iter(self.experiment.rows[row].tune), ())
        path = self._grid_path(row)
        if not is_there(path):
            tuning = self.experiment.tuning
            jobs = [Job("tune", row, tuning.base, tuning.seed, i) for i in range(len(members))]
            found = [read_json_object(self._folder(job) / MEMBER, REMEDY) for job in jobs]
            best = chosen_member([each["score"] for each in found])
            self._write(path, {"row": row, "base": tuning.base, "seed": tuning.seed, "chosen": best, "members": found})
        raw = read_json_object(path, REMEDY)
        return tuple(raw["members"][raw["chosen"]]["overrides"])

    def _run(self, job: Job) -> None:
        plan, folder = self.experiment.rows[job.row], self._folder(job)
        member: tuple[str, ...] = ()
        config = None
        cost: dict[str, Any] = {"steps": 0, "flops": 0.0, "passes": 0.0}
        if plan.trained:
            member = self.chosen(job.row)
            config, counted = self.recipes.fitted(job.row, member, job.base, job.seed)
            trained = self._train(config, folder)
            spent = counted.total(trained.steps)
            if plan.start == "scratch":
                spent = spent - counted.total(self.recipes.base_config(job.base).steps)
            cost = {"steps": trained.steps, **spent.as_dict(), "flops_per_step": counted.step.flops}
        else:
            folder.mkdir(parents=True, exist_ok=True)
            trained = Trained(load_policy(self.recipes.base_model(job.base), self.recipes.device))
        tuned = self._settings(trained.policy, folder)
        started = time.perf_counter()
        benchmarks = tested(trained.policy, self.experiment, tuned, self.summaries, self.say)
        summary = {
            "row": job.row,
            "group": plan.group,
            "base": job.base,
            "seed": job.seed,
            "experiment": self.experiment.name,
            "evidence": self.experiment.evidence,
            "config": plan.config,
            "overrides": list(plan.overrides),
            "member": list(member),
            "recipe": self.recipes.recipe(config, job.base),
            "config_sha256": None if config is None else config_sha256(config),
            **cost,
            "budget_flops": self.recipes.budget.flops if plan.trained else 0.0,
            "training_seconds": round(trained.seconds, 1),
            "test_seconds": round(time.perf_counter() - started, 1),
            "test_opened": time.strftime("%Y-%m-%d", time.gmtime()),
            "validation": {"score": validation_score(tuned), "prompts": self.experiment.tuning.prompts},
            "not_well": list(trained.not_well),
            "code": code_version(),
            "hardware": hardware(),
            "benchmarks": benchmarks,
        }
        self._write(self.summary_path(job), summary)

    def _settings(self, policy: Policy, folder: Path) -> Tuned:
        """Guidance and temperature chosen on validation, once for a run."""
        path = folder / TUNED
        if not is_there(path):
            self.say("validation: guidance and temperature")
            write_whole(path, json_text(validated(policy, self.experiment).as_dict()).encode())
        return Tuned.read(path)

    def _train(self, config: AnyConfig, folder: Path) -> Trained:
        """Starts a run or goes on with it; a finished one is read."""
        begun = (folder / START / SEAL).exists()
        if isinstance(config, PretrainConfig):
            trainer = Pretrainer.resume(folder, config) if begun else Pretrainer.start(config, folder)
        else:
            trainer = Trainer.resume(folder, config) if begun else Trainer.start(config, folder)
        with trainer.run:
            if not trainer.finished:
                self.say(f"training: {config.steps} steps")
            with Interruption(say_stopping) as interrupted:
                done = trainer.train(interrupted=interrupted)
            if not done or interrupted():
                raise Interrupted(f"{folder}: interrupted, a checkpoint is written; the same command goes on with it")
            if isinstance(trainer, Pretrainer):
                return Trained(trainer.state.average, trainer.state.step, trainer.state.seconds)
            findings = assess(trainer.run.metrics(), trainer.config.max_failed).findings
            words = tuple(finding.words for finding in findings)
            return Trained(trainer.result(), trainer.state.step, trainer.state.seconds, words)

    def _write(self, path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json_text(content).encode())


def hardware() -> str:
    """In words: the cards, or the processor and its threads."""
    found = environment()["hardware"]
    cards: Sequence[str] = found["gpus"]
    return ", ".join(cards) if cards else f"{found['cpu']}, {found['threads']} of {found['cores']} cores"


__all__ = ["Runner", "Trained", "hardware"]
