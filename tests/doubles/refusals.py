"""What must be refused: in one line; by a command also with exit code 2, in time, and with nothing written."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from lvrpo.cli import main
from lvrpo.errors import InputError

MOST_SECONDS = 10
"""Of one case."""


def complaint(
    arguments: Sequence[str], names: Sequence[str], own: Path | None = None, tolerant: bool = False
) -> str | None:
    """What is wrong with the way in which a command refuses its input; None where nothing is.

    ``names``: the line holds one of them. ``own``: a folder that the command goes on writing, which may have changed.
    ``tolerant``: whether it may as well be done.
    """
    before = listing(Path(), own)
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()), interrupted_after(MOST_SECONDS):
        started = time.monotonic()
        code = main(arguments)
        seconds = time.monotonic() - started
    lines = said.getvalue().splitlines()
    written = listing(Path(), own) ^ before
    if written:
        return f"wrote: {written}"
    if tolerant and code == 0 and not lines:
        return None
    if code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or "(unexpected" in lines[0]:
        return f"exit code {code} after {seconds:.1f} s: {lines}"
    if not any(name in lines[0] for name in names):
        return f"does not name {' or '.join(names)}: {lines}"
    return None


@contextmanager
def interrupted_after(seconds: int) -> Iterator[None]:
    """As Ctrl-C would after so many seconds: what waits for a pipe ends, with another exit code than 2."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The body raises an InputError of one line that holds all the words."""
    with pytest.raises(InputError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line
    for each in words:
        assert each in line


def listing(folder: Path, but: Path | None = None) -> set[tuple[str, int, int]]:
    """Names, sizes and times of everything below, links not followed; locks are no content."""
    found: set[tuple[str, int, int]] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.add((entry.path, 0, 0))
                if but is None or Path(entry.path) != but:
                    found |= listing(Path(entry.path), but)
            elif entry.name != ".lock":
                s = entry.stat(follow_symlinks=False)
                found.add((entry.path, s.st_size, s.st_mtime_ns))
    return found


def require_none(complaints: Mapping[str, str | None]) -> None:
    """Fails with some of the complaints, if there are any."""
    left = {case: said for case, said in complaints.items() if said}
    some = "\n".join(f"{case}\n    {said}" for case, said in list(left.items())[:40])
    assert not left, f"{len(left)} of {len(complaints)} cases:\n{some}"
