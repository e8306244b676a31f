"""An experiment: evaluate the base, align it and train a supervised baseline, evaluate again, write the report."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from lvrpo.config import config_sha256, parse_section
from lvrpo.distributed import on_main
from lvrpo.errors import ContractError, InputError, LvrpoError
from lvrpo.evaluation import BENCHMARKS
from lvrpo.evaluation.reward_audit import write_audit
from lvrpo.evaluation.samples import (
    REPEATED_PROMPTS,
    first_per_category,
    first_successes,
    read_evaluation,
    write_evaluation,
    write_samples,
)
from lvrpo.evaluation.scoring import evaluation_policy, sample_prompts
from lvrpo.evaluation.suite import (
    SAMPLING,
    Benchmark,
    Evaluation,
    EvaluationOptions,
    default_sampling,
    evaluate,
    find_benchmarks,
    prompt_benchmarks,
    with_sampling,
)
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import START, load_policy, possible_tasks, stored_image_size
from lvrpo.reading import Record, path_exists
from lvrpo.records import Cost, SampleKey
from lvrpo.report import build_report
from lvrpo.rewards.success import SUCCESS_ONLY
from lvrpo.training.base_trainer import InterruptHandler, print_stopping
from lvrpo.training.checkpoint import SEAL
from lvrpo.training.config import ROW_SOURCES, TrainConfig
from lvrpo.training.health import assess
from lvrpo.training.memory import peak_memory_gib
from lvrpo.training.policies import SetName
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import PLAN, RunDirectory
from lvrpo.training.trainer import Trainer
from lvrpo.types import TASKS, Group, Prompt, TaskKind

RESULT = "eval/after.json"


@dataclass
class Baseline:
    """The supervised baseline, trained and evaluated in a second process."""

    config: PretrainConfig
    folder: Path
    benchmarks: Sequence[str]
    sizes: Mapping[str, int]
    sampling: Sampling
    sampled_prompts: int = 0
    process: SpawnProcess | None = field(default=None, init=False)

    @property
    def finished(self) -> bool:
        """Whether its evaluation is written."""
        return path_exists(self.folder / RESULT)

    def start(self) -> None:
        """Starts the process, which resumes from the last checkpoint if there is one."""
        if not self.finished:
            process = multiprocessing.get_context("spawn").Process(target=self._run_process, daemon=True)
            process.start()  # a copy of this object goes along
            self.process = process

    def wait(self) -> tuple[Evaluation, Cost]:
        """Waits for the process; returns its evaluation and cost. Raises ContractError if it failed."""
        if self.process is not None:
            self.process.join()
            if self.process.exitcode != 0:
                why = _text(self.folder.with_suffix(".error")) or f"exit code {self.process.exitcode}"
                raise ContractError(f"the baseline in {self.folder} failed: {why}: run again, or use --no-baseline")
        record = read_evaluation(RunDirectory.read(self.folder), RESULT)
        if record.cost is None:
            raise InputError(f"{self.folder / RESULT}: cost is missing: restore the file")
        return Evaluation(record.scores, seconds=record.seconds), record.cost

    def stop(self) -> None:
        """Terminates the process; its last checkpoint stays."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def _run_process(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent handles it
        error_file = self.folder.with_suffix(".error")
        try:
            error_file.unlink(missing_ok=True)
            self.train_and_evaluate()
        except BaseException as error:  # exits too: the parent process reads the reason from the file
            line = " ".join(str(error).split()) or type(error).__name__
            error_file.write_text(line if isinstance(error, LvrpoError) else traceback.format_exc(limit=-2))
            sys.exit(1)

    def train_and_evaluate(self) -> None:
        """Trains (or resumes) and evaluates the baseline in this process; writes eval/after.json last.

        The base that it started from judges its best of n, as for the alignment.
        """
        parent, config = multiprocessing.parent_process(), self.config

        def end_with_parent(row: Mapping[str, Any]) -> None:
            if parent is not None and not parent.is_alive():
                sys.exit(1)

        begun = (self.folder / START / SEAL).exists()
        trainer = Pretrainer.resume(self.folder, config) if begun else Pretrainer.start(config, self.folder)
        with trainer.run as run:
            trainer.train(end_with_parent)
            judge = None if config.init is None else load_policy(config.init, config.device, "float32").make_reference()
            options = EvaluationOptions(self.sampled_prompts, judge=judge)
            found = find_benchmarks(self.benchmarks)
            policy = trainer.state.average
            evaluation = evaluate(policy, found, sizes=self.sizes, sampling=self.sampling, options=options)
            cost = Cost(trainer.state.seconds, peak_memory_gib())
            run.write_json(RESULT, {**evaluation.as_dict(), "cost": asdict(cost)})


def _text(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split()) if path.exists() else ""


TEST_ROWS = "data.test"
"""Benchmark name for the test rows of the run's own prompt source."""


class PlanRecord(Record):
    """``plan.json``."""

    benchmarks: list[str]
    sizes: dict[str, int]
    baseline: dict[str, Any] | None
    baseline_name: str
    parallel: bool
    sampled_prompts: int = 70


@dataclass(frozen=True)
class Plan:
    """The benchmarks and the baseline of an experiment; stored in ``plan.json`` of the run."""

    benchmarks: tuple[str, ...] = ("scenes",)
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Prompts per benchmark, where it is not the default."""
    sampled_prompts: int = 70
    """Prompts per benchmark that are sampled repeatedly, for pass@k and best of n as judged by the base."""
    baseline: PretrainConfig | None = None
    baseline_name: str = "continued pretraining"
    parallel: bool = True
    """Whether the baseline trains at the same time as the alignment, or afterwards."""

    def files(self) -> dict[str, Any]:
        """``plan.json`` for ``Trainer.start`` to write. Any: JSON."""
        baseline = None if self.baseline is None else self.baseline.model_dump(mode="json")
        return {PLAN: {**vars(self), "baseline": baseline}}

    def load_or_write(self, run: RunDirectory) -> Plan:
        """The stored plan of the run; where there is none, writes and returns this one."""
        if not path_exists(run.path / PLAN):
            for name, content in self.files().items():
                run.write_json(name, content)
            return self
        raw = run.read_json(PLAN, PlanRecord)
        section = raw["baseline"]
        baseline = None if section is None else parse_section(PretrainConfig, section, f"{run.path / PLAN}: baseline")
        known = {name: raw[name] for name in PlanRecord.model_fields if name in raw}
        return Plan(**{**known, "benchmarks": tuple(raw["benchmarks"]), "baseline": baseline})


class ProgressListener(Protocol):
    """Receives the progress of an experiment."""

    def phase(self, text: str) -> None:
        """A new part of the experiment begins."""
        ...

    def step(self, row: Mapping[str, Any]) -> None:
        """A step of the alignment is done."""
        ...


class Experiment:
    """The evaluations before and after an alignment, its baseline and its report.

    Results are files of the run directory; those that exist are not computed again. A context manager: leaving it
    terminates the baseline's process.
    """

    def __init__(self, trainer: Trainer, plan: Plan, progress: ProgressListener) -> None:
        """``plan``: of a new run; a resumed one has its own."""
        self.trainer, self.run, self.progress = trainer, trainer.run, progress
        self.plan = plan = plan.load_or_write(trainer.run)
        rollout = trainer.config.rollout
        self.sampling = replace(
            SAMPLING, num_steps=rollout.num_steps, timestep_shift=rollout.timestep_shift, solver=rollout.solver
        )
        self.benchmarks = _planned_benchmarks(trainer, plan)
        self.baseline: Baseline | None = None
        if plan.baseline is not None:
            folder = trainer.run.path / "baseline"
            sizes = (plan.benchmarks, plan.sizes)
            self.baseline = Baseline(plan.baseline, folder, *sizes, self.sampling, plan.sampled_prompts)
        self._report_prompts: list[tuple[Benchmark, Prompt]] = []
        self.summary: dict[str, Any] = {}
        """JSON, written to summary.json."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.baseline is not None:
            self.baseline.stop()

    @contextmanager
    def measured(self, command: str = "train") -> Iterator[Callable[[], bool]]:
        """Evaluates before and after the body, which trains until what is yielded is true; then ``summary`` is there.

        Raises Interrupted, which says how ``command`` goes on, where a signal ended the training.
        """
        before = self.before()
        with InterruptHandler(print_stopping) as interrupted:
            yield interrupted
            self.trainer.require_uninterrupted(command)
        self.summary = self.after(before)

    def before(self) -> Evaluation:
        """Starts a parallel baseline and evaluates the initial policy."""
        plan, baseline, trainer = self.plan, self.baseline, self.trainer
        if plan.baseline is not None and baseline is not None and plan.parallel and not baseline.finished:
            steps = plan.baseline.steps
            self.progress.phase(f"{plan.baseline_name}, the baseline, starts in a second process: {steps} steps")
            baseline.start()
        evaluation = self._measure("before", "reference")
        if not trainer.finished:
            self.progress.phase(f"train: {trainer.config.steps} steps")
            self._report_prompts = self._find_report_prompts()
        return evaluation

    def observe(self, row: Mapping[str, Any]) -> None:
        """The callback of a step: halfway, samples the prompts of the report once more. Any: metrics."""
        middle = max(1, self.trainer.config.steps // 2)
        if row["step"] == middle and self._report_prompts:
            policy = evaluation_policy(self.trainer.state.policies, "ema")
            alike: dict[Sampling, list[tuple[Benchmark, Prompt]]] = {}
            for benchmark, prompt in self._report_prompts:
                own = benchmark.own_sampling
                sampling = benchmark.sampling(default_sampling(policy, prompt.task)) if own else self.sampling
                alike.setdefault(sampling, []).append((benchmark, prompt))
            drawn: dict[str, list[Group]] = {}
            for sampling, pairs in alike.items():
                groups = sample_prompts(policy, [prompt for _, prompt in pairs], sampling, 0)
                for (benchmark, _), group in zip(pairs, groups, strict=True):
                    drawn.setdefault(benchmark.name, []).append(group)
            name = f"step_{middle:06d}"
            shown = [(benchmark, group) for benchmark, own_groups in drawn.items() for group in own_groups]
            samples = write_samples(self.run, name, shown, self._successes(drawn))
            self.run.write_json(f"eval/{name}.json", {"prompts": list(map(asdict, samples))})
        self.progress.step(row)

    def _successes(self, drawn: Mapping[str, Sequence[Group]]) -> dict[SampleKey, float]:
        """The successes of the report's prompts by benchmark; the task's own rule is asked of its own prompts alone."""
        own_rule = {benchmark.name for benchmark in self.benchmarks if benchmark.own_rule}
        return {
            (name, prompt): success
            for name, groups in drawn.items()
            for scorer in [self.trainer.components.scorer if name in own_rule else SUCCESS_ONLY]
            for prompt, success in first_successes(groups, scorer).items()
        }

    def after(self, before: Evaluation) -> dict[str, Any]:
        """Evaluates the result, waits for the baseline, writes summary and report; returns the summary. Any: JSON."""
        plan, run, baseline = self.plan, self.run, self.baseline
        after = self._measure("after", "ema")
        _require_same_prompts(run, before, after)
        baseline_result = None
        if baseline is not None:
            self.progress.phase(f"{plan.baseline_name}: waiting for the baseline")
            if not plan.parallel:
                baseline.start()
            baseline_result = baseline.wait()
        summary = _summarize(self.trainer, before, after, baseline_result, plan)
        run.write_summary(summary)
        page = on_main(lambda: (write_audit(run.path), build_report(run.path))[1])
        self.progress.phase(f"report: {page}")
        return summary

    def _measure(self, phase: Literal["before", "after"], weights: SetName) -> Evaluation:
        """Evaluates and writes eval/PHASE.json, or reads it where it exists.

        The initial policy judges the best of n and for the run's own rewards.
        """
        run, plan, policies = self.run, self.plan, self.trainer.state.policies
        path = run.path / "eval" / f"{phase}.json"
        if on_main(lambda: path_exists(path)):
            record = read_evaluation(run, f"eval/{phase}.json")
            return Evaluation(record.scores, seconds=record.seconds)
        if self.benchmarks:
            own = " (the run's own rewards)"
            names = [b.name + (own if b.metric == "reward" else "") for b in self.benchmarks]
            self.progress.phase(f"evaluate {phase}: {', '.join(names)}")
        if phase == "after":
            self.trainer.load_result()
        base, scorer = evaluation_policy(policies, "reference"), self.trainer.components.scorer
        options = EvaluationOptions(plan.sampled_prompts, judge=base, scorer=scorer, reward_judge=base)
        evaluation = evaluate(
            evaluation_policy(policies, weights),
            self.benchmarks,
            sizes=plan.sizes,
            sampling=self.sampling,
            keep=first_per_category,
            options=options,
        )
        on_main(lambda: write_evaluation(run, phase, evaluation))
        return evaluation

    def _find_report_prompts(self) -> list[tuple[Benchmark, Prompt]]:
        """The prompts of the samples in eval/before.json, each with its benchmark."""
        sizes = self.plan.sizes
        shown = [sample.key for sample in read_evaluation(self.run, "eval/before.json").prompts]
        known = {
            key: (benchmark, prompt)
            for benchmark in self.benchmarks
            if benchmark.name not in REPEATED_PROMPTS
            for prompt in benchmark.prompts(sizes.get(benchmark.name, benchmark.n))
            if (key := (benchmark.name, prompt.id)) in shown
        }
        return [known[key] for key in shown if key in known]


def _require_same_prompts(run: RunDirectory, before: Evaluation, after: Evaluation) -> None:
    """Raises InputError where the two evaluations of a run are of different prompts."""
    one, two = before.scored, after.scored
    if list(one) != list(two) or not all(two[name].has_prompts_of(record) for name, record in one.items()):
        raise InputError(
            f"{run.path / 'eval'}: before.json and after.json are not of the same prompts: delete both to measure again"
        )


def _planned_benchmarks(trainer: Trainer, plan: Plan) -> list[Benchmark]:
    """The benchmarks of a plan; the user's rows are sampled as in validation and scored by the run's rewards."""
    config, components = trainer.config, trainer.components
    names = [name for name in plan.benchmarks if name != TEST_ROWS]
    files = any(name.endswith(".jsonl") for name in names)
    side = stored_image_size(config.policy) if files else None
    found = find_benchmarks(names, components.scorer, side, config.data.jsonl.root)
    if TEST_ROWS in plan.benchmarks:
        found += prompt_benchmarks("test", components.test_prompts(), components.scorer)
    return with_sampling(found, config.rollout.held_out_sampling())


def _summarize(
    trainer: Trainer,
    before: Evaluation,
    after: Evaluation,
    baseline_result: tuple[Evaluation, Cost] | None,
    plan: Plan,
) -> dict[str, Any]:
    """``summary.json``."""
    config, state = trainer.config, trainer.state
    summary: dict[str, Any] = {
        "before": before.results(),
        "after": after.results(),
        "difference": before.difference(after),
        "health": assess(trainer.run.metrics(), config.max_failed).as_dict(),
        "validation": {"best_step": state.validation.best_step, "rolled_back": state.validation.rollbacks},
        "seconds": state.seconds,
        "evaluation_seconds": before.seconds + after.seconds,
        "peak_memory_gib": peak_memory_gib(),
        "steps": state.step,
        "seed": config.seed,
        "config_sha256": config_sha256(config),
    }
    if baseline_result is not None and plan.baseline is not None:
        other, cost = baseline_result
        summary["baseline"] = {
            "name": plan.baseline_name,
            "after": other.results(),
            "difference": before.difference(other),
            "steps": plan.baseline.steps,
            **asdict(cost),
        }
        summary["ours_minus_baseline"] = other.difference(after)
        if plan.parallel:
            summary["peak_memory_gib"] += cost.peak_memory_gib
    return summary


def scene_benchmarks(*models: str | Path) -> tuple[str, ...]:
    """Names of the benchmarks of the built-in world whose tasks every MODEL supports."""
    tasks: set[TaskKind] = {*TASKS}
    for model in models:
        with suppress(InputError):  # opening the run reports it, after the configuration's own mistakes
            tasks &= {*possible_tasks(model)}
    able = tuple(name for name in BENCHMARKS if name.partition("_")[0] in tasks)
    return ("scenes",) if len(able) == len(BENCHMARKS) else able


def held_out_plan(config: TrainConfig, benchmarks: Sequence[str]) -> Plan:
    """The default benchmarks of ``lvrpo train``: the built-in world, or the user's test rows.

    Without test rows it evaluates the validation rows, and without those nothing: see ``warn_without_test``.
    """
    if benchmarks:
        return Plan(tuple(benchmarks))
    if config.data.source == "scenes":
        return Plan(scene_benchmarks(config.policy))
    if config.data.source == "datasets":
        return Plan((TEST_ROWS,) if config.data.has_split("test") or config.data.has_split("validation") else ())
    if config.data.source != "jsonl":
        return Plan((TEST_ROWS,))
    rows = config.data.jsonl
    for name, path in (("test", rows.test), ("validation", rows.validation)):
        if path is not None and path.suffix != ".jsonl":
            raise InputError(f"data.jsonl.{name}={path}: must end in .jsonl: rename the file")
        if path is not None:
            return Plan((str(path),))
    return Plan(())


def warn_without_test(config: TrainConfig) -> None:
    """Warns where ``held_out_plan`` finds no test rows; called after the run has started."""
    source = config.data.source
    if source not in ROW_SOURCES or config.data.has_split("test"):
        return
    stand_in = "nothing is measured before and after"
    if config.data.has_split("validation"):
        rows = config.data.jsonl.validation if source == "jsonl" else "the validation rows"
        stand_in = f"before and after are measured on {rows}, on which validation also chooses the weights"
    warnings.warn(f"data.{source}.test is not set: {stand_in}: give it a file of held-out rows", stacklevel=2)
