"""Sharded tensors in safetensors files that any number of ranks can read; no pickle.

PyTorch's distributed checkpoint (DCP) with its Hugging Face storage: every rank writes its rows to its own files, whose
headers hold the row ranges, so another number of ranks can read them. Atomic folders and file hashes are left to the
caller: DCP detects neither a missing nor a modified file.
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

from lvrpo.distributed.collectives import communication_errors, relay_errors, world_size
from lvrpo.distributed.peers import typed_first_line
from lvrpo.distributed.sharding import local
from lvrpo.errors import ContractError, InputError

FILE_BYTES = 2**30
"""Approximate size of a file: DCP builds each in memory before it writes it."""


def save_sharded(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors into an existing folder: each rank its rows of sharded tensors, unsharded tensors once.

    All ranks call it with the same names, shapes and (shared) folder. Raises InputError on all ranks if one cannot
    write.
    """
    with _checkpoint_errors(folder, "written"):
        state_dict_saver.save(
            _detached(tensors), storage_writer=_writer(folder, tensors), no_dist=not dist.is_initialized()
        )


class AsyncSave:
    """A checkpoint that is being written in the background."""

    def __init__(self, folder: Path, future: Future[Any]) -> None:
        self.folder, self.future = folder, future

    @property
    def done(self) -> bool:
        """Whether this rank has written its part, or failed."""
        return self.future.done()

    def wait(self) -> None:
        """Waits until all ranks have written; called by all ranks. Raises as ``save_sharded``."""
        with relay_errors(), _checkpoint_errors(self.folder, "written"):
            self.future.result()


_background: dist.ProcessGroup | int | None = None
"""Process group of background saves, separate from the collectives of training."""


def save_sharded_async(folder: Path, tensors: Mapping[str, torch.Tensor]) -> AsyncSave:
    """``save_sharded`` in a thread of every rank, from a copy of the tensors in host memory; one save at a time.

    All ranks call it, and ``AsyncSave.wait`` before the folder is sealed. With one process it saves synchronously.
    """
    global _background
    if world_size() == 1:
        save_sharded(folder, tensors)
        done: Future[Any] = Future()
        done.set_result(None)
        return AsyncSave(folder, done)
    with _checkpoint_errors(folder, "written"):
        if _background is None:
            _background = dist.new_group(backend="gloo")
        future = state_dict_saver.async_save(
            _detached(tensors),
            storage_writer=_writer(folder, tensors),
            process_group=_background,  # pyright: ignore[reportArgumentType]  # this rank is in it
        )
    assert isinstance(future, Future)
    return AsyncSave(folder, future)


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a folder by name, with ``.size`` (shape) and ``.properties.dtype``, from the file headers.

    Raises InputError for a folder without tensors, or with missing rows.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: holds no tensors: use another checkpoint")
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # safetensors, json and the file system raise different types
        raise InputError(f"{folder}: damaged ({typed_first_line(error)}): use another checkpoint") from None
    tensors = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    if not tensors:
        raise InputError(f"{folder}: holds no tensors: use another checkpoint")
    for name, entry in tensors.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise InputError(f"{folder}: rows of {name} are missing: use another checkpoint")
    return tensors


def load_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], finite: bool = False) -> None:
    """Reads tensors in place, for any number of writing ranks; called by all ranks with the same names.

    Other tensors of the folder are ignored. Raises InputError on all ranks for a missing tensor, another shape or
    dtype, a damaged file, or, with ``finite``, a value that is not finite.
    """
    with relay_errors():
        found = stored_tensors(folder)
        for name, tensor in tensors.items():
            if name not in found:
                raise InputError(
                    f"{folder}: the checkpoint lacks {name}: resume with the configuration of the run and the version "
                    "of lvrpo in its manifest.json"
                )
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
    """Without gradients, which DCP's copies would include."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _writer(folder: Path, tensors: Mapping[str, torch.Tensor]) -> HuggingFaceStorageWriter:
    numbers, taken = dict[str, int](), 0
    for name, tensor in tensors.items():
        taken += tensor.numel() * tensor.element_size() // world_size()
        numbers[name] = 1 + taken // FILE_BYTES
    # the writer needs consecutive file numbers
    order = {number: i for i, number in enumerate(sorted(set(numbers.values())), start=1)}
    mapping = {name: order[number] for name, number in numbers.items()}
    return HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=mapping, save_distributed=True)


@contextmanager
def _checkpoint_errors(folder: Path, doing: str) -> Iterator[None]:
    """Turns DCP's CheckpointException, which holds the tracebacks of all ranks, into an error of one line."""
    try:
        with communication_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected with one process
            yield
    except CheckpointException as error:
        number, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        who = f"process {number} of {world_size()}: " if number else ""
        if isinstance(cause, OSError):
            raise InputError(
                f"{who}{folder}: cannot be {doing}: {cause.strerror}: fix that, or choose another folder"
            ) from None
        raise ContractError(f"{who}{folder}: cannot be {doing}: {typed_first_line(cause)}") from None
