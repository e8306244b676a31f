"""The whole experiment: evaluate the base, align it, evaluate again, compare with the baseline, write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lvrpo.config import config_sha256
from lvrpo.errors import InputError
from lvrpo.evaluation.baseline import Baseline
from lvrpo.evaluation.benchmark import score_prompts
from lvrpo.evaluation.cases import keep_cases, write_cases, write_evaluation
from lvrpo.evaluation.reward_audit import write_audit
from lvrpo.evaluation.suite import SAMPLING, Evaluation, Measuring, evaluate, find_benchmarks
from lvrpo.policies.base import Policy, Sampling
from lvrpo.report import build_report
from lvrpo.training.config import TrainConfig
from lvrpo.training.host_memory import peak_memory_gib
from lvrpo.training.interrupt import Interrupted, Interruption, say_stopping
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run import Alignment
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import Prompt

PLAN = "plan.json"
"""File of a run that holds its plan."""


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

    def kept(self, run: RunDirectory) -> Plan:
        """This plan, written into the run; or the one that the run began with."""
        if not (run.path / PLAN).exists():
            baseline = None if self.baseline is None else self.baseline.model_dump(mode="json")
            run.write_json(PLAN, {**vars(self), "baseline": baseline})
            return self
        raw = run.read_json(PLAN)
        baseline = None if raw["baseline"] is None else PretrainConfig.model_validate(raw["baseline"])
        return Plan(**{**raw, "benchmarks": tuple(raw["benchmarks"]), "baseline": baseline})


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
        base = alignment.policies.reference
        before = measure(run, "before", base, base, plan, sampling, watch)
        align_watched(alignment, plan, sampling, watch)
        after = measure(run, "after", alignment.result(), base, plan, sampling, watch)
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
    run: RunDirectory, phase: str, policy: Policy, judge: Policy, plan: Plan, sampling: Sampling, watch: Watcher
) -> Evaluation:
    """Evaluates, the best of n chosen by ``judge``, and writes eval/PHASE.json, or reads it if it is there already."""
    path = run.path / "eval" / f"{phase}.json"
    if path.exists():
        return Evaluation.from_dict(run.read_json(f"eval/{phase}.json"))
    benchmarks = find_benchmarks(plan.benchmarks)
    watch.phase(f"evaluate {phase}: {', '.join(b.name for b in benchmarks)}")
    measuring = Measuring(plan.sampled_prompts, judge=judge)
    evaluation = evaluate(policy, benchmarks, sizes=plan.sizes, sampling=sampling, keep=keep_cases, measuring=measuring)
    write_evaluation(run, phase, evaluation)
    return evaluation


def align_watched(alignment: Alignment, plan: Plan, sampling: Sampling, watch: Watcher) -> None:
    """The alignment; half-way the kept prompts are drawn once more for the report."""
    run, config = alignment.run, alignment.config
    if alignment.finished:
        return
    watch.phase(f"align: {config.steps} steps")
    prompts = shown_prompts(run, plan)
    middle = max(1, config.steps // 2)

    def observe(row: Mapping[str, Any]) -> None:
        if row["step"] == middle and prompts:
            groups = score_prompts(alignment.policies.average, prompts, sampling, 0).groups
            run.write_json(f"eval/step_{middle:06d}.json", {"prompts": write_cases(run, f"step_{middle:06d}", groups)})
        watch.step(row)

    with Interruption(say_stopping) as interrupted:
        done = alignment.go(observe, interrupted)
    if not done or interrupted():
        step = alignment.state.step
        raise Interrupted(f"interrupted after step {step} of {config.steps}; the checkpoint is written")


def shown_prompts(run: RunDirectory, plan: Plan) -> list[Prompt]:
    """The prompts of the cases that eval/before.json shows."""
    known = {
        prompt.id: prompt
        for benchmark in find_benchmarks(plan.benchmarks)
        for prompt in benchmark.prompts(plan.sizes.get(benchmark.name, benchmark.n))
    }
    shown = run.read_json("eval/before.json")["prompts"]
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
    """What ``lvrpo train`` evaluates by default: the built-in world, or the user's test rows, or nothing."""
    if benchmarks:
        return Plan(tuple(benchmarks))
    if config.data.source == "scenes":
        return Plan()
    if config.data.source == "jsonl" and config.data.jsonl.test is not None:
        if config.data.jsonl.test.suffix != ".jsonl":
            raise InputError(f"data.jsonl.test={config.data.jsonl.test}: must end in .jsonl: rename the file")
        return Plan((str(config.data.jsonl.test),))
    return Plan(())
