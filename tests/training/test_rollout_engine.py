"""Rollout engines: a process that has the pushed weights samples what the policy would, and anything else is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from settings import SMALL

from lvrpo.config import load_config
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.registry import allow_code, isolated_permissions
from lvrpo.training import weights_folder
from lvrpo.training.base_trainer import latest_checkpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.policies import policy_module, weights_checksum
from lvrpo.training.preflight import engine_checks
from lvrpo.training.rollout_engine import EngineSampler, ProcessEngine, open_engine
from lvrpo.training.trainer import Trainer
from lvrpo.types import Group, Prompt, TextSegment

PROCESS = "rollout.engine.kind=process"
CAPPED = "text.importance_cap=2.0"


def config_of(policy: Path | str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*SMALL, f"policy={policy}", *overrides])


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if "seconds" not in key and "memory" not in key}
        for line in lines
    ]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = latest_checkpoint(run)
    assert last is not None
    files = sorted((last / "state").rglob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Copied:
    """An engine that samples with the policy that it was made for, whatever it is sent."""

    def __init__(self, policy: TinyPolicy) -> None:
        self.policy, self.pushed, self.closed = policy, 0, False

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        self.pushed += 1
        return weights_checksum(dict(self.policy.named_parameters()))

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        return self.policy.sample(prompts, sampling, seeds)

    def close(self) -> None:
        self.closed = True


class Rounded(Copied):
    """Its log-probs are those of another distribution than it samples, as another program's are."""

    def __init__(self, start: Path, config: TrainConfig, options: Mapping[str, Any]) -> None:
        policy = load_policy(start, "cpu")
        assert isinstance(policy, TinyPolicy)
        super().__init__(policy)
        self.by = float(options.get("by", 0.0))

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        own = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        return weights_checksum(own)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        return [
            Group(group.prompt, tuple(self._moved(trajectory) for trajectory in group.trajectories))
            for group in super().sample(prompts, sampling, seeds)
        ]

    def _moved(self, trajectory: Any) -> Any:
        segments = [
            replace(s, behavior_logprobs=s.behavior_logprobs - self.by) if isinstance(s, TextSegment) else s
            for s in trajectory.segments
        ]
        return replace(trajectory, segments=tuple(segments))


@pytest.fixture
def engine(small_base: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A run of three steps with an engine in a process of its own. Never change it."""

    def make(folder: Path) -> None:
        trainer = Trainer.start(config_of(small_base, "steps=3", PROCESS, "checkpoint_every=10"), folder)
        with trainer.run:
            assert trainer.train()

    return made_once("process_engine", make)


def test_a_process_samples_what_the_policy_would_bit_for_bit(small_base: Path, tmp_path: Path, engine: Path) -> None:
    own = tmp_path / "own"
    trainer = Trainer.start(config_of(small_base, "steps=3", CAPPED), own)
    with trainer.run:
        assert trainer.train()
    assert_same(own, engine)
    assert "importance/text" in metrics(engine)[-1]
    checks = {check["check"]: check for check in json.loads((engine / "contract.json").read_text(encoding="utf-8"))}
    for name in ("text", "image"):
        found = checks[f"rollout engine, {name}: divergence"]
        assert found["ok"]
        assert found["value"] == 0
        assert "max |difference| 0" in found["detail"]


def test_of_an_adapter_its_own_weights_alone_are_sent(small_base: Path, tmp_path: Path) -> None:
    own, engine = tmp_path / "own", tmp_path / "engine"
    sent: list[int] = []
    real = ProcessEngine.load_weights

    def counted(self: ProcessEngine, weights: Mapping[str, torch.Tensor]) -> str:
        assert all(".lora_" in name for name in weights)
        sent.append(len(weights))
        return real(self, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessEngine, "load_weights", counted)
        for folder, overrides in ((own, (CAPPED,)), (engine, (PROCESS,))):
            trainer = Trainer.start(config_of(small_base, "adapter={rank: 2}", *overrides), folder)
            with trainer.run:
                assert trainer.train()
    assert_same(own, engine)
    assert sent
    assert all(sent)


def test_a_killed_engine_is_named_and_the_run_goes_on_bit_for_bit(
    small_base: Path, tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    settings = config_of(small_base, "steps=3", PROCESS, "checkpoint_every=10")
    real, asked = ProcessEngine.sample, []

    def sample(self: ProcessEngine, *arguments: Any) -> list[Group]:
        asked.append(None)
        if len(asked) == 6:  # the contract, then two samplers a step
            assert self._process is not None
            os.kill(self._process.pid, signal.SIGKILL)
        return real(self, *arguments)

    trainer = Trainer.start(settings, killed)
    with monkeypatch.context() as patch:
        patch.setattr(ProcessEngine, "sample", sample)
        lost = "^rollout engine: its process ended with exit code -9: .*; step 2 is saved: continue with lvrpo train"
        with trainer.run, pytest.raises(ContractError, match=lost):
            trainer.train()
    trainer = Trainer.resume(killed)
    with trainer.run:
        assert trainer.train()
    assert_same(engine, killed)


def test_the_process_ends_when_it_is_closed_or_its_trainer_is_gone(lively_base: Path) -> None:
    """It imports nothing from the current folder."""
    for name in ("torch", "safetensors", "random"):
        Path(f"{name}.py").write_text("open('imported', 'w')\n")
    settings = config_of(lively_base, PROCESS)
    for close in (True, False):
        engine = ProcessEngine(settings, lively_base)
        with pytest.raises(InputError, match=r"^rollout engine: weights of nothing: .* were sent, its copy has none$"):
            engine.load_weights({"nothing": torch.zeros(1)})
        process, connection = engine._process, engine._connection
        assert process is not None
        assert connection is not None
        if close:
            engine.close()
        else:
            connection.close()
        assert process.wait(30) == 0
        engine.close()
        assert not os.path.exists(engine._folder.path)
    assert not Path("imported").exists()


def test_weights_that_did_not_arrive_stop_the_run(lively_policy: Any) -> None:
    engine = Copied(lively_policy(1))
    sampler = EngineSampler(engine)
    with pytest.raises(ContractError, match=r"^rollout engine: holds weights with checksum \w+ after those with \w+ "):
        sampler.sync_weights(lively_policy(0))
    sampler.sync_weights(engine.policy)
    sampler.sync_weights(engine.policy)
    assert engine.pushed == 2  # what it holds is not sent again
    with torch.no_grad():
        next(engine.policy.parameters()).add_(1)
    sampler.sync_weights(engine.policy)
    assert engine.pushed == 3


@pytest.mark.parametrize("at", [0, 7, 8, 2**23 - 1, 2**23, 2**23 + 4])
def test_the_checksum_sees_a_bit_anywhere_and_an_exchange(at: int) -> None:
    weights = {"a": torch.zeros(2**23 + 5, dtype=torch.uint8)}
    before = weights_checksum(weights)
    weights["a"][at] = 1
    one = weights_checksum(weights)
    assert one != before
    weights["a"][at], weights["a"][(at + 8) % (2**23)] = 0, 1
    assert weights_checksum(weights) not in (before, one)


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "value", "order"])
def test_the_checksum_is_of_names_dtypes_shapes_and_values(change: str) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    other = {
        "name": {"c": weights["a"], "b": weights["b"]},
        "dtype": weights | {"b": torch.ones(2, dtype=torch.float16)},
        "shape": weights | {"a": weights["a"].reshape(3, 2)},
        "value": weights | {"b": torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)},
        "order": dict(reversed(weights.items())),
    }[change]
    assert (weights_checksum(weights) == weights_checksum(other)) == (change == "order")


def test_groups_of_wrong_size_are_refused(lively_policy: Any, prompts: list[Prompt]) -> None:
    class Short(Copied):
        def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
            return super().sample(prompts[1:], sampling, seeds[1:])

    sampling = Sampling(2, max_new_tokens=3, num_steps=3)
    with pytest.raises(ContractError, match=r"returned groups of \[2\] for 2 prompts: return one of 2 trajectories"):
        EngineSampler(Short(lively_policy())).sample(prompts[:2], sampling, [0, 1])

    class Failing(Copied):
        def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
            raise RuntimeError("no\nanswer")

    with pytest.raises(ContractError, match=r"^rollout engine: sample failed: RuntimeError: no answer: fix it$"):
        EngineSampler(Failing(lively_policy())).sample(prompts[:2], sampling, [0, 1])
    groups = EngineSampler(Copied(lively_policy())).sample(prompts[:2], sampling, [0, 1])
    assert all(t.prompt is prompt for prompt, group in zip(prompts, groups, strict=False) for t in group.trajectories)


@pytest.mark.parametrize(("by", "ok"), [(0.1, True), (0.5, False)])
def test_the_contract_tells_how_far_an_engine_is(by: float, ok: bool, lively_base: Path, prompts: list[Prompt]) -> None:
    engine = Rounded(lively_base, cast(Any, None), {"by": by})
    sampling = Sampling(3, max_new_tokens=4, num_steps=3)
    (check,) = engine_checks(engine.policy, engine.sample(prompts[:2], sampling, [0, 1]))
    assert check.check == "rollout engine, text: divergence"
    assert check.value == pytest.approx(torch.tensor(by).exp().item() - 1 - by, rel=1e-3)
    assert check.ok is ok
    assert f"max |difference| {by}" in check.detail


def test_an_engine_of_ones_own_is_corrected_by_truncated_weights(small_base: Path, tmp_path: Path) -> None:
    name = f"rollout.engine={{kind: custom, name: '{__file__}:Rounded', options: {{by: 0.2}}}}"
    settings = config_of(small_base, name, f"allow_code=['{__file__}']")
    trainer = Trainer.start(settings, tmp_path / "run")
    with trainer.run:
        assert trainer.train()
    rows = metrics(tmp_path / "run")[1:]
    assert all(row["importance/text"] == pytest.approx(torch.tensor(0.2).exp().item(), rel=1e-4) for row in rows)
    assert all(row["ratio/text"] == pytest.approx(1, abs=1e-5) for row in rows)  # to the trainer's own log-probs


def test_an_engine_is_closed_whatever_happens(lively_base: Path) -> None:
    settings = config_of(lively_base, f"rollout.engine={{kind: custom, name: '{__file__}:Rounded'}}")
    with isolated_permissions():
        with (
            pytest.raises(InputError, match="is code of a file, not of lvrpo"),
            open_engine(settings, load_policy(lively_base), lively_base),
        ):
            pass
        allow_code([__file__])
        opened: list[EngineSampler | None] = []
        with pytest.raises(KeyError), open_engine(settings, load_policy(lively_base), lively_base) as sampler:  # noqa: PT012
            opened.append(sampler)
            raise KeyError
        assert opened[0] is not None
        assert cast(Copied, opened[0].engine).closed
        wrong = config_of(lively_base, f"rollout.engine={{kind: custom, name: '{__file__}:Copied'}}")
        with (
            pytest.raises(InputError, match=r"Copied cannot be made: TypeError: "),
            open_engine(wrong, load_policy(lively_base), lively_base),
        ):
            pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.engine.kind=proces",), "rollout.engine.kind=proces: must be .*: did you mean process?"),
        (("rollout.engine.kind=custom",), "rollout.engine.name: is missing"),
        (
            ("rollout.engine.device=cpu",),
            "rollout.engine.device: applies to rollout.engine.kind=process, not to policy",
        ),
        (
            (PROCESS, "rollout.sample_from=reference", "text.kind=dpo", "flow.kind=dpo"),
            "rollout.engine.kind=process: an engine has the trained weights, and with rollout.sample_from",
        ),
        (
            ("rollout.engine={kind: custom, name: a.b:C}", "flow.kind=flow_grpo", "rollout.sampler=flow_sde"),
            "flow.kind=flow_grpo: takes ratios of steps to log-probs of another program",
        ),
    ],
)
def test_settings_that_do_not_fit(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, None, overrides)


@pytest.mark.parametrize(
    ("overrides", "cap"),
    [((), 2.0), (("text.importance_cap=5",), 5.0), (("text.importance_cap=0",), None), (("text.kind=gspo",), 2.0)],
)
def test_another_program_is_corrected_unless_it_is_said_otherwise(
    overrides: tuple[str, ...], cap: float | None
) -> None:
    def cap_of(*settings: str) -> object:
        config = load_config(TrainConfig, None, settings)
        again = TrainConfig.model_validate(config.model_dump())  # as a resumed run reads it
        return getattr(again.sections(("text", "flow"))["text"], "importance_cap", "none at all")

    assert cap_of(PROCESS, *overrides) == cap
    assert cap_of(PROCESS, "text.kind=dpo") == "none at all"
    assert cap_of() is None


def test_the_worker_takes_what_it_is_sent(lively_base: Path, lively_policy: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from lvrpo.training.rollout_worker import load_weights

    policy, sent = (
        lively_policy(0),
        {name: p.detach() for name, p in policy_module(lively_policy(5)).named_parameters()},
    )
    save_file(sent, str(tmp_path / "w.safetensors"))
    assert load_weights(policy, str(tmp_path / "w.safetensors")) == weights_checksum(sent)
    assert all(torch.equal(p, sent[name]) for name, p in policy.named_parameters())


def test_weights_that_a_killed_process_left_in_memory_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights_folder, "SHARED_MEMORY", tmp_path)
    code = (
        "import os, sys; from pathlib import Path; from lvrpo.training import weights_folder as w\n"
        "w.SHARED_MEMORY = Path(sys.argv[1])\n"
        "folder = w.WeightsFolder(); (folder.path / 'weights.safetensors').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("weights.safetensors"))) == 1
    one, other = weights_folder.WeightsFolder(), weights_folder.WeightsFolder(mode=0o755)
    assert {*tmp_path.iterdir()} == {one.path, other.path}
    assert [folder.path.stat().st_mode & 0o777 for folder in (one, other)] == [0o700, 0o755]
    one.close()
    other.close()
    assert not [*tmp_path.iterdir()]


def test_weights_of_an_engine_that_nobody_closed_are_removed_at_the_end(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lvrpo.training import weights_folder as w\n"
        "w.SHARED_MEMORY = Path(sys.argv[1])\n"
        "folder = w.WeightsFolder(); (folder.path / 'weights.safetensors').write_bytes(b'x')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not [*tmp_path.iterdir()]
