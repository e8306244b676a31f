"""Several processes on one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from lvrpo.cli import main
from lvrpo.policies.base import Sampling
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.limits import LimitsConfig
from lvrpo.training.methods import objectives_of
from lvrpo.training.objective import GroupAdvantages, Policies
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.team import ALONE, Shared, _packed, _unpacked
from lvrpo.training.work import hands
from lvrpo.types import Prompt

OPTIONS = (
    "steps=4",
    "data.prompts_per_step={generate: 3, understand: 8, edit: 1, reason: 3}",
    "rollout={group_size: 4, num_steps: 4}",
    "mini_updates=2",
    "rewards=[{name: exact_answer}, {name: own_vqa}, {name: drawing_likelihood}]",
    "advantages.std_floor=1e-4",
    "guard={every: 2, prompts: {generate: 3, understand: 8}}",
    "checkpoint_every=2",
    "control_every=2",
    "device=cpu",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lvrpo")


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], succeeds: bool = True) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert (process.returncode == 0) == succeeds, output
    return output


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in RunDirectory.read(run).metrics()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "checkpoints" / "step_000004" / "state" / "state.safetensors")
    tree = json.loads((run / "checkpoints" / "step_000004" / "state" / "state.json").read_text(encoding="utf-8"))
    return {name: state[place["$tensor"]] for name, place in tree["policies"]["live"].items()}


def test_two_processes_compute_what_one_does_and_resume_bit_for_bit(small_base: Path) -> None:
    options = ("train", "quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
    both = start(*options, "--out", "both")
    assert main([*options, "--out", "alone"]) == 0
    finish(both)
    alone, shared = rows(Path("alone")), rows(Path("both"))
    assert [set(row) for row in shared] == [set(row) for row in alone]
    for one, other in zip(alone[:2], shared[:2], strict=True):  # later steps start from weights that differ by rounding
        for name, value in one.items():
            same = other[name] == value if isinstance(value, str) else other[name] == pytest.approx(value, 1e-3, 1e-4)
            assert same, (name, value, other[name])
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
    while halved.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.02)
    os.kill(int(Path("halved/.lock").read_text()), signal.SIGINT)
    assert "go on with: lvrpo train --resume halved" in finish(halved, succeeds=False)
    assert 2 <= rows(Path("halved"))[-1]["step"] < 4
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


class InTurn:
    """A leader whose processes are all this one."""

    def __init__(self, policy: object, size: int) -> None:
        self.policy, self.size = policy, size
        self.asked: list[list[Any]] = []

    def call(self, name: str, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        self.asked.append([given is not None for given in arguments])
        sent = [_unpacked(_packed(given)) for given in arguments]
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
    config = TrainConfig.model_validate({"flow": {"kind": method}, "rollout": {"group_size": 4}, "device": "cpu"})
    drawn = [prompt for prompt in prompts if prompt.output == ("image",)]
    groups = policy.sample(drawn, Sampling(group_size=4, num_steps=2), list(range(len(drawn))))
    objective = next(o for o in objectives_of(config, policy.writes) if o.kind == "flow")
    chosen = objective.choose(groups, GroupAdvantages.of_all(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups))))
    dealt = hands("generate", chosen, objective, policy, LimitsConfig(backward_members=3), count)
    assert len(dealt) == count
    members = [member for hand in dealt for work in hand for member in work.members]
    assert sorted(map(id, members)) == sorted(map(id, chosen))
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
