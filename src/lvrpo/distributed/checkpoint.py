"""Sharded tensors as safetensors files that any number of ranks reads; no pickle.

PyTorch's distributed checkpoint (DCP) with its Hugging Face storage: every rank writes its own rows into files of its
own, whose headers say which rows they are, so another number of ranks reads what it needs. Folders that appear whole,
and the seals of their files, are the caller's: DCP notices neither a file that is missing nor one that was changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lvrpo.distributed.collectives import communicating, relay_errors, world_size
from lvrpo.distributed.peers import first_line
from lvrpo.distributed.sharding import local
from lvrpo.errors import ContractError, InputError

FILE_BYTES = 2**30
"""About the size of a file: DCP builds each in memory before it writes it."""


def save_sharded(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors into a folder that exists: the rows of sharded ones by their ranks, whole ones once.

    Called by all ranks with the same names, shapes and folder, which all see. Raises InputError on all where one
    cannot write.
    """
    with _checkpoint_errors(folder, "written"):
        state_dict_saver.save(
            _detached(tensors), storage_writer=_writer(folder, tensors), no_dist=not dist.is_initialized()
        )


class Saving:
    """A checkpoint that is being written while training goes on."""

    def __init__(self, folder: Path, future: Future[Any]) -> None:
        self.folder, self.future = folder, future

    @property
    def done(self) -> bool:
        """Whether this rank has written its part, or failed to."""
        return self.future.done()

    def wait(self) -> None:
        """Until all ranks have written; called by all. Raises as ``save_sharded`` does."""
        with relay_errors(), _checkpoint_errors(self.folder, "written"):
            self.future.result()


_background: dist.ProcessGroup | int | None = None
"""What savings in the background communicate over, beside the collectives of training."""


def save_sharded_async(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Saving:
    """``save_sharded`` from a thread of every rank, after a copy of the tensors in host memory; one at a time.

    Called by all ranks, as ``Saving.wait`` is before the folder is sealed. With one process it saves at once.
    """
    global _background
    if world_size() == 1:
        save_sharded(folder, tensors)
        done: Future[Any] = Future()
        done.set_result(None)
        return Saving(folder, done)
    with _checkpoint_errors(folder, "written"):
        if _background is None:
            _background = dist.new_group(backend="gloo")
        future = state_dict_saver.async_save(
            _detached(tensors),
            storage_writer=_writer(folder, tensors),
            process_group=_background,  # pyright: ignore[reportArgumentType]  # this rank is in it
        )
    assert isinstance(future, Future)
    return Saving(folder, future)


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What a folder holds, by name: ``.size`` (shape) and ``.properties.dtype``, from the headers of its files.

    Raises InputError for a folder without tensors, or with rows missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: holds no tensors: use another checkpoint")
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # safetensors, json and the file system each raise their own
        raise InputError(f"{folder}: damaged ({_words(error)}): use another checkpoint") from None
    tensors = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    if not tensors:
        raise InputError(f"{folder}: holds no tensors: use another checkpoint")
    for name, entry in tensors.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise InputError(f"{folder}: rows of {name} are missing: use another checkpoint")
    return tensors


def load_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], finite: bool = False) -> None:
    """Reads tensors in place, however many ranks wrote them; called by all ranks with the same names.

    Others that the folder holds are left there. Raises InputError on all ranks where one finds a tensor missing, of
    another shape or dtype, a file damaged, or with ``finite`` a number that is not.
    """
    with relay_errors():
        found = stored_tensors(folder)
        for name, tensor in tensors.items():
            if name not in found:
                raise InputError(f"{folder}: the checkpoint lacks {name}: resume with the configuration of the run")
            size, dtype = found[name].size, found[name].properties.dtype
            if (size, dtype) != (tensor.shape, tensor.dtype):
                raise InputError(
                    f"{folder}: {name} is {tuple(size)} {dtype}, not {tuple(tensor.shape)} {tensor.dtype}: resume with "
                    "the configuration of the run"
                )
    with torch.no_grad(), _checkpoint_errors(folder, "read"):
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(_detached(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    with relay_errors():
        for name, tensor in tensors.items() if finite else ():
            if not bool(local(tensor.detach()).isfinite().all()):
                raise InputError(f"{folder}: {name} holds a number that is not finite: use another checkpoint")


def _detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without their gradients, which DCP's copies would take along."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _writer(folder: Path, tensors: Mapping[str, torch.Tensor]) -> HuggingFaceStorageWriter:
    numbers, taken = dict[str, int](), 0
    for name, tensor in tensors.items():
        taken += tensor.numel() * tensor.element_size() // world_size()
        numbers[name] = 1 + taken // FILE_BYTES
    # its numbers have to follow each other
    order = {number: i for i, number in enumerate(sorted(set(numbers.values())), start=1)}
    mapping = {name: order[number] for name, number in numbers.items()}
    return HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=mapping, save_distributed=True)


@contextmanager
def _checkpoint_errors(folder: Path, doing: str) -> Iterator[None]:
    """DCP tells all ranks what went wrong on some, with tracebacks; here it is one line."""
    try:
        with communicating(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, as was asked for
            yield
    except CheckpointException as error:
        number, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        who = f"process {number} of {world_size()}: " if number else ""
        if isinstance(cause, OSError):
            raise InputError(
                f"{who}{folder}: cannot be {doing}: {cause.strerror}: mend that, or choose another folder"
            ) from None
        raise ContractError(f"{who}{folder}: cannot be {doing}: {_words(cause)}") from None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
