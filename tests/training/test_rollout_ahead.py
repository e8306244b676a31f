"""An engine that samples the next step while the policy trains: its weights, overlap, checkpoints, failures."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_work as work
from processes import rows
from ranks import Ranks
from settings import SMALL
from stored import stored

from lvrpo.config import load_config
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import FINAL, load_policy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training import trainer, validation
from lvrpo.training.checkpoint import load_state, save_state
from lvrpo.training.config import TrainConfig
from lvrpo.training.policies import weights_checksum
from lvrpo.training.rollout_ahead import _decoded, _encoded
from lvrpo.training.run_directory import SUMMARY
from lvrpo.training.trainer import Trainer
from lvrpo.types import Group, Prompt, Trajectory

ENGINE = (f"rollout.engine={{kind: custom, name: '{__file__}:Recording'}}", f"allow_code=['{__file__}']")
AHEAD = (*ENGINE, "rollout.steps_ahead=1")
TIMEOUT = 60


class Recording:
    """An engine in this process; what it sampled with is on record."""

    sampled: list[tuple[str, str]] = []  # noqa: RUF012  # of each call: checksum of the weights, first prompt
    before: Callable[[Sequence[Prompt]], object] = staticmethod(lambda prompts: None)
    """Called before each sampling."""

    def __init__(self, start: Path, config: TrainConfig, options: Mapping[str, Any]) -> None:
        policy = load_policy(start, "cpu")
        assert isinstance(policy, TinyPolicy)
        self.policy = policy

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        own = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        return weights_checksum({name: own[name] for name in weights})

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        self.before(prompts)
        self.sampled.append((weights_checksum(dict(self.policy.named_parameters())), prompts[0].id))
        return self.policy.sample(prompts, sampling, seeds)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvrpo.training.rollout_engine.resolve", lambda *_: Recording)
    monkeypatch.setattr(Recording, "sampled", [])


def config_of(policy: Path, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*SMALL, f"policy={policy}", "checkpoint_every=1", *overrides])


def trained(config: TrainConfig, folder: str) -> Trainer:
    run = Trainer.start(config, Path(folder))
    with run.run:
        assert run.train()
    return run


def resumed(folder: Path) -> None:
    run = Trainer.resume(folder)
    with run.run:
        assert run.train()


def truncate(run: Path, copy: Path, step: int) -> None:
    """A copy of a run that was killed after the checkpoint of a step."""
    shutil.copytree(run, copy)
    for result in (FINAL, SUMMARY):
        (copy / result).unlink(missing_ok=True)
    for later in (copy / "checkpoints").iterdir():
        if later.name > f"step_{step:06d}":
            shutil.rmtree(later)


def assert_same(one: Path, other: Path, step: int) -> None:
    assert rows(one) == rows(other)
    for name in ("policy", "old", "ema"):
        first, second = (stored(run / "checkpoints" / f"step_{step:06d}", name) for run in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_each_step_is_sampled_with_the_weights_of_before_the_update(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text with the policy, images with the old policy: in both cases of one step before."""
    at_step: list[dict[str, str]] = []
    real = trainer.train_step

    def recording(policies: Any, *arguments: Any, **named: Any) -> Any:
        weights = policies.weights
        at_step.append({name: weights_checksum(dict(weights[name])) for name in ("policy", "old")})
        return real(policies, *arguments, **named)

    monkeypatch.setattr(trainer, "train_step", recording)
    trained(config_of(small_base, "steps=4", *AHEAD), "run")
    preflight = len(Recording.sampled) - 8  # a call for texts and one for images in each of 4 steps
    found = [checksum for checksum, _ in Recording.sampled[preflight:]]
    lagged = [at_step[0], *at_step[:3]]
    assert found == [weights[name] for weights in lagged for name in ("policy", "old")]
    assert len({weights["policy"] for weights in at_step}) == 4
    assert len({weights["old"] for weights in at_step}) > 2


def test_without_an_update_it_samples_what_the_policy_would(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "check_first_update", lambda *_: None)
    still = ("steps=3", "optimizer.muon_lr=1e-30", "optimizer.adamw_lr=1e-30", "text.importance_cap=2")
    trained(config_of(small_base, *still, *ENGINE), "at_once")
    trained(config_of(small_base, *still, *AHEAD), "ahead")
    assert_same(Path("at_once"), Path("ahead"), 3)


def test_the_engine_samples_while_the_policy_trains(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling of a coming step waits for the middle of the step before it, which needs both at the same time."""
    training, real = threading.Event(), trainer.train_step
    main = threading.current_thread()

    def step(*arguments: Any, **named: Any) -> Any:
        training.set()
        return real(*arguments, **named)

    def before(prompts: Sequence[Prompt]) -> None:
        if threading.current_thread() is not main:
            assert training.wait(TIMEOUT)

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(Recording, "before", staticmethod(before))
    trained(config_of(small_base, "steps=3", *AHEAD), "run")
    assert training.is_set()


@pytest.mark.parametrize("overrides", [(), ("flow.kind=awm", "adapter={rank: 2}")])
def test_a_killed_run_resumes_bit_for_bit(small_base: Path, overrides: tuple[str, ...]) -> None:
    config = config_of(small_base, "steps=4", "keep_checkpoints=5", *AHEAD, *overrides)
    trained(config, "whole")
    for step in (1, 2):
        killed = Path(f"killed_{step}")
        truncate(Path("whole"), killed, step)
        Recording.sampled.clear()
        resumed(killed)
        assert_same(Path("whole"), killed, 4)
        assert len(Recording.sampled) == 2 * (4 - step - 1)  # that of the next step was in the checkpoint


def test_with_an_engine_in_another_process_too(small_base: Path) -> None:
    config = config_of(small_base, "steps=3", "keep_checkpoints=5", "rollout={engine: {kind: process}, steps_ahead: 1}")
    trained(config, "whole")
    truncate(Path("whole"), Path("killed"), 2)
    resumed(Path("killed"))
    assert_same(Path("whole"), Path("killed"), 3)


def test_an_engine_that_fails_ahead_stops_the_step_that_needs_it(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(small_base, "steps=4", *AHEAD)
    trained(config, "whole")
    calls: list[None] = []

    def fail_once(prompts: Sequence[Prompt]) -> None:
        calls.append(None)
        if len(calls) == failing:
            raise RuntimeError("no memory")

    failing = len(Recording.sampled) - 3  # images of the third step
    monkeypatch.setattr(Recording, "before", staticmethod(fail_once))
    broken = Trainer.start(config, Path("broken"))
    with broken.run, pytest.raises(ContractError, match=r"sample failed: RuntimeError: no memory.*; step 2 is saved"):
        broken.train()
    resumed(Path("broken"))
    assert rows(Path("broken"))[:3] == rows(Path("whole"))[:3]
    assert len(rows(Path("broken"))) == 5


def test_a_reward_that_fails_leaves_the_rollout_of_its_step_in_the_checkpoint(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(small_base, "steps=4", "checkpoint_every=100", *AHEAD)
    trained(config, "whole")
    real = trainer.score_local

    def score(rewards: Any, groups: Any, judge: Any, step: int, *rest: Any) -> Any:
        if step == 2 and rest:
            raise InputError("a reward is broken")
        return real(rewards, groups, judge, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score_local", score)
        broken = Trainer.start(config, Path("broken"))
        with broken.run, pytest.raises(InputError, match="a reward is broken; step 2 is saved"):
            broken.train()
    resumed(Path("broken"))
    assert_same(Path("whole"), Path("broken"), 4)


def test_a_rollback_forgets_what_the_weights_before_it_sampled(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run is killed right after it."""

    def verdict(self: Any, scores: Any, state: validation.ValidationState, step: int) -> validation.ValidationReport:
        worse = step == 2
        if not worse:
            state.best_step, state.best_scores, state.top = step, scores, 0.0
        return validation.ValidationReport({}, "regressed" if worse else "best", ("generate",) if worse else (), scores)

    monkeypatch.setattr(validation.Validator, "_compare", verdict)
    config = config_of(small_base, "steps=4", "keep_checkpoints=5", "validation.every=1", *AHEAD)
    run = trained(config, "whole")
    assert run.state.validation.rollbacks == 1
    actions = {row["step"]: row.get("validation/action", "") for row in rows(Path("whole"))}
    assert actions[2].startswith("rolled back to step 1")
    assert not list(Path("whole/checkpoints/step_000002/state").glob("rollout_*"))
    assert list(Path("whole/checkpoints/step_000003/state").glob("rollout_*"))
    truncate(Path("whole"), Path("killed"), 2)
    resumed(Path("killed"))
    assert_same(Path("whole"), Path("killed"), 4)


def test_ranks_share_it_and_one_process_goes_on_with_it(small_base: Path, tmp_path: Path) -> None:
    small = (*SMALL, "steps=3", "checkpoint_every=1", "keep_checkpoints=5", f"policy={small_base}", *AHEAD)

    def run(size: int, *arguments: str) -> None:
        folder = tmp_path / f"{size}_{arguments[-1]}"
        assert Ranks(folder, size, work.command, Path.cwd(), *arguments).results() == [0] * size

    run(2, "train", "quickstart", *small, "--no-evaluate", "--out", "both")
    assert len(list(Path("both/checkpoints/step_000002/state").glob("rollout_*"))) == 2
    for size in (1, 2):
        truncate(Path("both"), Path(f"by_{size}"), 2)
        run(size, "train", "--no-evaluate", *AHEAD[1:2], "--resume", f"by_{size}")
    assert_same(Path("both"), Path("by_2"), 3)
    both, alone = rows(Path("both"))[3], rows(Path("by_1"))[3]
    scores = [name for name in both if name.startswith("reward/")]
    assert scores
    assert [alone[name] for name in scores] == pytest.approx([both[name] for name in scores], abs=1e-6)


def test_outputs_come_back_from_a_file_as_they_were(lively_policy: Any, prompts: list[Prompt], tmp_path: Path) -> None:
    sampling = Sampling(group_size=2, num_steps=3, window=(1,), sampler="flow_sde", max_new_tokens=4)
    for group in lively_policy().sample(prompts, sampling, list(range(len(prompts)))):
        for trajectory in group.trajectories:
            folder = tmp_path / f"{group.prompt.id}_{trajectory.member}".replace("/", "_")
            folder.mkdir()
            save_state(folder, _encoded(trajectory))
            assert_equal(_decoded(load_state(folder), group.prompt), trajectory)


def assert_equal(one: Trajectory, other: Trajectory) -> None:
    assert replace(one, segments=()) == replace(other, segments=())
    for first, second in zip(one.segments, other.segments, strict=True):
        assert type(first) is type(second)
        for each in fields(first):
            a, b = getattr(first, each.name), getattr(second, each.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, each.name


@pytest.mark.parametrize("overrides", [(), (*ENGINE, "rollout.max_resamples=2")])
def test_settings_that_do_not_fit(overrides: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"rollout.steps_ahead=1: an engine samples the next step meanwhile"):
        load_config(TrainConfig, None, ["rollout.steps_ahead=1", *overrides])
