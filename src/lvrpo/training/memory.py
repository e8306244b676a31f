"""The memory of a run: the record of an estimate, whether it fits, and what this process uses."""

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

LARGE_MODEL_SHARE = 64
"""A model of less than this share of the free memory is trained without asking."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes."""

    stays: Mapping[str, int]
    """Weights and whatever else is there all the time."""
    gradients: int
    """Of the trained weights: there while a step is replayed."""
    passes: Mapping[str, int]
    """What the parts of a step take at their worst; they come one after another."""
    host: int = 0
    """Beside the card, in host memory: of all processes of the run together."""

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        return sum(self.stays.values()) + max(
            (size + (self.gradients if name.startswith("replay") else 0) for name, size in self.passes.items()),
            default=0,
        )

    @property
    def worst(self) -> str:
        """The part of a step in which that is."""
        sizes = {n: size + (self.gradients if n.startswith("replay") else 0) for n, size in self.passes.items()}
        return max(sizes, key=lambda name: sizes[name])

    def lines(self) -> list[str]:
        """For the terminal, in GiB."""
        rows = [*self.stays.items(), ("gradients", self.gradients)]
        rows += [(f"{name}, while it lasts", size) for name, size in self.passes.items()]
        rows += [("beside the card: in host memory, of all processes together", self.host)]
        return [f"{size / 2**30:9.3f}  {name}" for name, size in rows if size >= 2**16]


def require_memory(estimate: MemoryEstimate | None, device: torch.device, what: str) -> None:
    """Raises InputError, with what to change, where less is free than a run will need."""
    if estimate is None:
        return
    available = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available
    require_fit(estimate, free, str(device), what)
    machines = max(1, int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if estimate.host // machines > available:
        raise InputError(
            f"{what}: offload=true needs about {estimate.host / machines / 2**30:.1f} GiB of host memory, "
            f"{available / 2**30:.1f} GiB are free: use more machines, or train an adapter (adapter.rank=16)"
        )


def require_fit(estimate: MemoryEstimate, free: int, where: str, what: str) -> None:
    """Raises InputError, with what to change, where so many free bytes are too few."""
    if estimate.peak > free:
        raise InputError(
            f"{what}: needs about {estimate.peak / 2**30:.1f} GiB on {where}, {free / 2**30:.1f} GiB are free: "
            f"{_remedy(estimate)}"
        )


def is_large_model(folder: Path, device: torch.device) -> bool:
    """Whether a model is so large that its memory should be estimated before it is loaded."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) * LARGE_MODEL_SHARE > free


def _remedy(estimate: MemoryEstimate) -> str:
    """What to change about the largest part."""
    stays = dict(estimate.stays)
    copies = stays.get("frozen and averaged weights", 0) + stays.get("the judge's own weights", 0)
    copies += stays.get("moments", 0) + estimate.gradients
    largest = max(stays.get("weights", 0), copies, max(estimate.passes.values(), default=0))
    if largest == copies:
        return "set offload=true, or train an adapter (adapter.rank=16)"
    if largest == stays.get("weights", 0):
        return "set precision.weights=bfloat16 with an adapter, or use a larger device"
    if estimate.worst.startswith("replay"):
        return "set limits.microbatch_size=1 and limits.gradient_checkpointing=true, flow.timesteps_per_sample lower"
    return "set rollout.group_size, data.prompts_per_step, rollout.max_new_tokens or the size of pictures lower"


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
