"""Files that lvrpo writes: whole or not there, and readable by whom the umask lets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import Field

from lvrpo import atomic_io
from lvrpo.atomic_io import write_atomic, write_tensors
from lvrpo.commands.inputs import write_file
from lvrpo.config import Config
from lvrpo.policies.adapter import AdapterConfig, inject_adapter
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.questions import TextCache
from lvrpo.training.checkpoint import checkpoint_writer, save_state
from lvrpo.training.run_directory import RunDirectory


class Root(Config):
    """Of a run directory."""

    seed: int = Field(default=0, ge=0)


@pytest.fixture(params=[0o022, 0o077], ids=["022", "077"])
def rights(request: pytest.FixtureRequest) -> Iterator[int]:
    """What the umask of the test leaves a new file."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def checkpoint(folder: Path) -> None:
    with checkpoint_writer(folder / "step_000001") as inside:
        save_state(inside, {"a": torch.ones(3), "b": 1})


def tiny_policy(folder: Path) -> None:
    load_policy("tiny").save(folder / "tiny")


def bagel_policy(folder: Path) -> None:
    sizes = BagelSizes.model_validate({"width": 32, "depth": 1, "mlp_width": 32, "vocabulary_size": 512})
    create_bagel(sizes, ["a red circle"]).save(folder / "bagel")


def adapter(folder: Path) -> None:
    pytest.importorskip("peft")
    policy = load_policy("tiny")
    inject_adapter(policy, AdapterConfig(rank=1))  # type: ignore[arg-type]  # the tiny policy is one of the core's
    policy.save(folder / "adapter")


def run_files(folder: Path) -> None:
    with RunDirectory.create(folder / "run", Root()) as run:
        run.write_summary({"seed": 1})


def user_files(folder: Path) -> None:
    write_file(folder / "deep" / "image.png", b"picture", force=False)
    TextCache(folder / "cache").put("text", "key")


@pytest.mark.parametrize("write", [checkpoint, tiny_policy, bagel_policy, adapter, run_files, user_files])
def test_the_umask_says_who_may_read(write: Callable[[Path], None], rights: int, tmp_path: Path) -> None:
    write(tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"]
    assert files
    assert {str(f.relative_to(tmp_path)): oct(f.stat().st_mode & 0o777) for f in files} == {
        str(f.relative_to(tmp_path)): oct(rights) for f in files
    }
    assert not [file for file in files if ".tmp-" in file.name]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"format": "pt"})
    before = path.read_bytes()

    def half(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(before[:10])
        raise OSError("the disk went away")

    monkeypatch.setattr(atomic_io, "save_file", half)
    with pytest.raises(OSError, match="went away"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_atomic(path, b"old")
    renamed: list[tuple[bytes, bytes]] = []
    replace = os.replace

    def seen(source: Path, target: Path) -> None:
        renamed.append((Path(source).read_bytes(), Path(target).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    write_atomic(path, b"new")
    assert renamed == [(b"new", b"old")]
    assert path.read_bytes() == b"new"
