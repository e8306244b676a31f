"""``lvrpo quickstart``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lvrpo.commands.inputs import read_config
from lvrpo.commands.options import Options, refuse_given
from lvrpo.commands.progress import Progress, print_tables, summary_tables
from lvrpo.commands.train import require_well
from lvrpo.commands.train_options import train_overrides
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import Experiment, Plan, scene_benchmarks
from lvrpo.policies.loading import (
    START,
    can_draw_after_text,
    has_supervised_losses,
    possible_tasks,
    stored_segment_kinds,
)
from lvrpo.reading import unused_path
from lvrpo.training.base_trainer import Interrupted
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run_directory import CONFIG
from lvrpo.training.trainer import Trainer
from lvrpo.types import TASKS, SegmentKind, TaskKind

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
PROMPTS = ("data.prompts_per_step", "validation.prompts")
"""Keys of a training configuration with a number of prompts per task."""
ROWS: Mapping[str, TaskKind] = {
    "generate": "generate",
    "caption": "understand",
    "question": "understand",
    "edit": "edit",
    "reason": "reason",
}
"""Kinds of rows of the baseline, and the task that a model needs for them."""
OF_A_NEW_RUN = ("config", "seed", "steps", "policy", "out", "no_baseline", "quick")
"""Options that a resumed run does not take."""
QUICK_BASELINE = (
    "batch={generate: 8, caption: 4, question: 16, edit: 4, reason: 4}",
    "corpus={scenes: 200, edits: 100, reasons: 100}",
)


class Recipe(NamedTuple):
    """The built-in configurations that a quickstart takes where ``--config`` names none."""

    training: str = "quickstart"
    baseline: str = "continued"


RECIPES: Mapping[SegmentKind, Recipe] = {
    "tokens": Recipe("quickstart_token", "continued_token"),
    "masked": Recipe("quickstart_masked", "continued_token"),
}
"""By the way a model generates images; ``Recipe()`` for all others."""


def run(options: Options) -> None:
    started = time.monotonic()
    if options.resume is not None:
        refuse_given(options, OF_A_NEW_RUN, "a resumed run keeps its own: leave it out")
        for override in options.overrides:
            raise InputError(f"{override}: a resumed run keeps its own settings: leave it out")
        trainer = Trainer.resume(options.resume)
    else:
        config = training_config(options)
        if not options.no_baseline and not has_supervised_losses(config.policy):
            raise InputError(f"policy={config.policy}: has no supervised losses for a baseline: add --no-baseline")
        folder = options.out or unused_path(Path("runs") / config.name)
        if options.out is None and folder.name != config.name:
            print(f"runs/{config.name} exists: this run is {folder}")
        trainer = Trainer.start(config, folder, files=plan(options, config, folder, config.policy).files())
    run, config = trainer.run, trainer.config
    measured = plan(options, config, run.path, run.path / START)
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
    print(_closing_message(run.path, config.policy, summary, time.monotonic() - started))
    require_well(run.path, summary)


def recipe_of(model: str | Path) -> Recipe:
    """The recipe for MODEL; raises InputError where there is no such model."""
    return next((RECIPES[kind] for kind in stored_segment_kinds(model) if kind in RECIPES), Recipe())


def training_config(options: Options) -> TrainConfig:
    """``--config``, or the recipe of ``--policy``; that and ``--quick`` ask the model only for what it can do."""
    name = options.config or (Recipe() if options.policy is None else recipe_of(options.policy)).training
    overrides = train_overrides(options)
    if options.quick or (options.config is None and options.policy is not None):
        model = options.policy or read_config(TrainConfig, name, []).policy
        tasks = possible_tasks(model)
        overrides += [f"{key}.{task}=0" for key in PROMPTS for task in TASKS if task not in tasks]
        if "reason" in tasks and not can_draw_after_text(model):
            overrides.append("data.scenes.weights={reason/draw_answer: 0}")
    return read_config(TrainConfig, name, overrides)


def plan(options: Options, config: TrainConfig, run: Path, model: str | Path) -> Plan:
    """The evaluations, and the baseline, which starts from the same base (``model``) with the run's seed."""
    baseline, recipe = None, recipe_of(model)
    if not options.no_baseline:
        standard = read_config(TrainConfig, options.config or recipe.training, []).steps
        steps = read_config(PretrainConfig, recipe.baseline, []).steps
        overrides = [f"init={run / START}", f"seed={config.seed}", f"threads={config.threads}"]
        overrides.append(f"steps={max(1, round(steps * config.steps / standard))}")
        if options.quick:
            overrides += QUICK_BASELINE
        tasks = possible_tasks(model)
        overrides += [f"batch.{kind}=0" for kind, task in ROWS.items() if task not in tasks]
        baseline = read_config(PretrainConfig, recipe.baseline, overrides)
    sizes = QUICK_SIZES if options.quick else SIZES
    full = Plan(scene_benchmarks(model), sizes, baseline=baseline, parallel=cores() >= 2)
    return replace(full, sampled_prompts=QUICK_SAMPLED) if options.quick else full


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _closing_message(run: Path, policy: str, summary: dict, seconds: float) -> str:
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
            *(["  lvrpo quickstart --config self    # no labels: the model itself is the judge"] * (policy == "tiny")),
            f"  lvrpo train {run / CONFIG} seed=1 --out runs/other && lvrpo compare {run} runs/other",
        ]
    )
