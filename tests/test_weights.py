"""Weights that are no weights are refused wherever they are loaded, in one line that names file and tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lvrpo.atomic_io import read_tensors, read_weights
from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdapterConfig, add_adapter
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.training.checkpoint import load_state, save_state

Spoil = Callable[[torch.Tensor], torch.Tensor]


def one(value: float) -> Spoil:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return spoil


SPOILS: dict[str, tuple[Spoil, str]] = {
    "one nan": (one(math.nan), r"holds nan \(1 of \d+ numbers are not finite\)"),
    "all nan": (lambda t: torch.full_like(t, math.nan), r"holds nan \((\d+) of \1 numbers are not finite\)"),
    "one infinity": (one(math.inf), r"holds inf \(1 of"),
    "minus infinity": (one(-math.inf), r"holds -inf \(1 of"),
    "integers": (lambda t: t.to(torch.int32), "has dtype int32: weights are float32 or bfloat16 or float16"),
    "double": (lambda t: t.double(), "has dtype float64"),
    "booleans": (lambda t: t.bool(), "has dtype bool"),
    "complex": (lambda t: t.to(torch.complex64), "has dtype complex64"),
}


def spoiled(path: Path, spoil: Spoil) -> str:
    """The file with its last tensor spoiled; returns which that is."""
    tensors, metadata = read_tensors(path, "")
    name = max(name for name, tensor in tensors.items() if tensor.numel() > 1)
    save_file({**tensors, name: spoil(tensors[name])}, path, metadata)
    return name


def a_policy(folder: Path) -> tuple[Path, Callable[[], object]]:
    load_policy("tiny").save(folder)
    return folder / "model.safetensors", lambda: load_policy(folder)


def an_adapter(folder: Path) -> tuple[Path, Callable[[], object]]:
    pytest.importorskip("peft")
    policy = load_policy("tiny")
    assert isinstance(policy, MoTPolicy)
    add_adapter(policy, AdapterConfig(rank=2), "tiny")
    policy.save(folder)
    return folder / "adapter_model.safetensors", lambda: load_policy(folder)


KINDS = {"policy": a_policy, "adapter": an_adapter}


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_names_file_and_tensor(kind: str, tmp_path: Path) -> None:
    path, load = KINDS[kind](tmp_path / kind)
    load()
    whole = path.read_bytes()
    for spoil, why in SPOILS.values():
        path.write_bytes(whole)
        name = spoiled(path, spoil)
        with pytest.raises(InputError, match=rf"{path.name}: tensor {name} {why}") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_state_of_training_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Its integers are the optimizer's; what tests read back exactly may hold anything."""
    tree = {"policies": {"live": {"w": torch.tensor([1.0, math.nan])}}, "step": torch.tensor(3)}
    save_state(tmp_path, tree)
    assert load_state(tmp_path)["step"] == 3
    with pytest.raises(InputError, match=r"state\.safetensors: tensor 0:policies/live/w holds nan \(1 of 2 numbers"):
        load_state(tmp_path, finite=True)
    save_state(tmp_path, {"w": torch.ones(2), "count": torch.tensor([1, 2])})
    assert load_state(tmp_path, finite=True)["count"].tolist() == [1, 2]


def test_what_is_finite_is_read_as_it_lies(tmp_path: Path) -> None:
    numbers = {
        "half": torch.tensor([65504.0, -65504.0]).half(),
        "brain": torch.tensor([3e38, -3e38]).bfloat16(),
        "single": torch.tensor([3.4e38, 1e-45, -0.0]),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
    }
    save_file(numbers, tmp_path / "a.safetensors", {"format": "pt"})
    found, metadata = read_weights(tmp_path / "a.safetensors", "")
    assert metadata == {"format": "pt"}
    assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
        name: (t.dtype, t.tolist()) for name, t in numbers.items()
    }


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "bad", "--prompt", "a red circle", "--out", "new"),
        ("evaluate", "bad", "--n", "2", "--json", "new.json"),
        ("export", "bad", "new"),
        ("train", "quickstart", "policy=bad", "steps=1", "--out", "new"),
        (
            "check",
            "quickstart",
            "policy=bad",
            "data.prompts_per_step={generate: 1}",
            "validation.prompts={generate: 1}",
        ),
    ],
    ids=lambda command: command[0],
)
def test_no_command_goes_on_with_them(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = a_policy(Path("bad"))
    spoiled(path, one(math.nan))
    before = sorted(Path().rglob("*"))
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad/model.safetensors: tensor " in line
    assert sorted(Path().rglob("*")) == before
