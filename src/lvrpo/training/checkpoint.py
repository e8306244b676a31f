"""Atomic checkpoints without pickle: safetensors and JSON in a folder that is created by one rename.

A folder is written under a temporary name, sealed with the size and hash of every file (``checkpoint.json``), synced,
then renamed. A crash leaves a temporary folder, which is not a checkpoint and is removed at the next save.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lvrpo.atomic_io import read_tensors, require_finite, sync, write_tensors
from lvrpo.errors import ContractError, InputError
from lvrpo.reading import MIB, path_exists, read_json

STATE_BYTES = 1024 * MIB
"""Size limit of state.json."""
STATE = "state"
"""Subfolder of a checkpoint with the training state, next to the policy."""
SEAL = "checkpoint.json"
"""The file with size and sha256 of every other file; a folder without it is not a checkpoint."""

_HEX = "[0-9a-f]" * 8
"""The end of a temporary name."""
State = Any
"""Any: nested dicts (text keys) and lists of None, bool, int, float, str and tensors."""


# --- nested state ---


def save_state(folder: Path, state: State) -> None:
    """Writes ``state.safetensors`` and ``state.json`` into an existing folder; ``load_state`` restores it exactly.

    Tuples become lists. Raises ContractError for any other type.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    tree = _encode(state, (), tensors, storages)
    text = json.dumps(tree, allow_nan=False)
    with disk_errors(folder):
        write_tensors(folder / "state.safetensors", tensors)
        (folder / "state.json").write_text(text, encoding="utf-8")


def load_state(folder: Path, finite: bool = False) -> State:
    """Restores the state of ``save_state``; raises InputError for a missing or truncated file.

    ``finite``: also for a tensor with values that are not finite.
    """
    for name in ("state.json", "state.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file: give a folder that a training run saved")
    with disk_errors(folder, "read"):
        tree = read_json(folder / "state.json", "use another checkpoint", STATE_BYTES)
        tensors, _ = read_tensors(folder / "state.safetensors", "use another checkpoint")
        for name, tensor in tensors.items() if finite else ():
            require_finite(folder / "state.safetensors", name, tensor, "use another checkpoint")
    try:
        return _decode(tree, tensors)
    except KeyError as error:
        raise InputError(f"{folder}: tensor {error} is missing: use another checkpoint") from None


def _encode(value: State, path: tuple[str, ...], tensors: dict[str, torch.Tensor], storages: set[int]) -> State:
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}:{'/'.join(path)}".encode("utf-8", "backslashreplace").decode()
        tensors[name] = _with_own_storage(value.detach(), storages)
        return {"$tensor": name}
    if isinstance(value, (list, tuple)):
        return [_encode(inner, (*path, str(i)), tensors, storages) for i, inner in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ContractError(f"state key {'/'.join(path)}/{key!r} is {type(key).__name__}: keys must be text")
        inner = {key: _encode(value[key], (*path, key), tensors, storages) for key in value}
        return {"$dict": list(inner.items())} if any(key.startswith("$") for key in inner) else inner
    raise ContractError(f"state {'/'.join(path)} is {type(value).__name__}: save numbers, text, lists, dicts, tensors")


def _decode(tree: State, tensors: Mapping[str, torch.Tensor]) -> State:
    if isinstance(tree, list):
        return [_decode(inner, tensors) for inner in tree]
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return tensors[tree["$tensor"]]
        if "$float" in tree:
            return float(tree["$float"])
        if "$dict" in tree:
            return {key: _decode(inner, tensors) for key, inner in tree["$dict"]}
        return {key: _decode(inner, tensors) for key, inner in tree.items()}
    return tree


def _with_own_storage(tensor: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """The tensor, copied if it shares its storage or does not fill it (safetensors refuses both)."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    if whole and tensor.numel() and storage.data_ptr() not in storages:
        storages.add(storage.data_ptr())
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


# --- atomic folders ---


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder; on success it is synced and renamed to ``path``, on failure removed.

    Raises InputError if ``path`` exists (unless ``replace``) or cannot be written.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise InputError(f"{path}: exists already: choose another name or delete it")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(path.parent, path.name)  # the folder may be the user's
        temporary, lock = locked_temporary(path)
        try:
            yield temporary
            sync_tree(temporary)
            if path.exists():
                old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
                os.rename(path, old)
                os.rename(temporary, path)
                shutil.rmtree(old)
            else:
                os.rename(temporary, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextmanager
def checkpoint_writer(path: Path) -> Iterator[Path]:
    """``atomic_folder`` that replaces an existing folder and is sealed, so that later changes are detected."""
    clean_leftovers(path.parent)
    with atomic_folder(path, replace=True) as folder:
        yield folder
        seal_checkpoint(folder)


def clean_leftovers(parent: Path, name: str = "*") -> None:
    """Removes temporary files and folders of dead writers, and restores a folder whose replacement was not completed.

    ``name``: of what they wrote; all others are left alone.
    """
    name = name if name == "*" else glob.escape(name)
    for leftover in sorted(parent.glob(f".{name}.old-{_HEX}")):
        path = leftover.with_name(leftover.name[1:].rpartition(".old-")[0])
        if path.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            os.rename(leftover, path)
    for leftover in sorted(parent.glob(f".{name}.tmp-{_HEX}")):
        with suppress(OSError):
            if not leftover.is_dir():
                leftover.unlink()
                continue
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def locked_temporary(path: Path) -> tuple[Path, int]:
    """A new folder next to ``path``, locked until its writer exits."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, lock


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below, then of the folder."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


_WRONG_NAMES = {
    errno.ENOTDIR: "it lies below a file",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "it exists and is no folder",
    errno.ENOTEMPTY: "it is a folder that is not empty",
    errno.ENOENT: "its folder cannot be made",  # as in /proc
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "it is a link that leads to itself",
    errno.EINVAL: "its name is not allowed there",
}


@contextmanager
def disk_errors(path: Path, doing: str = "written") -> Iterator[None]:
    """Turns a full disk, a missing permission or a name that cannot be used into an InputError of one line."""
    try:
        yield
    except OSError as error:
        where = _final_name(Path(error.filename if isinstance(error.filename, str) else path))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = f"{_free_bytes(Path(path)) / 2**20:.0f} MiB free"
            raise InputError(
                f"{where}: cannot be {doing}: the disk is full ({free}): free some space or choose another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                f"{where}: cannot be {doing}: permission denied: change its permissions or choose another folder"
            ) from error
        if error.errno in _WRONG_NAMES:
            reason = _WRONG_NAMES[error.errno]
            raise InputError(f"{where}: cannot be {doing}: {reason}: choose another name") from error
        raise


def _final_name(path: Path) -> Path:
    """The path with the temporary names in it replaced by the final ones."""
    return Path(*(re.sub(r"^\.(.+)\.tmp-[0-9a-f]{8}$", r"\1", part) for part in path.parts))


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


# --- checkpoints of a run ---


def files_to_seal(folder: Path) -> list[str]:
    """Paths of all files of a checkpoint, relative to it."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name != SEAL)


def file_seals(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files. Any: numbers and strings."""
    return {n: {"bytes": (folder / n).stat().st_size, "sha256": file_sha256(folder / n)} for n in names}


def seal_checkpoint(folder: Path, seals: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes ``checkpoint.json``: size and sha256 of every file; ``seals``: if they are already computed."""
    files = file_seals(folder, files_to_seal(folder)) if seals is None else dict(sorted(seals.items()))
    (folder / SEAL).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def verify_checkpoint(folder: Path, share: Callable[[list[str]], list[str]] = list) -> None:
    """Raises InputError unless every file of the folder matches its seal.

    ``share``: selects the files to hash on this rank; for the others only existence and size are checked.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint: give a folder that a training run saved")
    if not (folder / SEAL).is_file():
        raise InputError(f"{folder}: has no {SEAL}, so it is not a whole checkpoint: use another one")
    with disk_errors(folder, "read"):
        try:
            files = read_json(folder / SEAL, "use another checkpoint")["files"]
            expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{folder / SEAL}: truncated or not a seal: use another checkpoint") from None
        read = set(share(list(expected)))
        for name, (size, sha256) in expected.items():
            file = folder / name
            if not file.is_file():
                raise InputError(f"{file}: is missing from the checkpoint: use another one")
            if file.stat().st_size != size:
                raise InputError(f"{file}: has {file.stat().st_size} of {size} bytes: use another checkpoint")
            if name in read and file_sha256(file) != sha256:
                raise InputError(f"{file}: was changed after it was saved: use another checkpoint")


def checkpoint_step(folder: Path) -> int | None:
    """The step of ``step_000050``; None for another name."""
    match = re.fullmatch(r"step_(\d{6,})", folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run directory, sorted by step."""
    found = [
        (step, folder)
        for folder in (run / "checkpoints").glob("step_*")
        if (step := checkpoint_step(folder)) is not None and path_exists(folder / SEAL)
    ]
    return [folder for _, folder in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return next(reversed(list_checkpoints(run)), None)


def prune_checkpoints(run: Path, keep_last: int, keep: Collection[int] = ()) -> list[Path]:
    """Deletes all checkpoints but the last ``keep_last`` and the steps in ``keep``; returns the deleted ones."""
    folders = list_checkpoints(run)
    last = folders[max(0, len(folders) - max(1, keep_last)) :]
    pruned = [folder for folder in folders if folder not in last and checkpoint_step(folder) not in keep]
    with disk_errors(run):
        for folder in pruned:
            temporary = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(4)}")
            os.rename(folder, temporary)
            shutil.rmtree(temporary)
    return pruned


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, or of all files of a folder together; for the manifest."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    sha256 = file_sha256(path) if path.is_file() else digest.hexdigest()
    return {"name": path.name, "bytes": sum(file.stat().st_size for file in files), "sha256": sha256}
