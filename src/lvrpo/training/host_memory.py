"""The memory of this process: the most that it had, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import psutil


def peak_memory_gib() -> float:
    """The largest resident memory that this process has had."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss / 2**30
    return kibibytes / 2**20


def return_freed_memory() -> None:
    """Gives freed blocks back to the system, which glibc keeps between tensors that live on; elsewhere nothing.

    Without it a run on a CPU grows step by step, though no more tensors are alive.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it can do that."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: no library without a name on Windows
        return None
    return libc if hasattr(libc, "malloc_trim") else None
