"""What alignment and pretraining share: steps with their metrics, checkpoints, the end of a run."""

from __future__ import annotations

import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lvrpo.distributed import AsyncSave, gather, is_main, on_main, relay_errors, split_between_ranks, world_size
from lvrpo.errors import LostProcessError, LvrpoError
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import FINAL, START
from lvrpo.reading import is_there
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
from lvrpo.training.interrupt import Interrupted
from lvrpo.training.memory import return_freed_memory
from lvrpo.training.run_directory import RunDirectory

Observer = Callable[[Mapping[str, Any]], None]
"""Called with the metrics row of every step."""


class TrainerState(Protocol):
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    seconds: float
    """Training seconds so far, over all resumptions."""

    @property
    def best_steps(self) -> set[int]:
        """The steps whose checkpoints are kept, whatever comes after them."""
        ...

    def write(self, folder: Path) -> AsyncSave | None:
        """Writes the policy to use in the folder, and everything else below it; what is still being written of it."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint; raises InputError if it is damaged."""
        ...


class RunConfig(Protocol):
    """The fields that every configuration of a run has."""

    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...


C = TypeVar("C", bound=RunConfig)
S = TypeVar("S", bound=TrainerState)


class BaseTrainer(ABC, Generic[C, S]):
    """A run on the disk that is trained step by step."""

    command: ClassVar[str]
    """Of the command line, which resumes it."""
    config: C
    run: RunDirectory
    state: S
    _interrupted = False
    _pending: PendingCheckpoint | None = None

    @abstractmethod
    def train(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Steps until the end or an interruption, with checkpoints; returns whether it came to its end."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return is_there(self.run.path / FINAL)

    def restore(self) -> None:
        """Goes on from the last whole checkpoint; metrics that came after it are dropped.

        That of step 0 is made anew, with what is measured before the first step.
        """
        last = latest_checkpoint(self.run.path)
        if last is not None and checkpoint_step(last):
            self.state.load(last)
        self._prune()  # what a kill left beside the last
        self.run.truncate_metrics(self.state.step or -1)

    @contextmanager
    def logged_step(self, observe: Observer) -> Iterator[dict[str, Any]]:
        """A step: what is put into the row goes into the metrics, with the time it took. Any: numbers and texts."""
        started, state = time.perf_counter(), self.state
        row: dict[str, Any] = {"step": state.step + 1}
        yield row
        state.seconds += time.perf_counter() - started
        row |= {"seconds": state.seconds, "seconds_left": state.seconds / state.step * (self.config.steps - state.step)}
        self.run.append_metrics(row)
        observe(row)
        return_freed_memory()

    @contextmanager
    def saved_if_it_fails(self) -> Iterator[None]:
        """What fails before a step has changed anything leaves a checkpoint of the steps that are done.

        An error of lvrpo's own says so. Nothing is written where another process is lost, or the disk does not let it.
        """
        step, run = self.state.step, self.run
        try:
            yield
        except LostProcessError:
            raise
        except Exception as error:
            with suppress(Exception):  # the first error is the one to tell
                self.wait_for_checkpoint()
                if step and not run.checkpoint_dir(step).is_dir():
                    self.save()
                    self.wait_for_checkpoint()
            if step and isinstance(error, LvrpoError) and run.checkpoint_dir(step).is_dir():
                went_on = f"{error}; step {step} is saved: go on with lvrpo {self.command} --resume {run.path}"
                raise type(error)(went_on) from error
            raise

    def save(self) -> Path:
        """Writes checkpoints/step_NNNNNN: the state, and the policy to use in Hub layout.

        Of several processes it is there once ``wait_for_checkpoint`` was called.
        """
        self.wait_for_checkpoint()
        path = self.run.checkpoint_dir(self.state.step)
        self._pending = PendingCheckpoint(path, self.state)
        if world_size() == 1:
            self.wait_for_checkpoint()
        return path

    def wait_for_checkpoint(self) -> None:
        """Waits for a checkpoint that is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.finish()
            self._prune()

    def save_if_due(self, last: bool) -> None:
        """Saves where the configuration wants it, at the last step and at the best ones."""
        state = self.state
        if state.step % self.config.checkpoint_every == 0 or last or state.step in state.best_steps:
            self.save()
        if last:
            self.wait_for_checkpoint()

    def _prune(self) -> None:
        keep = self.state.best_steps
        on_main(lambda: prune_checkpoints(self.run.path, self.config.keep_checkpoints, keep=keep))

    def finish(self, step: int) -> None:
        """Says which step's weights are the result."""
        self.wait_for_checkpoint()
        found = {"checkpoint": f"checkpoints/{self.run.checkpoint_dir(step).name}", "step": step}
        on_main(lambda: self.run.write_json(FINAL, found))

    def asked_to_stop(self, interrupted: Callable[[], bool]) -> bool:
        """Whether any rank was asked to stop; the same on all. A checkpoint that all have written is finished."""
        written = self._pending is not None and self._pending.written
        found = gather((bool(interrupted()), written))
        if all(done for _, done in found):
            self.wait_for_checkpoint()
        self._interrupted = any(asked for asked, _ in found)
        return self._interrupted

    def require_uninterrupted(self, command: str | None = None) -> None:
        """Raises Interrupted after a request to stop, which ``train`` obeyed with a checkpoint written.

        ``command``: what resumes the run, where it is not the trainer's own.
        """
        if self._interrupted:
            raise Interrupted(
                f"interrupted after step {self.state.step} of {self.config.steps}; the checkpoint is written; "
                f"go on with: lvrpo {command or self.command} --resume {self.run.path}"
            )


class PendingCheckpoint:
    """A checkpoint that all ranks write, also while they go on; called by all.

    Its folder has a temporary name until ``finish``, so what fails or is killed before leaves the last one the last.
    """

    def __init__(self, path: Path, state: TrainerState) -> None:
        self._writer = atomic_folder(path, replace=True)
        self.folder = on_main(self._writer.__enter__)
        with self._removed_if_it_fails():
            self._saving = state.write(self.folder)

    @property
    def written(self) -> bool:
        """Whether this rank has written its part."""
        return self._saving is None or self._saving.done

    def finish(self) -> None:
        """Waits for all ranks, seals the folder and gives it its name.

        Every rank hashes its share of the files: one alone would take minutes for those of a large model.
        """
        with self._removed_if_it_fails():
            if self._saving is not None:
                self._saving.wait()
            with relay_errors():
                own = file_seals(self.folder, split_between_ranks(files_to_seal(self.folder)))
            seals = {name: seal for part in gather(own) for name, seal in part.items()}
            on_main(lambda: seal_checkpoint(self.folder, seals))
        on_main(lambda: self._writer.__exit__(None, None, None))

    @contextmanager
    def _removed_if_it_fails(self) -> Iterator[None]:
        try:
            with relay_errors():
                yield
        except BaseException:
            if is_main():
                self._writer.__exit__(*sys.exc_info())
            raise


def keep_start(run: RunDirectory, policy: Policy) -> None:
    """Writes the starting weights into the run, sealed."""

    def write() -> None:
        shutil.rmtree(run.path / START, ignore_errors=True)
        with atomic_folder(run.path / START) as folder:
            policy.save(folder)
            seal_checkpoint(folder)

    on_main(write)


def require_start(run: RunDirectory) -> Path:
    """The folder of the starting weights; raises InputError where it is damaged."""
    verify_checkpoint(run.path / START)
    return run.path / START
