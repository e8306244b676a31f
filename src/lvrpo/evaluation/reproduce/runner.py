"""Runs the jobs of an experiment, each a run directory that can be resumed, and evaluates the results."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lvrpo.atomic_io import write_atomic
from lvrpo.config import config_sha256
from lvrpo.errors import InputError
from lvrpo.evaluation.reproduce.compute import AnyConfig
from lvrpo.evaluation.reproduce.plan import Experiment, Job, Recipes, code_version, list_jobs
from lvrpo.evaluation.results import BEST_OF
from lvrpo.evaluation.suite import SAMPLING, Benchmark, Measuring, cluster_of, evaluate, find_benchmarks, form_of
from lvrpo.evaluation.tuning import Tuned, content_key, tune
from lvrpo.metrics import best_of_n
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import FINAL, START, load_policy
from lvrpo.reading import path_exists, read_json_object
from lvrpo.records import BenchmarkRecord
from lvrpo.report.evidence import TUNING, Outcome, PromptSet, Summary, prompts_file
from lvrpo.rewards.verifiable_text import normalize_answer
from lvrpo.training.checkpoint import SEAL
from lvrpo.training.health import assess
from lvrpo.training.interrupt import Interrupted, InterruptHandler, print_stopping
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import environment, json_text
from lvrpo.training.trainer import Trainer
from lvrpo.types import Prompt

PLAIN = "_plain"
"""End of the name of a benchmark that is measured unguided and greedy as well."""
ANSWERS = 10
"""Answers of a form of question that a summary counts by themselves; the others are ``OTHER``."""
OTHER = "(other answers)"

Say = Callable[[str], None]


def validated(policy: Policy, experiment: Experiment) -> Tuned:
    """Guidance and temperature at which the policy is best on the validation split, with the scores there."""
    return tune(policy, find_benchmarks(experiment.test.benchmarks), experiment.tuning.prompts)


def validation_score(tuned: Tuned) -> float:
    """The mean over tasks of the best success on validation: what members of a grid are compared by."""
    best = [max(grid.values()) for grid in tuned.grid.values()]
    return sum(best) / len(best)


def tested(policy: Policy, experiment: Experiment, tuned: Tuned, folder: Path, say: Say) -> dict[str, Any]:
    """By benchmark the packed outcome on the test split; the prompts are written into ``folder`` once.

    Drawing benchmarks are measured twice, at the settings chosen and unguided. Raises InputError where a test prompt is
    among those that anything was chosen on.
    """
    test = experiment.test
    found: dict[str, Any] = {}
    for benchmark in find_benchmarks(test.benchmarks):
        n = test.sizes.get(benchmark.name, benchmark.n)
        prompts = benchmark.prompts(n)
        say(f"test: {benchmark.name}, {len(prompts)} prompts")
        fingerprint = keep_prompts(prompts, folder)
        scored = _score(policy, benchmark, n, Measuring(test.sampled_prompts, tuned=tuned))
        found[benchmark.name] = packed(scored, fingerprint).as_dict()
        plain = replace(benchmark, name=benchmark.name + PLAIN, fixed=True)
        if all(_same(plain, prompt, tuned) for prompt in prompts):
            found[plain.name] = benchmark.name  # the same measurement
        else:
            found[plain.name] = packed(_score(policy, plain, n, Measuring(0, tuned=tuned)), fingerprint).as_dict()
    return found


def _score(policy: Policy, benchmark: Benchmark, n: int, measuring: Measuring) -> BenchmarkRecord:
    result = evaluate(policy, [benchmark], sizes={benchmark.name: n}, measuring=measuring)
    return result.scored[benchmark.name]


def _same(plain: Benchmark, prompt: Prompt, tuned: Tuned) -> bool:
    """Whether what was chosen for the prompt's task is what the benchmark does anyway."""
    base = plain.sampling(SAMPLING)
    return tuned.applied(base, prompt.task) == base


def packed(scored: BenchmarkRecord, fingerprint: str) -> Outcome:
    """A record as a summary holds it: the first sample of every prompt, and what many of some gave."""
    sizes = [len(row) for row in scored.successes]
    most = max(sizes)
    often = [most > 1 and size == most for size in sizes]
    unknown = np.full(len(sizes), np.nan)
    counts = np.array([sum(row) if many else np.nan for row, many in zip(scored.successes, often, strict=True)])
    best = {n: unknown.copy() for n in BEST_OF if n <= most} if scored.judged else {}
    for n, values in best.items():
        for i, many in enumerate(often):
            judged = [score for score in scored.judged[i] if score is not None] if many else []
            if many and len(judged) == most:
                values[i] = best_of_n(judged, scored.successes[i], n)
    known = {n: values for n, values in best.items() if not np.isnan(values[often]).any()}
    answers: dict[str, Counter[str]] = {}
    for form, given in zip(scored.forms, scored.answers, strict=True):
        if form:
            answers.setdefault(form, Counter()).update(given[:1])
    shown = {form: _commonest(given) for form, given in answers.items()}
    first = np.array([row[0] for row in scored.successes], dtype=np.float64)
    settings = scored.settings["tasks"]
    return Outcome(fingerprint, first, most, counts, known, shown, settings)


def _commonest(given: Counter[str]) -> dict[str, int]:
    """The answers given most often, the rest of them as one."""
    shown = dict(given.most_common(ANSWERS))
    rest = given.total() - sum(shown.values())
    return {**shown, **({OTHER: rest} if rest else {})}


def keep_prompts(prompts: Sequence[Prompt], folder: Path) -> str:
    """Writes what tables need to know of the prompts, once; returns their fingerprint."""
    digest = hashlib.blake2b(digest_size=6)
    for prompt in prompts:
        digest.update(f"{content_key(prompt)} {prompt.answer}\n".encode())
    fingerprint = digest.hexdigest()
    path = prompts_file(folder, fingerprint)
    if not path_exists(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(prompt_set(prompts).as_dict(), separators=(",", ":")) + "\n").encode())
    return fingerprint


def prompt_set(prompts: Sequence[Prompt]) -> PromptSet:
    """What tables need to know of prompts."""
    clusters: dict[str, int] = {}
    asked = [prompt.output == ("text",) and prompt.answer is not None for prompt in prompts]
    return PromptSet(
        tuple(prompt.category for prompt in prompts),
        tuple(clusters.setdefault(cluster_of(prompt), len(clusters)) for prompt in prompts),
        tuple(prompt.held_out for prompt in prompts),
        tuple(form_of(prompt) if text else "" for prompt, text in zip(prompts, asked, strict=True)),
        tuple(normalize_answer(str(p.answer)) if text else None for p, text in zip(prompts, asked, strict=True)),
    )


def chosen_member(scores: Sequence[float]) -> int:
    """The member of a grid with the highest score on validation; of equal ones the first."""
    if not scores or not all(np.isfinite(scores)):
        raise InputError(f"validation scores {list(scores)}: a member has none: run its job again")
    return int(np.argmax(scores))


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
        if not path_exists(path):
            return False
        raw = Summary.read(path).raw
        config = None
        if self.experiment.rows[job.row].trained:
            config = self.recipes.config(job.row, raw.get("member", ()), job.base, job.seed)
        self.recipes.require_same_recipe(raw.get("recipe"), config, job.base, path)
        return True

    def _tuned(self, job: Job) -> bool:
        return path_exists(self._grid_path(job.row)) or path_exists(self._folder(job) / MEMBER)

    def _based(self, job: Job) -> bool:
        return path_exists(self._folder(job) / FINAL)

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
        write_atomic(folder / MEMBER, json_text(found).encode())

    def chosen(self, row: str) -> tuple[str, ...]:
        """The member of a grid that validation chose; what all reached is written beside the summaries."""
        members = self.experiment.members(row)
        if not members:
            return next(iter(self.experiment.rows[row].tune), ())
        path = self._grid_path(row)
        if not path_exists(path):
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
        if not path_exists(path):
            self.say("validation: guidance and temperature")
            write_atomic(path, json_text(validated(policy, self.experiment).as_dict()).encode())
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
            with InterruptHandler(print_stopping) as interrupted:
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
        write_atomic(path, json_text(content).encode())


def hardware() -> str:
    """In words: the cards, or the processor and its threads."""
    found = environment()["hardware"]
    cards: Sequence[str] = found["gpus"]
    return ", ".join(cards) if cards else f"{found['cpu']}, {found['threads']} of {found['cores']} cores"


__all__ = [
    "Runner",
    "Say",
    "Trained",
    "chosen_member",
    "hardware",
    "packed",
    "prompt_set",
    "tested",
    "validated",
    "validation_score",
]
