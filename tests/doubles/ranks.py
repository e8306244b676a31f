"""Real processes with a gloo group of their own, and what they do in the tests of ``lvrpo.distributed``.

They are forked from a server that has torch loaded, so that a test costs a fraction of a second of imports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented

from lvrpo.cli import main
from lvrpo.distributed import process_group, rank, should_print
from lvrpo.errors import LvrpoError

# the server takes its path from the environment alone
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distributed_work", "training_work"])


def exit_code(function: Callable[..., Any], *args: Any) -> int | None:
    """Of one process that calls a function; an exception in it is 1."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    process.join(300)
    return process.exitcode


class Command:
    """``lvrpo`` with these arguments in the working directory; forked, so that it imports nothing."""

    def __init__(self, *arguments: object) -> None:
        self.errors = Path.cwd() / "errors"
        self.process = CONTEXT.Process(target=_command, args=(Path.cwd(), self.errors, tuple(map(str, arguments))))
        self.process.start()

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self) -> tuple[int | None, str]:
        """The exit code and the messages."""
        self.process.join(300)
        assert self.ended, self.errors.read_text()
        return self.process.exitcode, self.errors.read_text()


def _command(folder: Path, errors: Path, arguments: Sequence[str]) -> None:
    os.chdir(folder)
    with errors.open("w") as stderr, open(os.devnull, "w") as stdout:
        os.dup2(stderr.fileno(), 2)
        os.dup2(stdout.fileno(), 1)
    sys.exit(main(arguments))


@dataclass
class Outcome:
    """How a process ended."""

    code: int | None
    result: Any
    error: str
    """"InputError: its words", or nothing."""
    stderr: str
    seconds: float


class Ranks:
    """Processes that run a function; ``outcomes`` waits for them."""

    def __init__(
        self,
        folder: Path,
        world: int,
        function: Callable[..., Any],
        *args: Any,
        absent: Sequence[int] = (),
        timeout_min: float = 1.0,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # as torchrun's agent does
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        self.began = time.monotonic()
        self.processes: dict[int, BaseProcess] = {
            own: CONTEXT.Process(target=_run, args=(own, world, port, folder, timeout_min, function, args))
            for own in range(world)
            if own not in absent
        }
        for process in self.processes.values():
            process.start()

    @property
    def ended(self) -> bool:
        """Whether any of them has."""
        return any(process.exitcode is not None for process in self.processes.values())

    def wait_for(self, name: str, count: int) -> None:
        """Until the function has made so many files of a name in the folder of the test."""
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob(f"{name}*"))) < count:
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)

    def outcomes(self, timeout: float = 300) -> dict[int, Outcome]:
        ended: dict[int, float] = {}
        deadline = time.monotonic() + timeout
        while len(ended) < len(self.processes):
            for own, process in self.processes.items():
                if own not in ended and process.exitcode is not None:
                    ended[own] = time.monotonic() - self.began
            if time.monotonic() > deadline:
                for process in self.processes.values():
                    process.kill()
                raise AssertionError(f"processes {set(self.processes) - set(ended)} hang: {self._stderr()}")
            time.sleep(0.01)
        return {own: self._outcome(own, process, ended[own]) for own, process in self.processes.items()}

    def results(self) -> list[Any]:
        """Of all ranks, which all succeed."""
        outcomes = self.outcomes()
        for own, outcome in outcomes.items():
            assert outcome.code == 0, (own, outcome.code, outcome.error, outcome.stderr)
        return [outcome.result for outcome in outcomes.values()]

    def _outcome(self, own: int, process: BaseProcess, seconds: float) -> Outcome:
        result, error = self.folder / f"result_{own}.pt", self.folder / f"error_{own}"
        return Outcome(
            process.exitcode,
            torch.load(result, weights_only=False) if result.exists() else None,
            error.read_text() if error.exists() else "",
            (self.folder / f"stderr_{own}").read_text(),
            seconds,
        )

    def _stderr(self) -> list[str]:
        return [path.read_text()[-2000:] for path in sorted(self.folder.glob("stderr_*"))]


def _run(
    own: int, world: int, port: int, folder: Path, timeout_min: float, function: Callable[..., Any], args: Any
) -> None:
    with (folder / f"stderr_{own}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(own),
        LOCAL_RANK=str(own),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    try:
        with process_group(timeout_min):
            assert rank() == (own if world > 1 else 0)
            result = function(*args)
        torch.save(result, folder / f"result_{own}.pt")
    except LvrpoError as error:
        (folder / f"error_{own}").write_text(f"{type(error).__name__}: {error}")
        if should_print(error):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
