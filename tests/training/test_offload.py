"""Weights in host memory, divided among the processes: what is computed, what is kept, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import training_work as work
from processes import assert_begin_alike, rows
from ranks import Ranks
from safetensors.torch import load_file
from stored import killed_copy, stored

from lvrpo.cli import main
from lvrpo.distributed import local
from lvrpo.errors import InputError
from lvrpo.training.config import TrainConfig
from lvrpo.training.setup import open_policy
from lvrpo.training.trainer import Trainer
from lvrpo.training.validation import roll_back
from lvrpo.types import Prompt

OPTIONS = (*processes.OPTIONS, "text.lr_scale=0.5")
LAST = "checkpoints/step_000004"


@pytest.fixture
def alone(small_base: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A run of one process that keeps everything. Never change it."""

    def make(folder: Path) -> None:
        options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
        assert main([*options, "--out", str(folder)]) == 0

    return made_once("keeps_everything", make)


def test_one_process_computes_the_bits_of_a_run_that_keeps_everything(small_base: Path, alone: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
    dpo = ("flow.kind=dpo", "steps=3")
    assert main([*options, *dpo, "--out", "dpo"]) == 0
    for method, whole, more in (("nft", alone, ()), ("dpo", Path("dpo"), dpo)):
        offloaded = Path(f"offloaded_{method}")
        assert main([*options, *more, "offload=true", "--out", str(offloaded)]) == 0
        last = LAST if method == "nft" else "checkpoints/step_000003"
        one, other = (stored(run / last) for run in (whole, offloaded))
        assert rows(whole) == rows(offloaded)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        kept = {name.split("/")[0] for name in one}
        assert kept == {"policy", "ema", "optimizer_0", "optimizer_1", *(["old"] if method == "nft" else [])}


def command(folder: Path, *arguments: str) -> None:
    """``lvrpo`` in two processes; test_ranks.py starts them by ``torchrun``."""
    assert Ranks(folder, 2, work.command, Path.cwd(), *arguments).results() == [0, 0]


def test_two_processes_divide_a_run_and_resume_bit_for_bit(small_base: Path, alone: Path, tmp_path: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
    command(tmp_path / "both", *options, "offload=true", "--out", "both")
    shared = rows(Path("both"))
    assert_begin_alike(rows(alone), shared)
    sizes = [path.stat().st_size for path in Path("both", LAST, "state/tensors").iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)
    begun, own, together = (
        load_file(small_base / "model.safetensors"),
        *(stored(run / LAST) for run in (alone, Path("both"))),
    )
    for name in ("policy", "ema", "old"):
        apart = sum(float((together[f"{name}/{n}"] - own[f"{name}/{n}"]).square().sum()) for n in begun) ** 0.5
        moved = sum(float((own[f"{name}/{n}"] - t).square().sum()) for n, t in begun.items()) ** 0.5
        assert apart < 0.05 * moved

    killed = killed_copy(Path("both"), 2)  # test_ranks.py interrupts
    command(tmp_path / "again", "train", "--resume", str(killed), "--no-evaluate")
    assert rows(killed) == shared
    again = stored(killed / LAST)
    assert all(torch.equal(tensor, again[name]) for name, tensor in together.items())


@pytest.mark.parametrize("size", [2, 3])
def test_processes_step_what_they_keep_as_one_would(
    size: int, lively_base: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    tree = {"optimizer": {"warmup_steps": 0}, "limits": {"microbatch_size": 1}, "offload": True}
    (alone,) = Ranks(tmp_path / "alone", 1, work.steps, lively_base, prompts, tree).results()
    begun = {name: p.detach() for name, p in work.lively(lively_base).named_parameters()}
    for own in Ranks(tmp_path / "all", size, work.steps, lively_base, prompts, tree).results():
        assert own["metrics"][0] == pytest.approx(alone["metrics"][0], rel=1e-4, abs=1e-6)
        assert own["tensors"].keys() == alone["tensors"].keys()
        for path, tensor in alone["tensors"].items():
            name, _, key = path.partition("/")
            if name in ("policy", "ema"):
                moved = float((tensor - begun[key]).norm())
                assert moved > 0
                assert float((own["tensors"][path] - tensor).norm()) <= 0.02 * moved


def test_a_file_that_was_changed_is_refused(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "steps=1", "--no-evaluate", "offload=true")
    assert main([*options, "--out", "run"]) == 0
    (path,) = Path("run/checkpoints/step_000001/state/tensors").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for file in ("summary.json", "policy.json"):
        Path("run", file).unlink()
    with pytest.raises(InputError, match=rf"{path.name}: was changed after it was saved"):
        Trainer.resume(Path("run"))


def test_gradients_that_are_not_finite_anywhere_leave_all_weights(lively_base: Path, tmp_path: Path) -> None:
    for found in Ranks(tmp_path / "two", 2, work.bad_gradient, lively_base).results():
        norms, sizes = found["norms"], found["sizes"]
        assert norms["understand"] != norms["understand"]
        assert norms["generate"] == pytest.approx(sizes["generate"] ** 0.5, rel=1e-5)
        assert not found["moved"]


def test_a_rollback_brings_back_the_weights_of_a_checkpoint(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "steps=2", "--no-evaluate")
    assert main([*options, "offload=true", "--out", "run", "keep_checkpoints=9"]) == 0
    Path("run/summary.json").unlink()
    trainer = Trainer.resume(Path("run"))
    with trainer.run as run:
        weights = trainer.state.policies.weights
        assert weights.differs_from("reference")
        roll_back(trainer.config, run, trainer.state, 0)
        assert trainer.state.step == 2
        assert not weights.differs_from("reference")
        begun = load_file(small_base / "model.safetensors")
        assert all(torch.equal(local(tensor.detach()), begun[name]) for name, tensor in weights["policy"].items())


def test_weights_can_be_shown_farther_than_they_went(lively_base: Path, tmp_path: Path) -> None:
    (found,) = Ranks(tmp_path / "one", 1, work.farther, lively_base).results()
    for tensor in found.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 2.0**-6), rtol=0, atol=2e-3)


def test_a_policy_of_one_precision_says_so(small_base: Path) -> None:
    config = TrainConfig.model_validate(
        {"policy": str(small_base), "offload": True, "precision": {"compute": "bfloat16"}, "device": "cpu"}
    )
    with pytest.raises(
        InputError, match=r"^precision.compute=bfloat16 with offload=true: policy=.* is loaded in float32"
    ):
        open_policy(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": {}}, "offload=true with adapter: is small beside its base: leave offload out"),
        ({"optimizer": {"kind": "adamw_8bit"}}, "offload=true with optimizer.kind=adamw_8bit: moments are on the host"),
    ],
)
def test_what_cannot_be_offloaded_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"offload": True, **options})
