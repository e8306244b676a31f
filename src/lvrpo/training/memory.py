"""Memory of a run: the estimate, the check that it fits, and the usage of this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from lvrpo.errors import InputError


class NotEstimatedError(InputError):
    """A policy whose memory cannot be estimated, and why, in one line."""


LARGE_MODEL_DIVISOR = 64
"""A model below 1 / ``LARGE_MODEL_DIVISOR`` of the free memory is trained without an estimate."""


@dataclass(frozen=True)
class MemoryEstimate:
    """All sizes in bytes."""

    persistent: Mapping[str, int]
    """Allocated during the whole run: weights, optimizer states ..."""
    gradients: int
    """Gradients of the trained weights; allocated during the replay."""
    transient: Mapping[str, int]
    """Peak of each phase of a step, one after another."""
    host: int = 0
    """Host memory besides that of the device, of all processes of the run together."""

    @property
    def peak(self) -> int:
        """Peak device memory."""
        return sum(self.persistent.values()) + max(
            (size + (self.gradients if name.startswith("replay") else 0) for name, size in self.transient.items()),
            default=0,
        )

    @property
    def peak_phase(self) -> str:
        """The phase of a step with the peak."""
        sizes = {n: size + (self.gradients if n.startswith("replay") else 0) for n, size in self.transient.items()}
        return max(sizes, key=lambda name: sizes[name])

    def lines(self) -> list[str]:
        """Lines for the terminal, in GiB."""
        rows = [*self.persistent.items(), ("gradients", self.gradients)]
        rows += [(f"{name}, while it lasts", size) for name, size in self.transient.items()]
        rows += [("beside the card: in host memory, of all processes together", self.host)]
        return [f"{size / 2**30:9.3f}  {name}" for name, size in rows if size >= 2**16]


def require_memory(estimate: MemoryEstimate, device: torch.device, what: str) -> None:
    """Raises InputError, with a remedy, if the estimate exceeds the free device or host memory."""
    available = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available
    require_free_bytes(estimate, free, str(device), what)
    machines = max(1, int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if estimate.host // machines > available:
        raise InputError(
            f"{what}: offload=true needs about {estimate.host / machines / 2**30:.1f} GiB of host memory, "
            f"{available / 2**30:.1f} GiB are free: use more machines, or train an adapter (adapter.rank=16)"
        )


def require_free_bytes(estimate: MemoryEstimate, free: int, where: str, what: str) -> None:
    """Raises InputError, with a remedy, if the peak exceeds ``free`` bytes."""
    if estimate.peak > free:
        raise InputError(
            f"{what}: needs about {estimate.peak / 2**30:.1f} GiB on {where}, {free / 2**30:.1f} GiB are free: "
            f"{_remedy(estimate)}"
        )


def is_large_model(folder: Path, device: torch.device) -> bool:
    """Whether memory should be estimated before a model is loaded (``LARGE_MODEL_DIVISOR``)."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) * LARGE_MODEL_DIVISOR > free


def _remedy(estimate: MemoryEstimate) -> str:
    """A suggestion that reduces the largest part."""
    persistent = estimate.persistent
    copies = persistent.get("frozen and averaged weights", 0) + persistent.get("the judge's own weights", 0)
    copies += persistent.get("moments", 0) + estimate.gradients
    largest = max(persistent.get("weights", 0), copies, max(estimate.transient.values(), default=0))
    if largest == copies:
        return "set offload=true, or train an adapter (adapter.rank=16)"
    if largest == persistent.get("weights", 0):
        return "set precision.weights=bfloat16 with an adapter, or use a larger device"
    if estimate.peak_phase.startswith("replay"):
        return "set limits.microbatch_size=1 and limits.gradient_checkpointing=true, flow.timesteps_per_sample lower"
    return "set rollout.group_size, data.prompts_per_step, rollout.max_new_tokens or the size of images lower"


def peak_memory_gib() -> float:
    """Peak resident memory of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss / 2**30
    return kibibytes / 2**20


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""


def keep_freed_memory() -> None:
    """Lets glibc's heap keep what is freed for the next allocation, also above 32 MiB (a no-op elsewhere).

    Otherwise large tensors on a CPU go back to the system one by one, and every new one is mapped and zeroed page by
    page. What the heap keeps is returned by ``return_freed_memory``.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Returns freed heap memory to the system (glibc ``malloc_trim``; a no-op elsewhere).

    Without it the resident memory of a run on a CPU grows by fragmentation.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it has ``malloc_trim``."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: no library without a name on Windows
        return None
    return libc if hasattr(libc, "malloc_trim") else None
