"""The run directory: all files of a run, each written atomically, by one process at a time.

Every rank has a ``RunDirectory``; only rank 0 writes, on other ranks writes are no-ops.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import psutil
import torch
from pydantic import Field

from lvrpo import __version__
from lvrpo.atomic_io import write_atomic
from lvrpo.config import (
    Config,
    config_differences,
    config_sha256,
    config_tree,
    dump_config,
    load_config,
    parse_section,
    read_yaml,
    tree_sha256,
)
from lvrpo.distributed import is_main, on_main
from lvrpo.errors import ContractError, InputError, RefusedRunError
from lvrpo.policies.loading import START
from lvrpo.reading import Kind, Record, parse_typed_json, path_exists, read_bytes, read_json, validate_type
from lvrpo.training.checkpoint import SEAL, clean_leftovers, disk_errors, latest_checkpoint

C = TypeVar("C", bound=Config)
Json = Any
"""Any: JSON values."""

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PLAN = "plan.json"
SCORES = "scores"
LOCK = ".lock"
OF_A_START = {CONFIG, PLAN, START}
"""What is written before the initial policy is complete, from which a run can be resumed."""


class MetricsRow(Record):
    """A line of ``metrics.jsonl``."""

    step: int


class Manifest(Record):
    """``manifest.json``."""

    config_sha256: str
    versions: dict[str, str] = Field(default={})
    commit: str | None = None
    resumed: list[dict[str, Any]] = Field(default=[])


class RunDirectory:
    """A run on disk. A context manager, which releases the lock."""

    def __init__(self, path: Path) -> None:
        """Does not access the disk; use ``create``, ``open`` or ``read``."""
        self.path = Path(path)
        self._unlock: Callable[[], object] | None = None
        self._close_first: list[Callable[[], object]] = []
        self._created: list[Path] | None = None
        """Folders that ``create`` created for a new run, innermost first."""

    @classmethod
    def create(cls, path: Path, config: Config) -> Self:
        """Creates a run in a new directory, or in one where the same run never finished its first step.

        A directory in which a killed process did not complete the initial policy counts as new. Raises InputError if it
        holds another configuration, finished steps or other files, or is locked.
        """
        run = cls(path)
        on_main(lambda: run._create(config))
        return run

    def _create(self, config: Config) -> None:
        self._require_unused(config)
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._created = None if (self.path / CONFIG).exists() else missing
        incomplete = self._is_incomplete()
        try:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._require_unused(config)
            self._recover()
            if incomplete and self._is_incomplete():
                self._delete_files()
                self._created = [self.path]
            if not (self.path / CONFIG).exists():
                self.write_text(CONFIG, dump_config(config))
        except BaseException as error:  # interrupts too: the lock is released
            self.close_on_exit(error)
            raise

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens and locks an existing run to resume it; raises InputError if it is no run or is locked."""
        run = cls.read(path)
        run.require_unchanged()
        on_main(lambda: (run._lock(), run._recover()))
        return run

    @classmethod
    def read(cls, path: Path) -> Self:
        """Opens an existing run for reading, without a lock."""
        run = cls(path)
        if not (run.path / CONFIG).is_file():
            raise InputError(f"{run.path}: is not a run directory (no {CONFIG}): give the folder of a run")
        return run

    def close_first(self, close: Callable[[], object]) -> None:
        """Calls ``close`` before the lock is released."""
        self._close_first.append(close)

    def close(self) -> None:
        """Releases the lock."""
        while self._close_first:
            self._close_first.pop()()
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def close_on_exit(self, error: BaseException | None) -> None:
        """Releases the lock; deletes a run that this process created if it was refused, or has no checkpoint."""
        if not is_main():
            return
        while self._close_first:
            self._close_first.pop()()
        locked = self._unlock is not None
        if (
            locked
            and isinstance(error, Exception)
            and self._created is not None
            and (isinstance(error, RefusedRunError) or latest_checkpoint(self.path) is None)
        ):
            self._delete_files()
            (self.path / LOCK).unlink(missing_ok=True)
        self.close()
        with suppress(OSError):  # stops at the first folder that is not empty
            for folder in (self._created or ()) if isinstance(error, Exception) else ():
                folder.rmdir()

    def _delete_files(self) -> None:
        """Deletes all but the lock."""
        for entry in self.path.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _is_incomplete(self) -> bool:
        """Whether a process that started a run here was killed before the initial policy was complete."""
        if not path_exists(self.path / LOCK):
            return False
        names = {entry.name for entry in self.path.iterdir()} - {LOCK, *OF_A_START}
        temporary = tuple(f".{name}." for name in OF_A_START)
        return all(name.startswith(temporary) for name in names) and not path_exists(self.path / START / SEAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close_on_exit(error)

    # --- configuration ---

    def config(self, cls: type[C], overrides: Sequence[str] = ()) -> C:
        """The resolved configuration of the run, without ``allow_code``, as a run may be downloaded.

        Raises InputError; for unknown keys of another version of lvrpo it names that version.
        """
        if self._is_of_another_version():
            try:
                load_config(cls, self.path / CONFIG, allow_code=False)
            except InputError as error:
                manifest = self.read_json(MANIFEST, Manifest)
                version, commit = manifest.get("versions", {}).get("lvrpo"), manifest.get("commit")
                wrote = f"lvrpo {version}" + (f" at commit {commit[:10]}" if commit else "")
                key = str(error).removeprefix(f"{self.path / CONFIG}: ").partition(": ")[0]
                raise InputError(
                    f"{self.path / CONFIG}: was written by {wrote}, and has {key}, which this version lacks: use that "
                    "version, or start a new run"
                ) from None
        return load_config(cls, self.path / CONFIG, overrides, allow_code=False)

    def _is_of_another_version(self) -> bool:
        """Whether another version of lvrpo wrote ``config.yaml``, unmodified since."""
        if not path_exists(self.path / MANIFEST):
            return False
        manifest = self.read_json(MANIFEST, Manifest)
        another = (manifest.get("versions", {}).get("lvrpo"), manifest.get("commit")) != (__version__, git_commit())
        return another and tree_sha256(read_yaml(self.path / CONFIG)) in self._known_configs(manifest)

    @staticmethod
    def _known_configs(manifest: dict[str, Any]) -> list[str | None]:
        return [manifest["config_sha256"], *(start.get("config_sha256") for start in manifest.get("resumed", []))]

    def require_config(self, config: Config, remedy: str, allow: Collection[str] = ()) -> None:
        """Raises InputError if the run was started with another configuration; keys in ``allow`` may differ."""
        differing = [line for line in self._differences(config) if line.partition("=")[0] not in allow]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise InputError(
                f"{self.path}: holds a run with another configuration ({', '.join(differing[:3])}{more}): {remedy}"
            )

    def require_unchanged(self) -> None:
        """Raises InputError if ``config.yaml`` does not match its hash in the manifest."""
        if not path_exists(self.path / MANIFEST):
            return
        manifest = self.read_json(MANIFEST, Manifest)
        if tree_sha256(read_yaml(self.path / CONFIG)) not in self._known_configs(manifest):
            raise InputError(
                f"{self.path / CONFIG}: was changed since the run began ({MANIFEST} holds its hash): undo the change, "
                "or start another run with it"
            )

    def _differences(self, config: Config) -> list[str]:
        held = read_yaml(self.path / CONFIG)
        with suppress(InputError):  # of an older version: keys that did not exist then have their defaults
            held = config_tree(parse_section(type(config), held, ""))
        return config_differences(held, config_tree(config))

    def _require_unused(self, config: Config) -> None:
        with disk_errors(self.path, "read"):
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path}: is a file: choose another name")
            names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
            if self._is_incomplete():
                return
        if CONFIG not in names:
            foreign = sorted(name for name in names if name != LOCK and not name.startswith(f".{CONFIG}."))
            if foreign:
                raise InputError(f"{self.path}: is no run and holds {foreign[0]}: choose another name")
            return
        self.require_config(config, "choose another name, or continue that run with --resume and its own configuration")
        if path_exists(self.path / SUMMARY) or latest_checkpoint(self.path) is not None or self.metrics():
            raise InputError(f"{self.path}: holds this run already: continue it with --resume or choose another name")

    # --- lock and crash recovery ---

    def _lock(self) -> None:
        with disk_errors(self.path):
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._unlock = weakref.finalize(self, os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
            except BlockingIOError:
                holder = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
                self.close()
                raise InputError(
                    f"{self.path}: process {holder} is writing this run: wait for it or choose another name"
                ) from None
            except BaseException:
                self.close()
                raise

    def _recover(self) -> None:
        """Removes the leftovers of a killed writer: temporary files and folders, an incomplete line of metrics."""
        with disk_errors(self.path):
            for folder in (self.path, *(self.path / name for name in ("checkpoints", "eval", "samples", SCORES))):
                for place in (folder, *(child for child in folder.glob("*") if child.is_dir())):
                    clean_leftovers(place)
            metrics = self.path / METRICS
            if path_exists(metrics):
                content = read_bytes(metrics, "restore the file")
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    os.truncate(metrics, whole)

    # --- files ---

    def write_bytes(self, relative: str, content: bytes) -> Path:
        """Writes one file atomically (temporary name, fsync, rename)."""
        path = self._inside(relative)
        if is_main():
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content)
        return path

    def write_text(self, relative: str, text: str) -> Path:
        """``write_bytes`` of UTF-8."""
        return self.write_bytes(relative, text.encode("utf-8"))

    def write_json(self, relative: str, value: Json) -> Path:
        """``write_text`` of valid JSON: nan and infinities become null."""
        return self.write_text(relative, json_text(value))

    def read_json(self, relative: str, kind: Kind = Json) -> Json:
        """Reads a JSON file of the run and validates its type; raises InputError if it is missing or invalid."""
        path = self._inside(relative)
        if not path_exists(path):
            raise InputError(f"{path}: no such file: the run has not written it")
        found = read_json(path, "restore it or delete it", finite=False)
        return validate_type(found, kind, str(path), "restore it or delete it")

    def samples_dir(self, step: int) -> Path:
        """``samples/step_000010``, created."""
        path = self.path / "samples" / f"step_{step:06d}"
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def checkpoint_dir(self, step: int) -> Path:
        """``checkpoints/step_000050``, not created; for ``checkpoint_writer``."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def _inside(self, relative: str) -> Path:
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise ContractError(f"{relative!r} leaves the run directory: give a path inside it")
        return self.path / relative

    # --- metrics ---

    def append_metrics(self, row: Mapping[str, Json], durable: bool = False) -> None:
        """Appends one line atomically; ``durable``: with fsync."""
        if not is_main():
            return
        line = json.dumps(to_json(row), ensure_ascii=False) + "\n"
        path = self.path / METRICS
        with disk_errors(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(handle).st_size
            try:
                rest = memoryview(line.encode("utf-8"))
                while rest:
                    rest = rest[os.write(handle, rest) :]
                if durable:
                    os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, size)
                raise
            finally:
                os.close(handle)

    def metrics(self) -> list[dict[str, Json]]:
        """All complete lines; raises InputError for a broken line."""
        path = self.path / METRICS
        with disk_errors(path, "read"):
            lines = read_bytes(path, "restore the file").split(b"\n") if path_exists(path) else [b""]
        return [
            parse_typed_json(
                line.decode(errors="replace"), MetricsRow, f"{path}:{number}", "delete this line", finite=False
            )
            for number, line in enumerate(lines[:-1], start=1)
        ]

    def truncate_metrics(self, step: int) -> None:
        """Deletes the lines after ``step``, which a resumed run writes again."""
        if not is_main():
            return
        rows = self.metrics()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self.write_text(METRICS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    # --- summary and manifest ---

    def write_summary(self, summary: Mapping[str, Json]) -> Path:
        """Writes ``summary.json``."""
        return self.write_json(SUMMARY, summary)

    def read_summary(self) -> dict[str, Json] | None:
        """``summary.json``, or None if the run has not finished."""
        return self.read_json(SUMMARY, dict[str, Json]) if path_exists(self.path / SUMMARY) else None

    def write_manifest(
        self,
        config: Config,
        seeds: Mapping[str, int],
        data: Mapping[str, Json] | None = None,
        checkpoints: Mapping[str, Json] | None = None,
    ) -> Path:
        """Writes ``manifest.json``; a resumed run appends to its list "resumed".

        ``data`` and ``checkpoints``: fingerprints by name.
        """
        if not is_main():
            return self.path / MANIFEST
        start = {
            **environment(),
            "config_sha256": config_sha256(config),
            "seeds": dict(seeds),
            "data": dict(data or {}),
            "checkpoints": dict(checkpoints or {}),
        }
        if not path_exists(self.path / MANIFEST):
            return self.write_json(MANIFEST, start)
        manifest = self.read_json(MANIFEST, Manifest)
        return self.write_json(MANIFEST, {**manifest, "resumed": [*manifest.get("resumed", []), start]})


def environment() -> dict[str, Json]:
    """The environment of a run: versions, commit, platform, hardware, command, time."""
    others = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")}
    versions = {"lvrpo": __version__, **others}  # a checkout on PYTHONPATH has no metadata
    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "lvrpo"), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions},
        "commit": git_commit(),
        "platform": platform.platform(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(psutil.Process().cpu_affinity() or []) if sys.platform == "linux" else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": cuda,
        },
    }


def git_commit() -> str | None:
    """The commit of the checkout that lvrpo runs from, with "-dirty" if files differ; None if it is installed."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def json_text(value: Json) -> str:
    """Valid JSON, indented: nan and infinities become null."""
    return json.dumps(to_json(value), indent=1, ensure_ascii=False) + "\n"


def to_json(value: Json) -> Json:
    """Converts a value to JSON types: arrays and tuples to lists, numeric types to numbers, non-finite ones to null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(inner) for inner in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    raise ContractError(f"{type(value).__name__} cannot be written as JSON: pass numbers, text, lists and dicts")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, platform.processor() or platform.machine())
