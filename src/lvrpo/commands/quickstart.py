"""``lvrpo quickstart``."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from lvrpo.commands.inputs import read_config
from lvrpo.commands.options import Options
from lvrpo.commands.progress import Progress, print_tables, summary_tables
from lvrpo.commands.train import require_well
from lvrpo.commands.train_options import train_overrides
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import Experiment, Plan
from lvrpo.policies.loading import START
from lvrpo.reading import unused_path
from lvrpo.training.base_trainer import Interrupted
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.trainer import Trainer

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


def run(options: Options) -> None:
    started = time.monotonic()
    if options.resume is not None:
        given = [f"--{name}" for name in ("seed", "steps", "policy", "out") if getattr(options, name) is not None]
        if given:
            raise InputError(f"{given[0]}: a resumed run keeps its own: leave it away")
        trainer = Trainer.resume(options.resume)
    else:
        config = read_config(TrainConfig, options.config, train_overrides(options))
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


def plan(options: Options, config: TrainConfig, run: Path) -> Plan:
    """The evaluations, and the baseline, which starts from the same base with the run's seed."""
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
