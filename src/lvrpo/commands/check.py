"""``lvrpo check``: everything that can go wrong before a run, found before it; changes nothing."""

from __future__ import annotations

from lvrpo.commands.options import Command, Options, Parser, add_config


def options(parser: Parser) -> None:
    add_config(parser)


def run(options: Options) -> None:
    from lvrpo.commands.progress import clock
    from lvrpo.commands.settings import read_config
    from lvrpo.config import dump_config
    from lvrpo.policies.loading import pick_device
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.contract import require
    from lvrpo.training.memory import require_memory
    from lvrpo.training.trial import memory_needed, try_out

    config = read_config(TrainConfig, options.config, options.overrides)
    print(dump_config(config), end="")
    memory = memory_needed(config)
    if memory is not None:
        print("\nmemory, GiB, before anything is loaded")
        for line in memory.lines():
            print(line)
        print(f"{memory.peak / 2**30:9.3f}  at most, in the {memory.worst}")
    require_memory(memory, pick_device(config.device), f"policy={config.policy}")
    trial = try_out(config)
    print("\nstep-0 contract")
    for check in trial.checks:
        print(f"  {'ok    ' if check.ok else 'BROKEN'}  {check.check}: {check.value:.3g} (limit {check.limit:.3g})")
    require(trial.checks)
    print("\nestimate, from one small step")
    print(
        f"  time    {clock(trial.seconds)} for {config.steps} steps with the guard, {trial.step_seconds:.1f} s a step"
    )
    foretold = "" if memory is None else f"{memory.peak / 2**30:.1f} GiB foretold; "
    print(f"  memory  {foretold}{trial.peak_memory_gib:.1f} GiB at most in this trial")
    print(f"  disk    {trial.disk_mib:.0f} MiB of checkpoints")


CHECK = Command(
    "resolve a configuration, load data and model, run the step-0 contract, estimate time and memory",
    options,
    run,
    "example: lvrpo check quickstart rollout.group_size=4",
)
