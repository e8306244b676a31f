"""What memory this process uses, gives back, and would use: its peak, freed blocks, bytes of live tensors."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still alive; ``peak`` is the most so far.

    Convolutions count with the copies that the kernels of a device (cpu, cuda) work on.
    """

    def __init__(self, not_counted: Iterable[torch.Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = 0
        self.device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any: what torch passes to a mode."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + self._rearranged(args[0], args[1], out))
        return out

    def _rearranged(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
        """A convolution wants the channels of a pixel together: it works on copies of what goes in and comes out.

        oneDNN has one of them at a time, and none for 1 x 1 (both measured); cuDNN takes its workspace for both.
        """
        if max(weight.shape[2:]) == 1:
            return 0
        sizes = (x.nbytes, out.nbytes)
        return max(sizes) if self.device == "cpu" else sum(sizes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
