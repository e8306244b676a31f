"""The process group of a run under ``torchrun``, the few collectives a run needs, and errors that cross ranks.

Every process runs the same program (SPMD) and calls the same collectives in the same order. With one process nothing
here communicates: each function returns what it was given, and exceptions pass through as they were raised.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from lvrpo.errors import ContractError, InputError, LostProcessError, LvrpoError

T = TypeVar("T")
R = TypeVar("R")

BEAT_S = 2.0
"""Seconds between two heartbeats of a process."""
SILENCE_S = 30.0
"""Seconds without a heartbeat after which a process counts as gone."""
GRACE_S = 10.0
"""Seconds that a collective has to fail by itself once a process is gone; then the waiting process ends."""

Failure = tuple[type[LvrpoError], str]


@dataclass
class _Group:
    """What this process knows of the others."""

    rank: int
    size: int
    addresses: list[str]
    """Of every rank: where its process id means something, and the id."""
    heartbeat: _Heartbeat
    lost: int | None = None
    """The rank that was found to be gone."""


_group: _Group | None = None


# --- start and end ---


def rank() -> int:
    """The rank of this process, 0 with one process."""
    return 0 if _group is None else _group.rank


def world_size() -> int:
    """The number of processes."""
    return 1 if _group is None else _group.size


def is_main() -> bool:
    """Whether this process is rank 0, which writes the files."""
    return rank() == 0


def device() -> torch.device:
    """What this process computes on: its own card, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_min: float = 10.0) -> None:
    """Joins the processes that ``torchrun`` started; without ``torchrun``, or with one process, does nothing.

    Each process takes the card of its local rank (NCCL, with gloo beside it for objects); without cards they compute
    on the CPU (gloo). ``timeout_min``: minutes a collective waits for the other ranks, and for all to arrive here.

    Raises InputError where there are fewer cards than local processes, LostProcessError, which names the ranks, where
    some do not arrive.
    """
    global _group
    if _group is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    own, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cards = torch.cuda.device_count()
    if 0 < cards <= local:
        raise InputError(f"--nproc-per-node: more processes than the {cards} cards of this machine: give {cards}")
    if cards:
        torch.cuda.set_device(local)
    timeout = timedelta(minutes=timeout_min)
    store = _all_arrived(own, size, timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cards else "gloo", store=store, rank=own, world_size=size, timeout=timeout
        )
    except RuntimeError as error:
        raise LostProcessError(f"the {size} processes could not connect: {_first_line(error)}") from None
    addresses = [store.get(f"process/{other}").decode() for other in range(size)]
    _group = _Group(own, size, addresses, _Heartbeat(_store(own, size, timeout, serve=False), own, size))


def stop() -> None:
    """Leaves the process group, after everybody's last collective; without one does nothing."""
    global _group
    if _group is not None:
        _group.heartbeat.end()
        _group = None
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # others may be gone
            dist.destroy_process_group()


@contextmanager
def process_group(timeout_min: float = 10.0) -> Iterator[None]:
    """``start`` and ``stop`` around a program. All ranks leave together where it succeeds."""
    start(timeout_min)
    try:
        yield
        gather(None)  # nobody takes the connections down while others still use them
    finally:
        stop()


def reports(error: LvrpoError) -> bool:
    """Whether this rank prints an error that all ranks raise: the first one that is still there."""
    lost = None if _group is None else _group.lost
    return rank() == (1 if isinstance(error, LostProcessError) and lost == 0 else 0)


def _store(own: int, size: int, timeout: timedelta, serve: bool) -> Store:
    """A connection to the key-value store of the run, which torchrun's agent or rank 0 serves."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = serve and own == 0 and not _agent_serves()
    try:
        store = dist.TCPStore(host, port, size, serves, timeout, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]  # documented
    except RuntimeError as error:
        raise LostProcessError(f"nobody answers at {host}:{port}, where rank 0 is: {_first_line(error)}") from None
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _all_arrived(own: int, size: int, timeout: timedelta) -> Store:
    store = _store(own, size, timeout, serve=True)
    store.set(f"process/{own}", f"{_pid_namespace()} {os.getpid()}")
    try:
        store.wait([f"process/{other}" for other in range(size)], timeout)
    except RuntimeError:
        with _lost_store():
            missing = [str(other) for other in range(size) if not store.check([f"process/{other}"])]
        raise LostProcessError(
            f"process {', '.join(missing)} of {size} did not arrive within {timeout.total_seconds() / 60:g} minutes: "
            "see what it printed, start all of them, or allow more minutes"
        ) from None
    return store


@contextmanager
def _lost_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise LostProcessError("the process that serves the others' addresses (rank 0 or torchrun) is gone") from None


# --- processes that are gone ---


class _Heartbeat:
    """A thread that tells the others that this process lives, and watches the next rank.

    A killed process breaks its connections, so that collectives fail at once, without saying whose they were. One that
    stands still, or whose machine lost its power, breaks none: the thread then ends this process if it waits for it.
    """

    def __init__(self, store: Store, own: int, size: int) -> None:
        self.store, self.own, self.size = store, own, size
        self.gone: int | None = None
        self.waiting_since: float | None = None
        """When this process entered the collective that it is in."""
        self._beats, self._heard, self._heard_at = 0, b"", time.monotonic()
        self._ended = threading.Event()
        store.set(f"beat/{own}", "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """This process leaves on purpose: its silence is not its death."""
        self._ended.set()
        self._thread.join()
        with suppress(RuntimeError):
            self.store.set(f"beat/{self.own}", "left")

    def _run(self) -> None:
        found = 0.0
        while not self._ended.wait(BEAT_S):
            if self.gone is None:
                self._exchange()
                found = time.monotonic()
            waiting = self.waiting_since
            if self.gone is not None and waiting is not None and time.monotonic() - max(found, waiting) > GRACE_S:
                if self.own == (1 if self.gone == 0 else 0):
                    os.write(2, f"error: process {self.gone} of {self.size} is gone, or stands still\n".encode())
                os._exit(1)

    def _exchange(self) -> None:
        """One heartbeat, and a look at the next rank's."""
        key = f"beat/{(self.own + 1) % self.size}"
        try:
            self._beats += 1
            self.store.set(f"beat/{self.own}", str(self._beats))
            heard = self.store.get(key) if self.store.check([key]) else b""
            if heard != self._heard or heard == b"left":
                self._heard, self._heard_at = heard, time.monotonic()
            elif time.monotonic() - self._heard_at > SILENCE_S:
                self.store.set("gone", key.removeprefix("beat/"))
            if self.store.check(["gone"]):
                self.gone = int(self.store.get("gone"))
        except RuntimeError:  # nobody serves the store any more
            self.gone = None if _agent_serves() else 0


@contextmanager
def communicating() -> Iterator[None]:
    """Around collectives: tells what goes wrong between ranks from what goes wrong in this one.

    Raises LostProcessError, which names the rank that is gone, for an error of a connection.
    """
    group = _group
    if group is None:
        yield
        return
    group.heartbeat.waiting_since = time.monotonic()
    try:
        yield
    except LvrpoError:
        raise
    except RuntimeError as error:
        if not _of_connections(error):
            raise
        group.lost = _who_is_gone(group)
        who = "another process" if group.lost is None else f"process {group.lost} of {group.size}"
        raise LostProcessError(f"{who} is gone: see what it printed ({_first_line(error)})") from error
    finally:
        group.heartbeat.waiting_since = None


def _of_connections(error: RuntimeError) -> bool:
    """gloo's errors are RuntimeErrors that say where in its source they come from."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(w in words for w in ("gloo", "nccl", "connection", "timed out"))


def _who_is_gone(group: _Group) -> int | None:
    """The first rank without a process; on other machines, without a heartbeat. None: nobody is known to be."""
    deadline = time.monotonic() + SILENCE_S + 2 * BEAT_S
    while time.monotonic() < deadline:
        for other, address in enumerate(group.addresses):
            where, _, pid = address.rpartition(" ")
            if where == _pid_namespace() and not _lives(int(pid)):
                return other
        if group.heartbeat.gone is not None:
            return group.heartbeat.gone
        time.sleep(0.2)
    return None


def _pid_namespace() -> str:
    """Processes for which it is equal see each other's ids."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()  # without /proc nobody knows
    return state not in "ZX"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- collectives ---


def gather(value: T) -> list[T]:
    """The values of all ranks, in order, on every rank; pickled, so for small objects without tensors of a card."""
    if _group is None:
        return [value]
    boxes: list[T | None] = [None] * _group.size
    with communicating():
        dist.all_gather_object(boxes, value)
    return boxes  # pyright: ignore[reportReturnType]  # all are filled


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor of one shape over the ranks, in place and returned; the same bits on every rank."""
    if _group is not None:
        with communicating():
            dist.all_reduce(tensor)
    return tensor


def deal(items: Sequence[T]) -> list[T]:
    """This rank's share of items that all ranks have: every ``world_size``-th one; none where there are too few."""
    return list(items[rank() :: world_size()])


def join(own: Sequence[T]) -> list[T]:
    """The inverse of ``deal``: the results of all ranks' shares in the order of the items, on every rank."""
    parts = gather(list(own))
    joined: list[T] = [value for part in parts for value in part]
    for first, part in enumerate(parts):
        joined[first :: len(parts)] = part
    return joined


def map_items(function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """``function(items)``, where every rank computes the results of its own share; it is not called with no items.

    ``function`` gives one small result per item and communicates with nobody; its errors are raised on all ranks.
    """
    own = deal(items)
    found: Sequence[R] = ()
    with relay():
        if own:
            found = function(own)
            if len(found) != len(own):
                raise ContractError(f"{len(found)} results of {len(own)} items: give one of each")
    return join(found)


# --- errors ---


@contextmanager
def relay() -> Iterator[None]:
    """Around work that a rank does without the others: an error of any rank is raised on all, with the same line.

    Every rank enters and leaves. LvrpoErrors keep their type, other exceptions become ContractErrors; the first rank
    that failed is named, unless it is rank 0. Raises LostProcessError where a rank is gone.
    """
    if _group is None:
        yield
        return
    caught: Exception | None = None
    try:
        yield
    except LostProcessError:
        raise
    except Exception as error:
        caught = error
    _raise_first(gather(None if caught is None else _failure(caught)), caught)


def on_main(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, on every rank; for files, and small results. Its error is raised on all."""
    if _group is None:
        return function()
    box: list[object] = [None, None]
    caught: Exception | None = None
    if _group.rank == 0:
        try:
            box[0] = function()
        except LostProcessError:
            raise
        except Exception as error:
            caught, box[1] = error, _failure(error)
    with communicating():
        dist.broadcast_object_list(box, src=0)
    failure: Failure | None = box[1]  # pyright: ignore[reportAssignmentType]  # what rank 0 put there
    _raise_first([failure], caught)
    return box[0]  # pyright: ignore[reportReturnType]  # what rank 0 put there


def _failure(error: Exception) -> Failure:
    if isinstance(error, LvrpoError):
        return type(error), str(error)
    return ContractError, f"{type(error).__name__}: {_first_line(error)}"


def _raise_first(failures: Sequence[Failure | None], caught: Exception | None) -> None:
    for number, failure in enumerate(failures):
        if failure is not None:
            kind, words = failure
            raise kind(words if number == 0 else f"process {number} of {world_size()}: {words}") from caught
