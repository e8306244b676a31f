"""``lvrpo launch ray``: a distributed run by workers of Ray Train, each of which starts one process of the run.

When a worker fails, Ray Train restarts all of them, and they resume from the last checkpoint. An actor passes output,
exit codes and the request to stop between workers and terminal.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from lvrpo.commands.options import Command, Options, Parser, positive, whole
from lvrpo.commands.train_options import check_keys, refuse_out, train_options
from lvrpo.errors import ContractError, InputError, UnhealthyRunError
from lvrpo.registry import ANY, allowed_code

FINAL_CODES = (0, 2, 3, 130)
"""Exit codes of ``lvrpo train`` after which a restart gains nothing: done, wrong input, not healthy, interrupted."""
POLL_S = 0.5
GRACE_S = 30.0
"""Seconds until a process is killed once another has failed."""
MAX_CONTROLLER_FAILURES = 10
"""Attempts of Ray to schedule all workers again, about one a minute."""
FINAL_LINES = ("error: ", "not healthy: ", "interrupted")
"""Prefixes of the line in which a process reports why it ends."""
DIES_WITH_PARENT = (
    "import ctypes, os, sys; getattr(ctypes.CDLL(None), 'prctl', lambda *_: 0)(1, 9); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
"""Replaces itself by the given program, which the kernel kills with the worker (PR_SET_PDEATHSIG, Linux only)."""
Line = tuple[str, str]
"""(stream "out" or "err", text)."""


@dataclass(frozen=True)
class Job:
    """The command that the workers run."""

    arguments: tuple[str, ...]
    """Arguments of ``lvrpo train``, without the run directory."""
    run: str
    """The run directory, on a file system shared by all nodes."""
    resumes: bool
    """Whether the run exists."""
    folder: str
    """The working directory."""


@dataclass(frozen=True)
class Rendezvous:
    """The rendezvous of an attempt, broadcast by rank 0."""

    attempt: int
    host: str
    port: int
    resumes: bool


def has_start(run: Path) -> bool:
    """Whether a run has its first checkpoint."""
    return (run / "start" / "checkpoint.json").exists()


def command(job: Job, resumes: bool) -> list[str]:
    """The command line of a process."""
    return [sys.executable, "-m", "lvrpo", "train", *job.arguments, "--resume" if resumes else "--out", job.run]


def environment(rendezvous: Rendezvous, rank: int, size: int, local_rank: int) -> dict[str, str]:
    """The environment variables that ``torchrun`` would set; rank 0 serves the store of each attempt.

    ``local_rank``: index of its GPU among the visible ones.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": rendezvous.host,
        "MASTER_PORT": str(rendezvous.port),
        "TORCHELASTIC_RUN_ID": "ray",
        "TORCHELASTIC_RESTART_COUNT": str(rendezvous.attempt),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": os.environ.get(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        ),  # hides a stack trace per lost connection
    }


def require_resources(has: Mapping[str, float], workers: int, gpus: int) -> None:
    """Raises InputError where a cluster has fewer CPUs or GPUs than the workers take."""
    most = min(int(has["CPU"]), int(has["GPU"] // gpus) if gpus else workers)
    if workers > most:
        takes = "1 CPU and 1 GPU" if gpus else "1 CPU"
        raise InputError(
            f"--workers {workers}: each takes {takes}, and the Ray cluster has {has['CPU']:g} CPUs and {has['GPU']:g} "
            f"GPUs: give {most}, or add nodes"
            if most
            else f"--workers {workers}: the Ray cluster has {has['CPU']:g} CPUs and {has['GPU']:g} GPUs: add nodes"
        )


def outcome(codes: Sequence[int]) -> int:
    """The exit code of an attempt: that of the first process that failed, else 0."""
    return next((code for code in codes if code), 0)


# --- the actor between workers and terminal ---


class Coordinator:
    """Ray actor: collects output and exit codes of the workers, and passes on a request to stop."""

    def __init__(self) -> None:
        self.attempts: list[list[int]] = []
        """The exit codes of each attempt, in order of arrival."""
        self.lines: list[Line] = []
        self.stopping = False

    def begin(self) -> int:
        """Starts an attempt; returns its number."""
        self.attempts.append([])
        return len(self.attempts) - 1

    def report(self, attempt: int, lines: Sequence[Line], code: int | None) -> tuple[list[int], bool]:
        """Adds output and an exit code; returns the exit codes of the attempt, and whether to stop."""
        self.lines += lines
        if code is not None:
            self.attempts[attempt].append(code)
        return list(self.attempts[attempt]), self.stopping

    def stop(self) -> None:
        """Asks every process to finish its step and write a checkpoint."""
        self.stopping = True

    def read(self) -> tuple[list[Line], list[list[int]]]:
        """The lines since the last call, and all attempts."""
        lines, self.lines = self.lines, []
        return lines, [list(codes) for codes in self.attempts]


# --- in a worker ---


def _run_worker(config: dict[str, Any]) -> None:
    """Runs one process of the run until it ends; raises RuntimeError where a restart may help. Any: Ray handles."""
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    job, coordinator, context = config["job"], config["coordinator"], train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    rendezvous = broadcast_from_rank_zero(_rendezvous(job, ray.get(coordinator.begin.remote())) if rank == 0 else None)
    assert rendezvous is not None  # rank 0 sent one
    own = environment(rendezvous, rank, size, 0 if config["cards"] else context.get_local_rank())
    process = subprocess.Popen(
        [sys.executable, "-c", DIES_WITH_PARENT, *command(job, rendezvous.resumes)[1:]],
        cwd=job.folder,
        env=os.environ | config["environment"] | own | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    output: SimpleQueue[Line] = SimpleQueue()
    streams = {"out": process.stdout, "err": process.stderr}
    readers = [
        threading.Thread(target=_read, args=(n, stream, output), daemon=True) for n, stream in streams.items() if stream
    ]
    for reader in readers:
        reader.start()
    codes: list[int] = []
    code, asked, stopping, deadline = None, False, False, None
    while code is None:
        time.sleep(POLL_S)
        code = process.poll()
        for reader in readers if code is not None else ():
            reader.join(GRACE_S)
        lines = [output.get() for _ in range(output.qsize())]
        codes, stopping = ray.get(coordinator.report.remote(rendezvous.attempt, lines, code))
        # SIGTERM: all stop after the same step; after a failure the others would wait forever
        if (stopping or outcome(codes)) and not asked and code is None:
            process.send_signal(signal.SIGTERM)
            asked = True
        if outcome(codes) and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            process.kill()
    if outcome(codes) not in FINAL_CODES and not stopping:
        raise RuntimeError(f"lvrpo train ended with {outcome(codes)}")


def _rendezvous(job: Job, attempt: int) -> Rendezvous:
    from ray.util import get_node_ip_address

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return Rendezvous(attempt, get_node_ip_address(), port, job.resumes or has_start(Path(job.run)))


def _read(name: str, stream: IO[str], output: SimpleQueue[Line]) -> None:
    for line in stream:
        output.put((name, line.rstrip("\n")))


# --- at the terminal ---


def launch(job: Job, workers: int, gpus: int | None, max_failures: int) -> None:
    """Runs the job until it ends.

    ``gpus``: per worker, 0 or 1; None: 1 where the cluster has GPUs. Raises the error of ``lvrpo train`` that has the
    exit code of the processes, ContractError where they failed more than ``max_failures`` times.
    """
    from lvrpo.distributed.ray_cluster import ray_cluster, resources

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    ray: Any = ray_cluster("lvrpo launch ray")  # a package that need not be there
    has = resources(ray)
    gpus = int(has["GPU"] > 0) if gpus is None else gpus
    require_resources(has, workers, gpus)
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    except ImportError as error:
        raise InputError(f"lvrpo launch ray: needs Ray Train ({error}): pip install 'lvrpo[ray]'") from None

    coordinator = ray.remote(num_cpus=0)(Coordinator).remote()
    shared = next(folder for folder in Path(job.run).parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".ray-", dir=shared, ignore_cleanup_errors=True) as storage:
        passed = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        trainer = DataParallelTrainer(
            _run_worker,
            train_loop_config={"job": job, "coordinator": coordinator, "cards": gpus, "environment": passed},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpus else {}),
            ),
            run_config=RunConfig(
                storage_path=storage,
                failure_config=FailureConfig(
                    max_failures=max_failures, controller_failure_limit=MAX_CONTROLLER_FAILURES
                ),
            ),
        )
        result = _follow(ray, coordinator, trainer, max_failures)
    raise_for_result(result, job.run)


@dataclass
class LaunchResult:
    """The outcome of a launch."""

    code: int | None = None
    """Exit code of the first process that failed in the last attempt; None: no attempt started."""
    message: str = ""
    """The reason that the process reported; printed once it is known whether there is another attempt."""
    error: Exception | None = None
    """The error of Ray."""
    stopped: bool = False
    """Whether the user interrupted it."""


def _follow(ray: Any, coordinator: Any, trainer: Any, max_failures: int) -> LaunchResult:
    """Prints the output of the processes until the launch ends. Any: Ray objects."""
    result, over, attempts = LaunchResult(), False, 1

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # anything that Ray may raise
            result.error = error

    thread = threading.Thread(target=fit, daemon=True)  # outside the main thread Ray leaves Ctrl-C to us
    thread.start()
    while not over:
        try:
            over = not thread.is_alive()
            lines, codes = ray.get(coordinator.read.remote())
            for stream, line in lines:
                if stream == "err" and line.startswith(FINAL_LINES):
                    result.message = line
                else:
                    print(line, file=sys.stdout if stream == "out" else sys.stderr, flush=True)
            if len(codes) > attempts:
                attempts = len(codes)
                why = result.message or "a worker died"
                print(f"restart {attempts - 1} of {max_failures} from the last checkpoint: {why}", flush=True)
                result.message = ""
            if codes:
                result.code = outcome(codes[-1])
            if not over:
                time.sleep(POLL_S)  # not join: in Python 3.11 an interrupted join marks the thread as ended
        except KeyboardInterrupt:
            if result.stopped:
                raise
            result.stopped = True
            coordinator.stop.remote()
    return result


def raise_for_result(result: LaunchResult, run: str) -> None:
    """Raises the error that gives the command the exit code of its processes."""
    code, again = result.code, f"lvrpo launch ray --workers N --resume {run}"
    message = result.message.removeprefix("error: ").removeprefix("not healthy: ")
    if code == 130 or (result.stopped and code not in FINAL_CODES):
        raise KeyboardInterrupt(message.replace(f"lvrpo train --resume {run}", again) or "interrupted")
    if code not in FINAL_CODES or result.error is not None:
        what = f"a process ended with code {code}" if code else " ".join(str(result.error).split())[:200]
        raise ContractError(f"{message or what}: no restart is left: continue with {again}")
    if code:
        raise InputError(message) if code == 2 else UnhealthyRunError(message)


def options(parser: Parser) -> None:
    train_options(parser)
    parser.add_argument("--workers", type=positive, required=True, metavar="N", help="number of training processes")
    parser.add_argument(
        "--max-failures", type=whole, default=3, metavar="N", help="restarts before giving up (default: 3)"
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=int,
        choices=(0, 1),
        help="GPUs per process (default: 1 if the cluster has GPUs)",
    )


def run(options: Options) -> None:
    from lvrpo.commands.inputs import read_config
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
    """The arguments of every process, without the run directory."""
    found = [] if options.config is None else [options.config, *options.overrides]
    found += ["--benchmark", ",".join(options.benchmark)] if options.benchmark else []
    found += ["--no-evaluate"] if options.no_evaluate else []
    found += ["--base", options.base] if options.base is not None else []
    packages = sorted(allowed)
    found += ["--allow-code" if ANY in packages else f"--allow-code={','.join(packages)}"] if packages else []
    return [*found, "--timeout-min", str(options.timeout_min)]


RAY = Command(
    "train a policy on a Ray cluster, restarting from the last checkpoint when a worker dies",
    options,
    "lvrpo.commands.launch:run",
    "examples:\n"
    "  lvrpo launch ray quickstart --workers 2 --out runs/shared\n\n"
    "CONFIG, the run directory and the working directory must be on a file system that all nodes share.",
    check_keys(),
)
