"""Safetensors files, whole or in shards: their tensors by name, read in chunks straight to their device."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvrpo.atomic_io import require_weights
from lvrpo.errors import InputError
from lvrpo.reading import open_regular, parse_json, read_json_object

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes of weights, by their names in a file."""
CHUNK_BYTES = 8 << 20
"""Read at once."""
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor in a file."""

    path: Path
    name: str
    dtype: str
    """Dtype as the file names it, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def read(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor at a dtype on a device; allocates only ``CHUNK_BYTES`` in addition."""
        out = torch.empty(self.shape, dtype=dtype, device=device)
        flat = out.view(-1)
        stored = DTYPES[self.dtype]
        step = CHUNK_BYTES // stored.itemsize
        buffer = bytearray(min(step, self.count) * stored.itemsize)
        with open_regular(self.path, "copy it too", None) as file:
            file.seek(self.start)
            for first in range(0, self.count, step):
                count = min(step, self.count - first)
                part = memoryview(buffer)[: count * stored.itemsize]
                if file.readinto(part) != len(part):
                    raise InputError(f"{self.path}: ends within {self.name}: copy the file again")
                piece = torch.frombuffer(buffer, dtype=stored, count=count)
                require_weights(self.path, self.name, piece, "fetch the file again")
                flat[first : first + count].copy_(piece)
        return out


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises InputError for one that is cut off, no safetensors, or of other dtypes."""
    size = path.stat().st_size if path.is_file() else 0
    with open_regular(path, "copy it too", None) as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            what = "a git-lfs pointer" if head.startswith(b"version ") else "empty or no safetensors file"
            raise InputError(f"{path}: is {what}: fetch the file itself")
        raw = file.read(length)
    if len(raw) < length:
        raise InputError(f"{path}: truncated ({size} bytes, the header alone has {length + 8}): copy the file again")
    try:
        header = parse_json(raw, str(path), "fetch the file again")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _stored(path, name, entry, length + 8) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0) + length + 8
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{path}: damaged header: fetch the file again") from None
    if size < end:
        raise InputError(f"{path}: truncated ({size} of {end} bytes): copy the file again")
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Any: decoded JSON. Raises InputError for a dtype that weights do not have, ValueError for a wrong extent."""
    dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
    counts = name.endswith((".num_batches_tracked", ".power_vals"))  # of BatchNorm, of MAGVIT-v2: never read
    known = {**DTYPES, "I64": torch.int64} if counts else DTYPES
    if dtype not in known:
        raise InputError(f"{path}: {name} has dtype {dtype}: use weights in {', '.join(DTYPES)}")
    first, last = entry["data_offsets"]
    tensor = StoredTensor(path, name, dtype, shape, data_start + int(first))
    if last - first != tensor.count * known[dtype].itemsize:
        raise ValueError("extent and shape differ")
    return tensor


def find_tensors(folder: Path, stems: Sequence[str], role: str) -> dict[str, StoredTensor]:
    """The tensors of the first of ``stems`` that the folder holds, whole (STEM.safetensors) or in shards.

    Raises InputError where there is none, or where a shard is missing.
    """
    for stem in stems:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if whole.is_file():
            return read_header(whole)
        if index.is_file():
            return _sharded(folder, index)
    raise InputError(f"{folder}: holds no {stems[0]}.safetensors, {role}: copy it from the published folder")


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        places = read_json_object(index, "fetch the file again")["weight_map"]
        shards = sorted(set(places.values()))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: has no weight_map: fetch the file again") from None
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise InputError(f"{index}: names the shard {outside[0]!r}, which is no file beside it: fetch the file again")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(shards)}): copy it too")
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        found.update(read_header(folder / shard))
    return found
