"""``lvrpo launch ray``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, positive, whole
from lvrpo.commands.train import refuse_out, train_options
from lvrpo.errors import InputError
from lvrpo.registry import ANY, allowed_code


def options(parser: Parser) -> None:
    train_options(parser)
    parser.add_argument("--workers", type=positive, required=True, metavar="N", help="processes of the run")
    parser.add_argument(
        "--max-failures", type=whole, default=3, metavar="K", help="restarts from the last checkpoint (default: 3)"
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=int,
        choices=(0, 1),
        help="cards of a process (default: 1 in a cluster that has cards)",
    )


def run(options: Options) -> None:
    from lvrpo.commands.ray_train import Job, has_start, launch
    from lvrpo.commands.settings import read_config
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.run_directory import RunDirectory

    arguments = train_arguments(options, allowed_code())
    if options.resume is not None:
        refuse_out(options)
        folder = RunDirectory.read(options.resume).path
    else:
        config = read_config(TrainConfig, options.config, options.overrides)
        folder = options.out or Path("runs") / config.name
        if has_start(folder):
            raise InputError(f"{folder}: holds a run already: continue it with --resume or choose another name")
    job = Job(tuple(arguments), str(folder.absolute()), options.resume is not None, str(Path.cwd()))
    launch(job, options.workers, options.gpus_per_worker, options.max_failures)


def train_arguments(options: Options, allowed: Iterable[str]) -> list[str]:
    """What every process of the run is given, but where the run is."""
    found = [] if options.config is None else [options.config, *options.overrides]
    found += ["--benchmark", ",".join(options.benchmark)] if options.benchmark else []
    found += ["--no-evaluate"] if options.no_evaluate else []
    found += ["--base", options.base] if options.base is not None else []
    packages = sorted(allowed)
    found += ["--allow-code" if ANY in packages else f"--allow-code={','.join(packages)}"] if packages else []
    return [*found, "--timeout-min", str(options.timeout_min)]


RAY = Command(
    "align a policy on a Ray cluster: lvrpo launch ray CONFIG [section.key=value ...] --workers N",
    options,
    run,
    "example: lvrpo launch ray quickstart --workers 2 --out runs/shared; a worker or node that dies: the run is\n"
    "restarted from its last checkpoint. CONFIG, the run and the working directory must be seen by all nodes.",
)
