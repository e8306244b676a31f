"""Several ranks on one run."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import training_work as work
from processes import OPTIONS, assert_begin_alike, finish, in_ranks, rows, start
from ranks import Ranks
from safetensors.torch import load_file
from stored import stored

from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.training.base_trainer import latest_checkpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import KINDS, GroupAdvantages, Metrics, Microbatch
from lvrpo.training.microbatches import microbatches
from lvrpo.training.trainer import Trainer
from lvrpo.types import Group, Prompt


def weights(run: Path) -> dict[str, torch.Tensor]:
    return stored(run / "checkpoints" / "step_000004", "policy")


def test_two_processes_compute_what_one_does_and_resume_bit_for_bit(small_base: Path, tmp_path: Path) -> None:
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
    assert finish(halved, succeeds=False).count("continue with: lvrpo train --resume halved") == 1
    assert 1 <= rows(Path("halved"))[-1]["step"] < 4
    resumed = in_processes(tmp_path, 2, work.command, Path.cwd(), "train", "--resume", "halved", "--no-evaluate")
    assert resumed == [0, 0]
    assert rows(Path("halved")) == shared
    again = weights(Path("halved"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in both_weights.items())


def test_two_machines_share_a_run(small_base: Path) -> None:
    """Two agents that meet over the loopback, each with a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = (
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    )
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "steps=1", "--no-evaluate", "--out", "run")
    agents = [start(*options, agent=meeting) for _ in range(2)]
    printed = [finish(agent) for agent in agents]
    assert sum("the policy: run" in output for output in printed) == 1
    assert len(list(Path("run/checkpoints/step_000001/state/tensors").iterdir())) == 2


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


def test_bad_input_is_one_line_on_all_ranks(small_base: Path) -> None:
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


METHODS: dict[str, dict[str, Any]] = {
    "nft and grpo": {},
    "dpo": {"flow": {"kind": "dpo"}, "text": {"kind": "dpo"}},
    "pcgrad": {"gradient_mixing": "pcgrad"},
    "rescored": {"text": {"importance_cap": 2.0}},
    "offloaded": {"offload": True},
}


def in_processes(tmp_path: Path, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return Ranks(tmp_path / f"{size}_{function.__name__}", size, function, *args).results()


@pytest.mark.parametrize(
    ("size", "method"), [*((2, method) for method in METHODS), (3, "nft and grpo"), (7, "pcgrad"), (7, "nft and grpo")]
)
def test_the_gradients_of_all_ranks_are_those_of_one(
    size: int, method: str, lively_base: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    """Seven ranks: some have no image, one nothing at all."""
    found = in_processes(tmp_path, size, work.gradients, lively_base, prompts, METHODS[method])
    (alone,) = in_processes(tmp_path, 1, work.gradients, lively_base, prompts, METHODS[method])
    for p, texts in enumerate(alone["texts"]):
        assert [own["texts"][p] for own in found if own["texts"][p]] == [texts]
    for own in found:
        assert own["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
        assert own["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            assert float((own["gradients"][name] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7
            assert torch.equal(own["gradients"][name], found[0]["gradients"][name])


def test_a_training_step_sends_what_it_has_to(lively_base: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    """Three sets of weights are gathered (old, reference, policy), gradients are scattered once."""
    for sent in in_processes(tmp_path, 2, work.communicated, lively_base, prompts):
        print(sent)
        assert 3 <= sent["gathered"] <= 3 * 1.2
        assert 1 <= sent["scattered"] <= 1.2
        assert sent["exchanged"] <= 1.2  # there and back, of matrices, a half of each


@pytest.mark.parametrize("error", [InputError("too long: shorten it"), RuntimeError("out of memory")])
@pytest.mark.parametrize(("where", "broken"), [("sample", 1), ("velocity", 0), ("velocity", 1), ("reward", 1)])
def test_what_fails_in_one_rank_is_raised_in_all(
    where: str, broken: int, error: Exception, lively_base: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    drawn = [prompt for prompt in prompts if prompt.output == ("image",)]
    own = isinstance(error, InputError)
    words = f"InputError: {'process 1 of 2: ' if broken else ''}" if own else "ContractError: "
    for raised in in_processes(tmp_path, 2, work.fail, lively_base, drawn, where, broken, error):
        assert raised.startswith(words), raised
        assert ("process 1 of 2: " in raised) == bool(broken)
        assert (str(error) if own else f"RuntimeError: {error}") in raised


def test_a_contract_that_one_rank_breaks_ends_all(tmp_path: Path) -> None:
    """Each rank scores the batch of the contract itself, and an endpoint may fail for one of them."""
    words = "process 1 of 2: step-0 contract: scores that failed is 0.5, limit 0: judge: HTTP 503"
    assert in_processes(tmp_path, 2, work.contract, 1) == [words, words]


def test_a_new_judge_is_that_of_all_ranks_or_of_none(tmp_path: Path) -> None:
    """Each rank measures the candidate itself, and one may round a tie to a difference."""
    assert in_processes(tmp_path, 2, work.refreshed) == [("refreshed", [("judge", "ema")])] * 2


@pytest.mark.parametrize("size", [2, 3, 7])
def test_policies_of_an_evaluation_answer_in_the_order_of_the_question(
    size: int, lively_base: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    (alone,) = in_processes(tmp_path, 1, work.evaluate, lively_base, prompts)
    assert alone[0]["identity"] == alone[2]["identity"] != alone[1]["identity"]
    assert alone[1]["identity"] == judge_fingerprint(work.lively(lively_base))
    for answers in in_processes(tmp_path, size, work.evaluate, lively_base, prompts):
        for own, expected in zip(answers, alone, strict=True):
            assert (own["size"], own["identity"]) == (expected["size"], expected["identity"])
            for mine, other in zip(own["logprobs"], expected["logprobs"], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-2)
            for group, others in zip(own["groups"], expected["groups"], strict=True):
                for mine, other in zip(group, others, strict=True):
                    assert mine[:3] == other[:3]
                    if mine[3] is not None:
                        torch.testing.assert_close(mine[3], other[3])


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
            "limits": {"microbatch_size": 3},
            "device": "cpu",
        }
    )
    drawn = [prompt for prompt in prompts if prompt.output == ("image",)]
    groups = policy.sample(drawn, Sampling(group_size=4, num_steps=2), list(range(len(drawn))))
    objective = next(o for o in objectives_of(config, policy.segment_kinds) if o.kind == "flow")
    A = GroupAdvantages.all_valid(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups)))
    chosen = objective.select_members(groups, A)

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


def test_a_disk_that_fills_during_a_save_leaves_the_last_checkpoint(small_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for line in in_processes(tmp_path / "ranks", 2, work.train_on_a_disk_that_fills, small_base, run):
        assert line.startswith(f"process 1 of 2: {run}/checkpoints/")
        assert "cannot be written: No space left on device" in line
    last = latest_checkpoint(run)
    assert last is not None
    assert last.name == "step_000001"
    assert not [path for path in (run / "checkpoints").iterdir() if path != last and path.name != "step_000000"]
    trainer = Trainer.resume(run)
    assert trainer.state.step == 1
    with trainer.run:
        assert trainer.train()
