"""Base class of the alignment and pretraining trainers: metrics of a step, checkpoints, interruption, results."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from lvrpo.distributed import AsyncSave, gather, is_main, on_main, relay_errors, split_between_ranks, world_size
from lvrpo.errors import InputError, LostProcessError, LvrpoError
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import FINAL, START
from lvrpo.reading import path_exists
from lvrpo.training.checkpoint import (
    atomic_folder,
    checkpoint_step,
    file_seals,
    files_to_seal,
    latest_checkpoint,
    prune_checkpoints,
    seal_checkpoint,
    verify_checkpoint,
)
from lvrpo.training.memory import return_freed_memory
from lvrpo.training.run_directory import RunDirectory

RETURN_MEMORY_EVERY = 16
"""Steps after which freed memory is returned to the system; the step after it takes pages from the system again."""


class Interrupted(KeyboardInterrupt):
    """The run stopped on request after writing a checkpoint; the message says how to resume."""


def print_stopping() -> None:
    """Prints a notice, unbuffered because a signal handler may interrupt another print."""
    with suppress(OSError):
        os.write(1, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


class InterruptHandler:
    """Inside the context, the first signal is recorded and ``notify`` called; calling the object returns whether."""

    def __init__(self, notify: Callable[[], object] = lambda: None) -> None:
        self.requested = False
        self.notify = notify
        self._handlers: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        self._handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.notify()


Observer = Callable[[Mapping[str, Any]], None]
"""Called with the metrics row of every step."""


class TrainerState(Protocol):
    """The state that a checkpoint saves."""

    step: int
    """Steps done."""
    seconds: float
    """Training time so far, over all resumptions."""

    @property
    def best_steps(self) -> set[int]:
        """The steps whose checkpoints are never pruned."""
        ...

    def write(self, folder: Path) -> AsyncSave | None:
        """Writes the policy to the folder and the training state below it; returns a pending asynchronous save."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Restores a checkpoint; raises InputError if it is damaged."""
        ...


class RunConfig(Protocol):
    """The fields common to all run configurations."""

    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...


C = TypeVar("C", bound=RunConfig)
S = TypeVar("S", bound=TrainerState)


class BaseTrainer(ABC, Generic[C, S]):
    """A training run with a run directory."""

    command: ClassVar[str]
    """The subcommand that resumes the run."""
    config: C
    run: RunDirectory
    state: S
    _interrupted = False
    _pending: PendingCheckpoint | None = None

    @abstractmethod
    def train(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Trains until the end or an interruption, with checkpoints; returns whether the run is finished."""

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return path_exists(self.run.path / FINAL)

    def restore(self) -> None:
        """Loads the last complete checkpoint and drops later metrics; step 0 is repeated with its measurements."""
        last = latest_checkpoint(self.run.path)
        if last is not None and checkpoint_step(last):
            self.state.load(last)
        elif last is None and is_main() and (repeated := max((row["step"] for row in self.run.metrics()), default=0)):
            steps = f"{repeated} step{'s' * (repeated > 1)}"
            warnings.warn(
                f"{self.run.path}: has no checkpoint: training starts again at step 0 and repeats {steps}",
                stacklevel=2,
            )
        self._prune()  # a killed process may have left old checkpoints
        self.run.truncate_metrics(self.state.step or -1)

    @contextmanager
    def logged_step(self, observe: Observer) -> Iterator[dict[str, Any]]:
        """One step: yields its metrics row, and writes it with timings on exit. Any: numbers and strings."""
        started, state = time.perf_counter(), self.state
        row: dict[str, Any] = {"step": state.step + 1}
        yield row
        state.seconds += time.perf_counter() - started
        row |= {"seconds": state.seconds, "seconds_left": state.seconds / state.step * (self.config.steps - state.step)}
        self.run.append_metrics(row)
        observe(row)
        if state.step % RETURN_MEMORY_EVERY == 0:
            return_freed_memory()

    @contextmanager
    def checkpoint_on_error(self) -> Iterator[None]:
        """Saves a checkpoint if the body, which must not change the state, raises; LvrpoErrors then mention it.

        Nothing is saved if another process is lost or writing fails.
        """
        step, run = self.state.step, self.run
        try:
            yield
        except LostProcessError:
            raise
        except Exception as error:  # the state is whole, whatever failed beside it
            with suppress(Exception):  # the first error is the one to raise
                self.wait_for_checkpoint()
                if step and not run.checkpoint_dir(step).is_dir():
                    self.save()
                    self.wait_for_checkpoint()
            if step and isinstance(error, LvrpoError) and run.checkpoint_dir(step).is_dir():
                message = f"{error}; step {step} is saved: continue with lvrpo {self.command} --resume {run.path}"
                raise type(error)(message) from error
            raise

    def save(self) -> Path:
        """Writes checkpoints/step_NNNNNN: the training state, and the policy in Hub layout.

        With several processes the write is asynchronous; ``wait_for_checkpoint`` completes it.
        """
        self.wait_for_checkpoint()
        path = self.run.checkpoint_dir(self.state.step)
        self._pending = PendingCheckpoint(path, self.state)
        if world_size() == 1:
            self.wait_for_checkpoint()
        return path

    def wait_for_checkpoint(self) -> None:
        """Completes a pending checkpoint."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.finish()
            self._prune()

    def save_if_due(self, last: bool) -> None:
        """Saves every ``checkpoint_every`` steps, at the last step and at the best steps."""
        state = self.state
        if state.step % self.config.checkpoint_every == 0 or last or state.step in state.best_steps:
            self.save()
        if last:
            self.wait_for_checkpoint()

    def _prune(self) -> None:
        keep = self.state.best_steps
        on_main(lambda: prune_checkpoints(self.run.path, self.config.keep_checkpoints, keep=keep))

    def finish(self, step: int) -> None:
        """Records the checkpoint of a step as the result of the run."""
        self.wait_for_checkpoint()
        final = {"checkpoint": f"checkpoints/{self.run.checkpoint_dir(step).name}", "step": step}
        on_main(lambda: self.run.write_json(FINAL, final))

    def stop_requested(self, interrupted: Callable[[], bool]) -> bool:
        """Whether any rank was interrupted; equal on all ranks. Also completes a checkpoint that all have written."""
        written = self._pending is not None and self._pending.written
        by_rank = gather((bool(interrupted()), written))
        if all(done for _, done in by_rank):
            self.wait_for_checkpoint()
        self._interrupted = any(stop for stop, _ in by_rank)
        return self._interrupted

    def require_uninterrupted(self, command: str | None = None) -> None:
        """Raises Interrupted if ``train`` stopped because of an interruption.

        ``command``: the subcommand that resumes the run, if not the trainer's own.
        """
        if self._interrupted:
            raise Interrupted(
                f"interrupted after step {self.state.step} of {self.config.steps}; the checkpoint is written; "
                f"continue with: lvrpo {command or self.command} --resume {self.run.path}"
            )


class PendingCheckpoint:
    """A checkpoint that all ranks write in the background; all methods are collective.

    Its folder has a temporary name until ``finish``, so an error or kill leaves the previous checkpoint the latest.
    """

    def __init__(self, path: Path, state: TrainerState) -> None:
        self._writer = atomic_folder(path, replace=True)
        self.folder = on_main(self._writer.__enter__)
        with self._cleanup_on_error():
            self._saving = state.write(self.folder)

    @property
    def written(self) -> bool:
        """Whether this rank has written its part."""
        return self._saving is None or self._saving.done

    def finish(self) -> None:
        """Waits for all ranks, seals the folder and renames it. Each rank hashes its share of the files."""
        with self._cleanup_on_error():
            if self._saving is not None:
                self._saving.wait()
            with relay_errors():
                local = file_seals(self.folder, split_between_ranks(files_to_seal(self.folder)))
            seals = {name: seal for part in gather(local) for name, seal in part.items()}
            on_main(lambda: seal_checkpoint(self.folder, seals))
        on_main(lambda: self._writer.__exit__(None, None, None))

    @contextmanager
    def _cleanup_on_error(self) -> Iterator[None]:
        try:
            with relay_errors():
                yield
        except BaseException:  # interrupts too: no half-written folder stays
            if is_main():
                self._writer.__exit__(*sys.exc_info())
            raise


def save_start(run: RunDirectory, policy: Policy) -> None:
    """Saves the initial policy in the run directory, sealed."""

    def write() -> None:
        shutil.rmtree(run.path / START, ignore_errors=True)
        with atomic_folder(run.path / START) as folder:
            policy.save(folder)
            seal_checkpoint(folder)

    on_main(write)


def require_start(run: RunDirectory) -> Path:
    """The folder of the initial policy; raises InputError if it is damaged, or was never complete."""
    if not path_exists(run.path / START):
        raise InputError(f"{run.path}: was stopped before its {START} was complete: repeat the command that started it")
    verify_checkpoint(run.path / START)
    return run.path / START
