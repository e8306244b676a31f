"""``lvrpo quickstart``."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lvrpo.commands.options import Command, Options, Parser, positive, whole
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from lvrpo.evaluation.experiment import Plan
    from lvrpo.training.config import TrainConfig

QUICK = (
    "data.prompts_per_step={generate: 4, understand: 8, edit: 2, reason: 4}",
    "validation.prompts={generate: 7, understand: 12, edit: 5, reason: 6}",
    "validation.every=2",
    "samples_every=2",
    "reference_eval_every=2",
    "checkpoint_every=2",
)
QUICK_STEPS = 4
SIZES = {
    "generate": 700,
    "generate_guided": 700,
    "generate_paraphrased": 210,
    "understand": 1200,
    "understand_sampled": 480,
    "understand_paraphrased": 240,
    "edit": 400,
    "reason": 600,
}
"""Prompts of the test split that a quickstart takes; ``lvrpo evaluate`` takes all."""
QUICK_SIZES = {
    "generate": 14,
    "generate_guided": 14,
    "generate_paraphrased": 14,
    "understand": 24,
    "understand_sampled": 24,
    "understand_paraphrased": 24,
    "edit": 10,
    "reason": 12,
}
QUICK_SAMPLED = 7
"""Prompts that are sampled many times."""
QUICK_BASELINE = (
    "batch={generate: 8, caption: 4, question: 16, edit: 4, reason: 4}",
    "corpus={scenes: 200, edits: 100, reasons: 100}",
)


def options(parser: Parser) -> None:
    parser.add_argument(
        "--config", default="quickstart", metavar="CONFIG", help="the training configuration (default: quickstart)"
    )
    parser.add_argument("--seed", type=whole, metavar="N", help="random seed (default: that of CONFIG)")
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps; the baseline scales with them")
    parser.add_argument("--policy", metavar="MODEL", help="the model to train (default: that of CONFIG)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run directory (default: the next free one in runs/)"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted quickstart")
    parser.add_argument("--no-baseline", action="store_true", help="skip the supervised baseline")
    parser.add_argument("--quick", action="store_true", help="smoke test: a few small steps; its numbers mean nothing")


def _check_keys(options: Options) -> None:
    from lvrpo.commands.keys import known_config

    if options.resume is None:
        known_config("TrainConfig", options.config, _train_overrides(options))


def run(options: Options) -> None:
    from lvrpo.commands.inputs import read_config
    from lvrpo.commands.progress import Progress, print_tables, summary_tables
    from lvrpo.commands.train import require_well
    from lvrpo.evaluation.experiment import Experiment
    from lvrpo.reading import unused_path
    from lvrpo.training.base_trainer import Interrupted
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.trainer import Trainer

    started = time.monotonic()
    if options.resume is not None:
        given = [f"--{name}" for name in ("seed", "steps", "policy", "out") if getattr(options, name) is not None]
        if given:
            raise InputError(f"{given[0]}: a resumed run keeps its own: leave it away")
        trainer = Trainer.resume(options.resume)
    else:
        config = read_config(TrainConfig, options.config, _train_overrides(options))
        folder = options.out or unused_path(Path("runs") / config.name)
        if options.out is None and folder.name != config.name:
            print(f"runs/{config.name} exists: this run is {folder}")
        trainer = Trainer.start(config, folder, files=plan(options, config, folder).files())
    run, config = trainer.run, trainer.config
    measured = plan(options, config, run.path)
    with run, Progress(config.steps) as watch, Experiment(trainer, measured, watch) as experiment:
        watch.phase(f"run {run.path}: {config.steps} steps from {config.policy}, seed {config.seed}")
        try:
            with experiment.measured("quickstart") as interrupted:
                trainer.train(experiment.observe, interrupted)
        except Interrupted:
            raise
        except KeyboardInterrupt:  # while it was evaluating
            raise Interrupted(f"interrupted; continue with: lvrpo quickstart --resume {run.path}") from None
        summary = experiment.summary
        print_tables(summary_tables(summary))
        watch.phase("done")
    print(_closing_message(run.path, summary, time.monotonic() - started))
    require_well(run.path, summary)


def _train_overrides(options: Options) -> list[str]:
    """Overrides of the training configuration that follow from the options."""
    overrides = [*QUICK, f"steps={QUICK_STEPS}"] if options.quick else []
    for name in ("seed", "steps", "policy"):
        value = getattr(options, name)  # the options of these names
        if value is not None:
            overrides.append(f"{name}={value}")
    return overrides


def plan(options: Options, config: TrainConfig, run: Path) -> Plan:
    """The evaluations, and the baseline, which starts from the same base with the run's seed."""
    from lvrpo.commands.inputs import read_config
    from lvrpo.evaluation.experiment import Plan
    from lvrpo.policies.loading import START
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.pretrain import PretrainConfig

    baseline = None
    if not options.no_baseline:
        standard = read_config(TrainConfig, options.config, []).steps
        steps = read_config(PretrainConfig, "continued", []).steps
        overrides = [f"init={run / START}", f"seed={config.seed}", f"threads={config.threads}"]
        overrides.append(f"steps={max(1, round(steps * config.steps / standard))}")
        baseline = read_config(PretrainConfig, "continued", [*overrides, *(QUICK_BASELINE if options.quick else ())])
    sizes = QUICK_SIZES if options.quick else SIZES
    full = Plan(sizes=sizes, baseline=baseline, parallel=cores() >= 2)
    return replace(full, sampled_prompts=QUICK_SAMPLED) if options.quick else full


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _closing_message(run: Path, summary: dict, seconds: float) -> str:
    """The cost of the run, the location of its results, and suggestions for the next step."""
    baseline = summary.get("baseline")
    cost = f"alignment {summary['seconds']:.0f} s"
    if baseline:
        cost += f", {baseline['name']} {baseline['seconds']:.0f} s"
    cost += f", in total {seconds:.0f} s; peak memory {summary['peak_memory_gib']:.2f} GiB"
    return "\n".join(
        [
            "",
            cost,
            f"report   {run / 'report.html'}",
            f"numbers  {run / 'summary.json'}",
            "",
            "next:",
            f'  lvrpo generate {run} --prompt "two red circles left of a blue star" --out drawings',
            "  lvrpo quickstart --config self    # no labels: the model itself is the judge",
            "  lvrpo train quickstart seed=1 --out runs/other && lvrpo compare " + f"{run} runs/other",
        ]
    )


QUICKSTART = Command(
    "evaluate the built-in tiny model, train it, evaluate it again, write a report",
    options,
    run,
    "examples:\n"
    "  lvrpo quickstart --quick                      # half a minute, to see that everything works\n"
    "  lvrpo quickstart --seed 1 --out runs/seed1    # minutes on two cores",
    _check_keys,
)
