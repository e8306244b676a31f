"""Rewards in Ray actors: configuration and what travels, without Ray; the actors, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_rewards import ROWS, drawn

from lvrpo.config import load_config, parse_section
from lvrpo.distributed import ray_cluster
from lvrpo.errors import InputError
from lvrpo.registry import allow_code, allowed_code
from lvrpo.rewards import remote
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.remote import RewardActor, portable
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.training.config import TrainConfig
from lvrpo.types import FlowSegment, Group, Prompt

THERE = {"ray": {}}


def config(**row: Any) -> RewardConfig:
    return parse_section(RewardConfig, row, "rewards.0")


def test_fields_and_defaults() -> None:
    assert config(name="scene_facts").where is None
    ray = config(name="scene_facts", where={"ray": {"num_gpus": 0.5, "replicas": 2}}).where.ray
    assert (ray.num_gpus, ray.num_cpus, ray.replicas, ray.timeout_s) == (0.5, 1.0, 2, 600.0)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ({"ray": {"replicsa": 2}}, "where.ray.replicsa: unknown key: did you mean where.ray.replicas?"),
        ({"rya": {}}, "where.rya: unknown key: did you mean where.ray?"),
        ({"ray": {"replicas": 0}}, "where.ray.replicas=0: must be >= 1"),
        ({"ray": {"num_gpus": -1}}, "where.ray.num_gpus=-1: must be >= 0"),
        ({"ray": {"timeout_s": 0}}, "where.ray.timeout_s=0: must be > 0"),
        ({"ray": {"num_gpus": 1.5}}, "num_gpus=1.5: must be a whole number above 1"),
    ],
)
def test_wrong_values(where: Any, line: str) -> None:
    with pytest.raises(InputError) as error:
        config(name="scene_facts", where=where)
    assert line in str(error.value)


def test_the_command_line_says_where() -> None:
    given = "rewards=[{name: scene_facts, where: {ray: {num_gpus: 1, replicas: 2}}}]"
    assert load_config(TrainConfig, None, [given]).rewards[0].where.ray.replicas == 2


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError) as error:
        build_rewards([config(name="scene_facts", label="facts", where=THERE)])
    assert str(error.value) == "rewards.facts.where: needs ray: pip install 'lvrpo[ray]'"


def test_several_processes_start_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCluster:
        def is_initialized(self) -> bool:
            return False

        def init(self, address: str, **_: object) -> None:
            assert address == "auto"
            raise ConnectionError

    monkeypatch.setitem(sys.modules, "ray", NoCluster())
    monkeypatch.setattr(ray_cluster, "world_size", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="no Ray cluster to connect to: start one first: ray start --head"):
        build_rewards([config(name="scene_facts", where=THERE)])


def test_what_was_handed_over_in_python_stays() -> None:
    with pytest.raises(InputError, match=r"rewards\.scene_facts\.where: was handed over in Python"):
        build_rewards([config(name="scene_facts", where=THERE)], given={"scene_facts": object()})


def test_one_namespace_for_all_processes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = remote.shared_namespace()
    assert alone == remote.shared_namespace()
    monkeypatch.setattr(remote, "world_size", lambda: 2)
    names = []
    for port, attempt in (("1", "0"), ("1", "1"), ("2", "0"), ("1", "0")):
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        names.append(remote.shared_namespace())
    assert len({alone, *names}) == 4
    assert names[0] == names[3]


def test_what_travels_is_small_and_scores_the_same(tiny_groups: list[Group], tiny: Any) -> None:
    rows = [config(**row) for row in ROWS]
    sent = [portable(group) for group in tiny_groups]
    tables = [score_groups(build_rewards(rows), groups, tiny) for groups in (tiny_groups, sent)]
    assert torch.equal(tables[0].scores, tables[1].scores)
    assert tables[0].reasons == tables[1].reasons
    for group, copy in zip(tiny_groups, sent, strict=True):
        assert [t.seed for t in group.trajectories] == [t.seed for t in copy.trajectories]
        for one, other in zip(group.trajectories, copy.trajectories, strict=True):
            assert torch.equal(one.image, other.image)
            assert other.image.untyped_storage().nbytes() == other.image.numel() * other.image.element_size()
            segment = other.segments[-1]
            assert isinstance(segment, FlowSegment)
            assert segment.states.numel() == segment.next_states.numel() == 0
            assert segment.means is None
            assert one.segments[-1].states.numel() > 0


def test_images_of_prompts_travel_in_memory_of_their_own(group: Callable[..., Group]) -> None:
    many = torch.rand(50, 3, 8, 8)
    prompt = Prompt("edit", "edit", (many[3], "larger"), ("image",), edited=torch.ones(50, 8, 8, dtype=torch.bool)[0])
    sent = portable(group(prompt, [[many[4]], [many[5]]]))
    assert torch.equal(sent.prompt.parts[0], many[3])
    for tensor in (sent.prompt.parts[0], sent.prompt.edited, sent.trajectories[1].image):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert sent.trajectories[0].prompt is sent.prompt


def test_an_actor_makes_what_is_made_here(tiny_groups: list[Group], tmp_path: Path) -> None:
    """Without Ray: the class as it is."""
    (tmp_path / "mine.py").write_text("def mean(image, times=1):\n    return times * float(image.mean())\n")
    row = config(name="./mine.py:mean", options={"times": 2})
    actor = RewardActor(row, str(tmp_path), [])
    assert isinstance(error := actor.make(), InputError)
    assert "add --allow-code" in str(error)
    os.chdir(tmp_path)
    allow_code(["./mine.py"])
    assert (traits := RewardActor(row, str(tmp_path), sorted(allowed_code())).make()).sides == ()
    assert traits.judges == ("image",)
    began, scores = RewardActor(row, str(tmp_path), sorted(allowed_code())).score(tiny_groups[0])
    assert (began, scores.failures) == (None, {})
    assert torch.equal(scores.values, score_groups(build_rewards([row]), tiny_groups[:1], None).scores[..., 0])
    wrong = RewardActor(row.model_copy(update={"options": {"tmies": 2}}), str(tmp_path), sorted(allowed_code()))
    assert str(wrong.make()).startswith("rewards.mean.options (tmies): ")
    [_, error] = wrong.score(tiny_groups[0])
    assert isinstance(error, InputError)
    lost = RewardActor(row, str(tmp_path / "gone"), ())
    assert "its node does not see" in str(lost.make())


def test_an_actor_tells_that_its_reward_asks_the_judge() -> None:
    assert RewardActor(config(name="self_vqa"), ".", ()).make().sides == ("read",)
    own = RewardActor(config(name="self_vqa", judge="tiny"), ".", ()).make()
    assert own.sides == ()
    assert own.judged_by.startswith("TinyPolicy:")


@pytest.fixture(scope="module")
def tiny() -> Any:
    from lvrpo.policies.loading import load_policy

    return load_policy("tiny").make_reference()


@pytest.fixture(scope="module")
def tiny_groups(tiny: Any) -> list[Group]:
    return drawn(tiny)


# --- with Ray ---


@pytest.mark.slow
@pytest.mark.parametrize("what", ["same_scores", "refusals", "deaths", "no_room"])
def test_actors(what: str, root: Path) -> None:
    """In a process of its own, for Ray warns of this and that."""
    pytest.importorskip("ray")
    script = root / "tests" / "doubles" / "remote_rewards.py"
    command = [sys.executable, "-W", "ignore", str(script), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
