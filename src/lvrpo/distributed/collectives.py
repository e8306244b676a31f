"""The process group of a run under ``torchrun``, the few collectives a run needs, and errors that cross ranks.

Every process runs the same program (SPMD) and calls the same collectives in the same order. With one process nothing
here communicates: each function returns what it was given, and exceptions pass through as they were raised.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from lvrpo.distributed.peers import Peers, first_line, is_of_connections
from lvrpo.errors import ContractError, InputError, LostProcessError, LvrpoError

T = TypeVar("T")

Failure = tuple[type[LvrpoError], str]


_group: Peers | None = None
"""The processes of the run, where there are several."""
_left: Peers | None = None
"""Those of the group that this process has left."""


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


def start(timeout_min: float = 30.0) -> None:
    """Joins the processes that ``torchrun`` started; without ``torchrun``, or with one process, does nothing.

    Each process takes the card of its local rank (NCCL, with gloo beside it for objects); without cards they compute
    on the CPU (gloo). ``timeout_min``: minutes that a collective waits for the other ranks, which may still sample or
    write a checkpoint, and for all to arrive here. One that is gone or stands still is noticed by its heartbeat before.

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
    group = Peers(own, size, timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cards else "gloo", store=group.store, rank=own, world_size=size, timeout=timeout
        )
    except RuntimeError as error:
        group.heartbeat.end()
        raise LostProcessError(f"the {size} processes could not connect: {first_line(error)}") from None
    _group = group


def stop() -> None:
    """Leaves the process group, after everybody's last collective; without one does nothing."""
    global _group, _left
    if _group is not None:
        _group.heartbeat.end()
        _group, _left = None, _group
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # others may be gone
            dist.destroy_process_group()


@contextmanager
def process_group(timeout_min: float = 30.0) -> Iterator[None]:
    """``start`` and ``stop`` around a program. All ranks leave together where it succeeds."""
    start(timeout_min)
    try:
        yield
        gather(None)  # nobody takes the connections down while others still use them
    finally:
        stop()


def lost_process() -> LostProcessError | None:
    """The error that names a rank that is known to be gone by now; at once, for a handler of signals."""
    lost = None if _group is None else _group.look()
    return None if lost is None else LostProcessError(f"process {lost} of {world_size()} is gone: see what it printed")


def reports(error: object) -> bool:
    """Whether this rank prints an error or a warning, also after ``stop``.

    What all ranks raise the first one prints that is still there; what is a rank's own it prints itself.
    """
    group = _group or _left
    if group is None:  # they have not met yet
        return os.environ.get("RANK", "0") == "0" or isinstance(error, LostProcessError)
    if isinstance(error, LvrpoError | KeyboardInterrupt | Warning | str):
        return group.rank == (1 if isinstance(error, LostProcessError) and group.lost == 0 else 0)
    return True


# --- collectives ---


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
        if not is_of_connections(error):
            raise
        lost = group.search()
        who = "another process" if lost is None else f"process {lost} of {group.size}"
        raise LostProcessError(f"{who} is gone: see what it printed ({first_line(error)})") from error
    finally:
        group.heartbeat.waiting_since = None


def gather(value: T) -> list[T]:
    """The values of all ranks, in order, on every rank; pickled, so for small objects without tensors of a card."""
    if _group is None:
        return [value]
    boxes: list[T | None] = [None] * _group.size
    with communicating():
        dist.all_gather_object(boxes, value)
    return boxes  # pyright: ignore[reportReturnType]  # all are filled


def gather_with_tensors(value: T) -> list[T]:
    """``gather`` of objects that hold tensors; those of a card arrive on this rank's."""
    if _group is None:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    here = {f"cuda:{i}": f"cuda:{torch.cuda.current_device()}" for i in range(64)} if torch.cuda.is_available() else {}
    return [
        torch.load(io.BytesIO(sent), map_location=here, weights_only=False)  # from our own processes
        for sent in gather(buffer.getvalue())
    ]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor of one shape over the ranks, in place and returned; the same bits on every rank."""
    if _group is not None:
        with communicating():
            dist.all_reduce(tensor)
    return tensor


def split_between_ranks(items: Sequence[T]) -> list[T]:
    """This rank's share of items that all ranks have: every ``world_size``-th one; none where there are too few."""
    return list(items[rank() :: world_size()])


# --- errors ---


@contextmanager
def relay_errors() -> Iterator[None]:
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
    return ContractError, f"{type(error).__name__}: {first_line(error)}"


def _raise_first(failures: Sequence[Failure | None], caught: Exception | None) -> None:
    for number, failure in enumerate(failures):
        if failure is not None:
            kind, words = failure
            raise kind(words if number == 0 else f"process {number} of {world_size()}: {words}") from caught
