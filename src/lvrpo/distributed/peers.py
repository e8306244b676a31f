"""Failure detection between the processes of a run: rendezvous, heartbeats, and the rank of a lost process.

When a process is killed, its connections break and the collectives of the others fail at once, but do not name the
rank: process ids (on one machine) or heartbeats (between machines) identify it. A hanging process, or a machine without
power, breaks no connection: then the watchdog thread ends the processes that wait for it.
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
"""Seconds without a heartbeat after which a process counts as lost."""
GRACE_S = 10.0
"""Seconds that a collective has to fail by itself after a process is lost; then the watchdog exits this process."""


class Peers:
    """The processes of a run, as seen by one of them."""

    def __init__(self, rank: int, size: int, timeout: timedelta) -> None:
        """Waits for all ranks; raises LostProcessError, which names those that do not arrive."""
        self.rank, self.size = rank, size
        self.lost: int | None = None
        """The first rank known to be lost."""
        self.store = _connect(rank, size, timeout, serve=True)
        self.store.set(f"process/{rank}", f"{_pid_namespace()} {os.getpid()}")
        keys = [f"process/{other}" for other in range(size)]
        try:
            self.store.wait(keys, timeout)
            self.addresses = [self.store.get(key).decode() for key in keys]
        except RuntimeError:
            raise self._arrival_error(keys, timeout) from None
        self.heartbeat = _Heartbeat(_connect(rank, size, timeout, serve=False), rank, size)

    def _arrival_error(self, keys: list[str], timeout: timedelta) -> LostProcessError:
        try:
            missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        except RuntimeError:
            missing = ["0"]
        return LostProcessError(
            f"process {', '.join(missing)} of {self.size} did not arrive within {timeout.total_seconds() / 60:g} "
            "minutes: see what it printed, start all of them, or allow more minutes"
        )

    def find_lost(self) -> int | None:
        """The first rank that any process found to be lost; None: no rank is known to be."""
        if self.lost is not None:
            return self.lost
        dead = [rank for rank, address in enumerate(self.addresses) if not _is_running(address)]
        self.lost = dead[0] if dead else self.heartbeat.lost_rank
        # processes exit after they recorded a lost rank: so the store is read after the process list
        with suppress(RuntimeError):
            if self.lost is not None:
                self.store.compare_set("gone", "", str(self.lost))
            if self.store.check(["gone"]):
                self.lost = int(self.store.get("gone"))
        return self.lost

    def wait_for_lost(self) -> int | None:
        """Polls ``find_lost`` for as long as the heartbeat needs to detect a silent rank."""
        deadline = time.monotonic() + SILENCE_S + 2 * BEAT_S
        while self.find_lost() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.lost


class _Heartbeat:
    """Two threads: one sends this process's heartbeat and checks the next rank's, one is this process's watchdog.

    The watchdog is separate because the first thread may block on the store if the store's machine hangs.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.lost_rank: int | None = None
        self.waiting_since: float | None = None
        """When this process entered its current collective (``time.monotonic``); None: it is in none."""
        self._stopped = threading.Event()
        self._agent: int | None = os.getppid()
        store.set(f"beat/{rank}", "0")
        self._exchanged_at: float | None = time.monotonic()
        """Last successful access to the store; None: the store is unreachable."""
        self._sender = threading.Thread(target=self._exchange, name="heartbeat", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        for thread in (self._sender, self._watchdog):
            thread.start()

    def stop(self) -> None:
        """Stops both threads and marks this process as having left.

        A thread that returns from the store during interpreter shutdown would abort the process ("terminate called
        without an active exception"), so it is joined, but only briefly if a lost rank may have served the store.
        """
        self._stopped.set()
        self._watchdog.join()
        self._sender.join(SILENCE_S if self.lost_rank is None else BEAT_S)

    def _exchange(self) -> None:
        """Sends heartbeats and checks those of the next rank."""
        key, beats, last, last_at = f"beat/{(self.rank + 1) % self.size}", 0, b"", time.monotonic()
        try:
            while not self._stopped.wait(BEAT_S):
                beats += 1
                self.store.set(f"beat/{self.rank}", str(beats))
                found = self.store.get(key) if self.store.check([key]) else b""
                if found != last or found == b"left":
                    last, last_at = found, time.monotonic()
                elif time.monotonic() - last_at > SILENCE_S:
                    self.store.compare_set("gone", "", key.removeprefix("beat/"))
                if self.store.check(["gone"]):
                    self.lost_rank = int(self.store.get("gone"))
                self._exchanged_at = time.monotonic()
            self.store.set(f"beat/{self.rank}", "left")
        except RuntimeError:
            self._exchanged_at = None
            if self.lost_rank is None and not _agent_serves():
                self.lost_rank = 0

    def _watch(self) -> None:
        """Exits this process if it waits for a lost rank whose connections did not break.

        If torchrun's agent, the parent process, has died, it sends this process the SIGTERM that the agent would have
        sent: the run then saves and ends.
        """
        known_at: float | None = None
        while not self._stopped.wait(BEAT_S):
            if self._agent is not None and os.getppid() != self._agent:
                self._agent = None
                os.kill(os.getpid(), signal.SIGTERM)
            now, waiting, exchanged = time.monotonic(), self.waiting_since, self._exchanged_at
            if self.lost_rank is None and exchanged is not None and now - exchanged > SILENCE_S:
                self.lost_rank = 0  # its machine serves the store
            if self.lost_rank is None:
                continue
            known_at = now if known_at is None else known_at
            if waiting is not None and now - max(known_at, waiting) > GRACE_S:
                if self.rank == (1 if self.lost_rank == 0 else 0):
                    os.write(2, f"error: process {self.lost_rank} of {self.size} is gone, or stands still\n".encode())
                os._exit(1)


def _connect(rank: int, size: int, timeout: timedelta, serve: bool) -> Store:
    """A connection to the key-value store of the run, served by torchrun's agent or rank 0."""
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


def is_connection_error(error: RuntimeError) -> bool:
    """Whether collectives raise such an error when a rank is lost; gloo's messages contain its source path."""
    message = str(error).lower()
    return isinstance(error, dist.DistError) or any(w in message for w in ("gloo", "nccl", "connection", "timed out"))


def first_line(error: BaseException) -> str:
    """The first line of an error message, without PyTorch's advice on bug reports."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". This is typically")[0]


def typed_first_line(error: BaseException) -> str:
    """``first_line`` after the type of the error."""
    return f"{type(error).__name__}: {first_line(error)}"


def _pid_namespace() -> str:
    """Host and PID namespace; processes with the same value see each other's process ids."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _is_running(address: str) -> bool:
    """False for a process of this machine that ended; True for one of another machine, whose state is unknown."""
    where, _, pid = address.rpartition(" ")
    if where != _pid_namespace():
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()
    return state not in "ZX"  # zombie, dead
