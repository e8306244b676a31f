"""``lvrpo train``, ``lvrpo pretrain`` and ``lvrpo check``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lvrpo.commands.inputs import read_config
from lvrpo.commands.options import Options
from lvrpo.commands.progress import Progress, clock, print_tables, summary_tables
from lvrpo.commands.train_options import refuse_out
from lvrpo.config import dump_config
from lvrpo.distributed import is_main, relay_errors
from lvrpo.errors import InputError, UnhealthyRunError
from lvrpo.evaluation.experiment import Experiment, Plan, held_out_plan, warn_without_test
from lvrpo.evaluation.suite import find_benchmarks
from lvrpo.policies.loading import FINAL, pick_device, policy_folder
from lvrpo.reading import path_exists
from lvrpo.report import build_report
from lvrpo.training.base_trainer import InterruptHandler, print_stopping
from lvrpo.training.components import open_components
from lvrpo.training.config import TrainConfig
from lvrpo.training.dry_run import dry_run, memory_needed
from lvrpo.training.leakage import require_disjoint_splits, require_unseen
from lvrpo.training.memory import MemoryEstimate, NotEstimatedError, require_free_bytes, require_memory
from lvrpo.training.preflight import require
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.setup import estimate_run_memory
from lvrpo.training.trainer import Trainer


def train(options: Options) -> None:
    trainer, plan = _open_trainer(options)
    run, config = trainer.run, trainer.config
    with run, Progress(config.steps, quiet=not is_main()) as watch, Experiment(trainer, plan, watch) as experiment:
        watch.phase(f"run {run.path}, from {config.policy}, step {trainer.state.step}")
        with experiment.measured() as interrupted:
            trainer.train(experiment.observe, interrupted)
        summary = experiment.summary
        if summary["before"] and is_main():
            print_tables(summary_tables(summary))
        watch.phase(f"done; the policy: {run.path} ({_kept_step(trainer, summary)})")
    require_well(run.path, summary)


def _kept_step(trainer: Trainer, summary: dict[str, Any]) -> str:
    """The step of the saved policy, and why that step was selected."""
    step = summary["validation"]["best_step"]
    return f"step {step} was best on validation" if trainer.validator.prompts else f"step {step}, the last one"


def require_well(run: Path, summary: Mapping[str, Any]) -> None:
    """Raises UnhealthyRunError with every reason why a run that is done is not healthy. Any: what JSON holds."""
    health = summary["health"]
    if not health["well"]:
        raise UnhealthyRunError(f"{run}: {'; '.join(finding['words'] for finding in health['findings'])}")


def _open_trainer(options: Options) -> tuple[Trainer, Plan]:
    """A new or resumed run, and its evaluations."""
    find_benchmarks([name for name in options.benchmark if not name.endswith(".jsonl")])
    trainer, plan = _resume_run(options) if options.resume is not None else start_run(options)
    if not options.benchmark and not options.no_evaluate:
        warn_without_test(trainer.config)
    return trainer, plan


def _resume_run(options: Options) -> tuple[Trainer, Plan]:
    refuse_out(options)
    trainer = Trainer.resume(options.resume, resumed_config(options), options.base)
    return trainer, _evaluation_plan(options, trainer.config)


def start_run(options: Options) -> tuple[Trainer, Plan]:
    if options.base is not None:
        raise InputError(f"--base {options.base}: is for a resumed run: a new run starts from policy={options.base}")
    with relay_errors():
        config = read_config(TrainConfig, options.config, options.overrides)
        require_unseen(options.benchmark, config)
        plan, folder = _evaluation_plan(options, config), options.out or Path("runs") / config.name
    return Trainer.start(config, folder, files=plan.files()), plan


def _evaluation_plan(options: Options, config: TrainConfig) -> Plan:
    """The evaluations before and after training."""
    return Plan(()) if options.no_evaluate else held_out_plan(config, options.benchmark)


def resumed_config(options: Options) -> TrainConfig | None:
    """The requested configuration of a resumed run: CONFIG, or the run's own with changes, or None."""
    if options.config is None:
        return None
    if "=" in options.config and not Path(options.config).is_file():
        return RunDirectory.read(options.resume).config(TrainConfig, [options.config, *options.overrides])
    return read_config(TrainConfig, options.config, options.overrides)


def pretrain(options: Options) -> None:
    trainer = _open_pretrainer(options)
    run, config = trainer.run, trainer.config
    with run, Progress(config.steps) as watch:
        watch.phase(f"run {run.path}: {config.steps} steps, from step {trainer.state.step}")
        with InterruptHandler(print_stopping) as interrupted:
            if not trainer.train(watch.step, interrupted):
                trainer.require_uninterrupted()
        watch.phase(f"done; the policy: {run.path}; report: {build_report(run.path)}")


def _open_pretrainer(options: Options) -> Pretrainer:
    """A new or resumed supervised run."""
    if options.resume is not None:
        config = None if options.config is None else read_config(PretrainConfig, options.config, options.overrides)
        refuse_out(options)
        if path_exists(options.resume / FINAL):
            raise InputError(f"{options.resume}: has finished: evaluate it with lvrpo evaluate {options.resume}")
        return Pretrainer.resume(options.resume, config)
    config = read_config(PretrainConfig, options.config, options.overrides)
    return Pretrainer.start(config, options.out or Path("runs") / config.name)


def check(options: Options) -> None:
    config = read_config(TrainConfig, options.config, options.overrides)
    if options.card is not None:
        _check_gpu_memory(config, options.card)
        return
    policy_folder(config.policy)  # a missing one is refused before anything is printed
    print(dump_config(config), end="")
    components = open_components(config)  # what it refuses need not wait for the estimate
    require_disjoint_splits(config, components.rows)
    memory = None
    try:
        memory = estimate_run_memory(config, components)
    except NotEstimatedError as error:
        print(f"\nmemory: {error}")
    if memory is not None:
        _print_memory(memory)
        require_memory(memory, pick_device(config.device), f"policy={config.policy}")
    found = dry_run(config, components)
    print("\nstep-0 contract")
    for check in found.checks:
        print(f"  {'ok    ' if check.ok else 'BROKEN'}  {check.check}: {check.value:.3g} (limit {check.limit:.3g})")
    require(found.checks)
    print("\nestimate, from one small step")
    print(
        f"  time    {clock(found.seconds)} for {config.steps} steps with validation, {found.step_seconds:.1f} s a step"
    )
    estimated = "" if memory is None else f"{memory.peak / 2**30:.1f} GiB estimated; "
    print(f"  memory  {estimated}{found.peak_memory_gib:.1f} GiB at most in this dry run")
    print(f"  disk    {found.disk_mib:.0f} MiB of checkpoints")


def _print_memory(memory: MemoryEstimate) -> None:
    """Prints static memory, memory per phase, and the peak."""
    print("\nmemory, GiB, before anything is loaded")
    for line in memory.lines():
        print(line)
    print(f"{memory.peak / 2**30:9.3f}  at most, in the {memory.peak_phase}")


def _check_gpu_memory(config: TrainConfig, gib: float) -> None:
    """The memory of a run on a card that need not be there; raises InputError where it does not fit."""
    if config.device == "cpu":
        raise InputError(f"device=cpu, and --card {gib:g}: leave one of them out")
    memory = memory_needed(config, torch.device("cuda"))
    _print_memory(memory)
    require_free_bytes(memory, round(gib * 2**30), "a card", f"policy={config.policy}")
    print(f"fits: {gib - memory.peak / 2**30:.1f} of {gib:g} GiB are left")
