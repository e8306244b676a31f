from __future__ import annotations

import errno
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import crash_work
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import CONTEXT, exit_code
from torch import nn

from lvrpo import atomic_io
from lvrpo.errors import ContractError, InputError
from lvrpo.training import checkpoint as ckpt
from lvrpo.training.optimizer import optimizer_moments, set_optimizer_moments

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 50
    return values.to(dtype)


scalars = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text()
states = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("$tensor"), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        bits = lambda t: t.contiguous().view(-1).view(torch.uint8) if t.numel() else t  # noqa: E731
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(other) is list and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        equal = (math.isnan(one) and math.isnan(other)) or one == other
        return type(other) is float and equal and math.copysign(1, one) == math.copysign(1, other)
    return type(one) is type(other) and one == other


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- state ---


@given(state=states)
@example(state={"nan": math.nan, "others": [math.inf, -math.inf, 0.5]})
def test_any_state_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    ckpt.save_state(folder, state)
    loaded = ckpt.load_state(folder)
    if isinstance(state, float) and math.isnan(state):
        assert math.isnan(loaded)
    else:
        assert same(state, loaded)


def test_views_shared_memory_and_reserved_names(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "base": base,
        "row": base[1],
        "transposed": base.t(),
        "again": base,
        "parameter": nn.Parameter(torch.ones(2)),
        "__metadata__": torch.zeros(1),
        "random": torch.get_rng_state(),
        "python_random": random.getstate(),
        "a/b": {"c": torch.ones(1)},
        "a": {"b/c": torch.zeros(1)},
    }
    ckpt.save_state(tmp_path, state)
    loaded = ckpt.load_state(tmp_path)
    assert same({**state, "parameter": torch.ones(2)}, loaded)
    assert loaded["python_random"][2] is None
    assert sorted(os.listdir(tmp_path)) == ["state.json", "state.safetensors"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": object()}}, "state a/b is object"),
        ({"a": {3: 1}}, "state key a/3 is int: keys must be text"),
        ([{1, 2}], "state 0 is set"),
        ({"a": b"x"}, "state a is bytes"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        ckpt.save_state(tmp_path, state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_truncated_or_missing_state_gets_one_line(tmp_path: Path, name: str) -> None:
    ckpt.save_state(tmp_path, {"weights": torch.ones(100), "step": 3})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{name}: (truncated or|not JSON).*: use another checkpoint"):
        ckpt.load_state(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        ckpt.load_state(tmp_path)


# --- optimizers ---


class TwoLayers(nn.Module):
    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        for name in ("second", "first") if swapped else ("first", "second"):
            self.add_module(name, nn.Linear(3, 3))


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9)),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}


def build(kind: str, swapped: bool = False) -> tuple[TwoLayers, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = TwoLayers()
    weights = model.state_dict()
    model = TwoLayers(swapped)
    model.load_state_dict(weights)
    groups = [
        {"params": [p for name, p in model.named_parameters() if name.endswith("weight")]},
        {"params": [p for name, p in model.named_parameters() if name.endswith("bias")], "lr": 0.01},
    ]
    return model, OPTIMIZERS[kind](groups)


def advance(model: TwoLayers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.second(torch.tanh(model.first(x))).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_five_steps_and_five_more_equal_ten(tmp_path: Path, kind: str, swapped: bool) -> None:
    model, optimizer = build(kind)
    advance(model, optimizer, range(10))

    half, half_optimizer = build(kind)
    advance(half, half_optimizer, range(5))
    ckpt.save_state(tmp_path, optimizer_moments([half_optimizer], [*half.named_parameters()]))

    resumed, resumed_optimizer = build(kind, swapped)
    resumed.load_state_dict(half.state_dict())
    set_optimizer_moments([resumed_optimizer], [*resumed.named_parameters()], ckpt.load_state(tmp_path))
    resumed_optimizer.param_groups[0]["lr"] = half_optimizer.param_groups[0]["lr"]  # of a schedule
    advance(resumed, resumed_optimizer, range(5, 10))

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(resumed.named_parameters())[name])


def test_a_state_of_wider_type_than_its_parameter_is_not_rounded(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    precise = torch.tensor([1 / 3, 1e-9, 3.0])
    optimizer.state[weight]["momentum_buffer"] = precise
    ckpt.save_state(tmp_path, optimizer_moments([optimizer], [("w", weight)]))
    other = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    set_optimizer_moments([other], [("w", weight)], ckpt.load_state(tmp_path))
    assert torch.equal(other.state[weight]["momentum_buffer"], precise)


def test_moments_of_another_model_are_refused_and_nothing_changed() -> None:
    model, optimizer = build("adamw")
    advance(model, optimizer, range(2))
    saved, before = optimizer_moments([optimizer], [*model.named_parameters()]), dict(optimizer.state)
    renamed = [(f"other.{name}", p) for name, p in model.named_parameters()]
    with pytest.raises(InputError, match=r"moments of first\.bias: resume with the configuration of the run"):
        set_optimizer_moments([optimizer], renamed, saved)
    assert optimizer.state == before


# --- atomic folders ---


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ckpt.atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    def write(text: str, replace: bool) -> None:
        with ckpt.atomic_folder(tmp_path / "out", replace) as folder:
            (folder / "a").write_text(text)

    write("one", False)
    with pytest.raises(InputError, match="exists already: choose another name or delete it"):
        write("two", False)
    assert tree_of(tmp_path) == {"out/a": b"one"}
    write("two", True)
    assert tree_of(tmp_path) == {"out/a": b"two"}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in (".one.tmp-01230123", ".other.tmp-01230123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with ckpt.atomic_folder(tmp_path / "one") as one:
        with ckpt.atomic_folder(tmp_path / "two") as two:
            (two / "b").write_text("2")
        (one / "a").write_text("1")
    assert tree_of(tmp_path) == {"one/a": b"1", "two/b": b"2", ".other.tmp-01230123/half": b"x"}


def test_a_replacement_that_never_came_is_undone(tmp_path: Path) -> None:
    old = tmp_path / ".step_000001.old-aaaaaaaa"
    old.mkdir()
    (old / "a").write_text("1")
    ckpt.clean_leftovers(tmp_path)
    assert tree_of(tmp_path) == {"step_000001/a": b"1"}
    old.mkdir()
    ckpt.clean_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_kill_9_never_halves_a_checkpoint(tmp_path: Path) -> None:
    chance, whole, cut = random.Random(0), 0, 0
    for _ in range(4):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        writer = CONTEXT.Process(target=crash_work.write_checkpoints, args=(tmp_path, sender))
        writer.start()
        receiver.recv()
        time.sleep(chance.uniform(0.02, 0.25))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        whole += len(ckpt.list_checkpoints(tmp_path))
        cut += any(path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())
        for folder in ckpt.list_checkpoints(tmp_path):
            ckpt.verify_checkpoint(folder)
            state, policy = ckpt.load_state(folder), ckpt.load_state(folder / "policy")
            assert state["step"] == policy["step"]
            assert bool((state["weights"] == state["step"]).all())
    assert whole > 0
    assert cut > 0  # a kill in the middle of a write
    with ckpt.checkpoint_writer(tmp_path / "checkpoints" / "step_000009") as folder:
        ckpt.save_state(folder, {})
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
    assert ckpt.latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_000009"


def test_everything_is_on_the_disk_before_it_has_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []
    rename, step = os.rename, tmp_path / "step_000001"
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "rename", lambda *names: (events.append("rename"), rename(*names)))
    with ckpt.checkpoint_writer(step) as folder:
        (folder / "policy").mkdir()
        ckpt.save_state(folder / "policy", {"weights": torch.ones(2)})
    renamed = events.index("rename")
    assert {path.stat().st_ino for path in (step, *step.rglob("*"))} <= {*events[:renamed]}
    assert events[renamed + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("call", ["rename", "fsync", "flock"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_crash_inside_a_replacement_loses_nothing(tmp_path: Path, call: str, nth: int) -> None:
    """The process dies in the nth rename, fsync or lock of a replacing save: the old or the new one is whole."""
    target = tmp_path / "checkpoints" / "step_000001"
    with ckpt.checkpoint_writer(target) as folder:
        ckpt.save_state(folder, {"value": 1})
    code = exit_code(crash_work.replace_and_die, target, call, nth)
    assert code == (0 if (call, nth) == ("flock", 2) else -signal.SIGKILL)  # it locks once
    ckpt.clean_leftovers(target.parent)
    latest = ckpt.latest_checkpoint(tmp_path)
    assert latest == target
    ckpt.verify_checkpoint(latest)
    assert ckpt.load_state(latest)["value"] == (2 if code == 0 else 1)
    assert [p.name for p in target.parent.iterdir()] == ["step_000001"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"step_000001: cannot be written: the disk is full \(3 MiB free\): free some space"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "step_000001: cannot be written: permission denied"),
        (errno.EROFS, "permission denied"),
    ],
)
def test_a_full_disk_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    def save() -> None:
        with ckpt.checkpoint_writer(tmp_path / "step_000001") as folder:
            ckpt.save_state(folder, {"a": torch.ones(3)})

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(ckpt, "_free_bytes", lambda path: 3 * 2**20)
    with pytest.raises(InputError, match=message) as caught:
        save()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_safetensors_on_a_full_disk_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").symlink_to("/dev/full")
    with pytest.raises(InputError, match="the disk is full"):
        ckpt.save_state(tmp_path, {"a": "x" * 100_000})


def test_the_system_error_inside_a_safetensors_error_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise atomic_io.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(atomic_io, "save_file", full)
    with pytest.raises(InputError, match=r"state\.safetensors: cannot be written: the disk is full"):
        ckpt.save_state(tmp_path, {"a": torch.ones(1)})


# --- checkpoints of a run ---


def write_steps(run: Path, *steps: int) -> None:
    for step in steps:
        with ckpt.checkpoint_writer(run / "checkpoints" / f"step_{step:06d}") as folder:
            ckpt.save_state(folder, {"step": step})


def steps_of(run: Path) -> list[int | None]:
    return [ckpt.checkpoint_step(folder) for folder in ckpt.list_checkpoints(run)]


def test_latest_is_by_number_and_skips_what_is_not_whole(tmp_path: Path) -> None:
    assert ckpt.latest_checkpoint(tmp_path) is None
    write_steps(tmp_path, 5, 1_000_000, 200)
    (tmp_path / "checkpoints" / "step_9000000").mkdir()
    (tmp_path / "checkpoints" / ".step_2000000.tmp-aaaaaaaa").mkdir()
    (tmp_path / "checkpoints" / "step_best").mkdir()
    assert steps_of(tmp_path) == [5, 200, 1_000_000]
    latest = ckpt.latest_checkpoint(tmp_path)
    assert latest is not None
    assert ckpt.load_state(latest) == {"step": 1_000_000}


def test_prune_keeps_the_last_and_the_chosen(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    deleted = ckpt.prune_checkpoints(tmp_path, keep_last=2, keep={2})
    assert [folder.name for folder in deleted] == ["step_000001", "step_000003"]
    assert steps_of(tmp_path) == [2, 4, 5]
    ckpt.prune_checkpoints(tmp_path, keep_last=0)
    assert steps_of(tmp_path) == [5]


def test_every_kind_of_damage_is_refused_with_one_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_000001"
    ckpt.verify_checkpoint(folder)
    file = folder / "state.json"
    whole = file.read_bytes()

    def refusal() -> str:
        with pytest.raises(InputError) as caught:
            ckpt.verify_checkpoint(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file.write_bytes(whole[:-3])
    assert refusal() == f"{file}: has {len(whole) - 3} of {len(whole)} bytes: use another checkpoint"
    file.write_bytes(whole.replace(b"1", b"2"))
    assert refusal() == f"{file}: was changed after it was saved: use another checkpoint"
    file.unlink()
    assert refusal() == f"{file}: is missing from the checkpoint: use another one"
    (folder / ckpt.SEAL).write_text("[]")
    assert "truncated or not a seal" in refusal()
    (folder / ckpt.SEAL).unlink()
    assert "not a whole checkpoint" in refusal()
    folder = tmp_path / "nothing"
    assert "no such checkpoint" in refusal()


def test_fingerprints_follow_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    one = ckpt.fingerprint(tmp_path / "a")
    assert one["name"] == "a"
    assert one["bytes"] == 1
    assert ckpt.fingerprint(tmp_path / "a") == one
    assert ckpt.fingerprint(tmp_path / "a" / "x")["sha256"] == ckpt.file_sha256(tmp_path / "a" / "x")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert ckpt.fingerprint(tmp_path / "a")["sha256"] != one["sha256"]
