"""Rewards that wait for another program score groups while others are sampled, with the numbers of a run without it."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from lvrpo.config import parse_section
from lvrpo.data.base import Task
from lvrpo.errors import InputError, LvrpoError
from lvrpo.policies.mot import model_runner
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.rewards.async_scoring import AsyncScores, cancellation, wait_for_async_scores
from lvrpo.rewards.base import Scores
from lvrpo.rewards.config import ConfiguredReward, RewardConfig, configured_reward
from lvrpo.rewards.endpoint import ChatEndpoint
from lvrpo.rewards.function import reward
from lvrpo.rewards.remote import RemoteReward
from lvrpo.rewards.table import score_groups
from lvrpo.training.components import CustomComponents, PromptList, Split
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer
from lvrpo.types import Group, Image, Prompt

WAIT_S = 20.0
TITLES = ("a red circle", "draw a circle", "a circle")


def judged(body: dict[str, Any]) -> str:
    """An answer that depends on the bytes of the image."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return str(crc32(url.encode()) % 11)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Starts a run whose three groups of images are sampled one after another."""
    monkeypatch.setattr(model_runner, "MAX_ROWS", 4)
    sizes = MoTConfig(width=32, depth=1, heads=2, key_heads=2, mlp_width=32)
    torch.manual_seed(0)
    config = TinyConfig(image_size=16, tower_width=16, transformer=sizes)
    policy = TinyPolicy.from_vocabulary(config, ("draw", "a", "red", "circle"))
    for parameter in policy.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # a fresh policy draws one image only
    policy.save(tmp_path / "policy")

    def started(name: str, rewards: Sequence[dict[str, Any]], given: dict[str, Any] | None = None) -> Trainer:
        config = parse_section(
            TrainConfig,
            {
                "policy": str(tmp_path / "policy"),
                "device": "cpu",
                "steps": 2,
                "data": {"source": "python", "prompts_per_step": {"generate": 3}},
                "rollout": {"group_size": 4, "num_steps": 2},
                "rewards": list(rewards),
                "validation": {"prompts": {"generate": 1}},
            },
            "test",
        )
        prompts = [Prompt(f"p{i}", "generate", (text,), ("image",)) for i, text in enumerate(TITLES)]
        rows: dict[Split, Task] = {"train": PromptList(prompts), "validation": PromptList(prompts[:1])}
        return Trainer.start(config, tmp_path / name, CustomComponents(rows, given or {}))

    return started


def results(trainer: Trainer) -> list[dict[str, Any]]:
    """The metrics of a run that is trained to its end, without times."""
    with trainer.run:
        assert trainer.train()
        rows = trainer.run.metrics()
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def begin(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what comes before the first step; ``train`` then begins with it."""
    trainer._before_first_step(None)
    monkeypatch.setattr(trainer, "_before_first_step", lambda engine: None)


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is scored before all groups are sampled."""
    monkeypatch.setattr(ConfiguredReward, "waits", False)


def test_the_numbers_are_those_of_a_run_that_scores_afterwards(
    start: Callable[..., Trainer], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = judged
    rows = [
        {"name": "vlm_endpoint", "options": {"endpoint": server.options(), "ask": "rating"}},
        {"name": "python:red", "label": "red", "weight": 0.5},
    ]
    calls: list[int] = []
    ask = ChatEndpoint.ask

    def counted(self: ChatEndpoint, asked: Any) -> Any:
        calls.append(threading.get_ident())
        return ask(self, asked)

    monkeypatch.setattr(ChatEndpoint, "ask", counted)

    def run(name: str) -> tuple[list[dict[str, Any]], list[Any]]:
        red = reward(lambda image: float(image[0].mean()))()
        trainer = start(name, rows, {"red": red})
        found = results(trainer)
        return found, [p.detach().clone() for p in trainer.state.policies.module.parameters()]

    early, weights = run("early")
    in_thread = [ident for ident in calls if ident != threading.get_ident()]
    one_by_one(monkeypatch)
    calls.clear()
    late, others = run("late")
    assert len(in_thread) >= 2
    assert set(calls) == {threading.get_ident()}
    assert early == late
    assert 0 < early[1]["reward/generate/vlm_endpoint"] < 1
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_a_group_is_scored_before_the_next_is_sampled(
    start: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = threading.Event()
    calls: list[bool] = []
    sample = MoTPolicy._sample_batch

    def waiting(self: Any, members: Any, sampling: Any) -> Any:
        if members[0].prompt.id == "p1":
            calls.append(scored.wait(WAIT_S))  # for ever, if nothing scores meanwhile
        return sample(self, members, sampling)

    def slow(image: Image) -> float:
        if threading.current_thread() is not threading.main_thread():
            scored.set()
        return 100 * float(image.mean())

    trainer = start("run", [{"name": "python:slow", "label": "slow"}], {"slow": reward(waits=True)(slow)()})
    with trainer.run:
        begin(trainer, monkeypatch)
        monkeypatch.setattr(MoTPolicy, "_sample_batch", waiting)
        trainer.train()
    assert calls
    assert all(calls)


@pytest.mark.parametrize("on_failure", ["mask", "stop"])
@pytest.mark.parametrize("kind", ["score", "input", "shape"])
def test_errors_are_those_of_a_run_that_scores_afterwards(
    start: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, kind: str, on_failure: str
) -> None:
    class Broken:
        sides, judges, waits = (), ("image",), True
        steps = 0

        def applies(self, prompt: Prompt) -> bool:
            return True

        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            values = torch.stack([torch.stack([100 * t.image.mean() for t in g.trajectories]) for g in groups])  # type: ignore[union-attr]
            bad = [p for p, group in enumerate(groups) if group.prompt.id == "p1" and self.steps]
            if kind == "input" and bad:
                raise InputError("the key is refused: correct it")
            if kind == "shape" and bad:
                return Scores(values[0])
            return Scores(values, {(p, 1): "no answer" for p in bad})

    def outcome(name: str) -> tuple[str, list[dict[str, Any]]]:
        broken = Broken()
        row = {"name": "python:broken", "label": "broken", "on_failure": on_failure}
        trainer = start(name, [row], {"broken": broken})
        with trainer.run:
            begin(trainer, monkeypatch)
            broken.steps = 1
            try:
                trainer.train()
                error = ""
            except LvrpoError as raised:
                error = f"{type(raised).__name__} {raised}"
            rows = trainer.run.metrics()
        return error, [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]

    early = outcome("early")
    one_by_one(monkeypatch)
    assert early == outcome("late")
    assert bool(early[0]) == (kind != "score" or on_failure == "stop")


def test_an_interruption_ends_what_waits(
    start: Callable[..., Trainer], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = server.options(retries=50, backoff_s=30.0)
    options = {"endpoint": endpoint, "ask": "rating"}
    trainer = start("run", [{"name": "vlm_endpoint", "options": options}])
    sample = MoTPolicy._sample_batch

    def interrupted(self: Any, members: Any, sampling: Any) -> Any:
        if members[0].prompt.id == "p2":
            while len(server.bodies) == asked:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return sample(self, members, sampling)

    server.answer = judged
    with trainer.run:
        begin(trainer, monkeypatch)
        asked = len(server.bodies)
        server.answer = lambda body: (503, "")
        monkeypatch.setattr(MoTPolicy, "_sample_batch", interrupted)
        chance = random.getstate()
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        began = time.monotonic()
        wait_for_async_scores()
        assert time.monotonic() - began < 10  # not the 30 s of a try
    assert random.getstate() == chance
    assert not list((trainer.run.path / "checkpoints").glob("*.tmp*"))


def one_group(prompt_id: str) -> Group:
    prompt = Prompt(prompt_id, "generate", ("a circle",), ("image",))
    return Group(prompt, ())


def test_a_failure_ends_the_running_call_and_forgets_those_that_have_not_begun() -> None:
    begun: list[str] = []
    ended = threading.Event()

    def score(groups: Sequence[Group]) -> Any:
        begun.append(groups[0].prompt.id)
        if cancellation().wait(WAIT_S) and cancellation().is_set():  # a later call of the same reward ends at once
            ended.set()
        raise RuntimeError("cancelled")

    scores = AsyncScores()
    scores.submit([one_group("first")], score)
    while not begun:
        time.sleep(0.01)
    scores.submit([one_group("second")], score)

    class Stops:
        sides, judges = (), ("image",)

        def applies(self, prompt: Prompt) -> bool:
            raise LvrpoError("stop")

        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            raise AssertionError

    nobody: Any = None
    with pytest.raises(LvrpoError, match="stop"):
        score_groups(
            [ConfiguredReward(RewardConfig(name="python:stops"), Stops(), async_scores=scores)],
            [one_group("p")],
            nobody,
        )
    assert ended.wait(WAIT_S / 2)
    wait_for_async_scores()
    assert begun == ["first"]


def test_the_end_of_the_process_does_not_wait_for_a_call() -> None:
    code = (
        "import time; from lvrpo.rewards.async_scoring import AsyncScores; from lvrpo.types import Group, Prompt;"
        "AsyncScores().submit([Group(Prompt('p', 'generate', ('a',), ('image',)), ())], lambda groups: time.sleep(600))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_call_may_score_with_rewards_that_wait() -> None:
    done = threading.Event()

    def score(groups: Sequence[Group]) -> Any:
        wait_for_async_scores()
        done.set()
        raise RuntimeError("no scores")

    AsyncScores().submit([one_group("p")], score)
    assert done.wait(WAIT_S)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    AsyncScores().submit([one_group("p")], lambda groups: (groups, Scores(torch.zeros(1, 1))))
    wait_for_async_scores()

    def child() -> None:
        done = threading.Event()
        AsyncScores().submit([one_group("p")], lambda groups: (done.set(), Scores(torch.zeros(1, 1))))  # type: ignore[return-value]
        wait_for_async_scores()
        os._exit(0 if done.is_set() else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(WAIT_S)
    process.kill()
    assert process.exitcode == 0


def test_an_actor_is_asked_once_about_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def call(self: RemoteReward, name: str, prompts: Sequence[Prompt]) -> list[bool]:
        calls.append(len(prompts))
        return [True] * len(prompts)

    monkeypatch.setattr(RemoteReward, "_call_actor", call)
    remote = object.__new__(RemoteReward)
    remote._applies_to = {}
    prompts = [one_group(f"p{i}").prompt for i in range(4)]
    remote.prefetch_applies(prompts[:2], keep=True)
    remote.prefetch_applies(prompts[2:], keep=True)
    remote.prefetch_applies(prompts)
    assert all(remote.applies(prompt) for prompt in prompts)
    assert calls == [2, 2]
    remote.prefetch_applies([one_group("p0").prompt])
    assert calls == [2, 2, 1]
    assert len(remote._applies_to) == 1


def test_rewards_that_ask_the_policy_do_not_wait(server: Any) -> None:
    def source(**options: Any) -> ConfiguredReward:
        return configured_reward(RewardConfig(name="vlm_endpoint", options={"endpoint": server.options(), **options}))

    assert source().waits
    assert source(questions={"by": "grammar"}).waits
    assert not source(questions={"by": "policy"}).waits

    class Asks:
        waits = True

        def applies(self, prompt: Prompt) -> bool:
            return True

        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            return Scores(torch.zeros(len(groups), len(groups[0])))

    assert not ConfiguredReward(
        RewardConfig(name="python:asks"), Asks()
    ).waits  # it asks the judge as far as anyone knows
