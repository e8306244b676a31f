"""Several real processes: collectives, shared errors, sharded gradients, weight sets, Muon and checkpoints.

Every number is compared with that of one process. What the processes do lies in ``doubles/distributed_work.py``.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import distributed_work as work
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file

from lvrpo import distributed
from lvrpo.distributed import peers
from lvrpo.errors import InputError
from lvrpo.training.optimizer import Muon

TINY = Path(work.__file__).resolve().parents[2] / "src" / "lvrpo" / "assets" / "tiny-base"
ALL = ("t0", "t1", "t2", "d0", "d1", "d2")
DEALT: Mapping[str, Sequence[Sequence[str]]] = {
    "rank 0 texts, rank 1 images": (ALL[:3], ALL[3:]),
    "five micro-batches, one, none": (ALL[:5], ALL[5:], ()),
    "four alike": tuple(ALL[own::4] for own in range(4)),
}
"""Who computes what."""
TEXTS = ("t0", "t1", "t2")


@pytest.fixture(scope="session")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bagel") / "small"
    work.save_bagel(folder)
    return folder


def run(tmp_path: Path, world: int, function: Any, *args: Any) -> list[Any]:
    return Ranks(tmp_path / f"{world}_{random.random()}", world, function, *args).results()


def apart(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest relative distance of any tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].float() - tensor.float()).norm() / tensor.float().norm().clamp(min=1e-30))
        for name, tensor in expected.items()
    )


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The relative distance of all tensors as one vector."""
    whole = sum(float(tensor.float().square().sum()) for tensor in expected.values())
    return (sum(float((found[n].float() - t.float()).square().sum()) for n, t in expected.items()) / whole) ** 0.5


# --- collectives and errors ---


@pytest.mark.parametrize("world", [1, 2, 4])
def test_collectives(tmp_path: Path, world: int) -> None:
    results = run(tmp_path, world, work.collectives)
    for own, found in enumerate(results):
        assert found["gather"] == [{"rank": r} for r in range(world)]
        assert found["sum"] == [world * (world + 1) / 2] * 2
        assert found["dealt"] == list(range(own, 7, world))
        assert found["main"] == [0, world]
        assert found["is_main"] == (own == 0)


@pytest.mark.parametrize(
    ("kind", "ranks", "where", "raised"),
    [
        ("input", (0,), "relay_errors", "InputError: too long: shorten it"),
        ("input", (2,), "relay_errors", "InputError: process 2 of 3: too long: shorten it"),
        ("contract", (1, 2), "weights", "ContractError: process 1 of 3: a promise was broken"),
        ("not_well", (0, 1, 2), "weights", "UnhealthyRunError: diverged"),
        ("other", (1,), "relay_errors", "ContractError: process 1 of 3: ValueError: a"),
        ("other", (0,), "main", "ContractError: ValueError: a"),
        ("input", (0,), "main", "InputError: too long: shorten it"),
    ],
)
def test_an_error_of_one_rank_is_that_of_all(
    tmp_path: Path, kind: str, ranks: Sequence[int], where: str, raised: str
) -> None:
    results = run(tmp_path, 3, work.fail, kind, ranks, where)
    assert [found["raised"] for found in results] == [raised] * 3
    assert [found["reports"] for found in results] == [True, False, False]
    for found in results:
        assert all(found["left"])  # no gradient of a pass that failed
        assert found["after"] == [[6.0] * 3]


def test_one_process_raises_what_was_raised() -> None:
    error = ValueError("as it was")
    with pytest.raises(ValueError, match="as it was") as caught, distributed.relay_errors():
        raise error
    assert caught.value is error
    with pytest.raises(ZeroDivisionError):
        distributed.on_main(lambda: 1 / 0)


@pytest.mark.parametrize(("world", "killed", "where"), [(2, 1, "weights"), (3, 0, "collective")])
def test_the_others_end_soon_and_name_a_killed_process(tmp_path: Path, world: int, killed: int, where: str) -> None:
    assert_named(tmp_path, world, killed, where, signal.SIGKILL)


def assert_named(folder: Path, world: int, killed: int, where: str, number: signal.Signals) -> float:
    ranks = Ranks(folder, world, work.wait_to_be_left, folder, where)
    ranks.wait_for("ready", world)
    process = ranks.processes.pop(killed)
    assert process.pid is not None
    os.kill(process.pid, number)
    began = time.monotonic()
    try:
        outcomes = ranks.outcomes(timeout=60)
    finally:
        process.kill()
    seconds = time.monotonic() - began
    said = [outcome.error + outcome.stderr for outcome in outcomes.values()]
    assert all(outcome.code == 1 for outcome in outcomes.values())
    assert any(f"process {killed} of {world} is gone" in words for words in said), said
    if number == signal.SIGKILL:
        for outcome in outcomes.values():
            assert outcome.error.startswith(f"LostProcessError: process {killed} of {world} is gone: see"), said
            assert len(outcome.error.splitlines()) == 1
        assert sum("error: process" in outcome.stderr for outcome in outcomes.values()) == 1
    return seconds


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    chance = random.Random(0)
    for i in range(20):
        world = chance.choice([2, 3, 4])
        where = chance.choice(["weights", "collective"])
        seconds = assert_named(tmp_path / str(i), world, chance.randrange(world), where, signal.SIGKILL)
        assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_a_process_that_stands_still_ends_the_others(tmp_path: Path, killed: int) -> None:
    assert assert_named(tmp_path, 3, killed, "collective", signal.SIGSTOP) < 60


def test_a_heartbeat_that_a_slow_store_holds_up_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowStore:
        def __init__(self) -> None:
            self.kept: dict[str, str] = {}

        def set(self, key: str, value: str) -> None:
            time.sleep(0.4 if self.kept else 0)
            self.kept[key] = value

        def check(self, keys: Sequence[str]) -> bool:
            return False

    monkeypatch.setattr(peers, "BEAT_S", 0.05)
    store = SlowStore()
    heartbeat = peers._Heartbeat(cast(Any, store), 0, 2)
    time.sleep(0.1)  # it is in the store
    heartbeat.stop()
    assert not heartbeat._sender.is_alive()
    assert store.kept["beat/0"] == "left"


def test_ranks_that_never_arrive_are_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3, work.collectives, absent=(1, 2), timeout_min=0.02)
    (outcome,) = ranks.outcomes().values()
    assert outcome.error == (
        "LostProcessError: process 1, 2 of 3 did not arrive within 0.02 minutes: see what it printed, start all of "
        "them, or allow more minutes"
    )


# --- gradients ---


@pytest.fixture(scope="session")
def alone(bagel: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, bool], dict[str, Any]]:
    """What one process computes, by policy and whether it has an adapter."""
    folders = {"tiny": TINY, "bagel": bagel}
    return {
        (name, adapted): run(
            tmp_path_factory.mktemp("alone"), 1, work.gradients, folders[name], (ALL,), None, 1, adapted
        )[0]
        for name, adapted in (("tiny", False), ("bagel", False), ("bagel", True))
    }


@pytest.mark.parametrize(
    ("name", "adapted", "dealt"),
    [
        ("tiny", False, "five micro-batches, one, none"),
        *((name, adapted, dealt) for name, adapted in (("bagel", False), ("bagel", True)) for dealt in DEALT),
    ],
)
def test_gradients_and_steps_are_those_of_one_process(
    tmp_path: Path, alone: Any, bagel: Path, name: str, adapted: bool, dealt: str
) -> None:
    folder, expected, world = {"tiny": TINY, "bagel": bagel}[name], alone[name, adapted], len(DEALT[dealt])
    results = run(tmp_path, world, work.gradients, folder, DEALT[dealt], None, 1, adapted)
    first = results[0]
    error = apart(first["gradients"], expected["gradients"])
    print(f"{name}, {dealt}: largest relative difference of a gradient {error:.1e}")
    assert error < 1e-6
    assert first["norms"] == pytest.approx(expected["norms"], rel=2e-6)
    assert distance(first["weights"], expected["weights"]) < 1e-5
    for other in results[1:]:
        assert all(torch.equal(other["weights"][n], t) for n, t in first["weights"].items())
        assert other["norms"] == first["norms"]
    assert sum(found["held"] for found in results) == expected["trained"]
    assert max(found["held"] for found in results) < 1.3 * expected["trained"] / world


def test_the_same_bits_with_as_many_processes_again(tmp_path: Path, bagel: Path) -> None:
    first, again = (run(tmp_path, 3, work.gradients, bagel, DEALT["five micro-batches, one, none"]) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one["norms"] == other["norms"]
        for part in ("gradients", "weights"):
            assert all(torch.equal(other[part][n], t) for n, t in one[part].items())


def test_parameters_that_no_rank_used_have_no_gradient_and_stay(tmp_path: Path, bagel: Path) -> None:
    (expected,) = run(tmp_path, 1, work.gradients, bagel, (TEXTS,))
    for found in run(tmp_path, 2, work.gradients, bagel, ((), TEXTS)):
        assert not any(".generation." in name for name in found["gradients"])
        assert apart(found["gradients"], expected["gradients"]) < 1e-6
        assert distance(found["weights"], expected["weights"]) < 1e-5


def test_no_rank_has_anything(tmp_path: Path, bagel: Path) -> None:
    for found in run(tmp_path, 2, work.gradients, bagel, ((), ())):
        assert found["gradients"] == {}
        assert found["norms"] == {}


def test_bfloat16_compute_with_float32_shards_and_gradients(tmp_path: Path, alone: Any, bagel: Path) -> None:
    expected = alone["bagel", False]["gradients"]
    dealt = DEALT["five micro-batches, one, none"]
    errors = []
    for reductions in (1, 5):
        args = torch.bfloat16, reductions, False, False, "bfloat16"
        found = run(tmp_path, 3, work.gradients, bagel, dealt, *args)[0]
        assert found["whole"] == {torch.bfloat16}
        assert {g.dtype for g in found["gradients"].values()} == {torch.float32}
        assert {w.dtype for w in found["weights"].values()} == {torch.float32}
        errors.append(distance(found["gradients"], expected))
    print("bfloat16, by the number of reductions:", [f"{error:.4f}" for error in errors])
    assert max(errors) < 0.03


def test_an_adapter_on_a_bfloat16_base(tmp_path: Path, bagel: Path) -> None:
    args = None, 1, True, False, "bfloat16"
    (expected,) = run(tmp_path, 1, work.gradients, bagel, (ALL,), *args)
    dealt = DEALT["five micro-batches, one, none"]
    found = run(tmp_path, 3, work.gradients, bagel, dealt, *args)[0]
    assert torch.bfloat16 in found["frozen"]
    assert found["whole"] == {torch.float32}
    assert all(".lora_" in name for name in found["gradients"])
    assert apart(found["gradients"], expected["gradients"]) < 1e-6
    assert distance(found["weights"], expected["weights"]) < 1e-5


@pytest.mark.parametrize("world", [1, 2])
def test_offloaded_shards_give_the_same(tmp_path: Path, alone: Any, bagel: Path, world: int) -> None:
    dealt = [ALL[own::world] for own in range(world)]
    found = run(tmp_path, world, work.gradients, bagel, dealt, None, 1, False, True)[0]
    assert apart(found["gradients"], alone["bagel", False]["gradients"]) < 1e-6
    assert distance(found["weights"], alone["bagel", False]["weights"]) < 1e-5


def test_a_rollout_needs_no_collectives_and_gives_the_same_bits(tmp_path: Path) -> None:
    (expected,) = run(tmp_path, 1, work.rollout, TINY)
    for found in run(tmp_path, 3, work.rollout, TINY):
        for own, other in zip(found, expected, strict=True):
            for a, b in zip(own, other, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- weight sets ---


@pytest.mark.parametrize(
    ("adapted", "loaded", "dtype"),
    [(False, None, None), (False, "bfloat16", torch.bfloat16), (True, "bfloat16", None)],
)
def test_only_one_set_is_active_at_a_time(
    tmp_path: Path, bagel: Path, adapted: bool, loaded: str | None, dtype: torch.dtype | None
) -> None:
    model = work.policy(bagel, adapted, loaded)
    frozen = model.make_reference()
    start = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
    moved = {name: tensor + 0.01 for name, tensor in start.items()}
    policy = {name: tensor * 1.5 for name, tensor in moved.items()}
    expected = {"policy": policy, "old": moved, "ema": {n: start[n].lerp(t, 0.25) for n, t in moved.items()}}
    if not adapted:
        expected |= {"reference": start, "farther": {n: start[n].lerp(t, 3.0) for n, t in policy.items()}}
    worlds = [2] if dtype is not None else [1, 2]  # one process computes in the dtype that it has loaded
    for world in worlds:
        for found in run(tmp_path, world, work.weight_sets, bagel, adapted, loaded, dtype):
            assert found["same"]
            assert found["moved"] == (False, True, True, False)
            for name, weights in expected.items():
                text, drawing, whole = found["said"][name]
                for key, tensor in weights.items():
                    torch.testing.assert_close(whole[key], tensor.to(whole[key].dtype), rtol=0, atol=0)
                if world == 1:
                    with torch.no_grad():
                        for key, parameter in model.named_parameters():
                            if key in weights:
                                parameter.copy_(weights[key])
                        assert torch.equal(text, work.loss(model, "t0"))
                        assert torch.equal(drawing, work.loss(model, "d0"))
            if adapted or world == 1:
                with torch.no_grad():
                    text, drawing, _ = found["said"]["reference"]
                    assert torch.equal(text, work.loss(frozen, "t0"))
                    assert torch.equal(drawing, work.loss(frozen, "d0"))
            assert set(found["dtypes"]["ema"].values()) == {torch.float32}
            if not adapted and loaded:
                assert torch.bfloat16 in found["dtypes"]["reference"].values()


# --- Muon ---


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_muon_orthogonalizes_each_matrix_once(tmp_path: Path, world: int) -> None:
    results = run(tmp_path, world, work.matrices, 2)
    model = work.Matrices()
    optimizer = Muon(list(model.parameters()), lr=0.1, weight_decay=0.01)
    for step in range(2):
        work.gradient(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for found in results:
        for own, parameter in zip(found["weights"], model.parameters(), strict=True):
            assert torch.equal(own, parameter.detach())
        calls = found["calls"]
        assert sorted(shape for own in calls for shape in own) == sorted(
            [tuple(p.shape) for p in model.parameters()] * 2
        )
        assert max(map(len, calls)) - min(map(len, calls)) <= 2


# --- checkpoints ---


def test_checkpoints_go_from_3_to_1_to_2_to_4_processes(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    states = []
    for step, world in enumerate((3, 1, 2, 4), start=1):
        found = run(tmp_path, world, work.train_and_keep, kept, step - 1, 1, world == 2)
        assert all(name.endswith(".safetensors") for name in found[0]["files"])
        states.append(found[0]["state"])
        read = work.read_all(kept / str(step))  # here, with one process
        assert read.keys() == states[-1].keys()
        for name, tensor in states[-1].items():
            assert torch.equal(read[name], tensor), name
        assert {t.dtype for n, t in read.items() if n.startswith("ema.")} == {torch.bfloat16}
        assert any("momentum_buffer" in name for name in read)
        assert any("exp_avg" in name for name in read)
    whole = run(tmp_path, 1, work.train_and_keep, tmp_path / "whole", 0, 4)[0]["state"]
    assert distance(states[-1], whole) < 1e-6


def test_a_large_checkpoint_is_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file ends with the tensor that passes a multiple of the size; their numbers have no gaps."""
    monkeypatch.setattr("lvrpo.distributed.checkpoint.FILE_BYTES", 1000)
    numbers = {
        "a": (100, torch.float32),
        "b": (150, torch.float32),
        "c": (1100, torch.bfloat16),
        "d": (90, torch.int32),
    }
    tensors = {name: torch.arange(count).to(dtype) for name, (count, dtype) in numbers.items()}
    distributed.save_sharded(tmp_path, tensors)
    files = {path.stem[-14:]: sorted(load_file(path)) for path in tmp_path.iterdir()}
    assert files == {"00001-of-00003": ["a"], "00002-of-00003": ["b"], "00003-of-00003": ["c", "d"]}
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    distributed.load_sharded(tmp_path, read)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run(tmp_path, 3, work.train_and_keep, kept, 0, 1)
    lines = run(tmp_path, 2, work.load_another, kept / "1")
    assert lines[0] == lines[1]
    assert lines[0].endswith("resume with the configuration of the run and the version of lvrpo in its manifest.json")
    file = sorted((kept / "1").iterdir())[1]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged"):
        work.read_all(kept / "1")
    file.unlink()
    with pytest.raises(InputError, match=r"rows of .* are missing"):
        work.read_all(kept / "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no tensors"):
        work.read_all(empty)
    with pytest.raises(InputError, match="holds no tensors"):
        work.read_all(tmp_path / "nowhere")


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_of_one_rank_is_the_line_of_all(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    lines = run(tmp_path, 3, work.save_where_one_cannot, folder, background)
    assert (
        lines
        == [f"process 1 of 3: {folder}: cannot be written: No space left on device: fix that, or choose another folder"]
        * 3
    )
