from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lvrpo.training import memory
from lvrpo.training.memory import keep_freed_memory, peak_memory_gib, return_freed_memory


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc on Linux")
def test_freed_heap_memory_is_returned_to_the_system() -> None:
    blocks = [bytearray(64 * 1024) for _ in range(4000)]
    full = resident_mib()
    assert full > 250
    living = blocks[::100]
    del blocks
    return_freed_memory()
    assert resident_mib() < full - 200
    assert sum(map(len, living)) == 40 * 64 * 1024
    assert peak_memory_gib() * 1024 >= full - 1


FAULTS = """
import resource, sys, torch
from lvrpo.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc on Linux")
def test_kept_memory_is_taken_again_without_page_faults() -> None:
    done = [
        subprocess.run([sys.executable, "-c", FAULTS, name], capture_output=True, text=True, check=True)
        for name in ("keep", "return")
    ]
    kept, returned = (int(each.stdout) for each in done)
    assert kept < 100 < returned  # with huge pages of 2 MiB, 64 MB take 32 faults each time


@pytest.mark.parametrize("library", [OSError, TypeError])
def test_elsewhere_nothing_happens(library: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> object:
        raise library

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    find: Callable[..., object] = memory._libc.__wrapped__
    assert find() is None
    monkeypatch.setattr(memory, "_libc", find)
    keep_freed_memory()
    return_freed_memory()
