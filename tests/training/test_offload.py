"""A card that holds one policy at a time: what is computed, what is kept where, and who keeps it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import processes
import pytest
import torch
from processes import assert_begin_alike, finish, in_ranks, rows, start
from safetensors.torch import load_file

from lvrpo.cli import main
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import in_place
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.identity import judge_identity
from lvrpo.training.config import TrainConfig
from lvrpo.training.contract import weights_changed
from lvrpo.training.data_parallel import sample_own
from lvrpo.training.guard import roll_back
from lvrpo.training.methods import objectives_of
from lvrpo.training.objective import KINDS, Advantages, GroupAdvantages, Metrics
from lvrpo.training.offload import Offloaded, Shards, owners
from lvrpo.training.setup import open_policy
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import Trainer, train_step
from lvrpo.types import Group, Prompt

OPTIONS = (*processes.OPTIONS, "text.lr_scale=0.5")
LAST = "checkpoints/step_000006"


def kept(run: Path, checkpoint: str = LAST) -> dict[str, dict[str, torch.Tensor]]:
    """The float32 weights of every policy that moves, from all parts of a checkpoint."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    state = run / checkpoint / "state"
    for folder in sorted(state.glob("part_*")) or [state]:
        tensors = load_file(folder / "state.safetensors")
        tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for policy, places in tree["policies"].items():
            found.setdefault(policy, {}).update({name: tensors[place["$tensor"]] for name, place in places.items()})
    return found


def same(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(tensor, one[policy][name]) for policy, own in other.items() for name, tensor in own.items())


@pytest.mark.parametrize("method", ["flow.kind=nft", "flow.kind=dpo"])
def test_one_process_computes_the_bits_of_a_run_that_keeps_everything(method: str, small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, method, "steps=3", "--no-evaluate")
    for name, offload in (("whole", "false"), ("offloaded", "true")):
        assert main([*options, f"offload={offload}", "--out", name]) == 0
    assert rows(Path("offloaded")) == rows(Path("whole"))
    for file in ("model.safetensors", "config.json"):
        one, other = (Path(run) / "checkpoints/step_000003" / file for run in ("whole", "offloaded"))
        assert one.read_bytes() == other.read_bytes()
    whole, offloaded = (kept(Path(run), "checkpoints/step_000003") for run in ("whole", "offloaded"))
    assert set(whole) == set(offloaded) == ({"live", "average", "old"} if "nft" in method else {"live", "average"})
    assert same(whole, offloaded)
    assert len(offloaded["live"]) == len(whole["live"]) - sum("inv_freq" in name for name in whole["live"])


def test_two_processes_divide_a_run_and_resume_bit_for_bit(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
    both = start(*options, "offload=true", "--out", "both")
    assert main([*options, "--out", "alone"]) == 0
    finish(both)
    alone, shared = rows(Path("alone")), rows(Path("both"))
    assert_begin_alike(alone, shared)
    parts = sorted(Path("both", LAST, "state").glob("part_*"))
    sizes = [sum(t.numel() for t in load_file(part / "state.safetensors").values()) for part in parts]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)  # weights are dealt evenly; some have one moment, some two
    begun, own, together = load_file(small_base / "model.safetensors"), kept(Path("alone")), kept(Path("both"))
    for policy in ("live", "average", "old"):
        apart = sum(float((t - own[policy][name]).square().sum()) for name, t in together[policy].items()) ** 0.5
        moved = sum(float((own[policy][name] - begun[name]).square().sum()) for name in together[policy]) ** 0.5
        assert apart < 0.05 * moved

    halved = start(*options, "offload=true", "--out", "halved")
    metrics = Path("halved/metrics.jsonl")
    while halved.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.02)
    os.kill(int(Path("halved/.lock").read_text()), signal.SIGINT)
    assert "go on with: lvrpo train --resume halved" in finish(halved, succeeds=False)
    finish(start("train", "--resume", "halved", "--no-evaluate"))
    assert rows(Path("halved")) == shared
    assert same(kept(Path("halved")), together)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_state_is_read_by_any_number_of_processes(count: int, lively_policy: Callable[..., TinyPolicy]) -> None:
    config = TrainConfig.model_validate({"offload": True, "device": "cpu"})
    folder = Path("state")
    folder.mkdir()
    policies = [lively_policy() for _ in range(2)]

    def write(rank: int) -> Shards:
        shards, generator = Shards(policies[rank], config), torch.Generator().manual_seed(rank)
        for own in (shards.live, shards.kept["average"], shards.kept["old"]):
            for tensor in own.values():
                tensor.detach().normal_(generator=generator)
        for parameter in shards.live.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        shards.step(0, 0, 1.0)
        shards.save(folder)
        return shards

    def read(rank: int) -> Shards:
        shards = Shards(others[rank], config)
        shards.load(folder)
        return shards

    writers = in_ranks(2, write)
    others = [lively_policy(1) for _ in range(count)]
    readers = in_ranks(count, read)
    for name in ("live", "average", "old"):
        written, found = (
            {key: t for shards in everybody for key, t in shards.kept[name].items()} for everybody in (writers, readers)
        )
        assert set(written) == set(found)
        assert all(torch.equal(tensor, written[key]) for key, tensor in found.items())
    written, found = (
        {key: entries for shards in everybody for key, entries in shards.optimizers[0].moments().items()}
        for everybody in (writers, readers)
    )
    assert set(written) == set(found)
    assert all(torch.equal(t, written[key][name]) for key, entries in found.items() for name, t in entries.items())


def test_a_state_of_other_weights_is_refused(lively_policy: Callable[..., TinyPolicy]) -> None:
    config = TrainConfig.model_validate({"offload": True, "device": "cpu"})
    Path("state").mkdir()
    policies = [lively_policy() for _ in range(2)]
    in_ranks(2, lambda rank: Shards(policies[rank], config).save(Path("state")))
    shutil.rmtree("state/part_001")
    with pytest.raises(InputError, match=r"^state: the checkpoint lacks .*: resume with the configuration of the run$"):
        Shards(lively_policy(), config).load(Path("state"))


def test_a_part_that_was_changed_is_refused(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "steps=1", "--no-evaluate", "offload=true")
    assert main([*options, "--out", "run"]) == 0
    seal = json.loads(Path("run/checkpoints/step_000001/checkpoint.json").read_text(encoding="utf-8"))
    assert "state/part_000/checkpoint.json" in seal["files"]
    assert "state/part_000/state.safetensors" not in seal["files"]
    path = Path("run/checkpoints/step_000001/state/part_000/state.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for file in ("summary.json", "policy.json"):
        Path("run", file).unlink()
    with pytest.raises(InputError, match=r"part_000/state.safetensors: was changed after it was saved"):
        Trainer.resume(Path("run"))


SMALL = {
    "offload": True,
    "rollout": {"group_size": 4, "num_steps": 3},
    "optimizer": {"warmup_steps": 0},
    "limits": {"backward_members": 1},
    "device": "cpu",
}


def advantages_of(groups: Sequence[Group]) -> Advantages:
    return dict.fromkeys(KINDS, GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups))))


def stepped(state: TrainState, prompts: list[Prompt], config: TrainConfig) -> Metrics:
    groups = sample_own(state.policies.live, prompts, config.sampling(0), list(range(len(prompts))))
    objectives = objectives_of(config, state.policies.live.writes)
    return train_step(state.policies, objectives, state.optimizers, groups, advantages_of(groups), config, 0)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_step_what_they_keep_as_one_would(
    size: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    config = TrainConfig.model_validate(SMALL)
    alone, begun = TrainState.start(lively_policy(), config), dict(lively_policy().named_parameters())
    policies = [lively_policy() for _ in range(size)]  # weights are drawn from random numbers that threads share

    def work(rank: int) -> tuple[dict[str, float], Shards]:
        state = TrainState.start(policies[rank], config)
        assert not weights_changed(state.policies.live, state.policies.reference)
        found = stepped(state, prompts, config).means()
        assert weights_changed(state.policies.live, state.policies.reference)
        state.average("average", 0.5)
        state.average("old", 0.0)
        shards = state.shards
        assert shards is not None
        for name in ("live", "average", "reference"):
            in_place(getattr(state.policies, name))
            state.policies.live.timestep_shift()  # asks for no weights: they stay
            module = dict(cast(Any, shards.policy).named_parameters())
            assert all(torch.equal(module[key], tensor) for key, tensor in shards.kept[name].items())
            assert all(parameter.grad is None for parameter in module.values())
        return found, shards

    found = in_ranks(size, work)
    expected = stepped(alone, prompts, config).means()
    alone.average("average", 0.5)
    alone.average("old", 0.0)
    for metrics, _ in found:
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert alone.shards is not None
    for name, tensors in alone.shards.kept.items():
        owned = [set(own.kept[name]) for _, own in found]
        assert set.union(*owned) == set(tensors)
        assert sum(map(len, owned)) == len(tensors)
        for _, own in found:
            for key, tensor in own.kept[name].items():  # Muon's steps are rounded to bfloat16
                moved = (tensors[key] - begun[key]).norm()
                assert (tensor - tensors[key]).norm() <= 0.02 * moved
                assert (moved > 0) == (name != "reference")


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("where", ["update", "placing", "saving"])
def test_what_fails_in_one_process_is_raised_in_all(
    where: str, broken: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    config = TrainConfig.model_validate(SMALL)
    policies = [lively_policy() for _ in range(2)]
    Path("full").write_text("a file")

    def failing(*_: object) -> Any:
        raise RuntimeError("out of memory")

    def work(rank: int) -> None:
        state = TrainState.start(policies[rank], config)
        shards = state.shards
        assert shards is not None
        if where == "saving":
            shards.save(Path("full"))
        if rank == broken:
            cast(Any, shards.policy).velocity = failing
            if where == "placing":
                cast(Any, shards)._copy_own = failing
        if where == "placing":
            in_place(state.policies.live)
        stepped(state, prompts, config)

    by = "" if broken == 0 or where == "saving" else "process 1 of 2: "
    said = "NotADirectoryError: .*" if where == "saving" else "RuntimeError: out of memory"
    for error in in_ranks(2, work):
        assert isinstance(error, ContractError)
        assert re.fullmatch(f"{by}{said}", str(error)), str(error)


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_has_the_policy_as_exact_as_it_is_kept(size: int, lively_policy: Callable[[], TinyPolicy]) -> None:
    config, policies = TrainConfig.model_validate(SMALL), [lively_policy() for _ in range(size)]

    def work(rank: int) -> Shards:
        state = TrainState.start(policies[rank], config)
        own = state.shards
        assert own is not None
        for name, parameter in own.parameters.items():
            parameter.data = parameter.data.bfloat16()
            if name in own.live:
                own.kept["average"][name].add_(1e-4)
        in_place(state.policies.average)
        own.write("average", Path("policy"))
        return own

    found = in_ranks(size, work)
    saved = load_file("policy/model.safetensors")
    for own in found:
        assert {parameter.dtype for parameter in own.parameters.values()} == {torch.bfloat16}
        assert own.here == "average"
        for name, tensor in own.kept["average"].items():
            assert torch.equal(saved[name], tensor)
            assert saved[name].dtype == torch.float32


def test_gradients_that_are_not_finite_anywhere_leave_all_weights(lively_policy: Callable[[], TinyPolicy]) -> None:
    config, policies = TrainConfig.model_validate(SMALL), [lively_policy() for _ in range(2)]

    def work(rank: int) -> dict[str, float]:
        state = TrainState.start(policies[rank], config)
        own = state.shards
        assert own is not None
        for parameter in own.live.values():
            parameter.grad = torch.ones_like(parameter)
        if rank == 1:
            gradient = next(p for name, p in own.live.items() if ".reading." in name).grad
            assert gradient is not None
            gradient.fill_(torch.nan)
        norms = state.optimizers[0].step(0)
        assert not weights_changed(state.policies.live, state.policies.reference)
        return norms

    for norms in in_ranks(2, work):
        assert norms["understand"] != norms["understand"]
        assert norms["generate"] == pytest.approx(
            sum(p.numel() for p in lively_policy().parameter_groups()["generate"]) ** 0.5
        )


def test_a_policy_that_is_offloaded_passes_for_itself(lively_policy: Callable[..., TinyPolicy]) -> None:
    config = TrainConfig.model_validate(SMALL)
    policy = lively_policy()
    identity = judge_identity(policy)
    state = TrainState.start(policy, config)
    assert state.shards is not None
    with torch.no_grad():
        for parameter in state.shards.live.values():
            parameter.add_(1)
    assert isinstance(state.policies.live, Offloaded)
    assert judge_identity(state.policies.live) != identity
    assert judge_identity(state.policies.reference) == identity
    assert state.policies.live.writes == ("text", "flow")
    assert state.shards.here == "reference"
    in_place(state.policies.live)
    assert judge_identity(state.policies.reference) == identity
    assert state.shards.here == "live"  # a reference stays what it is: it was not asked again
    with pytest.raises(AttributeError):
        _ = cast(Any, state.policies.live).no_such_thing


def test_a_rollback_brings_back_the_weights_of_a_checkpoint(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "steps=2", "--no-evaluate")
    assert main([*options, "offload=true", "--out", "run", "keep_checkpoints=9"]) == 0
    Path("run/summary.json").unlink()
    alignment = Trainer.resume(Path("run"))
    with alignment.run as run:
        state = alignment.state
        assert state.shards is not None
        before = {name: tensor.detach().clone() for name, tensor in state.shards.live.items()}
        cast(Any, state.policies.live).text_logprob([("red",)], ["red"])
        roll_back(alignment.config, run, state, 0)
        assert state.step == 2
        begun = load_file(small_base / "model.safetensors")
        assert all(torch.equal(tensor, begun[name]) for name, tensor in state.shards.live.items())
        assert any(not torch.equal(tensor, begun[name]) for name, tensor in before.items())
        assert not weights_changed(state.policies.live, state.policies.reference)
        assert torch.equal(
            dict(cast(Any, in_place(state.policies.live)).named_parameters())[(n := next(iter(begun)))], begun[n]
        )


def test_a_policy_can_be_shown_farther_than_it_went(lively_policy: Callable[[], TinyPolicy]) -> None:
    state = TrainState.start(lively_policy(), TrainConfig.model_validate(SMALL))
    assert state.shards is not None
    begun = {name: tensor.clone() for name, tensor in state.shards.live.items()}
    with torch.no_grad():
        for parameter in state.shards.live.values():
            parameter += 2.0**-20
    assert isinstance(state.policies.live, Offloaded)
    shown = dict(cast(Any, in_place(state.policies.live.farther())).named_parameters())
    for name, tensor in shown.items():
        torch.testing.assert_close(tensor, begun[name] + 2.0**-6, rtol=0, atol=2e-3)
    state.optimizers[0].step(0)
    assert state.shards.here is None  # what was shown went with the weights that it was of


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[7, 7, 7, 7, 1], [100, 1, 1, 1], list(range(1, 40)), []])
def test_keepers_have_about_as_much(count: int, sizes: Sequence[int]) -> None:
    named = {f"p{i}": size for i, size in enumerate(sizes)}
    found = owners(named, count)
    assert set(found) == set(named)
    loads = [sum(size for name, size in named.items() if found[name] == rank) for rank in range(count)]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert owners(dict(reversed(named.items())), count) == found


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
        ({"judge": {"kind": "average"}}, "offload=true with judge: would be one more policy"),
        ({"optimizer": {"kind": "adamw_8bit"}}, "offload=true with optimizer.kind=adamw_8bit: moments are on the host"),
        ({"gradient_audit": {"every": 5}}, "offload=true with gradient_audit.every=5: keeps a gradient per task"),
        ({"gradient_mixing": "pcgrad"}, "offload=true with gradient_mixing=pcgrad: keeps a gradient per task: use sum"),
    ],
)
def test_what_cannot_be_offloaded_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"offload": True, **options})
