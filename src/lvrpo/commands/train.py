"""``lvrpo train``, ``lvrpo pretrain`` and ``lvrpo check``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvrpo.commands.options import Command, Options, Parser, add_base, add_config, add_timeout, gibibytes, names
from lvrpo.errors import InputError, UnhealthyRunError
from lvrpo.reading import path_exists

if TYPE_CHECKING:
    from lvrpo.evaluation.experiment import Plan
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.memory import MemoryEstimate
    from lvrpo.training.pretrain import Pretrainer
    from lvrpo.training.trainer import Trainer


def train_options(parser: Parser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--benchmark",
        type=names,
        default=[],
        metavar="NAME[,NAME]",
        help="what to measure before and after (default: scenes, or data.jsonl.test)",
    )
    parser.add_argument("--no-evaluate", action="store_true", help="train only, measure nothing")
    add_timeout(parser)
    add_base(parser)


def _pretrain_options(parser: Parser) -> None:
    _run_options(parser, "lvrpo.training.pretrain:PretrainConfig")


def _run_options(parser: Parser, cls: str = "lvrpo.training.config:TrainConfig") -> None:
    add_config(parser, cls)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (default: runs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue a run; CONFIG is then optional")


def check_keys(cls: str = "TrainConfig") -> Callable[[Options], None]:
    """The check of CONFIG and its keys, which a resumed run may leave out."""

    def check(options: Options) -> None:
        from lvrpo.commands.keys import known_config

        if getattr(options, "resume", None) is None:  # lvrpo check has no such option
            known_config(cls, options.config, options.overrides)

    return check


def train(options: Options) -> None:
    from lvrpo.commands.progress import Progress, print_tables, summary_tables
    from lvrpo.distributed import is_main
    from lvrpo.evaluation.experiment import Experiment

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
    from lvrpo.evaluation.experiment import warn_without_test
    from lvrpo.evaluation.suite import find_benchmarks

    find_benchmarks([name for name in options.benchmark if not name.endswith(".jsonl")])
    trainer, plan = _resume_run(options) if options.resume is not None else start_run(options)
    if not options.benchmark and not options.no_evaluate:
        warn_without_test(trainer.config)
    return trainer, plan


def _resume_run(options: Options) -> tuple[Trainer, Plan]:
    from lvrpo.training.trainer import Trainer

    refuse_out(options)
    trainer = Trainer.resume(options.resume, resumed_config(options), options.base)
    return trainer, _evaluation_plan(options, trainer.config)


def start_run(options: Options) -> tuple[Trainer, Plan]:
    from lvrpo.commands.inputs import read_config
    from lvrpo.distributed import relay_errors
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.splits import require_unseen
    from lvrpo.training.trainer import Trainer

    if options.base is not None:
        raise InputError(f"--base {options.base}: is for a resumed run: a new run starts from policy={options.base}")
    with relay_errors():
        config = read_config(TrainConfig, options.config, options.overrides)
        require_unseen(options.benchmark, config)
        plan, folder = _evaluation_plan(options, config), options.out or Path("runs") / config.name
    return Trainer.start(config, folder, files=plan.files()), plan


def _evaluation_plan(options: Options, config: TrainConfig) -> Plan:
    """The evaluations before and after training."""
    from lvrpo.evaluation.experiment import Plan, held_out_plan

    return Plan(()) if options.no_evaluate else held_out_plan(config, options.benchmark)


def resumed_config(options: Options) -> TrainConfig | None:
    """The requested configuration of a resumed run: CONFIG, or the run's own with changes, or None."""
    from lvrpo.commands.inputs import read_config
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.run_directory import RunDirectory

    if options.config is None:
        return None
    if "=" in options.config and not Path(options.config).is_file():
        return RunDirectory.read(options.resume).config(TrainConfig, [options.config, *options.overrides])
    return read_config(TrainConfig, options.config, options.overrides)


def refuse_out(options: Options) -> None:
    if options.out is not None:
        raise InputError(f"--out {options.out}: a resumed run stays where it is: leave --out away")


def pretrain(options: Options) -> None:
    from lvrpo.commands.progress import Progress
    from lvrpo.report import build_report
    from lvrpo.training.base_trainer import InterruptHandler, print_stopping

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
    from lvrpo.commands.inputs import read_config
    from lvrpo.policies.loading import FINAL
    from lvrpo.training.pretrain import PretrainConfig, Pretrainer

    if options.resume is not None:
        config = None if options.config is None else read_config(PretrainConfig, options.config, options.overrides)
        refuse_out(options)
        if path_exists(options.resume / FINAL):
            raise InputError(f"{options.resume}: has finished: evaluate it with lvrpo evaluate {options.resume}")
        return Pretrainer.resume(options.resume, config)
    config = read_config(PretrainConfig, options.config, options.overrides)
    return Pretrainer.start(config, options.out or Path("runs") / config.name)


TRAIN = Command(
    "train a policy with group-relative RL",
    train_options,
    train,
    "examples:\n"
    "  lvrpo train quickstart seed=1 steps=80 --out runs/short\n"
    "  lvrpo train --resume runs/short                  # continues an interrupted run\n"
    "  lvrpo train --resume runs/short steps=160        # makes a finished run longer\n"
    "  lvrpo train quickstart --config-help kl_coef     # what a setting does\n"
    "  torchrun --nproc-per-node 8 -m lvrpo train quickstart    # eight GPUs",
    check_keys(),
)
PRETRAIN = Command(
    "train a policy with supervised losses",
    _pretrain_options,
    pretrain,
    "examples:\n"
    "  lvrpo pretrain pretrain name=my-base steps=2000    # how the tiny base was made\n"
    "  lvrpo pretrain continued --out runs/baseline       # the baseline of the quickstart",
    check_keys("PretrainConfig"),
)


def check_options(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--card",
        type=gibibytes,
        metavar="GIB",
        help="only estimate whether the run fits a GPU with GIB GiB free; needs neither the GPU nor the weights",
    )


def check(options: Options) -> None:
    from lvrpo.commands.inputs import read_config
    from lvrpo.commands.progress import clock
    from lvrpo.config import dump_config
    from lvrpo.policies.loading import pick_device, policy_folder
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.dry_run import dry_run
    from lvrpo.training.memory import NotEstimatedError, require_memory
    from lvrpo.training.preflight import require
    from lvrpo.training.setup import estimate_run_memory
    from lvrpo.training.sources import open_parts

    config = read_config(TrainConfig, options.config, options.overrides)
    if options.card is not None:
        _check_gpu_memory(config, options.card)
        return
    policy_folder(config.policy)  # a missing one is refused before anything is printed
    print(dump_config(config), end="")
    parts = open_parts(config)  # what it refuses need not wait for the estimate
    memory = None
    try:
        memory = estimate_run_memory(config, parts)
    except NotEstimatedError as error:
        print(f"\nmemory: {error}")
    if memory is not None:
        _print_memory(memory)
        require_memory(memory, pick_device(config.device), f"policy={config.policy}")
    found = dry_run(config, parts)
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
    import torch

    from lvrpo.training.dry_run import memory_needed
    from lvrpo.training.memory import require_free_bytes

    if config.device == "cpu":
        raise InputError(f"device=cpu, and --card {gib:g}: leave one of them out")
    memory = memory_needed(config, torch.device("cuda"))
    _print_memory(memory)
    require_free_bytes(memory, round(gib * 2**30), "a card", f"policy={config.policy}")
    print(f"fits: {gib - memory.peak / 2**30:.1f} of {gib:g} GiB are left")


CHECK = Command(
    "check a configuration: load data and model, run the step-0 checks, estimate time and memory",
    check_options,
    check,
    "examples:\n"
    "  lvrpo check quickstart rollout.group_size=4\n"
    "  lvrpo check bagel_lvrpo_lora policy=FOLDER --card 78\n\n"
    "To fetch only what --card needs: hf download ID --include '*.json' '*.txt' '*.jinja' --local-dir FOLDER",
    check_keys(),
)
