"""The folder through which weights reach a rollout engine."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from lvrpo.training.checkpoint import clean_leftovers, locked_temporary

SHARED_MEMORY = Path("/dev/shm")
NAME = "lvrpo_weights"


class WeightsFolder:
    """A temporary folder, by default in shared memory: what killed processes left there is removed first."""

    def __init__(self, parent: str | None = None, mode: int = 0o700) -> None:
        """``parent``: where another machine can read it; nothing is removed there."""
        place = Path(parent or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else tempfile.gettempdir()))
        place.mkdir(parents=True, exist_ok=True)
        guard = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)  # no process removes a folder between its creation and its lock
            if parent is None:
                clean_leftovers(place, NAME)
            self.path, lock = locked_temporary(place / NAME)
        finally:
            os.close(guard)
        self.close = weakref.finalize(self, _remove, self.path, lock)
        """Removes the folder, at the latest when the process ends; another call does nothing."""
        self.path.chmod(mode)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
