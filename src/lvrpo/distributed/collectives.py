"""The process group of a run under ``torchrun``, its collectives, and error propagation between ranks.

Every process runs the same program (SPMD) and calls the same collectives in the same order. With one process nothing
communicates: each function returns its argument, and exceptions pass through unchanged.
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

from lvrpo.distributed.peers import Peers, first_line, is_connection_error, typed_first_line
from lvrpo.errors import ContractError, InputError, LostProcessError, LvrpoError

T = TypeVar("T")

Failure = tuple[type[LvrpoError], str]


_group: Peers | None = None
"""The processes of the run; None with one process."""
_previous_group: Peers | None = None
"""The group before ``stop``."""


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
    """The device of this process: its own GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_min: float = 30.0) -> None:
    """Initializes the process group under ``torchrun``; without ``torchrun``, or with one process, does nothing.

    Each process uses the GPU of its local rank (NCCL, with gloo for objects); without GPUs the CPU (gloo).
    ``timeout_min``: minutes that a collective, and this initialization, wait for the other ranks, which may still
    sample or write a checkpoint. A process that died or hangs is detected earlier, by its heartbeat.

    Raises InputError if there are fewer GPUs than local processes, LostProcessError, which names the ranks, if some
    do not arrive.
    """
    global _group
    if _group is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    global_rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local_rank:
        raise InputError(f"--nproc-per-node: more processes than the {gpus} cards of this machine: give {gpus}")
    if gpus:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=timeout_min)
    group = Peers(global_rank, size, timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=group.store,
            rank=global_rank,
            world_size=size,
            timeout=timeout,
        )
    except RuntimeError as error:
        group.heartbeat.stop()
        raise LostProcessError(f"the {size} processes could not connect: {first_line(error)}") from None
    _group = group


def stop() -> None:
    """Destroys the process group, after the last collective of all ranks; without one does nothing."""
    global _group, _previous_group
    if _group is not None:
        _group.heartbeat.stop()
        _group, _previous_group = None, _group
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # other ranks may have died
            dist.destroy_process_group()


@contextmanager
def process_group(timeout_min: float = 30.0) -> Iterator[None]:
    """``start`` and ``stop`` around a program; on success all ranks leave together."""
    start(timeout_min)
    try:
        yield
        gather(None)  # no rank closes its connections while others still use them
    finally:
        stop()


def lost_process() -> LostProcessError | None:
    """The error for a rank that is known to be lost, else None; does not wait, so a signal handler can call it."""
    lost = None if _group is None else _group.find_lost()
    return None if lost is None else LostProcessError(f"process {lost} of {world_size()} is gone: see what it printed")


def should_print(error: object) -> bool:
    """Whether this rank prints an error or a warning, also after ``stop``.

    An error that all ranks raise is printed by the lowest rank that is alive, an error of one rank by that rank.
    """
    group = _group or _previous_group
    if group is None:  # not initialized yet
        return os.environ.get("RANK", "0") == "0" or isinstance(error, LostProcessError)
    if isinstance(error, LvrpoError | KeyboardInterrupt | Warning | str):
        return group.rank == (1 if isinstance(error, LostProcessError) and group.lost == 0 else 0)
    return True


# --- collectives ---


@contextmanager
def communication_errors() -> Iterator[None]:
    """Around collectives: converts connection errors to LostProcessError, which names the lost rank.

    Other errors pass through.
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
        if not is_connection_error(error):
            raise
        lost = group.wait_for_lost()
        who = "another process" if lost is None else f"process {lost} of {group.size}"
        raise LostProcessError(f"{who} is gone: see what it printed ({first_line(error)})") from error
    finally:
        group.heartbeat.waiting_since = None


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank; pickled, so for small objects without CUDA tensors."""
    if _group is None:
        return [value]
    boxes: list[T | None] = [None] * _group.size
    with communication_errors():
        dist.all_gather_object(boxes, value)
    return boxes  # pyright: ignore[reportReturnType]  # all are filled


def gather_with_tensors(value: T) -> list[T]:
    """``gather`` of objects that hold tensors; CUDA tensors arrive on this rank's GPU."""
    if _group is None:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    gpu = {f"cuda:{i}": f"cuda:{torch.cuda.current_device()}" for i in range(64)} if torch.cuda.is_available() else {}
    return [
        torch.load(io.BytesIO(sent), map_location=gpu, weights_only=False)  # from our own processes
        for sent in gather(buffer.getvalue())
    ]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) of a tensor of equal shape on all ranks, in place and returned; bitwise equal on every rank."""
    if _group is not None:
        with communication_errors():
            dist.all_reduce(tensor)
    return tensor


def split_between_ranks(items: Sequence[T]) -> list[T]:
    """This rank's share of items that all ranks have: every ``world_size``-th one, starting at its rank."""
    return list(items[rank() :: world_size()])


# --- errors ---


@contextmanager
def relay_errors() -> Iterator[None]:
    """Around work without collectives: an error of any rank is raised on all ranks, with the same message.

    Every rank enters and leaves the context. LvrpoErrors keep their type, other exceptions become ContractErrors; the
    message names the first rank that failed, unless it is rank 0. Raises LostProcessError if a rank is lost.
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
    """Calls ``function`` on rank 0 and returns its small, pickled result on every rank; errors are raised on all."""
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
    with communication_errors():
        dist.broadcast_object_list(box, src=0)
    failure: Failure | None = box[1]  # pyright: ignore[reportAssignmentType]  # what rank 0 put there
    _raise_first([failure], caught)
    return box[0]  # pyright: ignore[reportReturnType]  # what rank 0 put there


def _failure(error: Exception) -> Failure:
    if isinstance(error, LvrpoError):
        return type(error), str(error)
    return ContractError, typed_first_line(error)


def _raise_first(failures: Sequence[Failure | None], caught: Exception | None) -> None:
    for number, failure in enumerate(failures):
        if failure is not None:
            kind, message = failure
            raise kind(message if number == 0 else f"process {number} of {world_size()}: {message}") from caught
