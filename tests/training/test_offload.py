"""A card that holds one policy at a time: what is computed, what is kept where, and who keeps it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import processes
import pytest
import torch
from processes import Threads, ThreadWire, assert_begin_alike, finish, rows, start
from safetensors.torch import load_file

from lvrpo.cli import main
from lvrpo.errors import ContractError, InputError, LostProcessError
from lvrpo.policies.base import in_place
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.identity import judge_identity
from lvrpo.training.config import TrainConfig
from lvrpo.training.contract import weights_changed
from lvrpo.training.guard import roll_back
from lvrpo.training.methods import objectives_of
from lvrpo.training.objective import KINDS, Advantages, GroupAdvantages, Metrics, Policies
from lvrpo.training.offload import Offloaded, Shards, owners
from lvrpo.training.setup import open_policy
from lvrpo.training.state import TrainState
from lvrpo.training.team import Leader, Setup, Team, serve
from lvrpo.training.trainer import Trainer, train_step
from lvrpo.training.wire import Wire
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
    writers = [Shards(lively_policy(), config, wire) for wire in wires(2)]
    folder = Path("state")
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for shards in writers:
        for own in (shards.live, shards.kept["average"], shards.kept["old"]):
            for tensor in own.values():
                tensor.detach().normal_(generator=generator)
        for parameter in shards.live.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        shards.optimizers[0].step(0)
        shards._save(folder / f"part_{shards.wire.rank:03d}")
    readers = [Shards(lively_policy(1), config, wire) for wire in wires(count)]
    for shards in readers:
        shards.load_own(folder)
    for name in ("live", "average", "old"):
        written, read = (
            {key: t for shards in everybody for key, t in shards.kept[name].items()} for everybody in (writers, readers)
        )
        assert set(written) == set(read)
        assert all(torch.equal(tensor, written[key]) for key, tensor in read.items())
    written, read = (
        {key: entries for shards in everybody for key, entries in shards.optimizers[0].moments().items()}
        for everybody in (writers, readers)
    )
    assert set(written) == set(read)
    assert all(torch.equal(t, written[key][name]) for key, entries in read.items() for name, t in entries.items())


def test_a_state_of_other_weights_is_refused(lively_policy: Callable[..., TinyPolicy]) -> None:
    config = TrainConfig.model_validate({"offload": True, "device": "cpu"})
    Path("state").mkdir()
    first, _ = (Shards(lively_policy(), config, wire) for wire in wires(2))
    first._save(Path("state/part_000"))
    with pytest.raises(InputError, match=r"^state: the checkpoint lacks .*: resume with the configuration of the run$"):
        Shards(lively_policy(), config, wires(1)[0]).load_own(Path("state"))


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


def wires(size: int) -> list[ThreadWire]:
    threads = Threads(size)
    return [ThreadWire(threads, rank) for rank in range(size)]


def together(size: int, policy: Callable[[], TinyPolicy], config: TrainConfig) -> tuple[Leader, TrainState, list[Any]]:
    """A run on so many processes, here threads; their shards, and the threads of the others."""
    ends, shards = wires(size), cast(list[Any], [None] * size)
    policies = [policy() for _ in ends]  # weights are drawn from random numbers that threads share

    def build(rank: int) -> tuple[Policies, Shards | None]:
        state = TrainState.start(policies[rank], config, ends[rank])
        shards[rank] = state.shards
        return state.policies, state.shards

    others = [
        threading.Thread(target=lambda rank=rank: serve(ends[rank], lambda _: build(rank)), daemon=True)
        for rank in range(1, size)
    ]
    for thread in others:
        thread.start()
    state = TrainState.start(policies[0], config, ends[0])
    shards[0] = state.shards
    return Leader(ends[0], Setup(config, "start"), state.policies, state.shards), state, [shards, others]


SMALL = {
    "offload": True,
    "rollout": {"group_size": 4, "num_steps": 3},
    "optimizer": {"warmup_steps": 0},
    "limits": {"backward_members": 1},
    "device": "cpu",
}


def stepped(state: TrainState, groups: Sequence[Group], A: Advantages, config: TrainConfig, team: Team) -> Metrics:
    objectives = objectives_of(config, state.policies.live.writes)
    return train_step(state.policies, objectives, state.optimizers, groups, A, config, 0, team=team)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_step_what_they_keep_as_one_would(
    size: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    config = TrainConfig.model_validate(SMALL)
    alone, begun = TrainState.start(lively_policy(), config), dict(lively_policy().named_parameters())
    team, state, (shards, others) = together(size, lively_policy, config)
    with team:
        groups = team.shared(state.policies).live.sample(prompts, config.sampling(0), list(range(len(prompts))))
        A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
        advantages = dict.fromkeys(KINDS, A)
        assert not weights_changed(state.policies.live, state.policies.reference)
        found, expected = (
            train_step(
                each.policies,
                objectives_of(config, each.policies.live.writes),
                each.optimizers,
                groups,
                advantages,
                config,
                0,
                team=by,
            ).means()
            for each, by in ((state, team), (alone, Team(alone.shards)))
        )
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert weights_changed(state.policies.live, state.policies.reference)
        for each in (state, alone):
            each.average("average", 0.5)
            each.average("old", 0.0)
        assert alone.shards is not None
        for name, tensors in alone.shards.kept.items():
            owned = [set(own.kept[name]) for own in shards]
            assert set.union(*owned) == set(tensors)
            assert sum(map(len, owned)) == len(tensors)
            for own in shards:
                for key, tensor in own.kept[name].items():  # Muon's steps are rounded to bfloat16
                    moved = (tensors[key] - begun[key]).norm()
                    assert (tensor - tensors[key]).norm() <= 0.02 * moved
                    assert (moved > 0) == (name != "reference")
        modules = [dict(cast(Any, own.policy).named_parameters()) for own in shards]
        for name in ("live", "average", "reference"):
            in_place(getattr(state.policies, name))
            whole = {key: tensor for own in shards for key, tensor in own.kept[name].items()}
            team.shared(state.policies).live.timestep_shift()  # asks for no weights: they stay
            shards[0].together("changed")  # by now everybody has them
            for module in modules:
                assert all(torch.equal(module[key], tensor) for key, tensor in whole.items())
        assert all(parameter.grad is None for module in modules for parameter in module.values())
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_in_one_process_is_raised_in_the_first(
    rank: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    config = TrainConfig.model_validate(SMALL)
    team, state, (shards, others) = together(2, lively_policy, config)
    A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(prompts)))

    def failing(*_: object) -> Any:
        raise RuntimeError("out of memory")

    with team:
        groups = team.shared(state.policies).live.sample(prompts, config.sampling(0), list(range(len(prompts))))
        shards[rank].policy.velocity = failing
        where = "" if rank == 0 else "process 1 of 2: "
        with pytest.raises(ContractError, match=f"^{where}RuntimeError: out of memory$"):
            train_step(
                state.policies,
                objectives_of(config, state.policies.live.writes),
                state.optimizers,
                groups,
                dict.fromkeys(KINDS, A),
                config,
                0,
                team=team,
            )
        Path("full").write_text("a file")
        with pytest.raises(ContractError, match="NotADirectoryError"):
            shards[0].together("save", Path("full"))
    others[0].join(60)
    assert not others[0].is_alive()


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_that_cannot_be_brought_stop_nobody_in_the_middle(
    rank: int, lively_policy: Callable[[], TinyPolicy]
) -> None:
    team, state, (shards, others) = together(2, lively_policy, TrainConfig.model_validate(SMALL))

    def full(_: str) -> None:
        raise RuntimeError("out of memory")

    with team:
        shards[rank]._copy_own = full
        with pytest.raises(ContractError, match=r"RuntimeError: out of memory$"):
            in_place(state.policies.live)
        del shards[rank]._copy_own
        assert in_place(state.policies.live) is shards[0].policy
    others[0].join(60)
    assert not others[0].is_alive()


def test_who_lost_another_process_does_not_speak_to_it() -> None:
    class Broken(Wire):
        size = 2
        said: ClassVar[list[object]] = []

        def broadcast_object(self, message: Any = None) -> Any:
            self.said.append(message)

        def all_gather_objects(self, message: Any) -> list[Any]:
            return [message, message]

    policy = cast(Any, object())
    with pytest.raises(LostProcessError), Leader(Broken(), Setup(TrainConfig(), ""), Policies(*[policy] * 4)):
        raise LostProcessError("another process is gone")
    assert [type(message) for message in Broken.said] == [Setup]


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_has_the_policy_as_exact_as_it_is_kept(size: int, lively_policy: Callable[[], TinyPolicy]) -> None:
    team, state, (shards, _) = together(size, lively_policy, TrainConfig.model_validate(SMALL))
    with team:
        for own in shards:
            for name, parameter in own.parameters.items():
                parameter.data = parameter.data.bfloat16()
                if name in own.live:
                    own.kept["average"][name].add_(1e-4)
        in_place(state.policies.average)
        shards[0].write("average", Path("policy"))
    saved = load_file("policy/model.safetensors")
    for own in shards:
        assert {parameter.dtype for parameter in own.parameters.values()} == {torch.bfloat16}
        assert own.here == "average"
        for name, tensor in own.kept["average"].items():
            assert torch.equal(saved[name], tensor)
            assert saved[name].dtype == torch.float32


def test_gradients_that_are_not_finite_anywhere_leave_all_weights(lively_policy: Callable[[], TinyPolicy]) -> None:
    config = TrainConfig.model_validate(SMALL)
    team, state, (shards, _) = together(2, lively_policy, config)
    with team:
        for own in shards:
            for parameter in own.live.values():
                parameter.grad = torch.ones_like(parameter)
        next(p for name, p in shards[1].live.items() if ".reading." in name).grad.fill_(torch.nan)
        norms = state.optimizers[0].step(0)
        assert norms["understand"] != norms["understand"]
        assert norms["generate"] == pytest.approx(
            sum(p.numel() for p in lively_policy().parameter_groups()["generate"]) ** 0.5
        )
        assert not weights_changed(state.policies.live, state.policies.reference)


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
