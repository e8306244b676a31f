"""The whole experiment: evaluate the base, align it beside a supervised baseline, evaluate again, write the report."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from lvrpo.config import config_sha256, parse_section
from lvrpo.distributed import on_main
from lvrpo.errors import ContractError, InputError, LvrpoError
from lvrpo.evaluation import BENCHMARKS
from lvrpo.evaluation.data_parallel import evaluated
from lvrpo.evaluation.reward_audit import write_audit
from lvrpo.evaluation.samples import DOUBLES, keep_cases, read_evaluation, write_cases, write_evaluation
from lvrpo.evaluation.scoring import sample_prompts
from lvrpo.evaluation.suite import (
    SAMPLING,
    Benchmark,
    Evaluation,
    Measuring,
    evaluate,
    find_benchmarks,
    own_benchmarks,
)
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import START, load_policy, possible_tasks, stored_image_size
from lvrpo.reading import Record, path_exists
from lvrpo.records import Cost
from lvrpo.report import build_report
from lvrpo.training.checkpoint import SEAL
from lvrpo.training.config import TrainConfig
from lvrpo.training.health import assess
from lvrpo.training.memory import peak_memory_gib
from lvrpo.training.policies import SetName
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer
from lvrpo.types import Prompt

RESULT = "eval/after.json"


class Baseline:
    """A second process; ``wait`` gives its evaluation."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        benchmarks: Sequence[str],
        sizes: Mapping[str, int],
        sampling: Sampling,
        sampled_prompts: int = 0,
    ) -> None:
        self.config = config
        self.folder = folder
        self.arguments = (config, folder, list(benchmarks), dict(sizes), sampling, sampled_prompts)
        self.process: SpawnProcess | None = None

    @property
    def finished(self) -> bool:
        """Whether its evaluation is written."""
        return path_exists(self.folder / RESULT)

    def start(self) -> None:
        """Starts it, or lets it go on from its last checkpoint."""
        if not self.finished:
            self.process = multiprocessing.get_context("spawn").Process(target=_work, args=self.arguments, daemon=True)
            self.process.start()

    def wait(self) -> tuple[Evaluation, Cost]:
        """Its evaluation and what it took; raises ContractError if it failed."""
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
        """Ends the process; what it has done up to its last checkpoint stays."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _work(
    config: PretrainConfig,
    folder: Path,
    benchmarks: Sequence[str],
    sizes: Mapping[str, int],
    sampling: Sampling,
    sampled_prompts: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    error_file = folder.with_suffix(".error")
    try:
        error_file.unlink(missing_ok=True)
        train_and_evaluate(config, folder, benchmarks, sizes, sampling, sampled_prompts)
    except BaseException as error:
        line = " ".join(str(error).split()) or type(error).__name__
        error_file.write_text(line if isinstance(error, LvrpoError) else traceback.format_exc(limit=-2))
        sys.exit(1)


def train_and_evaluate(
    config: PretrainConfig,
    folder: Path,
    benchmarks: Sequence[str],
    sizes: Mapping[str, int],
    sampling: Sampling,
    sampled_prompts: int = 0,
) -> None:
    """The whole baseline in this process, or what an interruption left of it; ends with eval/after.json.

    Its best of n is chosen by the base that it started from, as that of the alignment is.
    """
    parent = multiprocessing.parent_process()

    def end_with_parent(row: Mapping[str, Any]) -> None:
        if parent is not None and not parent.is_alive():
            sys.exit(1)

    begun = (folder / START / SEAL).exists()
    trainer = Pretrainer.resume(folder, config) if begun else Pretrainer.start(config, folder)
    with trainer.run as run:
        trainer.train(end_with_parent)
        judge = None if config.init is None else load_policy(config.init, config.device, "float32").make_reference()
        measuring = Measuring(sampled_prompts, judge=judge)
        found = find_benchmarks(benchmarks)
        evaluation = evaluate(trainer.state.average, found, sizes=sizes, sampling=sampling, measuring=measuring)
        cost = Cost(trainer.state.seconds, peak_memory_gib())
        run.write_json(RESULT, {**evaluation.as_dict(), "cost": asdict(cost)})


def _text(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split()) if path.exists() else ""


PLAN = "plan.json"
"""File of a run that holds its plan."""
TEST_ROWS = "data.test"
"""Benchmark of a plan: the test rows of the run's own source of prompts."""


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
    """What is done beside the alignment itself."""

    benchmarks: tuple[str, ...] = ("scenes",)
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Prompts per benchmark where not its default."""
    sampled_prompts: int = 70
    """Prompts per benchmark that are sampled many times, for pass@k and best of n by the base's reading side."""
    baseline: PretrainConfig | None = None
    baseline_name: str = "continued pretraining"
    parallel: bool = True
    """Whether the baseline runs in a second process at the same time, or afterwards."""

    def files(self) -> dict[str, Any]:
        """What ``Trainer.start`` writes, so that a run goes on with the plan that it began with. Any: JSON."""
        baseline = None if self.baseline is None else self.baseline.model_dump(mode="json")
        return {PLAN: {**vars(self), "baseline": baseline}}

    def kept(self, run: RunDirectory) -> Plan:
        """The plan that the run began with; else this one, which is then written into it."""
        if not path_exists(run.path / PLAN):
            for name, content in self.files().items():
                run.write_json(name, content)
            return self
        raw = run.read_json(PLAN, PlanRecord)
        section = raw["baseline"]
        baseline = None if section is None else parse_section(PretrainConfig, section, f"{run.path / PLAN}: baseline")
        known = {name: raw[name] for name in PlanRecord.model_fields if name in raw}
        return Plan(**{**known, "benchmarks": tuple(raw["benchmarks"]), "baseline": baseline})


class Watcher(Protocol):
    """Who is told how things go."""

    def phase(self, text: str) -> None:
        """A new part of the experiment begins."""
        ...

    def step(self, row: Mapping[str, Any]) -> None:
        """A step of the alignment is done."""
        ...


class Experiment:
    """What surrounds an alignment: measurements before and after, a baseline, the report.

    Everything lands in the run directory, and what is there already is not done again. A context manager: leaving it
    ends the baseline's process.
    """

    def __init__(self, trainer: Trainer, plan: Plan, watch: Watcher) -> None:
        """``plan``: of a new run; one that goes on has its own."""
        self.trainer, self.run, self.watch = trainer, trainer.run, watch
        self.plan = plan = plan.kept(trainer.run)
        rollout = trainer.config.rollout
        self.sampling = replace(
            SAMPLING, num_steps=rollout.num_steps, timestep_shift=rollout.timestep_shift, solver=rollout.solver
        )
        self.benchmarks = planned_benchmarks(trainer, plan)
        self.baseline: Baseline | None = None
        if plan.baseline is not None:
            folder = trainer.run.path / "baseline"
            sizes = (plan.benchmarks, plan.sizes)
            self.baseline = Baseline(plan.baseline, folder, *sizes, self.sampling, plan.sampled_prompts)
        self._shown: list[Prompt] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.baseline is not None:
            self.baseline.stop()

    def before(self) -> Evaluation:
        """Starts the baseline, where it runs beside the alignment, and measures the policy that the run starts from."""
        plan, baseline, trainer = self.plan, self.baseline, self.trainer
        if plan.baseline is not None and baseline is not None and plan.parallel and not baseline.finished:
            steps = plan.baseline.steps
            self.watch.phase(f"{plan.baseline_name}, the baseline, starts in a second process: {steps} steps")
            baseline.start()
        evaluation = self._measure("before", "reference")
        if not trainer.finished:
            self.watch.phase(f"align: {trainer.config.steps} steps")
            self._shown = self._prompts_shown()
        return evaluation

    def observe(self, row: Mapping[str, Any]) -> None:
        """Half-way the prompts that the report shows are drawn once more. Any: as metrics have them."""
        middle = max(1, self.trainer.config.steps // 2)
        if row["step"] == middle and self._shown:
            policy = evaluated(self.trainer.state.policies, "ema")
            groups = sample_prompts(policy, self._shown, self.sampling, 0)
            name = f"step_{middle:06d}"
            self.run.write_json(
                f"eval/{name}.json", {"prompts": list(map(asdict, write_cases(self.run, name, groups)))}
            )
        self.watch.step(row)

    def after(self, before: Evaluation) -> dict[str, Any]:
        """Measures the result, waits for the baseline, writes the report; the summary. Any: JSON."""
        plan, run, baseline = self.plan, self.run, self.baseline
        after = self._measure("after", "ema")
        require_same_prompts(run, before, after)
        against = None
        if baseline is not None:
            self.watch.phase(f"{plan.baseline_name}: waiting for the baseline")
            if not plan.parallel:
                baseline.start()
            against = baseline.wait()
        summary = summarize(self.trainer, before, after, against, plan)
        run.write_summary(summary)
        page = on_main(lambda: (write_audit(run.path), build_report(run.path))[1])
        self.watch.phase(f"report: {page}")
        return summary

    def _measure(self, phase: Literal["before", "after"], weights: SetName) -> Evaluation:
        """Evaluates and writes eval/PHASE.json, or reads it if it is there already.

        The policy that the alignment began with chooses the best of n and judges for the run's own rewards.
        """
        run, plan, policies = self.run, self.plan, self.trainer.state.policies
        path = run.path / "eval" / f"{phase}.json"
        if on_main(lambda: path_exists(path)):
            record = read_evaluation(run, f"eval/{phase}.json")
            return Evaluation(record.scores, seconds=record.seconds)
        if self.benchmarks:
            self.watch.phase(f"evaluate {phase}: {', '.join(map(in_words, self.benchmarks))}")
        if phase == "after":
            self.trainer.load_result()
        base, scorer = evaluated(policies, "reference"), self.trainer.parts.scorer
        measuring = Measuring(plan.sampled_prompts, judge=base, scorer=scorer, reward_judge=base)
        evaluation = evaluate(
            evaluated(policies, weights),
            self.benchmarks,
            sizes=plan.sizes,
            sampling=self.sampling,
            keep=keep_cases,
            measuring=measuring,
        )
        on_main(lambda: write_evaluation(run, phase, evaluation))
        return evaluation

    def _prompts_shown(self) -> list[Prompt]:
        """The prompts of the cases that eval/before.json shows."""
        sizes = self.plan.sizes
        known = {
            prompt.id: prompt
            for benchmark in self.benchmarks
            if benchmark.name not in DOUBLES
            for prompt in benchmark.prompts(sizes.get(benchmark.name, benchmark.n))
        }
        shown = read_evaluation(self.run, "eval/before.json").prompts
        return [known[sample.id] for sample in shown if sample.id in known]


def require_same_prompts(run: RunDirectory, before: Evaluation, after: Evaluation) -> None:
    """Raises InputError where two evaluations of a run, which may have been read back, are not of the same prompts."""
    asked = [{name: list(scored.ids) for name, scored in each.scored.items()} for each in (before, after)]
    if asked[0] != asked[1]:
        raise InputError(
            f"{run.path / 'eval'}: before.json and after.json are not of the same prompts: delete both to measure again"
        )


def in_words(benchmark: Benchmark) -> str:
    """Its name, and what its scores are where that is not success."""
    return benchmark.name if benchmark.metric == "success" else f"{benchmark.name} (the run's own rewards)"


def planned_benchmarks(trainer: Trainer, plan: Plan) -> list[Benchmark]:
    """Those of a plan, rows of the user scored as the run scores them."""
    config, parts = trainer.config, trainer.parts
    names = [name for name in plan.benchmarks if name != TEST_ROWS]
    files = any(name.endswith(".jsonl") for name in names)
    side = stored_image_size(config.policy) if files else None
    found = find_benchmarks(names, parts.scorer, side, config.data.jsonl.root)
    if TEST_ROWS in plan.benchmarks:
        found += own_benchmarks("test", parts.test_prompts(), parts.scorer)
    return found


def summarize(
    trainer: Trainer,
    before: Evaluation,
    after: Evaluation,
    against: tuple[Evaluation, Cost] | None,
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
    if against is not None and plan.baseline is not None:
        other, cost = against
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


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of wanted-2, wanted-3 ... that does not exist."""
    return next(
        path
        for number in range(1, 10_000)
        if not (path := wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")).exists()
    )


def held_out_plan(config: TrainConfig, benchmarks: Sequence[str]) -> Plan:
    """What ``lvrpo train`` evaluates by default: the built-in world, or the user's test rows.

    Without test rows the validation rows stand in, and without those nothing is measured: ``warn_without_test``.
    """
    if benchmarks:
        return Plan(tuple(benchmarks))
    if config.data.source == "scenes":
        tasks = possible_tasks(config.policy)
        able = tuple(name for name in BENCHMARKS if name.partition("_")[0] in tasks)
        return Plan() if len(able) == len(BENCHMARKS) else Plan(able)
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
    """Warns where ``held_out_plan`` finds no test rows; after the run has started, for wrong input is one line."""
    rows = config.data.jsonl
    if config.data.source != "jsonl" or rows.test is not None:
        return
    stand_in = "nothing is measured before and after"
    if rows.validation is not None:
        stand_in = f"before and after are measured on {rows.validation}, on which validation also chooses the weights"
    warnings.warn(f"data.jsonl.test is not set: {stand_in}: give it a file of held-out rows", stacklevel=2)
