"""Rewards of others: whatever they do, the run goes on as if they had not."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lvrpo.errors import ContractError, InputError
from lvrpo.registry import allow_code
from lvrpo.rewards.base import Scores, offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import MOST_FAILED, build_rewards
from lvrpo.training.data_parallel import score_local
from lvrpo.types import Group, Prompt

DRAW = Prompt("d", "generate", (torch.full((3, 8, 8), 0.25), "x"), ("image",))


class Does:
    """Scores 1 after doing something to the groups."""

    def __init__(self, act: Callable[[Sequence[Group]], object]) -> None:
        self.act = act

    def applies(self, prompt: Prompt) -> bool:
        return True

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        self.act(groups)
        return Scores(torch.ones(len(groups), len(groups[0])))


def drawn() -> list[Group]:
    return [offline_group(DRAW, [[torch.full((3, 8, 8), level)] for level in (0.25, 0.75)])]


def scored(groups: list[Group], act: Callable[[Sequence[Group]], object], **options: Any) -> Any:
    source = ConfiguredReward(RewardConfig(name="mine:Does", **options), Does(act))
    return score_local([source], groups, None, most_failed=MOST_FAILED)  # type: ignore[arg-type]  # nobody judges


def spoil(groups: Sequence[Group]) -> None:
    for group in groups:
        group.prompt.parts[0].zero_()  # type: ignore[union-attr]  # an image
        for trajectory in group.trajectories:
            trajectory.image.numpy()[...] = 7  # type: ignore[union-attr]  # past torch's own count of changes
            trajectory.segments[0].latent.zero_()  # type: ignore[union-attr]


def test_a_reward_that_changes_what_it_is_given_changes_a_copy() -> None:
    groups, untouched = drawn(), drawn()
    assert scored(groups, spoil).scores.tolist() == [[[1.0], [1.0]]]
    for one, other in zip(groups[0].trajectories, untouched[0].trajectories, strict=True):
        assert torch.equal(one.image, other.image)  # type: ignore[arg-type]
        assert torch.equal(one.segments[0].latent, other.segments[0].latent)  # type: ignore[union-attr]
    assert torch.equal(groups[0].prompt.parts[0], DRAW.parts[0])  # type: ignore[arg-type]
    assert float(DRAW.parts[0].mean()) == 0.25  # type: ignore[union-attr]


def test_what_it_sets_for_the_process_is_put_back() -> None:
    def meddle(groups: Sequence[Group]) -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        torch.rand(5)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)

    def state() -> list[Any]:
        numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index,union-attr]
        return [*numbers, torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()]

    before = state()
    assert scored(drawn(), meddle).mask.all()
    assert state() == before

    def meddle_and_fail(groups: Sequence[Group]) -> None:
        meddle(groups)
        raise RuntimeError("and out")

    with pytest.raises(ContractError, match="and out"):
        scored(drawn(), meddle_and_fail)
    assert state() == before


def test_one_that_sleeps_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert scored(drawn(), lambda groups: time.sleep(3600)).mask.all()
    assert slept == [3600]


def test_sys_exit_is_a_failure_as_any_other() -> None:
    with pytest.raises(ContractError, match=r"'mine:Does' failed on 2 of 2 outputs, .*\(2\): SystemExit: 3: fix"):
        scored(drawn(), lambda groups: sys.exit(3))
    table = scored(drawn(), lambda groups: sys.exit(3), max_failed=1)
    assert set(table.reasons.values()) == {"failed: SystemExit: 3"}


def test_ctrl_c_is_none() -> None:
    def stop(groups: Sequence[Group]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(drawn(), stop)


class Half(Does):
    """Fails on half of the outputs, or on all but one."""

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        return Scores(torch.ones(1, 2), {(0, g): "away" for g in range(int(self.act(groups)))})  # type: ignore[call-overload]


def test_more_than_half_of_a_step_stops_where_the_step_is_asked_about() -> None:
    config = RewardConfig(name="mine:Half")
    one, both = (ConfiguredReward(config, Half(lambda groups, n=n: n)) for n in (1, 2))
    groups = drawn()
    assert score_local([one], groups, None, most_failed=0.5).mask.sum() == 1  # type: ignore[arg-type]
    assert score_local([both], groups, None).mask.sum() == 0  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=r"failed on 2 of 2 outputs, max_failed=0.5: most often \(2\): away: fix"):
        score_local([both], groups, None, most_failed=0.5)  # type: ignore[arg-type]


METHODS = "    def applies(self, prompt): ...\n    def score(self, groups, judge): ...\n"
MODULES = {
    "raises": "class R:\n    def __init__(self, **options):\n        raise ValueError('no server given')\n" + METHODS,
    "exits": "import sys\nclass R:\n    def __init__(self):\n        sys.exit(3)\n" + METHODS,
}


@pytest.mark.parametrize(("name", "said"), [("raises", "ValueError: no server given"), ("exits", "SystemExit: 3")])
def test_a_class_that_cannot_be_made(name: str, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"lvrpo_test_{name}.py").write_text(MODULES[name])
    monkeypatch.syspath_prepend(tmp_path)
    allow_code([f"lvrpo_test_{name}"])
    with pytest.raises(InputError, match=rf"rewards\.mine: lvrpo_test_{name}:R cannot be made: {said}: correct"):
        build_rewards([RewardConfig(name=f"lvrpo_test_{name}:R", label="mine")])


def test_applies_that_raises_names_reward_and_prompt() -> None:
    class Odd(Does):
        def applies(self, prompt: Prompt) -> bool:
            return bool(1 / 0)

    source = ConfiguredReward(RewardConfig(name="mine:Odd"), Odd(len))
    with pytest.raises(ContractError, match="reward 'mine:Odd': applies failed on prompt 'd': ZeroDivisionError"):
        source.scores(DRAW)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="max_failed"):
        RewardConfig(name="self_vqa", max_failed=share)
