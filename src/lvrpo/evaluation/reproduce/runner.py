"""Runs the jobs of an experiment, each in a resumable run directory, and evaluates the results."""

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
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.items import cluster_of, form_of
from lvrpo.evaluation.reproduce.compute import AnyConfig
from lvrpo.evaluation.reproduce.plan import Experiment, Job, Recipes, code_version, list_jobs
from lvrpo.evaluation.results import BEST_OF
from lvrpo.evaluation.suite import Benchmark, EvaluationOptions, evaluate, find_benchmarks
from lvrpo.evaluation.tuning import TunedSampling, content_key, tune
from lvrpo.metrics import best_of_n
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import FINAL, START, load_policy
from lvrpo.reading import path_exists, read_json_object
from lvrpo.records import BenchmarkRecord
from lvrpo.report.evidence import TUNING, Outcome, PromptSet, Summary, prompts_file
from lvrpo.rewards.verifiable_text import normalize_answer
from lvrpo.training.base_trainer import Interrupted, InterruptHandler, print_stopping
from lvrpo.training.checkpoint import SEAL
from lvrpo.training.health import assess
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import environment, json_text
from lvrpo.training.trainer import Trainer
from lvrpo.types import Prompt

UNGUIDED = "_plain"
"""Name suffix of a benchmark that is evaluated unguided and greedy as well."""
ANSWERS = 10
"""The most frequent answers of a form of question that a summary counts; the others are ``OTHER``."""
OTHER = "(other answers)"

Log = Callable[[str], None]


def tune_on_validation(policy: Policy, experiment: Experiment) -> TunedSampling:
    """Tunes guidance and temperature on the validation split."""
    test = experiment.test
    return tune(policy, find_benchmarks(test.benchmarks), experiment.tuning.prompts, sampling=test.sampling)


def _validation_score(tuned: TunedSampling) -> float:
    """The mean over tasks of the best validation success, by which members of a grid are compared."""
    best = [max(grid.values()) for grid in tuned.grid.values()]
    return sum(best) / len(best)


def evaluate_on_test(
    policy: Policy, experiment: Experiment, tuned: TunedSampling, folder: Path, log: Log
) -> dict[str, Any]:
    """The outcomes on the test split, by benchmark; writes the prompts into ``folder`` once.

    Image benchmarks are evaluated twice, with tuned settings and unguided. Raises InputError where a test prompt was
    used for tuning.
    """
    test = experiment.test
    found: dict[str, Any] = {}
    for benchmark in find_benchmarks(test.benchmarks):
        n = test.sizes.get(benchmark.name, benchmark.n)
        prompts = benchmark.prompts(n)
        log(f"test: {benchmark.name}, {len(prompts)} prompts")
        fingerprint = _write_prompts(prompts, folder)
        options = EvaluationOptions(test.sampled_prompts, tuned=tuned)
        scored = _score(policy, benchmark, n, test.sampling, options)
        found[benchmark.name] = _to_outcome(scored, fingerprint).as_dict()
        plain = replace(benchmark, name=benchmark.name + UNGUIDED, fixed_sampling=True)
        if all(_same(plain, prompt, test.sampling, tuned) for prompt in prompts):
            found[plain.name] = benchmark.name  # identical settings
        else:
            found[plain.name] = _to_outcome(
                _score(policy, plain, n, test.sampling, EvaluationOptions(0, tuned=tuned)), fingerprint
            ).as_dict()
    return found


def _score(
    policy: Policy, benchmark: Benchmark, n: int, sampling: Sampling, options: EvaluationOptions
) -> BenchmarkRecord:
    result = evaluate(policy, [benchmark], sizes={benchmark.name: n}, sampling=sampling, options=options)
    return result.scored[benchmark.name]


def _same(plain: Benchmark, prompt: Prompt, sampling: Sampling, tuned: TunedSampling) -> bool:
    """Whether the tuned settings of the prompt's task equal the benchmark's own."""
    base = plain.sampling(sampling)
    return tuned.apply(base, prompt.task) == base


def _to_outcome(scored: BenchmarkRecord, fingerprint: str) -> Outcome:
    """A record as a summary stores it: the first sample of every prompt, and counts over repeated samples.

    Raises ContractError where a first sample is not right or wrong, of which a bit of the summary is made.
    """
    lost = sum(not np.isfinite(row[0]) for row in scored.successes)
    if lost or not scored.successes:
        why = next(filter(None, scored.failures), "it is scored by rewards")
        raise ContractError(
            f"test: {lost or len(scored.ids)} of {len(scored.ids)} prompts are neither right nor wrong: {why}: correct "
            "the scorer, or leave the benchmark out"
        )
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
    """The most frequent answers, the others summed."""
    shown = dict(given.most_common(ANSWERS))
    rest = given.total() - sum(shown.values())
    return {**shown, **({OTHER: rest} if rest else {})}


def _write_prompts(prompts: Sequence[Prompt], folder: Path) -> str:
    """Writes the prompt set, once; returns its fingerprint."""
    digest = hashlib.blake2b(digest_size=6)
    for prompt in prompts:
        digest.update(f"{content_key(prompt)} {prompt.answer}\n".encode())
    fingerprint = digest.hexdigest()
    path = prompts_file(folder, fingerprint)
    if not path_exists(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(_prompt_set(prompts).as_dict(), separators=(",", ":")) + "\n").encode())
    return fingerprint


def _prompt_set(prompts: Sequence[Prompt]) -> PromptSet:
    """The attributes of prompts that results tables need."""
    clusters: dict[str, int] = {}
    asked = [prompt.output == ("text",) and prompt.answer is not None for prompt in prompts]
    return PromptSet(
        tuple(prompt.category for prompt in prompts),
        tuple(clusters.setdefault(cluster_of(prompt), len(clusters)) for prompt in prompts),
        tuple(prompt.held_out for prompt in prompts),
        tuple(form_of(prompt) if text else "" for prompt, text in zip(prompts, asked, strict=True)),
        tuple(normalize_answer(str(p.answer)) if text else None for p, text in zip(prompts, asked, strict=True)),
    )


def _best_member(scores: Sequence[float]) -> int:
    """Index of the grid member with the highest validation score; the first of ties."""
    if not scores or not all(np.isfinite(scores)):
        raise InputError(f"validation scores {list(scores)}: a member has none: run its job again")
    return int(np.argmax(scores))


MEMBER = "member.json"
"""File of a tuning run: the validation scores of its grid member."""
TUNED = "tuned.json"
"""File of a run: its tuned guidance and temperature."""
REMEDY = "restore the file, or delete it to run it again"


@dataclass(frozen=True)
class TrainedRun:
    """A trained policy and its cost."""

    policy: Policy
    steps: int = 0
    seconds: float = 0.0
    not_well: tuple[str, ...] = ()
    """The findings of the health check."""


class Runner:
    """Runs the jobs of an experiment in the folder OUT; summaries go to a separate folder."""

    def __init__(self, recipes: Recipes, summaries: Path, log: Log) -> None:
        self.recipes, self.summaries, self.log = recipes, summaries, log

    @property
    def experiment(self) -> Experiment:
        """The experiment of the recipes."""
        return self.recipes.experiment

    def pending(self, rows: Collection[str] | None = None, seeds: Collection[int] | None = None) -> list[Job]:
        """The remaining jobs: runs without a summary, the grids that they depend on, and the bases of both.

        Raises InputError for a summary of another recipe.
        """
        jobs = list_jobs(self.experiment, rows, seeds)
        runs = [job for job in jobs if job.kind == "run" and not self._summarized(job)]
        waiting = {job.row for job in runs}
        grids = [job for job in jobs if job.kind == "tune" and job.row in waiting and not self._tuned(job)]
        remaining = [*grids, *runs]
        used = {job.base for job in remaining} | ({self.experiment.tuning.base} if remaining else set())
        bases = [
            job for job in jobs if job.kind == "base" and job.row in used and not path_exists(self._folder(job) / FINAL)
        ]
        kept = {job.name for job in (*bases, *remaining)}
        return [job for job in jobs if job.name in kept]

    def run_job(self, job: Job) -> None:
        """Starts or resumes one job; raises Interrupted after writing a checkpoint."""
        {"base": self._pretrain, "tune": self._tune, "run": self._run}[job.kind](job)

    # --- finished jobs ---

    def summary_path(self, job: Job) -> Path:
        """The file of the summary of a run."""
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
        config, cost = self.recipes.within_budget(job.row, member, job.base, job.seed)
        folder = self._folder(job)
        trained = self._train(config, folder)
        tuned = self._settings(trained.policy, folder)
        found = {
            "overrides": list(member),
            "score": _validation_score(tuned),
            "tasks": {task: max(grid.values()) for task, grid in tuned.grid.items()},
            "steps": trained.steps,
            "flops": cost.total(trained.steps),
            "seconds": trained.seconds,
        }
        write_atomic(folder / MEMBER, json_text(found).encode())

    def best_overrides(self, row: str) -> tuple[str, ...]:
        """The overrides of the best grid member; writes the scores of all members beside the summaries."""
        members = self.experiment.members(row)
        if not members:
            return next(iter(self.experiment.rows[row].tune), ())
        path = self._grid_path(row)
        if not path_exists(path):
            tuning = self.experiment.tuning
            jobs = [Job("tune", row, tuning.base, tuning.seed, i) for i in range(len(members))]
            found = [read_json_object(self._folder(job) / MEMBER, REMEDY) for job in jobs]
            best = _best_member([each["score"] for each in found])
            self._write(path, {"row": row, "base": tuning.base, "seed": tuning.seed, "chosen": best, "members": found})
        raw = read_json_object(path, REMEDY)
        return tuple(raw["members"][raw["chosen"]]["overrides"])

    def _run(self, job: Job) -> None:
        plan, folder = self.experiment.rows[job.row], self._folder(job)
        member: tuple[str, ...] = ()
        config = None
        cost: dict[str, Any] = {"steps": 0, "flops": 0.0}
        if plan.trained:
            member = self.best_overrides(job.row)
            config, counted = self.recipes.within_budget(job.row, member, job.base, job.seed)
            trained = self._train(config, folder)
            spent = counted.total(trained.steps)
            if plan.start == "scratch":
                spent = spent - counted.total(self.recipes.base_config(job.base).steps)
            cost = {"steps": trained.steps, "flops": spent, "flops_per_step": counted.step}
        else:
            folder.mkdir(parents=True, exist_ok=True)
            trained = TrainedRun(load_policy(self.recipes.base_model(job.base), self.recipes.device))
        tuned = self._settings(trained.policy, folder)
        started = time.perf_counter()
        benchmarks = evaluate_on_test(trained.policy, self.experiment, tuned, self.summaries, self.log)
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
            "budget_flops": self.recipes.budget if plan.trained else 0.0,
            "training_seconds": round(trained.seconds, 1),
            "test_seconds": round(time.perf_counter() - started, 1),
            "test_opened": time.strftime("%Y-%m-%d", time.gmtime()),
            "validation": {"score": _validation_score(tuned), "prompts": self.experiment.tuning.prompts},
            "not_well": list(trained.not_well),
            "code": code_version(),
            "hardware": hardware(),
            "benchmarks": benchmarks,
        }
        self._write(self.summary_path(job), summary)

    def _settings(self, policy: Policy, folder: Path) -> TunedSampling:
        """Tunes guidance and temperature, once per run."""
        path = folder / TUNED
        if not path_exists(path):
            self.log("validation: guidance and temperature")
            write_atomic(path, json_text(tune_on_validation(policy, self.experiment).as_dict()).encode())
        return TunedSampling.read(path)

    def _train(self, config: AnyConfig, folder: Path) -> TrainedRun:
        """Starts or resumes a run; a finished one is read."""
        begun = (folder / START / SEAL).exists()
        if isinstance(config, PretrainConfig):
            trainer = Pretrainer.resume(folder, config) if begun else Pretrainer.start(config, folder)
        else:
            trainer = Trainer.resume(folder, config) if begun else Trainer.start(config, folder)
        with trainer.run:
            if not trainer.finished:
                self.log(f"training: {config.steps} steps")
            with InterruptHandler(print_stopping) as interrupted:
                done = trainer.train(interrupted=interrupted)
            if not done or interrupted():
                raise Interrupted(f"{folder}: interrupted, a checkpoint is written; repeat the command to continue")
            if isinstance(trainer, Pretrainer):
                return TrainedRun(trainer.state.average, trainer.state.step, trainer.state.seconds)
            findings = assess(trainer.run.metrics(), trainer.config.max_failed).findings
            words = tuple(finding.words for finding in findings)
            return TrainedRun(trainer.result(), trainer.state.step, trainer.state.seconds, words)

    def _write(self, path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json_text(content).encode())


def hardware() -> str:
    """The names of the GPUs, or the processor and its threads."""
    found = environment()["hardware"]
    cards: Sequence[str] = found["gpus"]
    return ", ".join(cards) if cards else f"{found['cpu']}, {found['threads']} of {found['cores']} cores"
