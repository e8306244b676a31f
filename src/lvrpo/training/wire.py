"""Messages between the processes of a run."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lvrpo.errors import ContractError, InputError, LostProcessError

T = TypeVar("T")
Sent = Any
"""Any: what goes from one process to another."""
Failure = tuple[type[InputError | ContractError], str]

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first one may evaluate alone for hours."""


class Wire:
    """Messages between the processes of a run; here there is one, which hears what it says."""

    rank, size = 0, 1

    def close(self) -> None:
        """After everybody's last message."""

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """From one process to all, in place."""

    def reduce(self, tensor: torch.Tensor, owner: int = 0) -> None:
        """The sum of all in one process, in place; those of the others are lost."""

    def broadcast_object(self, message: Sent = None) -> Sent:
        """From the first process to all."""
        return message

    def scatter_objects(self, messages: Sequence[Sent] = ()) -> Sent:
        """From the first process one to each."""
        return messages[0]

    def all_gather_objects(self, message: Sent) -> list[Sent]:
        """From each to all, in order."""
        return [message]

    def gather_objects(self, message: Sent) -> list[Sent]:
        """From each to the first process, in order; the others get nothing."""
        return [message]


SOLO = Wire()


@contextmanager
def _spoken_to() -> Iterator[None]:
    """Tells what goes wrong between processes from what goes wrong in this one."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"another process is gone, see what it said: {error}") from None


class Processes(Wire):
    """Those that ``torchrun`` started. A tensor arrives on the CPU or the receiver's device, as it was at home."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def close(self) -> None:
        dist.destroy_process_group()

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        with _spoken_to():
            dist.broadcast(tensor, src=source)

    def reduce(self, tensor: torch.Tensor, owner: int = 0) -> None:
        with _spoken_to():
            dist.reduce(tensor, dst=owner)

    def broadcast_object(self, message: Sent = None) -> Sent:
        box = [packed(message) if self.rank == 0 else None]
        with _spoken_to():
            dist.broadcast_object_list(box, src=0)
        return unpacked(box[0])

    def scatter_objects(self, messages: Sequence[Sent] = ()) -> Sent:
        box: list[bytes | None] = [None]
        with _spoken_to():
            dist.scatter_object_list(box, [packed(message) for message in messages] or None, src=0)
        return unpacked(box[0])

    def all_gather_objects(self, message: Sent) -> list[Sent]:
        boxes: list[bytes | None] = [None] * self.size
        with _spoken_to():
            dist.all_gather_object(boxes, packed(message))
        return [unpacked(box) for box in boxes]

    def gather_objects(self, message: Sent) -> list[Sent]:
        boxes: list[bytes | None] = [None] * self.size if self.rank == 0 else []
        with _spoken_to():
            dist.gather_object(packed(message), boxes or None, dst=0)
        return [unpacked(box) for box in boxes]


def packed(message: Sent) -> bytes:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def unpacked(message: bytes | None) -> Sent:
    assert message is not None
    here = {f"cuda:{i}": f"cuda:{torch.cuda.current_device()}" for i in range(64)} if torch.cuda.is_available() else {}
    return torch.load(io.BytesIO(message), map_location=here, weights_only=False)  # from our own processes


def join() -> Wire:
    """The wire to the other processes, where ``torchrun`` started several.

    Raises InputError where they cannot have a card each.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return SOLO
    cards, rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if 0 < cards <= rank:
        raise InputError(f"--nproc-per-node: more processes than the {cards} cards of this machine: give {cards}")
    if cards:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=PATIENCE)
    return Processes()


def attempt(run: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """The result, or what went wrong: the others wait for an answer. Raises LostProcessError: they do not."""
    try:
        return run(), None
    except LostProcessError:
        raise
    except (InputError, ContractError) as error:
        return None, (type(error), str(error))
    except Exception as error:
        return None, (ContractError, f"{type(error).__name__}: {error}")


def require(failures: Sequence[Failure | None]) -> None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, words = failure
            raise kind(words if rank == 0 else f"process {rank} of {len(failures)}: {words}")
