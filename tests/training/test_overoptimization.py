from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.loading import FINAL
from lvrpo.statistics import Divergence, Interval, divergence
from lvrpo.training import validation
from lvrpo.training.checkpoint import list_checkpoints
from lvrpo.training.config import TrainConfig
from lvrpo.training.overoptimization import Overoptimization, OveroptimizationConfig, stratified_mean
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import ValidationState
from lvrpo.training.trainer import Trainer
from lvrpo.types import Group, Prompt, RewardTable


def table(reward: float, watched: float, rng: np.random.Generator, P: int = 8) -> RewardTable:
    """Groups of 4 whose scores scatter by .1 around two means."""
    scores = torch.tensor(rng.normal([reward, watched], 0.1, (P, 4, 2)), dtype=torch.float32)
    return RewardTable(("own", "truth"), torch.tensor([1.0, 0.0]), scores, scores > -9, {}, ("generate",) * P)


def run_through(
    course: list[tuple[float, float]], seed: int = 0, **options: Any
) -> tuple[Overoptimization, int | None]:
    """The step at which a course of (reward, watched) turned, looked at every 5 steps."""
    turn, rng = (
        Overoptimization(OveroptimizationConfig(reward="own", watch="truth", window=5, **options)),
        np.random.default_rng(seed),
    )
    for step, (reward, watched) in enumerate(course, start=1):
        turn.add(step, GROUPS, table(reward, watched, rng), {})
        if step % 5 == 0:
            found = turn.detect(step, num_validations=len(course) // 5, every=5)
            if found is not None:
                assert turn.message(step, *found).startswith("generate: own rose by ")
                return turn, step
            turn.update_best(step)
    return turn, None


GROUPS = [Group(Prompt(str(i), "generate", ("x",), ("image",)), ()) for i in range(8)]
HACKED = [(0.02 * i, 0.5 + 0.02 * min(i, 15) - 0.03 * max(0, i - 15)) for i in range(40)]
"""Both rise for 15 steps, then the watched scorer falls."""


def test_overoptimization_is_detected_soon_after_it_begins() -> None:
    turn, step = run_through(HACKED)
    assert step in (25, 30)
    assert turn.best_step in (15, 20)


@pytest.mark.parametrize(
    "course",
    [
        [(0.02 * i, 0.5 + 0.01 * i) for i in range(40)],  # both rise
        [(0.5 - 0.01 * i, 0.5 - 0.01 * i) for i in range(40)],  # both fall: no over-optimisation
        [(0.02 * i, 0.5) for i in range(40)],  # the watched one stands
    ],
)
def test_no_detection_without_divergence(course: list[tuple[float, float]]) -> None:
    assert run_through(course)[1] is None


def test_a_run_in_which_nothing_changes_is_rarely_stopped() -> None:
    stopped = sum(run_through([(0.5, 0.5)] * 30, seed)[1] is not None for seed in range(60))
    assert stopped <= 3


LEVELS = {"easy": 0.9, "hard": 0.1}


def of_categories(seed: int, fall: float) -> int | None:
    """When a run turned whose prompts are easy or hard by chance; the watched scorer falls after step 20."""
    turn, rng = (
        Overoptimization(OveroptimizationConfig(reward="own", watch="truth", window=5)),
        np.random.default_rng(seed),
    )
    for step in range(1, 41):
        names = rng.choice(list(LEVELS), 8).tolist()
        groups = [Group(Prompt(str(i), "generate", ("x",), ("image",), category=c), ()) for i, c in enumerate(names)]
        made = table(0.0, 0.0, rng)
        made.scores[:] += torch.tensor([LEVELS[name] for name in names])[:, None, None]
        made.scores[..., 0] += 0.01 * step
        made.scores[..., 1] -= fall * (step > 20)
        turn.add(step, groups, made, {})
        if step % 5 == 0 and turn.detect(step, num_validations=8, every=5) is not None:
            return step
    return None


def test_prompts_of_one_category_are_compared() -> None:
    """A fall of .1 beside categories .8 apart: without them its error is .09, with them .01."""
    assert [of_categories(seed, 0.1) for seed in range(5)] == [25] * 5
    assert sum(of_categories(seed, 0.0) is not None for seed in range(30)) <= 1


def test_the_best_window_is_not_the_one_with_easy_prompts() -> None:
    rows = [(1, 0, 0.9, 0), (1, 0, 0.1, 1), (2, 0, 0.8, 0), (2, 0, 0.8, 0), (3, 0, 0.1, 1), (3, 0, 0.2, 1)]
    means = torch.tensor(rows)
    easy, hard = means[means[:, 0] == 2], means[means[:, 0] == 3]
    overall = 2.9 / 6
    assert stratified_mean(means, easy) == pytest.approx(0.8 - (2.5 / 3 - overall))
    assert stratified_mean(means, hard) == pytest.approx(0.15 - (0.4 / 3 - overall))
    assert stratified_mean(means, hard) > stratified_mean(means, easy)
    assert stratified_mean(means, means) == pytest.approx(overall)


def test_what_is_remembered_comes_back() -> None:
    turn, _ = run_through(HACKED[:12])
    other = Overoptimization(turn.config)
    other.load(turn.state())
    assert other.categories == turn.categories == [""]
    assert torch.equal(other.means["generate"], turn.means["generate"])
    assert (other.best_step, other.best_watched) == (turn.best_step, turn.best_watched)
    old = {name: value for name, value in turn.state().items() if name != "categories"}
    with pytest.raises(InputError, match="a version that compared without categories"):
        other.load(old)


def test_groups_without_either_score_do_not_count() -> None:
    turn, made = (
        Overoptimization(OveroptimizationConfig(reward="own", watch="truth")),
        table(0, 0, np.random.default_rng(0)),
    )
    made.mask[0, :, 0] = False
    made.mask[1, :, 1] = False
    made.mask[2, :2, 1] = False
    turn.add(1, GROUPS, made, {})
    assert turn.means["generate"].shape == (6, 4)
    assert float(turn.means["generate"][0, 2]) == pytest.approx(float(made.scores[2, 2:, 1].mean()), rel=1e-5)


def test_divergence_returns_the_largest_fall() -> None:
    up, down = (
        [np.linspace(m, m + 0.1, 20) for m in (0, 0.2, 0.4)],
        [np.linspace(m, m + 0.1, 20) for m in (0.8, 0.9, 0.3)],
    )
    found = divergence(up, down, 0.95)
    assert found is not None
    assert found.part == 1
    assert found.scorer.score == pytest.approx(-0.6)
    assert divergence(up, up, 0.95) is None
    assert divergence([x[:9] for x in up], [x[:9] for x in down], 0.95) is None  # too few


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("{reward: self_vqa, watch: exact_answer}", "is no reward of weight 0"),
        ("{reward: own_vga, watch: success}", "is no trained reward: there are exact_answer, self_vqa"),
        ("{reward: self_vqa, watch: success, window: 0}", "validation.overoptimization.window"),
        ("{reward: self_vqa}", "validation.overoptimization.watch"),
    ],
)
def test_what_does_not_fit_is_one_line(turn: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(
            TrainConfig,
            None,
            ["rewards=[{name: exact_answer}, {name: self_vqa}]", f"validation.overoptimization={turn}"],
        )


SMALL = (
    "steps=8",
    "data.prompts_per_step={generate: 12}",
    "rollout={group_size: 2, num_steps: 2}",
    "flow.top_bottom_k=1",
    "allow_code=[tests_turn]",
    "rewards=[{name: tests_turn:rising}, {name: tests_turn:falling, weight: 0}]",
    "advantages.std_floor=0",
    "checkpoint_every=1",
    "device=cpu",
)
REWARDS = """
from lvrpo.rewards.function import reward
CALLS = {"rising": 0, "falling": 0}
def score(name, sign, trajectory):
    CALLS[name] += 1
    return sign * CALLS[name] / 100 + trajectory.member * 1e-4
@reward(outputs=["image"])
def rising(trajectory):
    return score("rising", 1, trajectory)
@reward(outputs=["image"])
def falling(trajectory):
    return score("falling", -1, trajectory)
"""


@pytest.mark.parametrize(("action", "held_out"), [("stop", 0), ("rollback", 0), ("warn", 0), ("stop", 7)])
def test_a_run_acts_on_a_detection(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, held_out: int
) -> None:
    (tmp_path / "tests_turn.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    watch = f"{{reward: tests_turn:rising, watch: tests_turn:falling, window: 2, action: {action}}}"
    watching = f"validation={{every: 2, prompts: {{generate: {held_out}}}, overoptimization: {watch}}}"
    monkeypatch.setattr(validation, "MAX_ROLLBACKS", 1)
    config = load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, watching])
    alignment = Trainer.start(config, Path("run"))
    with alignment.run:
        assert alignment.train()
    rows = RunDirectory.read(Path("run")).metrics()
    actions = {row["step"]: row["overoptimization/action"] for row in rows if "overoptimization/action" in row}
    assert min(actions) == 4
    assert "tests_turn:rising rose by" in actions[4]
    if action == "stop":
        assert rows[-1]["step"] == 4
        assert actions[4].startswith("stopped")
    elif action == "rollback":
        assert actions[4].startswith("rolled back to step 2")
        assert alignment.state.validation.rollbacks == 1
        assert rows[-1]["step"] == 8 or rows[-1]["overoptimization/action"].startswith("stopped")
    else:
        assert rows[-1]["step"] == 8
        assert all(words.startswith("warned") for words in actions.values())
    if action != "warn" or not held_out:
        assert alignment.state.validation.best_step == 2  # before the watched score fell further
    if action == "stop":
        (Path("run") / FINAL).unlink()  # as after a kill before the result was recorded
        resumed = Trainer.resume(Path("run"))
        with resumed.run:
            assert resumed.train()
        assert resumed.state.step == 4
        longer = Trainer.resume(Path("run"), config.model_copy(update={"steps": 9}))
        with longer.run:
            assert longer.train()
        assert longer.state.step > 4


def test_a_rollback_makes_its_checkpoint_the_best_though_validation_preferred_a_pruned_one(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation prefers step 0, then 4; the detector prefers step 2 and goes back there once 0 is deleted."""
    (tmp_path / "tests_turn.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)

    def verdict(self: Any, scores: Any, state: ValidationState, step: int) -> validation.ValidationReport:
        preferred = step in (0, 4)
        state.best_step = step if preferred else state.best_step
        return validation.ValidationReport({}, "best" if preferred else "kept", ())

    def detected(self: Overoptimization, step: int, *args: Any) -> tuple[str, Divergence] | None:
        change = Interval(0.5, 0.4, 0.6, 8)
        return ("generate", Divergence(0, change, Interval(-0.5, -0.6, -0.4, 8))) if step == 6 else None

    def prefer_the_second(self: Overoptimization, step: int) -> bool:
        self.best_step = min(step, 2)
        return step == 2

    monkeypatch.setattr(validation.Validator, "_compare", verdict)
    monkeypatch.setattr(Overoptimization, "detect", detected)
    monkeypatch.setattr(Overoptimization, "update_best", prefer_the_second)
    watch = "{reward: tests_turn:rising, watch: tests_turn:falling, window: 2, action: rollback}"
    watching = f"validation={{every: 2, prompts: {{generate: 7}}, overoptimization: {watch}}}"
    config = load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, watching, "keep_checkpoints=1"])
    trainer = Trainer.start(config, Path("run"))
    with trainer.run:
        assert trainer.train()
    assert trainer.state.validation.best_step == 2
    assert trainer.state.validation.rollbacks == 1
    assert [folder.name for folder in list_checkpoints(Path("run"))] == ["step_000002", "step_000008"]
    trainer.result()
