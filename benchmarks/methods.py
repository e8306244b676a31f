"""Methods side by side: shipped configurations from one base, at equal seconds or equal questions, as a markdown table.

    python benchmarks/methods.py lvrpo lvrpo_paper dpo continued --seconds 480 --seeds 0 1 2 --out runs/methods

A run directory each, OUT/NAME-SEED. Seconds are those of the processor, which other work on the machine hardly moves:
a run has one thread, so on an idle core they are the wall's. How many steps fit into them is measured, method by
method, with a few steps before its first seed. Finished runs are read, not repeated, and interrupted ones go on, so
methods can be added to a table, or split over several calls. All are evaluated alike, whatever they sampled with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from seeds import difference, scores, spread

from lvrpo.commands.settings import find_config
from lvrpo.config import config_sha256, load_config
from lvrpo.errors import InputError, LvrpoError
from lvrpo.evaluation.cases import keep_cases, write_evaluation
from lvrpo.evaluation.quickstart import Plan, measure, summarize
from lvrpo.evaluation.suite import SAMPLING, Evaluation, evaluate, find_benchmarks
from lvrpo.policies.loading import load_policy
from lvrpo.report import build_report
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run import Alignment, Pretraining
from lvrpo.training.run_directory import RunDirectory

FOUR = ("generate", "understand", "edit", "reason")
"""The tasks whose mean is the column of that name."""
TASKS = ("generate", "generate_guided", "understand", "understand_sampled", "edit", "reason")
PROBE = 4
"""Steps that are timed; the first one, which does more, is left out."""

AnyConfig = TrainConfig | PretrainConfig


@dataclass(frozen=True)
class Budget:
    """What every method gets; one of the two."""

    seconds: float | None
    questions: int | None


class Lines:
    """Plain lines of progress."""

    def phase(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def step(self, row: Mapping[str, Any]) -> None:
        """Nothing: a run's metrics are in its folder."""


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="CONFIG", help="a YAML file, or the name of one that lvrpo ships")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="of training, for every method")
    budget.add_argument("--questions", type=int, help="seen while training, for every method")
    parser.add_argument(
        "--steps", nargs="*", default=[], metavar="CONFIG=N", help="where the measured number missed the budget"
    )
    parser.add_argument("--n", type=int, help="prompts per benchmark (default: each benchmark's own)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="section.key=value", help="overrides for all alignments"
    )
    parser.add_argument(
        "--set-supervised", nargs="*", default=[], metavar="section.key=value", help="overrides for all supervised runs"
    )
    options = parser.parse_args()
    try:
        results = run_all(options, Budget(options.seconds, options.questions))
    except LvrpoError as error:
        raise SystemExit(f"error: {error}") from None
    print()
    print(table(results))


def run_all(options: argparse.Namespace, budget: Budget) -> dict[str, list[dict[str, Any]]]:
    """The summaries of every method, one per seed."""
    sizes = {} if options.n is None else dict.fromkeys(TASKS, options.n)
    bases: dict[str, Evaluation] = {}
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    steps = given_steps(options)
    for seed, method in itertools.product(options.seeds, options.methods):
        folder = options.out / f"{Path(method).stem}-{seed}"
        found = RunDirectory.read(folder).read_summary() if (folder / "summary.json").exists() else None
        if found is None:
            config = read(method, [f"seed={seed}"], options)
            if method not in steps:
                others = [options.out / f"{Path(method).stem}-{other}" for other in options.seeds]
                steps[method] = known_steps(others) or steps_for(config, budget)
                print(f"{method}: {steps[method]} steps", flush=True)
            config = config.model_copy(update={"steps": steps[method]})
            print(f"{method}, seed {seed}: {folder}", flush=True)
            found = train_and_measure(config, folder, Plan(sizes=sizes, sampled_prompts=0), bases)
        results[method].append(found)
    return results


def given_steps(options: argparse.Namespace) -> dict[str, int]:
    """The steps that the call names."""
    found: dict[str, int] = {}
    for item in options.steps:
        method, _, number = item.partition("=")
        if method not in options.methods or not number.isdecimal() or int(number) < 1:
            raise InputError(f"--steps {item}: give METHOD=N, a method of this call and a number above 0")
        found[method] = int(number)
    return found


def known_steps(folders: Sequence[Path]) -> int | None:
    """The steps that another call gave the method: its seeds share them."""
    for folder in folders:
        if (folder / "config.yaml").exists():
            return int(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["steps"])
    return None


def read(method: str, overrides: Sequence[str], options: argparse.Namespace) -> AnyConfig:
    """The configuration of a method, of whichever kind it is."""
    path = find_config(method)
    if is_supervised(path):
        return load_config(PretrainConfig, path, [*overrides, *options.set_supervised])
    return load_config(TrainConfig, path, [*overrides, *options.set])


def is_supervised(path: Path) -> bool:
    """Whether a file, or one that it extends, has keys of supervised training."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    own = set(tree) - {"extends"}
    return bool(own - set(TrainConfig.model_fields)) or (
        "extends" in tree and is_supervised(path.parent / tree["extends"])
    )


def steps_for(config: AnyConfig, budget: Budget) -> int:
    """How many steps the budget buys."""
    if budget.questions is not None:
        if isinstance(config, PretrainConfig):
            each = config.batch.get("question", 0)
        else:
            each = config.data.prompts_per_step.get("understand", 0)
        if not each:
            raise InputError(f"--questions {budget.questions}: {config.name} asks none: give --seconds")
        return max(1, round(budget.questions / each))
    assert budget.seconds is not None
    return max(1, round(budget.seconds / step_seconds(config)))


def step_seconds(config: AnyConfig) -> float:
    """Processor seconds of a step, with its share of the guard's looks and of the control."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "probe"
        probe = config.model_copy(update={"steps": PROBE})
        if isinstance(probe, PretrainConfig):
            training = Pretraining.start(probe.model_copy(update={"held_out_every": 0}), run)
            with training.run:
                return plain_step(training)
        alignment = Alignment.start(probe, run)
        with alignment.run:
            plain = plain_step(alignment)
            started = time.process_time()
            alignment.guard.score(alignment.state.policies.average)
            look = time.process_time() - started
    return plain * (1 + probe.control_group_size / probe.rollout.group_size / probe.control_every / 2) + (
        look / probe.guard.every
    )


def plain_step(training: Alignment | Pretraining) -> float:
    """The median of the steps between the first and the last."""
    ends: list[float] = []
    training.go(lambda row: ends.append(time.process_time()))
    return statistics.median(after - before for before, after in itertools.pairwise(ends[:-1]))


def train_and_measure(config: AnyConfig, folder: Path, plan: Plan, bases: dict[str, Evaluation]) -> dict[str, Any]:
    """One run, its evaluations, summary and report; goes on with what an interruption left."""
    begun = (folder / "start").exists()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    if isinstance(config, PretrainConfig):
        training = Pretraining.resume(folder) if begun else Pretraining.start(config, folder)
        with training.run as run:
            before = measured_base(run, str(training.config.init), plan, bases)
            spent = processor_seconds(training)
            after = measure(run, "after", training.trainer.average, plan, SAMPLING, Lines())
            summary = {
                "before": before.results(),
                "after": after.results(),
                "difference": before.difference(after),
                "seconds": training.seconds,
                "processor_seconds": spent,
                "steps": training.config.steps,
                "seed": training.config.seed,
                "config_sha256": config_sha256(training.config),
            }
            run.write_summary(summary)
    else:
        alignment = Alignment.resume(folder) if begun else Alignment.start(config, folder)
        with alignment.run as run:
            before = measured_base(run, alignment.config.policy, plan, bases)
            spent = processor_seconds(alignment)
            after = measure(run, "after", alignment.result(), plan, SAMPLING, Lines())
            summary = {**summarize(alignment, before, after, None, plan), "processor_seconds": spent}
            run.write_summary(summary)
    build_report(folder)
    return summary


def processor_seconds(training: Alignment | Pretraining) -> float:
    """Trains to the end; after an interruption, the share that is left stands for the whole."""
    done = training.state.step if isinstance(training, Alignment) else training.trainer.step_number
    started, steps = time.process_time(), training.config.steps
    training.go()
    spent = time.process_time() - started
    return spent * steps / (steps - done) if done < steps else training_seconds(training)


def training_seconds(training: Alignment | Pretraining) -> float:
    """By the wall's clock, where nothing better is left."""
    return training.state.seconds if isinstance(training, Alignment) else training.seconds


def measured_base(run: RunDirectory, policy: str, plan: Plan, bases: dict[str, Evaluation]) -> Evaluation:
    """The evaluation of the base, made once for all runs of OUT and written into every one."""
    kept = run.path.parent / f"base-{slug(policy)}" / "before.json"  # of another call, without its pictures
    if not (run.path / "eval" / "before.json").exists():
        if policy not in bases and kept.exists() and not plan.sizes:
            found = json.loads(kept.read_text(encoding="utf-8"))
            run.write_json("eval/before.json", found)
            return Evaluation.from_dict(found)
        if policy not in bases:
            base, benchmarks = load_policy(policy), find_benchmarks(plan.benchmarks)
            bases[policy] = evaluate(base, benchmarks, sizes=plan.sizes, sampling=SAMPLING, keep=keep_cases)
        write_evaluation(run, "before", bases[policy])
        if not plan.sizes:
            kept.parent.mkdir(parents=True, exist_ok=True)
            scratch = kept.with_name(f"{run.path.name}.tmp")
            scratch.write_text(json.dumps({**bases[policy].as_dict(), "prompts": []}), encoding="utf-8")
            scratch.replace(kept)
    return Evaluation.from_dict(run.read_json("eval/before.json"))


def slug(policy: str) -> str:
    """A policy as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", policy).strip("-")


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row per method: seconds, the mean of four tasks, then for every task the score and, in brackets, its gain."""
    first = next(iter(results.values()))
    tasks = [task for task in TASKS if task in first[0]["after"]]
    lines = [
        "| method | steps | seconds | mean of four | " + " | ".join(task.replace("_", " ") for task in tasks) + " |"
    ]
    lines.append("|---" * (4 + len(tasks)) + "|")
    columns = [FOUR, *((task,) for task in tasks)]
    lines.append("| base | | | " + " | ".join(f"{mean(first, 'before', column):.3f}" for column in columns) + " |")
    for method, summaries in results.items():
        cells = [f"{mean(summaries, 'after', column):.3f} ({gain(summaries, column)})" for column in columns]
        steps = " / ".join(sorted({str(summary["steps"]) for summary in summaries}))
        seconds = statistics.mean(summary["processor_seconds"] for summary in summaries)
        lines.append(f"| {Path(method).stem} | {steps} | {seconds:.0f} | " + " | ".join(cells) + " |")
    seeds = max(map(len, results.values()))
    lines.append(
        f"\n{seeds} seed{'s' if seeds > 1 else ''}; in brackets the gain over the base, with its 95 % t interval."
    )
    return "\n".join(lines)


def run_scores(summaries: Sequence[Mapping[str, Any]], section: str, tasks: Sequence[str]) -> list[float]:
    """The mean over the tasks, run by run."""
    rows = [dict(summary) for summary in summaries]
    each = [scores(rows, section, (task,)) for task in tasks]
    return [statistics.mean(values) for values in zip(*each, strict=True)]


def mean(summaries: Sequence[Mapping[str, Any]], section: str, tasks: Sequence[str]) -> float:
    """Over tasks and seeds."""
    return statistics.mean(run_scores(summaries, section, tasks))


def gain(summaries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """After minus before, over seeds."""
    gains = difference(run_scores(summaries, "after", tasks), run_scores(summaries, "before", tasks))
    return spread(gains) if len(gains) > 1 else f"{gains[0]:+.3f}"


if __name__ == "__main__":
    main()
