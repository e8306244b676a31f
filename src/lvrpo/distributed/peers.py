"""Which of a run's processes are there: their arrival, their heartbeats, and the name of one that is gone.

A killed process breaks its connections, so that collectives of the others fail at once, without saying whose they
were: process ids tell that on one machine, heartbeats between machines. A process that stands still, or whose machine
lost its power, breaks no connection: then the heartbeat's thread ends the processes that wait for it.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from lvrpo.errors import LostProcessError

BEAT_S = 2.0
"""Seconds between two heartbeats of a process."""
SILENCE_S = 30.0
"""Seconds without a heartbeat after which a process counts as gone."""
GRACE_S = 10.0
"""Seconds that a collective has to fail by itself once a process is gone; then the waiting process ends."""


class Peers:
    """The processes of a run, as one of them sees the others."""

    def __init__(self, rank: int, size: int, timeout: timedelta) -> None:
        """Waits for all to arrive; raises LostProcessError, which names those that do not."""
        self.rank, self.size = rank, size
        self.lost: int | None = None
        """The rank that this process found to be gone."""
        self.store = _connect(rank, size, timeout, serve=True)
        self.store.set(f"process/{rank}", f"{_pid_namespace()} {os.getpid()}")
        keys = [f"process/{other}" for other in range(size)]
        try:
            self.store.wait(keys, timeout)
            self.addresses = [self.store.get(key).decode() for key in keys]
        except RuntimeError:
            raise self._not_there(keys, timeout) from None
        self.heartbeat = _Heartbeat(_connect(rank, size, timeout, serve=False), rank, size)

    def _not_there(self, keys: list[str], timeout: timedelta) -> LostProcessError:
        try:
            missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        except RuntimeError:
            missing = ["0"]
        return LostProcessError(
            f"process {', '.join(missing)} of {self.size} did not arrive within {timeout.total_seconds() / 60:g} "
            "minutes: see what it printed, start all of them, or allow more minutes"
        )

    def look(self) -> int | None:
        """The first rank that was found to be gone by anybody so far; None: nobody is known to be."""
        if self.lost is not None:
            return self.lost
        dead = [rank for rank, address in enumerate(self.addresses) if not _runs(address)]
        self.lost = dead[0] if dead else self.heartbeat.gone
        # those who saw it end as well, after they have said so: what is there is read after the processes were
        with suppress(RuntimeError):
            if self.lost is not None:
                self.store.compare_set("gone", "", str(self.lost))
            if self.store.check(["gone"]):
                self.lost = int(self.store.get("gone"))
        return self.lost

    def search(self) -> int | None:
        """``look`` until a silent rank would have been noticed."""
        deadline = time.monotonic() + SILENCE_S + 2 * BEAT_S
        while self.look() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.lost


class _Heartbeat:
    """Two threads: one tells the others that this process lives and watches the next rank, one watches this process.

    The second is needed because a store whose machine stands still lets the first wait for ever.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.gone: int | None = None
        self.waiting_since: float | None = None
        """When this process entered the collective that it is in (``time.monotonic``)."""
        self._ended = threading.Event()
        self._agent: int | None = os.getppid()
        store.set(f"beat/{rank}", "0")
        self._exchanged_at: float | None = time.monotonic()
        """None: nobody serves the store any more."""
        self._speaking = threading.Thread(target=self._exchange, name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        for thread in (self._speaking, self._watching):
            thread.start()

    def end(self) -> None:
        """This process leaves on purpose: its silence is not its death.

        A thread that comes back from the store while the interpreter ends would abort the process ("terminate called
        without an active exception"), so it is waited for, unless somebody is gone who may have served the store.
        """
        self._ended.set()
        self._watching.join()
        self._speaking.join(SILENCE_S if self.gone is None else BEAT_S)

    def _exchange(self) -> None:
        """Heartbeats, and looks at the next rank's."""
        key, beats, heard, heard_at = f"beat/{(self.rank + 1) % self.size}", 0, b"", time.monotonic()
        try:
            while not self._ended.wait(BEAT_S):
                beats += 1
                self.store.set(f"beat/{self.rank}", str(beats))
                found = self.store.get(key) if self.store.check([key]) else b""
                if found != heard or found == b"left":
                    heard, heard_at = found, time.monotonic()
                elif time.monotonic() - heard_at > SILENCE_S:
                    self.store.compare_set("gone", "", key.removeprefix("beat/"))
                if self.store.check(["gone"]):
                    self.gone = int(self.store.get("gone"))
                self._exchanged_at = time.monotonic()
            self.store.set(f"beat/{self.rank}", "left")
        except RuntimeError:
            self._exchanged_at = None
            if self.gone is None and not _agent_serves():
                self.gone = 0

    def _watch(self) -> None:
        """Ends this process where it waits for one that is gone and no connection broke.

        Where torchrun's agent is gone, which started this process and would end it, it gets the SIGTERM that the agent
        owes it: a run then saves and ends.
        """
        known_at: float | None = None
        while not self._ended.wait(BEAT_S):
            if self._agent is not None and os.getppid() != self._agent:
                self._agent = None
                os.kill(os.getpid(), signal.SIGTERM)
            now, waiting, exchanged = time.monotonic(), self.waiting_since, self._exchanged_at
            if self.gone is None and exchanged is not None and now - exchanged > SILENCE_S:
                self.gone = 0  # the machine of rank 0 serves the store
            if self.gone is None:
                continue
            known_at = now if known_at is None else known_at
            if waiting is not None and now - max(known_at, waiting) > GRACE_S:
                if self.rank == (1 if self.gone == 0 else 0):
                    os.write(2, f"error: process {self.gone} of {self.size} is gone, or stands still\n".encode())
                os._exit(1)


def _connect(rank: int, size: int, timeout: timedelta, serve: bool) -> Store:
    """A connection to the key-value store of the run, which torchrun's agent or rank 0 serves."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = serve and rank == 0 and not _agent_serves()
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # documented
            host, port, size, serves, timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        raise LostProcessError(f"nobody answers at {host}:{port}, where rank 0 is: {first_line(error)}") from None
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_of_connections(error: RuntimeError) -> bool:
    """Whether collectives raise such an error where a rank is gone; gloo's say where in its source they come from."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(w in words for w in ("gloo", "nccl", "connection", "timed out"))


def first_line(error: BaseException) -> str:
    """What an error says, without advice on how to report it to PyTorch."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". This is typically")[0]


def _pid_namespace() -> str:
    """Processes for which it is equal see each other's ids."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _runs(address: str) -> bool:
    """False for a process of this machine that ended; of one that is elsewhere nobody here knows."""
    where, _, pid = address.rpartition(" ")
    if where != _pid_namespace():
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()
    return state not in "ZX"  # ended, and not waited for
