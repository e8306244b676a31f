"""Several ranks on one run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from gradients_only import differentiate
from processes import OPTIONS, assert_begin_alike, finish, in_ranks, rows, start
from safetensors.torch import load_file

from lvrpo.cli import main
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.data_parallel import DataParallelPolicy
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.table import RewardConfig, RewardSource
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import sample_own, score_own
from lvrpo.training.methods import objectives_of
from lvrpo.training.microbatches import microbatches
from lvrpo.training.objective import KINDS, GroupAdvantages, Metrics, Microbatch, Policies
from lvrpo.types import Group, Prompt


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


@pytest.mark.slow
def test_processes_whose_agent_is_killed_save_and_end(small_base: Path) -> None:
    run = start("train", "quickstart", f"policy={small_base}", *OPTIONS, "steps=500", "--no-evaluate", "--out", "run")
    metrics = Path("run/metrics.jsonl")
    while run.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.1)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) == 2
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    last = rows(Path("run"))[-1]["step"]
    assert Path(f"run/checkpoints/step_{last:06d}").is_dir()
    assert run.stdout is not None
    run.stdout.close()


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


def four(policy: TinyPolicy) -> Policies:
    return Policies(policy, policy.frozen(), policy.frozen(), policy.frozen())


METHODS: dict[str, dict[str, Any]] = {
    "nft and grpo": {},
    "dpo": {"flow": {"kind": "dpo"}, "text": {"kind": "dpo"}},
    "pcgrad": {"gradient_mixing": "pcgrad"},
    "rescored": {"text": {"importance_cap": 2.0}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3, 9])
def test_the_gradients_of_all_ranks_are_those_of_one(
    size: int, method: str, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    """Nine ranks: some have no drawing, some nothing at all."""
    config = TrainConfig.model_validate(
        {"rollout": {"group_size": 4, "num_steps": 3}, "device": "cpu"} | METHODS[method]
    )
    policies = [four(lively_policy()) for _ in range(size + 1)]
    for each in policies:
        with torch.no_grad():
            for parameter in cast(Any, each.live).parameters():
                parameter += 0.01  # the reference is where all began

    def work(rank: int) -> tuple[list[Group], dict[str, float], list[torch.Tensor | None]]:
        mine = policies[rank]
        groups = sample_own(mine.live, prompts, config.sampling(0), list(range(len(prompts))))
        A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
        metrics = differentiate(mine, groups, dict.fromkeys(KINDS, A), config).means()
        return groups, metrics, [parameter.grad for parameter in cast(Any, mine.live).parameters()]

    found = in_ranks(size, work)
    policies[0] = policies[size]
    groups, metrics, gradients = work(0)
    for p, group in enumerate(groups):
        owner = [own[p] for own, _, _ in found if own[p].trajectories]
        assert len(owner) == 1
        assert [t.text for t in owner[0].trajectories] == [t.text for t in group.trajectories]
    for _, logged, own in found:
        assert logged == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for gradient, expected in zip(own, gradients, strict=True):
            assert (gradient is None) == (expected is None)
            if gradient is not None and expected is not None:
                assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7
    one = found[0][2]
    assert all(
        (a is None and b is None) or torch.equal(cast(Any, a), cast(Any, b))
        for _, _, own in found[1:]
        for a, b in zip(one, own, strict=True)
    )


@pytest.mark.parametrize("error", [InputError("too long: shorten it"), RuntimeError("out of memory")])
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("where", ["sample", "velocity", "reward"])
def test_what_fails_in_one_rank_is_raised_in_all(
    where: str, broken: int, error: Exception, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    def failing(*_: object, **__: object) -> Any:
        raise error

    config = TrainConfig.model_validate({"rollout": {"group_size": 4, "num_steps": 3}, "device": "cpu"})
    policies = [four(lively_policy()) for _ in range(2)]
    if where != "reward":
        setattr(policies[broken].live, where, failing)
    drawn = [prompt for prompt in prompts if prompt.output == ("image",)]

    def zeros(groups: Sequence[Group], judge: object) -> Scores:
        return Scores(torch.zeros(len(groups), len(groups[0])))

    def work(rank: int) -> None:
        mine = policies[rank]
        groups = sample_own(mine.live, drawn, config.sampling(0), list(range(len(drawn))))
        if where == "reward":
            reward: Any = SimpleNamespace(applies=lambda prompt: True, score=failing if rank == broken else zeros)
            source = RewardSource(RewardConfig(name="fails", on_failure="stop"), reward)
            score_own([source], groups, mine.reference)
        A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
        differentiate(mine, groups, dict.fromkeys(KINDS, A), config)

    found = in_ranks(2, work)
    own = isinstance(error, InputError)
    words = str(error) if own else f"RuntimeError: {error}"
    by = "process 1 of 2: " if broken else ""
    for raised in found:
        assert isinstance(raised, InputError if own else ContractError), raised
        assert words in str(raised)
        assert str(raised).startswith(by)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_policies_of_an_evaluation_answer_in_the_order_of_the_question(
    size: int, lively_policy: Callable[[], TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = lively_policy()
    sampling = Sampling(group_size=2, max_new_tokens=3, num_steps=3)
    seeds = list(range(len(prompts)))
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["red", "blue", "two circle", "one", "red circle"]
    contexts = [(image, "what is it")] * 5
    pictures = [(text,) for text in texts], [image] * 5, 2, list(range(5))

    def asked(answering: Policy) -> tuple[list[Group], list[torch.Tensor]]:
        times = answering.image_logprob(*pictures, times=(0.2, 0.6))
        logprobs = [answering.text_logprob(contexts, texts), answering.image_logprob(*pictures), times]
        assert answering.image_size == policy.image_size
        return answering.sample(prompts, sampling, seeds), logprobs

    groups, logprobs = asked(policy)
    for own_groups, own in in_ranks(size, lambda rank: asked(DataParallelPolicy(policy))):  # pyright: ignore[reportArgumentType]
        for prompt, group, other in zip(prompts, own_groups, groups, strict=True):
            assert group.prompt is prompt
            for mine, alone in zip(group.trajectories, other.trajectories, strict=True):
                assert (mine.member, mine.seed, mine.text) == (alone.member, alone.seed, alone.text)
                if mine.image is not None and alone.image is not None:
                    torch.testing.assert_close(mine.image, alone.image)
        for one, expected in zip(own, logprobs, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("method", ["nft", "dpo"])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_members_are_differentiated_once_and_pairs_stay_together(
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
    drawn = [prompt for prompt in prompts if prompt.output == ("image",)]
    groups = policy.sample(drawn, Sampling(group_size=4, num_steps=2), list(range(len(drawn))))
    objective = next(o for o in objectives_of(config, policy.writes) if o.kind == "flow")
    A = GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
    chosen = objective.choose(groups, A)

    def work(rank: int) -> list[Microbatch]:
        own = [group if p % count == rank else Group(group.prompt, ()) for p, group in enumerate(groups)]
        return microbatches(policy, [objective], own, dict.fromkeys(KINDS, A), config, 0, Metrics())

    batches = [batch for of_rank in in_ranks(count, work) for batch in of_rank]
    members = [member for batch in batches for member in batch.members]
    assert sorted(id(m.trajectory) for m in members) == sorted(id(m.trajectory) for m in chosen)
    for task in ("generate", "edit"):
        assert sum(batch.share for batch in batches if batch.task == task) == pytest.approx(1)
    for batch in batches:
        ids = [member.trajectory.prompt.id for member in batch.members]
        assert ids[:: objective.unit] == ids[objective.unit - 1 :: objective.unit]
