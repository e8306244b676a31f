"""Several processes on one run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gradients_only import differentiate
from processes import OPTIONS, Threads, ThreadWire, assert_begin_alike, finish, rows, start
from safetensors.torch import load_file

from lvrpo.cli import main
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.methods import objectives_of
from lvrpo.training.microbatches import microbatches
from lvrpo.training.objective import KINDS, GroupAdvantages, Metrics, Policies
from lvrpo.training.team import ALONE, Leader, Setup, Shared, serve
from lvrpo.training.wire import packed, unpacked
from lvrpo.types import Prompt


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "checkpoints" / "step_000006" / "state" / "state.safetensors")
    tree = json.loads((run / "checkpoints" / "step_000006" / "state" / "state.json").read_text(encoding="utf-8"))
    return {name: state[place["$tensor"]] for name, place in tree["policies"]["live"].items()}


def test_two_processes_compute_what_one_does_and_resume_bit_for_bit(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
    both = start(*options, "--out", "both")
    assert main([*options, "--out", "alone"]) == 0
    finish(both)
    alone, shared = rows(Path("alone")), rows(Path("both"))
    assert_begin_alike(alone, shared)
    for name in ("grad_norm/understand", "grad_norm/generate", "grad_norm/shared"):  # of the last part of a step
        assert shared[1][name] == pytest.approx(alone[1][name], 2e-4), name
    own, begun, both_weights = (
        weights(Path("alone")),
        load_file(small_base / "model.safetensors"),
        weights(Path("both")),
    )
    apart = sum(float((both_weights[name] - own[name]).square().sum()) for name in own) ** 0.5
    moved = sum(float((own[name] - begun[name]).square().sum()) for name in own) ** 0.5
    assert apart < 0.05 * moved

    halved = start(*options, "--out", "halved")
    metrics = Path("halved/metrics.jsonl")
    while halved.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.02)
    os.kill(int(Path("halved/.lock").read_text()), signal.SIGINT)
    assert "go on with: lvrpo train --resume halved" in finish(halved, succeeds=False)
    assert 1 <= rows(Path("halved"))[-1]["step"] < 6
    finish(start("train", "--resume", "halved", "--no-evaluate"))
    assert rows(Path("halved")) == shared
    again = weights(Path("halved"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in both_weights.items())


def test_bad_input_is_one_line_and_nobody_waits(small_base: Path) -> None:
    output = finish(start("train", "quickstart", f"policy={small_base}", "stepz=3", "--out", "run"), succeeds=False)
    assert output.count("error: stepz") == 1
    assert not Path("run").exists()


def test_other_commands_are_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["pretrain", "pretrain"]) == 2
    assert capsys.readouterr().err == (
        "error: --nproc-per-node 8: lvrpo pretrain is one process: start it without torchrun\n"
    )


def helped(size: int, build: Callable[[int, Setup], Policies]) -> tuple[ThreadWire, list[threading.Thread]]:
    threads = Threads(size)

    def help_out(rank: int) -> None:
        serve(ThreadWire(threads, rank), lambda setup: (build(rank, setup), None))

    others = [threading.Thread(target=help_out, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in others:
        thread.start()
    return ThreadWire(threads, 0), others


def four(policy: TinyPolicy) -> Policies:
    return Policies(policy, policy.frozen(), policy.frozen(), policy.frozen())


@pytest.mark.parametrize("size", [2, 3])
def test_weights_that_moved_are_sent_and_gradients_are_those_of_all(
    size: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    config = TrainConfig.model_validate({"rollout": {"group_size": 4, "num_steps": 3}, "device": "cpu"})
    own, policies, single = lively_policy(), [four(lively_policy()) for _ in range(1, size)], lively_policy()

    def build(rank: int, setup: Setup) -> Policies:
        assert setup == Setup(config, "start")
        return policies[rank - 1]

    wire, others = helped(size, build)
    for each in (own, single):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter += 0.01  # the others start from other weights
    begun = lively_policy()  # the reference is where all began
    mine, alone = replace(four(own), reference=begun), replace(four(single), reference=begun)
    with torch.no_grad():
        for moved in (mine.old, alone.old):
            for parameter in cast(Any, moved).parameters():
                parameter -= 0.02
    with Leader(wire, Setup(config, "start"), mine) as team:
        groups = team.shared(mine).live.sample(prompts, config.sampling(0), list(range(len(prompts))))
        expected = single.sample(prompts, config.sampling(0), list(range(len(prompts))))
        for group, other in zip(groups, expected, strict=True):
            assert [t.text for t in group.trajectories] == [t.text for t in other.trajectories]
        A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
        advantages = dict.fromkeys(KINDS, A)
        found = differentiate(mine, groups, advantages, config, 0, team=team).means()
        alike = differentiate(alone, groups, advantages, config, 0).means()
    for thread in others:
        thread.join(60)
    assert wire.closed
    assert found == pytest.approx(alike, rel=1e-4, abs=1e-6)
    for parameter, other in zip(own.parameters(), single.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None and other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
    for helping in policies:
        assert all(parameter.grad is None for parameter in helping.live.parameters())
        for name in ("live", "old"):
            sent, had = getattr(helping, name).state_dict(), getattr(mine, name).state_dict()
            assert all(torch.equal(tensor, had[key]) for key, tensor in sent.items())


@pytest.mark.parametrize("error", [InputError("too long: shorten it"), RuntimeError("out of memory")])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_in_another_process_is_raised_in_the_first(
    rank: int, error: Exception, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    def failing(*_: object) -> Any:
        raise error

    everybody = [four(lively_policy()) for _ in range(2)]
    broken: Any = everybody[rank].live
    broken.sample = broken.velocity = failing
    config = TrainConfig.model_validate({"rollout": {"group_size": 4, "num_steps": 3}, "device": "cpu"})
    wire, others = helped(2, lambda rank, _: everybody[rank])
    mine = everybody[0]
    words = str(error) if isinstance(error, InputError) else f"RuntimeError: {error}"
    expected = type(error) if isinstance(error, InputError) else ContractError
    match = words if rank == 0 else f"process 1 of 2: {words}"
    groups = lively_policy().sample(prompts, config.sampling(0), list(range(len(prompts))))
    A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
    with Leader(wire, Setup(config, ""), mine) as team:
        live = team.shared(mine).live
        with pytest.raises(expected, match=f"^{match}$"):
            live.sample(prompts, config.sampling(0), list(range(len(prompts))))
        with pytest.raises(expected, match=f"^{match}$"):
            differentiate(mine, groups, dict.fromkeys(KINDS, A), config, 0, team=team)
    others[0].join(60)
    assert not others[0].is_alive()


def test_a_process_that_cannot_load_ends_the_run(lively_policy: Callable[[], TinyPolicy]) -> None:
    policies = four(lively_policy())

    def build(rank: int, setup: Setup) -> Policies:
        if rank == 2:
            raise InputError("start: no such folder")
        return policies

    wire, others = helped(3, build)
    with pytest.raises(InputError, match=r"^process 2 of 3: start: no such folder$"):
        Leader(wire, Setup(TrainConfig(), "start"), policies)
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()


class InTurn:
    """A leader whose processes are all this one."""

    def __init__(self, policy: object, size: int) -> None:
        self.policy, self.size = policy, size
        self.asked: list[list[Any]] = []

    def call(self, name: str, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        self.asked.append([given is not None for given in arguments])
        sent = [unpacked(packed(given)) for given in arguments]
        return [None if given is None else getattr(self.policy, method)(*given) for given in sent]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_shared_policies_answer_in_the_order_of_the_question(
    size: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = lively_policy()
    leader = InTurn(policy, size)
    shared = Shared(cast(Any, leader), "live", policy)
    sampling = Sampling(group_size=2, max_new_tokens=3, num_steps=3)
    seeds = list(range(len(prompts)))
    for prompt, group, other in zip(
        prompts, shared.sample(prompts, sampling, seeds), policy.sample(prompts, sampling, seeds), strict=True
    ):
        assert group.prompt is prompt
        for own, single in zip(group.trajectories, other.trajectories, strict=True):
            assert (own.member, own.seed, own.text) == (single.member, single.seed, single.text)
            if own.image is not None and single.image is not None:
                torch.testing.assert_close(own.image, single.image)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["red", "blue", "two circle", "one", "red circle"]
    contexts = [(image, "what is it")] * 5
    torch.testing.assert_close(shared.text_logprob(contexts, texts), policy.text_logprob(contexts, texts))
    pictures = [(text,) for text in texts], [image] * 5, 2, list(range(5))
    for times in ({}, {"times": (0.2, 0.6)}):
        torch.testing.assert_close(
            shared.image_logprob(*pictures, **times), policy.image_logprob(*pictures, **times), rtol=1e-4, atol=1e-2
        )
    assert leader.asked[0] == [rank < len(prompts) for rank in range(size)]
    assert shared.image_size == policy.image_size


@pytest.mark.parametrize("method", ["nft", "dpo"])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_members_are_dealt_once_and_pairs_stay_together(
    method: str, count: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = lively_policy()
    config = TrainConfig.model_validate(
        {
            "flow": {"kind": method},
            "rollout": {"group_size": 4},
            "limits": {"backward_members": 3},
            "device": "cpu",
        }
    )
    drawn = [prompt for prompt in prompts if prompt.task == "generate"]
    groups = policy.sample(drawn, Sampling(group_size=4, num_steps=2), list(range(len(drawn))))
    objective = next(o for o in objectives_of(config, policy.writes) if o.kind == "flow")
    A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
    chosen = objective.choose(groups, A)
    dealt = microbatches(policy, [objective], groups, dict.fromkeys(KINDS, A), config, 0, Metrics(), count)
    assert len(dealt) == count
    members = [member for hand in dealt for work in hand for member in work.members]
    assert sorted(id(m.trajectory) for m in members) == sorted(id(m.trajectory) for m in chosen)
    assert sum(work.share for hand in dealt for work in hand) == pytest.approx(1)
    for hand in dealt:
        for work in hand:
            ids = [member.trajectory.prompt.id for member in work.members]
            assert ids[:: objective.unit] == ids[objective.unit - 1 :: objective.unit]
    sizes = [sum(len(work.members) for work in hand) for hand in dealt]
    assert max(sizes) - min(sizes) <= objective.unit


def test_a_run_alone_asks_nobody(lively_policy: Callable[[], TinyPolicy]) -> None:
    policy = lively_policy()
    policies = Policies(policy, policy, policy, policy)
    assert ALONE.size == 1
    assert ALONE.shared(policies) is policies
