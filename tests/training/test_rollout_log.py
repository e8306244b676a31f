"""What every output scored: written as it was, bounded, and the same after a resumption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.rewards.table import NOT_APPLICABLE
from lvrpo.training import rollout_log
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import group_successes
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import FlowSegment, Group, Prompt, RewardTable, Segment, TextSegment, Trajectory

RED = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 4)
STRIPES = torch.stack([torch.tensor([0.0, 1.0]).repeat(4, 2)] * 3)  # black and white columns


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", TrainConfig())


def text(words: str, ended: bool = True) -> TextSegment:
    n = len(words.split())
    return TextSegment(torch.zeros(n, dtype=torch.int64), torch.zeros(n), 1.0, words, ended)


def flow_segment(image: torch.Tensor) -> FlowSegment:
    none = torch.zeros(0, 1, 1)
    return FlowSegment(
        torch.zeros(1, 1), torch.zeros(2), (), none, none, torch.zeros(0), "ode", 0.0, 1.0, 1.0, "none", "mean", image
    )


def group(prompt: Prompt, members: Sequence[Sequence[Segment]]) -> Group:
    return Group(prompt, tuple(Trajectory(prompt, g, tuple(s), seed=g) for g, s in enumerate(members)))


QUESTION = group(
    Prompt("q", "understand", ("x",), ("text",), answer="red"),
    [[text("red")], [text("blue sky")], [text("red")], [text("a a a", ended=False)]],
)
DRAWING = group(
    Prompt("d", "generate", ("x",), ("image",), category="colors"),
    [[flow_segment(RED)], [flow_segment(RED)], [flow_segment(RED)], [flow_segment(STRIPES)]],
)
THOUGHT = group(Prompt("t", "reason", ("x",), ("text", "image")), [[text("two"), flow_segment(RED)]] * 4)


def table() -> RewardTable:
    """Two rewards: the first fails once and does not apply to the image; the second fails for the whole question."""
    scores = torch.tensor([[[1.0, 9.0], [0.5, 9.0], [9.0, 9.0], [0.0, 9.0]], [[9.0, 0.25]] * 4, [[1.0, 0.75]] * 4])
    mask = scores < 9
    reasons = {(1, g, 0): NOT_APPLICABLE for g in range(4)} | {(0, g, 1): "failed: away" for g in range(4)}
    reasons[0, 2, 0] = "failed: away"
    return RewardTable(
        ("exact", "facts"), torch.tensor([1.0, 0.5]), scores, mask, reasons, ("understand", "generate", "reason")
    )


THREE = [QUESTION, DRAWING, THOUGHT]
RIGHT = group_successes(THREE)
ADVANTAGES = torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0] * 4, [0.5, -0.5, 1.5, -1.5]])


def test_a_step_comes_back_as_it_was(run: RunDirectory) -> None:
    rollout_log.write_step(run, 1, THREE, table(), RIGHT, ADVANTAGES)
    (record,) = rollout_log.read_steps(run.path)
    assert (record.step, record.names, record.tasks) == (1, ("exact", "facts"), ("understand", "generate", "reason"))
    assert record.weights.tolist() == [1.0, 0.5]
    nan = math.nan
    np.testing.assert_array_equal(record.scores[0], [[1, nan], [0.5, nan], [nan, nan], [0, nan]])
    np.testing.assert_array_equal(record.scores[1], [[nan, 0.25]] * 4)
    assert record.applies.tolist() == [[True, True], [False, True], [True, True]]
    np.testing.assert_array_equal(record.success, [[1, 0, 1, 0], [nan] * 4, [nan] * 4])
    assert record.advantages.tolist() == ADVANTAGES.tolist()
    assert record.judged.all()


def test_rewards_of_another_segment_are_noted(run: RunDirectory) -> None:
    judged = torch.tensor([[True, True], [True, True], [False, True]])
    rollout_log.write_step(run, 1, THREE, table(), RIGHT, ADVANTAGES, judged)
    (record,) = rollout_log.read_steps(run.path)
    assert record.judged.tolist() == judged.tolist()


def test_traits_and_diversity_by_hand(run: RunDirectory) -> None:
    rollout_log.write_step(run, 1, THREE, table(), RIGHT, ADVANTAGES)
    (record,) = rollout_log.read_steps(run.path)
    nan = math.nan
    drawn, striped = [nan, nan, 1, 0, 0, 0], [nan, nan, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_array_equal(
        record.traits[0], [[1, 0, *[nan] * 4], [2, 0, *[nan] * 4], [1, 0, *[nan] * 4], [3, 1, *[nan] * 4]]
    )
    np.testing.assert_array_equal(record.traits[1], [drawn] * 3 + [striped])
    np.testing.assert_array_equal(record.traits[2], [[1, 0, 1, 0, 0, 0]] * 4)
    # 5 of the 6 pairs of texts differ; red and stripes differ by 1 at half of all values, in 3 of the 6 pairs
    np.testing.assert_allclose(record.text_diversity, [5 / 6, nan, 0])
    np.testing.assert_allclose(record.picture_diversity, [nan, math.sqrt(0.5 * 3 / 6), 0], rtol=1e-6)


def test_large_images_are_measured_on_a_grid() -> None:
    wide = torch.rand(3, 200, 130)
    for image, shape in ((wide, (50, 33)), (wide[:, :64, :64], (64, 64))):
        images = rollout_log._images(group(DRAWING.prompt, [[flow_segment(image)]] * 2))
        assert images is not None
        assert images.shape == (2, 3, shape[0] * shape[1])


def test_controls_and_validations_are_recorded(run: RunDirectory) -> None:
    rollout_log.write_control(run, 1, THREE, table(), RIGHT, 10)
    rollout_log.write_validation(run, 0, {"understand": [1.0, 0.0]}, 20)
    rollout_log.write_validation(run, 20, {"understand": [1.0, 1.0]}, 20)
    rollout_log.write_validation(run, 40, {}, 20)
    (control,) = rollout_log.read_controls(run.path)
    assert np.isnan(control.advantages).all()
    assert [(step, look["understand"].tolist()) for step, look in rollout_log.read_validations(run.path)] == [
        (0, [1.0, 0.0]),
        (20, [1.0, 1.0]),
    ]
    assert not rollout_log.has_records(run.path)


@pytest.mark.parametrize(("newest", "spacing"), [(0, 1), (1023, 1), (1024, 2), (2047, 2), (2048, 4), (99_999, 128)])
def test_spacing_of_what_is_kept(newest: int, spacing: int) -> None:
    assert rollout_log.stride(newest) == spacing
    assert newest // spacing + 1 <= rollout_log.MAX_RECORDS


def kept(run: RunDirectory) -> dict[str, list[int]]:
    return {kind: [step for step, _ in rollout_log._files(run.path, kind)] for kind in rollout_log.FIRST_STEP}


def write_all(run: RunDirectory, first: int, last: int) -> None:
    """What the loop writes from step ``first`` to ``last``: controls every 3 steps, looks every 4 and at the end."""
    for step in range(first, last + 1):
        rollout_log.write_step(run, step, [DRAWING], one_row(), group_successes([DRAWING]), torch.zeros(1, 4))
        if (step - 1) % 3 == 0:
            rollout_log.write_control(run, step, [DRAWING], one_row(), group_successes([DRAWING]), 3)
        if step % 4 == 0 or step == 38:
            rollout_log.write_validation(run, step, {"generate": [float(step)]}, 4)


def one_row() -> RewardTable:
    return RewardTable(("facts",), torch.ones(1), torch.zeros(1, 4, 1), torch.ones(1, 4, 1) > 0, {}, ("generate",))


def test_a_long_run_keeps_evenly_spaced_records(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_log, "MAX_RECORDS", 8)
    rollout_log.write_validation(run, 0, {"generate": [0.0]}, 4)
    write_all(run, 1, 38)
    assert kept(run) == {
        "step": [1, 9, 17, 25, 33],
        "control": [1, 7, 13, 19, 25, 31, 37],
        "validation": [0, 8, 16, 24, 32],  # the last look, at 38, is number 10
    } | {"validation": [0, 8, 16, 24, 32, 38]}


@pytest.mark.parametrize("stopped", [5, 8, 9, 16, 17, 30])
def test_a_resumed_run_holds_what_an_uninterrupted_one_holds(
    run: RunDirectory, tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_log, "MAX_RECORDS", 8)
    other = RunDirectory.create(tmp_path / "other", TrainConfig())
    for one in (run, other):
        rollout_log.write_validation(one, 0, {"generate": [0.0]}, 4)
    write_all(other, 1, 38)
    write_all(run, 1, stopped)
    rollout_log.truncate(run, stopped - 3)  # the last checkpoint
    assert all(step <= stopped - 3 for steps in kept(run).values() for step in steps)
    write_all(run, stopped - 2, 38)
    assert kept(run) == kept(other)
    for name in ("step_000001.npz", "control_000019.npz", "validation_000016.npz"):
        assert (run.path / "scores" / name).read_bytes() == (other.path / "scores" / name).read_bytes()


def test_broken_files_are_one_line(run: RunDirectory) -> None:
    rollout_log.write_step(run, 1, [DRAWING], one_row(), group_successes([DRAWING]), torch.zeros(1, 4))
    path = run.path / "scores" / "step_000001.npz"
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole.replace(b"traits", b"traitz")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"step_000001\.npz: .*: delete it") as caught:
            list(rollout_log.read_steps(run.path))
        assert "\n" not in str(caught.value)


def test_what_a_killed_writer_left_is_cleared(run: RunDirectory) -> None:
    rollout_log.write_step(run, 1, [DRAWING], one_row(), group_successes([DRAWING]), torch.zeros(1, 4))
    left = run.path / "scores" / ".step_000002.npz.tmp-01230123"
    left.write_bytes(b"half")
    run.close()
    RunDirectory.open(run.path).close()
    assert not left.exists()
    assert kept(run)["step"] == [1]


def test_a_record_names_its_judges(run: RunDirectory) -> None:
    made = replace(table(), judge="TinyPolicy:0123", judged_by={"facts": "a model at an address"})
    rollout_log.write_step(run, 1, THREE, made, RIGHT, ADVANTAGES)
    (record,) = rollout_log.read_steps(run.path)
    assert record.judge == "TinyPolicy:0123"
    assert record.judged_by == tuple({"facts": "a model at an address"}.get(name, "") for name in record.names)
    assert any(record.judged_by)


def test_categories_are_on_record_and_older_records_have_none(run: RunDirectory) -> None:
    rollout_log.write_step(run, 1, THREE, table(), RIGHT, ADVANTAGES)
    (record,) = rollout_log.read_steps(run.path)
    assert record.categories == ("", "colors", "")
    path = run.path / "scores" / "step_000001.npz"
    with np.load(path) as arrays:
        older = {name: value for name, value in arrays.items() if name != "categories"}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **older)
    (record,) = rollout_log.read_steps(run.path)
    assert record.categories == ()


def test_caps_and_scales_of_their_own_are_on_record(run: RunDirectory) -> None:
    cut = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    made = replace(table(), normalize={"facts": "batch"}, cut={"exact": cut})
    rollout_log.write_step(run, 1, THREE, made, RIGHT, ADVANTAGES)
    rollout_log.write_step(run, 2, THREE, table(), RIGHT, ADVANTAGES)
    record, plain = rollout_log.read_steps(run.path)
    assert record.normalize == ("", "batch")
    nan = math.nan  # of the first group's three valid scores one was cut; the second group has none
    np.testing.assert_allclose(record.cut, [[1 / 3, nan], [nan, nan], [1, nan]], rtol=1e-6)
    assert (plain.normalize, plain.cut.size) == ((), 0)
