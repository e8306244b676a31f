"""The whole experiment: evaluate the base, align it, evaluate again, compare with the baseline, write the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lvrpo.config import config_sha256, parse_section
from lvrpo.errors import InputError
from lvrpo.evaluation.baseline import Baseline
from lvrpo.evaluation.benchmark import sample_prompts
from lvrpo.evaluation.cases import DOUBLES, keep_cases, read_evaluation, write_cases, write_evaluation
from lvrpo.evaluation.reward_audit import write_audit
from lvrpo.evaluation.suite import (
    SAMPLING,
    Benchmark,
    Evaluation,
    Measuring,
    evaluate,
    find_benchmarks,
    own_benchmarks,
)
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import picture_side
from lvrpo.reading import is_there
from lvrpo.report import build_report
from lvrpo.training.config import TrainConfig
from lvrpo.training.health import assess
from lvrpo.training.host_memory import peak_memory_gib
from lvrpo.training.interrupt import Interrupted, Interruption, say_stopping
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run import Alignment
from lvrpo.training.run_directory import RunDirectory
from lvrpo.typed_json import Record
from lvrpo.types import Prompt

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
        """What ``Alignment.start`` writes, so that a run goes on with the plan that it began with. Any: JSON."""
        baseline = None if self.baseline is None else self.baseline.model_dump(mode="json")
        return {PLAN: {**vars(self), "baseline": baseline}}

    def kept(self, run: RunDirectory) -> Plan:
        """The plan that the run began with; else this one, which is then written into it."""
        if not is_there(run.path / PLAN):
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


def run_experiment(alignment: Alignment, plan: Plan, watch: Watcher) -> dict[str, Any]:
    """Does what is left to do of the experiment and returns its summary; everything lands in the run directory.

    Raises Interrupted, with a checkpoint written, after Ctrl-C or SIGTERM.
    """
    run, config = alignment.run, alignment.config
    plan = plan.kept(run)
    rollout = config.rollout
    sampling = replace(
        SAMPLING, num_steps=rollout.num_steps, timestep_shift=rollout.timestep_shift, solver=rollout.solver
    )
    baseline = None
    if plan.baseline is not None:
        folder = run.path / "baseline"
        baseline = Baseline(plan.baseline, folder, plan.benchmarks, plan.sizes, sampling, plan.sampled_prompts)
    try:
        if plan.baseline is not None and baseline is not None and plan.parallel and not baseline.finished:
            watch.phase(f"{plan.baseline_name}, the baseline, starts in a second process: {plan.baseline.steps} steps")
            baseline.start()
        before = measure(alignment, "before", lambda: alignment.policies.reference, plan, sampling, watch)
        align_watched(alignment, plan, sampling, watch)
        after = measure(alignment, "after", alignment.result, plan, sampling, watch)
        require_same_prompts(run, before, after)
        against = None
        if baseline is not None:
            watch.phase(f"{plan.baseline_name}: waiting for the baseline")
            if not plan.parallel:
                baseline.start()
            against = baseline.wait()
    finally:
        if baseline is not None:
            baseline.stop()
    summary = summarize(alignment, before, after, against, plan)
    run.write_summary(summary)
    write_audit(run.path)
    watch.phase(f"report: {build_report(run.path)}")
    return summary


def measure(
    alignment: Alignment, phase: str, policy: Callable[[], Policy], plan: Plan, sampling: Sampling, watch: Watcher
) -> Evaluation:
    """Evaluates and writes eval/PHASE.json, or reads it if it is there already.

    The policy that the alignment began with chooses the best of n and judges for the run's own rewards.
    """
    run, base = alignment.run, alignment.policies.reference
    path = run.path / "eval" / f"{phase}.json"
    if is_there(path):
        return read_evaluation(run, f"eval/{phase}.json")[0]
    benchmarks = planned_benchmarks(alignment, plan)
    if benchmarks:
        watch.phase(f"evaluate {phase}: {', '.join(map(in_words, benchmarks))}")
    measuring = Measuring(plan.sampled_prompts, judge=base, scorer=alignment.parts.scorer, reward_judge=base)
    evaluation = evaluate(
        policy(), benchmarks, sizes=plan.sizes, sampling=sampling, keep=keep_cases, measuring=measuring
    )
    write_evaluation(run, phase, evaluation)
    return evaluation


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


def planned_benchmarks(alignment: Alignment, plan: Plan) -> list[Benchmark]:
    """Those of a plan, rows of the user scored as the run scores them."""
    config, parts = alignment.config, alignment.parts
    names = [name for name in plan.benchmarks if name != TEST_ROWS]
    files = any(name.endswith(".jsonl") for name in names)
    side = picture_side(config.policy) if files else None
    found = find_benchmarks(names, parts.scorer, side, config.data.jsonl.root)
    if TEST_ROWS in plan.benchmarks:
        found += own_benchmarks("test", parts.test_prompts(), parts.scorer)
    return found


def align_watched(alignment: Alignment, plan: Plan, sampling: Sampling, watch: Watcher) -> None:
    """The alignment; half-way the kept prompts are drawn once more for the report."""
    run, config = alignment.run, alignment.config
    if alignment.finished:
        return
    watch.phase(f"align: {config.steps} steps")
    prompts = shown_prompts(alignment, plan)
    middle = max(1, config.steps // 2)

    def observe(row: Mapping[str, Any]) -> None:
        if row["step"] == middle and prompts:
            groups = sample_prompts(alignment.policies.average, prompts, sampling, 0)
            run.write_json(f"eval/step_{middle:06d}.json", {"prompts": write_cases(run, f"step_{middle:06d}", groups)})
        watch.step(row)

    with Interruption(say_stopping) as interrupted:
        done = alignment.go(observe, interrupted)
    if not done or interrupted():
        step = alignment.state.step
        raise Interrupted(f"interrupted after step {step} of {config.steps}; the checkpoint is written")


def shown_prompts(alignment: Alignment, plan: Plan) -> list[Prompt]:
    """The prompts of the cases that eval/before.json shows."""
    run = alignment.run
    known = {
        prompt.id: prompt
        for benchmark in planned_benchmarks(alignment, plan)
        if benchmark.name not in DOUBLES
        for prompt in benchmark.prompts(plan.sizes.get(benchmark.name, benchmark.n))
    }
    shown = read_evaluation(run, "eval/before.json")[1].get("prompts", [])
    return [known[row["id"]] for row in shown if row["id"] in known]


def summarize(
    alignment: Alignment,
    before: Evaluation,
    after: Evaluation,
    against: tuple[Evaluation, Mapping[str, Any]] | None,
    plan: Plan,
) -> dict[str, Any]:
    """``summary.json``."""
    config, state = alignment.config, alignment.state
    summary: dict[str, Any] = {
        "before": before.results(),
        "after": after.results(),
        "difference": before.difference(after),
        "health": assess(alignment.run.metrics(), config.max_failed).as_dict(),
        "guard": {"best_step": state.guard.best_step, "rolled_back": state.guard.rollbacks},
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
            **cost,
        }
        summary["ours_minus_baseline"] = other.difference(after)
        if plan.parallel:
            summary["peak_memory_gib"] += cost["peak_memory_gib"]
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

    Without test rows the validation rows stand in, and without those nothing is measured; both are warned of.
    """
    if benchmarks:
        return Plan(tuple(benchmarks))
    if config.data.source == "scenes":
        return Plan()
    if config.data.source != "jsonl":
        return Plan((TEST_ROWS,))
    rows = config.data.jsonl
    if rows.test is None:
        stand_in = (
            "nothing is measured before and after"
            if rows.validation is None
            else (f"before and after are measured on {rows.validation}, on which the guard also chooses the weights")
        )
        warnings.warn(f"data.jsonl.test is not set: {stand_in}: give it a file of held-out rows", stacklevel=2)
    for name, path in (("test", rows.test), ("validation", rows.validation)):
        if path is not None and path.suffix != ".jsonl":
            raise InputError(f"data.jsonl.{name}={path}: must end in .jsonl: rename the file")
        if path is not None:
            return Plan((str(path),))
    return Plan(())
