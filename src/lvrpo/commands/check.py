"""``lvrpo check``: everything that can go wrong before a run, found before it; changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lvrpo.commands.options import Command, Options, Parser, add_config, gibibytes
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.memory import MemoryEstimate


def options(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--card",
        type=gibibytes,
        metavar="GIB",
        help="estimate the memory on a CUDA card with so many GiB free, and stop there; the card need not be there, "
        "and of a BAGEL its json and tokenizer files are enough",
    )


def run(options: Options) -> None:
    from lvrpo.commands.progress import clock
    from lvrpo.commands.settings import read_config
    from lvrpo.config import dump_config
    from lvrpo.policies.loading import pick_device
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.dry_run import dry_run, memory_needed
    from lvrpo.training.memory import require_memory
    from lvrpo.training.preflight import require

    config = read_config(TrainConfig, options.config, options.overrides)
    if options.card is not None:
        fit_card(config, options.card)
        return
    print(dump_config(config), end="")
    memory = memory_needed(config)
    if memory is not None:
        print_memory(memory)
    require_memory(memory, pick_device(config.device), f"policy={config.policy}")
    found = dry_run(config)
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


def print_memory(memory: MemoryEstimate) -> None:
    """What stays, what comes and goes, and the most at once."""
    print("\nmemory, GiB, before anything is loaded")
    for line in memory.lines():
        print(line)
    print(f"{memory.peak / 2**30:9.3f}  at most, in the {memory.worst}")


def fit_card(config: TrainConfig, gib: float) -> None:
    """The memory of a run on a card that need not be there; raises InputError where it does not fit."""
    import torch

    from lvrpo.training.dry_run import memory_needed
    from lvrpo.training.memory import require_fit

    if config.device == "cpu":
        raise InputError(f"device=cpu, and --card {gib:g}: leave one of them out")
    memory = memory_needed(config, torch.device("cuda"))
    if memory is None:
        raise InputError(f"--card {gib:g}: the memory of policy={config.policy} cannot be estimated: leave --card out")
    print_memory(memory)
    require_fit(memory, round(gib * 2**30), "a card", f"policy={config.policy}")
    print(f"fits: {gib - memory.peak / 2**30:.1f} of {gib:g} GiB are left")


CHECK = Command(
    "resolve a configuration, load data and model, run the step-0 contract, estimate time and memory",
    options,
    run,
    "example: lvrpo check quickstart rollout.group_size=4\n"
    "         lvrpo check bagel_lvrpo_lora policy=FOLDER --card 78\n"
    "of a model on the Hub, what --card needs is fetched with: hf download ID --include '*.json' '*.txt'",
)
