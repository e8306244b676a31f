"""The numbers of the reward audit, from scores made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvrpo.algorithms import gdpo_advantages, group_relative_advantages, normalize_rewards
from lvrpo.audit_records import RewardAudit, ScorerAudit, Window
from lvrpo.errors import InputError
from lvrpo.evaluation.recorded_groups import (
    AdvantageSettings,
    RecordedGroups,
    RecordedRun,
    read_recorded_run,
    split_windows,
)
from lvrpo.evaluation.reward_audit import audit_rewards, by_step, write_audit
from lvrpo.report.audit import audit_section, read_audit
from lvrpo.report.formatting import NONE, share
from lvrpo.training.advantages import win_rates
from lvrpo.training.config import TrainConfig
from lvrpo.training.rollout_log import RolloutRecord
from lvrpo.training.run_directory import RunDirectory

NAN = math.nan
GDPO = AdvantageSettings("gdpo", std_floor=1e-4)
SUMMED = AdvantageSettings("grpo", std_floor=1e-4)


def record(
    step: int,
    scores: Any,
    *,
    names: Sequence[str] = ("binary", "continuous"),
    weights: Sequence[float] | None = None,
    task: str = "generate",
    settings: AdvantageSettings = GDPO,
    success: Any = None,
    **rest: Any,
) -> RolloutRecord:
    """Groups of one task with the advantages that their scores (P, G, K) make; a nan is a score that failed."""
    table = torch.tensor(scores, dtype=torch.float32)
    P, G, K = table.shape
    weight = torch.ones(K) if weights is None else torch.tensor(weights, dtype=torch.float32)
    trained = weight > 0
    valid, mask = table[..., trained], table[..., trained].isfinite()
    if settings.per_reward:
        tasks = torch.zeros(P, dtype=torch.int64)
        A = gdpo_advantages(valid, mask, weight[trained], tasks, std_floor=settings.std_floor, clamp=settings.clamp)
    else:
        total = torch.where(mask, valid * weight[trained], 0.0).sum(dim=2)
        A = group_relative_advantages(total, mask.all(dim=2), std_floor=settings.std_floor)
    made: dict[str, Any] = {
        "applies": np.ones((P, K), dtype=np.bool_),
        "judged": np.ones((P, K), dtype=np.bool_),
        "success": np.full((P, G), NAN, dtype=np.float32) if success is None else np.float32(success),
        "traits": np.full((P, G, 6), NAN, dtype=np.float32),
        "text_diversity": np.full(P, NAN, dtype=np.float32),
        "picture_diversity": np.full(P, NAN, dtype=np.float32),
        "advantages": A.numpy(),
    }
    return RolloutRecord(step, tuple(names), weight.numpy(), (task,) * P, scores=table.numpy(), **(made | rest))


def audited(
    *records: RolloutRecord,
    settings: AdvantageSettings = GDPO,
    controls: Sequence[RolloutRecord] = (),
    verifiers: tuple[str, ...] = (),
) -> RewardAudit:
    groups = RecordedGroups.join(records)
    assert groups is not None
    return audit_rewards(RecordedRun(groups, RecordedGroups.join(controls), [], settings, verifiers))


def scorer(audit: RewardAudit, name: str, task: str = "generate") -> ScorerAudit:
    return next(s for s in audit.tasks[task].scorers if s.name == name)


BINARY_AND_CONTINUOUS = [[[0, 0.30], [0, 0.31], [1, 0.30], [1, 0.31]]]


@pytest.mark.parametrize(("settings", "which"), [(GDPO, "share"), (SUMMED, "other_share")])
def test_gdpo_keeps_to_the_weights_within_10_percent(settings: AdvantageSettings, which: str) -> None:
    audit = audited(record(1, BINARY_AND_CONTINUOUS * 3, settings=settings), settings=settings)
    for name in ("binary", "continuous"):
        found = scorer(audit, name)
        assert found.configured_share == 0.5
        assert getattr(found, which) == pytest.approx(0.5, rel=0.1)
    assert (audit.formula, audit.other_formula) in {("gdpo", "summed"), ("grpo", "gdpo")}


@pytest.mark.parametrize(("settings", "which"), [(SUMMED, "share"), (GDPO, "other_share")])
def test_summing_drowns_the_continuous_reward(settings: AdvantageSettings, which: str) -> None:
    audit = audited(record(1, BINARY_AND_CONTINUOUS * 3, settings=settings), settings=settings)
    assert getattr(scorer(audit, "continuous"), which) == pytest.approx(0.0001, abs=1e-5)
    assert getattr(scorer(audit, "binary"), which) == pytest.approx(0.9999, abs=1e-5)


def test_shares_are_pooled_over_steps_and_follow_each_step() -> None:
    """Step 1 has a difference in the first reward alone, step 2 in both alike."""
    first = [[[0, 5], [0, 5], [1, 5], [1, 5]]]
    second = [[[0, 0], [0, 1], [1, 0], [1, 1]]]
    audit = audited(record(1, first), record(2, second))
    series = audit.tasks["generate"].series
    assert series["share/binary"] == [(1, pytest.approx(1)), (2, pytest.approx(0.5, abs=1e-3))]
    # both steps have advantages of variance 1
    assert scorer(audit, "binary").share == pytest.approx(0.75, abs=1e-3)
    assert scorer(audit, "continuous").share == pytest.approx(0.25, abs=1e-3)


def test_a_clamp_is_named() -> None:
    settings = replace(GDPO, clamp=1.0)
    scores = [[[0.0], [0.0], [1.0], [5.0]]]
    audit = audited(record(1, scores, names=["one"], settings=settings), settings=settings)
    found = audit.tasks["generate"]
    # u = (-1.5, -1.5, -.5, 3.5) / sqrt(4.25); clamped to 1 only the last changes
    u = np.array([-1.5, -1.5, -0.5, 3.5]) / math.sqrt(4.25)
    A = np.minimum(u, 1) - np.minimum(u, 1).mean()
    rest = 1 - (u @ A) ** 2 / (u @ u) / (A @ A)
    assert found.rest == pytest.approx(rest, abs=1e-4)
    assert scorer(audit, "one").share == pytest.approx(1 - rest, abs=1e-4)


def test_win_rates_are_what_is_summed() -> None:
    """Of four, the pair that wins beats two and ties with one: rates 1/6 and 5/6 in both rewards, however far apart."""
    scores, mask = torch.tensor(BINARY_AND_CONTINUOUS), torch.ones(1, 4, 2) > 0
    rates, played = win_rates(scores, mask, 1e-4)
    torch.testing.assert_close(rates[0, :, 0] * 6, torch.tensor([1.0, 1, 5, 5]))
    torch.testing.assert_close(rates[0, :, 1] * 6, torch.tensor([1.0, 5, 1, 5]))
    assert played.all()
    tied, _ = win_rates(scores, mask, 0.1)
    assert (tied[..., 1] == 0.5).all()
    mask[0, 1:, 1] = False
    assert win_rates(scores, mask, 1e-4)[1][..., 1].sum() == 0  # nobody to play against

    settings = AdvantageSettings("win_rate", std_floor=1e-4)
    A = group_relative_advantages(rates.sum(dim=2), mask[..., 0])
    audit = audited(record(1, BINARY_AND_CONTINUOUS, advantages=A.numpy()), settings=settings)
    assert scorer(audit, "continuous").share == pytest.approx(0.5)
    assert audit.tasks["generate"].rest == pytest.approx(0, abs=1e-9)


def test_a_reward_that_judges_another_segment_has_no_part() -> None:
    """Thoughts are judged by the first reward, images by the second; the advantages on record are the image's."""
    scores = [[[0, 0.0], [0, 1.0], [1, 0.0], [1, 1.0]]] * 2
    A = np.float32([[-1, 1, -1, 1]] * 2)
    judged = np.array([[False, True]] * 2)
    audit = audited(record(1, scores, advantages=A, judged=judged))
    assert scorer(audit, "binary").share == 0
    assert scorer(audit, "continuous").share == pytest.approx(1)
    assert audit.tasks["generate"].rest == pytest.approx(0, abs=1e-9)
    # taken for a part of them, it would be counted as noise
    assert audited(record(1, scores, advantages=A)).tasks["generate"].rest == pytest.approx(0.5, abs=1e-3)


def test_what_comes_from_another_task_is_the_rest() -> None:
    """The partner's reward is as large as the own one and independent of it."""
    A = np.float32([[-2, 0, 0, 2]])
    audit = audited(record(1, [[[0.0], [0.0], [1.0], [1.0]]], names=["own"], advantages=A))
    assert scorer(audit, "own").share == pytest.approx(0.5)
    assert audit.tasks["generate"].rest == pytest.approx(0.5)


def test_groups_without_a_difference_by_hand() -> None:
    """Of the first reward: one group at its top, one at its bottom, one in the middle, two that spread."""
    scores = [
        [[1.0, 0.0], [1.0, 0.5]],
        [[0.0, 0.0], [0.0, 0.5]],
        [[0.5, 0.0], [0.5, NAN]],
        [[0.2, NAN], [0.8, NAN]],
        [[0.3, 0.0], [0.7, 0.25]],
    ]
    audit = audited(record(1, scores))
    first, second = scorer(audit, "binary"), scorer(audit, "continuous")
    assert (first.constant, first.all_best, first.all_worst, first.missing) == pytest.approx((0.6, 0.2, 0.2, 0.0))
    # of the 4 groups with any score one has a single one, at the bottom
    assert (second.constant, second.all_best, second.all_worst) == pytest.approx((0.25, 0.0, 0.25))
    assert second.missing == pytest.approx(0.3)
    # group 3 has one score of the second reward and a constant first one
    assert audit.tasks["generate"].with_signal == pytest.approx(0.8)


def test_a_scorer_that_never_moved_is_at_no_end() -> None:
    found = scorer(audited(record(1, [[[1.0], [1.0]]] * 3, names=["one"])), "one")
    assert (found.constant, found.all_best, found.all_worst) == (1.0, 0.0, 0.0)
    assert found.share is not None
    assert math.isnan(found.share)


def test_a_watched_reward_and_success_are_held_out() -> None:
    scores = [[[0, 0.1, 3], [1, 0.2, 2], [1, 0.3, 1], [0, 0.4, 0]]] * 12
    success = [[0, 1, 1, 0]] * 12
    audit = audited(record(1, scores, names=["a", "b", "watched"], weights=[2, 1, 0], success=success))
    assert [s.name for s in audit.tasks["generate"].scorers] == ["a", "b", "watched", "success"]
    assert [s.weight for s in audit.tasks["generate"].scorers] == [2, 1, 0, None]
    for name in ("watched", "success"):
        found = scorer(audit, name)
        assert (found.share, found.configured_share, found.other_share) == (None, None, None)
    assert scorer(audit, "a").configured_share == pytest.approx(0.8)
    a, b = (scorer(audit, name).share or 0 for name in "ab")
    assert a + b == pytest.approx(1)
    correlations = scorer(audit, "b").correlations
    assert correlations["watched"].value == pytest.approx(-1, abs=1e-6)
    assert correlations["success"].value == pytest.approx(0, abs=1e-6)
    assert correlations["a"].groups == 12
    assert scorer(audit, "a").correlations["success"].value == pytest.approx(1)
    assert "share/watched" not in audit.tasks["generate"].series


def test_a_task_with_watched_rewards_only_has_no_shares() -> None:
    audit = audited(record(1, [[[0.0], [1.0]]] * 3, names=["watched"], weights=[0]))
    found = audit.tasks["generate"]
    assert found.with_signal == 0
    assert math.isnan(found.rest)
    assert found.scorers[0].constant == 0


def test_tasks_are_apart_and_only_rewards_that_apply_are_theirs() -> None:
    drawings = record(1, [[[NAN, 0.1], [NAN, 0.3]]] * 2, applies=np.array([[False, True]] * 2))
    answers = record(1, [[[0.0, NAN], [1.0, NAN]]] * 3, task="understand", applies=np.array([[True, False]] * 3))
    audit = audited(drawings, answers)
    assert list(audit.tasks) == ["understand", "generate"]
    assert [[s.name for s in found.scorers] for found in audit.tasks.values()] == [["binary"], ["continuous"]]
    assert [found.groups for found in audit.tasks.values()] == [3, 2]
    assert scorer(audit, "continuous").configured_share == 1.0
    assert scorer(audit, "continuous").missing == 0.0


def traits(P: int, G: int, tokens: float = NAN, gray: float = NAN) -> np.ndarray:
    row = np.array([tokens, NAN if math.isnan(tokens) else 0, gray, gray, gray, gray / 2], dtype=np.float32)
    return np.broadcast_to(row, (P, G, 6)).copy()


def test_drift_by_hand() -> None:
    """Ten steps of three groups: parts are steps 1 to 2, ..., 9 to 10; images grow brighter by .01 a step."""
    scores = [[[0, 0], [1, 1]]] * 3
    rows = [
        record(s, scores, traits=traits(3, 2, gray=0.01 * s), picture_diversity=np.float32([0.1, 0.2, 0.3]) / s)
        for s in range(1, 11)
    ]
    controls = [record(s, scores, traits=traits(3, 2, gray=0.3 + 0.1 * (s > 5))) for s in (1, 4, 7, 10)]
    drift = audited(*rows, controls=controls).tasks["generate"].drift
    assert set(drift) == {"red", "green", "blue", "contrast", "picture_diversity"}
    red = drift["red"]
    assert (red.first, red.last, red.control) == pytest.approx((0.015, 0.095, 0.4), abs=1e-6)
    # two samples of three .01 and three .02 apart by .08: Welch with 10 degrees of freedom
    error = math.sqrt(2 * 0.01**2 * (6 * 0.25 / 5) / 6)
    assert red.difference.score == pytest.approx(0.08, abs=1e-6)
    assert red.difference.high - red.difference.score == pytest.approx(2.228 * error, rel=1e-3)
    assert drift["contrast"].last == pytest.approx(0.0475, abs=1e-6)
    assert drift["picture_diversity"].first == pytest.approx(0.2 * 0.75, abs=1e-6)
    assert math.isnan(drift["picture_diversity"].control)


def test_lengths_can_explain_a_reward() -> None:
    rows = traits(12, 4, tokens=1.0)
    rows[:, :, 0] = [1, 2, 3, 4]
    scores = [[[0.1], [0.2], [0.3], [0.4]]] * 12
    found = scorer(audited(record(1, scores, names=["long"], task="reason", traits=rows)), "long", "reason")
    assert found.correlations["tokens"].value == pytest.approx(1)
    assert set(found.correlations) == {"tokens"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 11), [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]),
        (range(1, 8), [(1, 2), (3, 4), (5, 5), (6, 6), (7, 7)]),
        ([1, 9, 17], [(1, 1), (9, 9), (17, 17)]),
        ([4], [(4, 4)]),
    ],
)
def test_the_parts_of_a_run(steps: Sequence[int], expected: list[tuple[int, int]]) -> None:
    assert split_windows(np.repeat(np.array(steps), 3)) == tuple(Window(*ends) for ends in expected)


def test_one_step_has_no_course() -> None:
    mean = scorer(audited(record(3, [[[0.0], [1.0]]], names=["one"])), "one").mean
    assert (mean.first, mean.last) == (0.5, 0.5)
    assert math.isnan(mean.difference.score)


def test_curves_by_hand_and_bounded() -> None:
    step = np.array([1, 1, 2, 4])
    assert by_step(step, np.array([0.0, 1.0, NAN, 3.0])) == [(1, 0.5), (4, 3.0)]
    assert by_step(step, np.array([1.0, 2.0, 0.0, 5.0]), np.array([4.0, 2.0, 0.0, 10.0])) == [(1, 0.5), (4, 0.5)]
    assert by_step(step, np.full(4, NAN)) == []
    long = by_step(np.arange(1000), np.arange(1000.0))
    assert len(long) == 334
    assert long[0] == (1.0, 1.0)
    assert long[-1] == (999.0, 999.0)


def test_records_of_other_rewards_are_refused() -> None:
    one, other = record(1, [[[0.0], [1.0]]], names=["one"]), record(2, [[[0.0], [1.0]]], names=["two"])
    with pytest.raises(InputError, match="scores of step 2: other rewards"):
        RecordedGroups.join([one, other])
    assert RecordedGroups.join([]) is None


def test_a_run_without_scores_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        read_recorded_run(tmp_path)
    RunDirectory.create(tmp_path / "run", TrainConfig()).close()
    with pytest.raises(InputError, match="holds no scores of training steps") as caught:
        read_recorded_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


def kept(run: RunDirectory, *records: RolloutRecord) -> None:
    for row in records:
        arrays = {name: np.array(value) for name, value in vars(row).items() if name != "step"}
        with (run.path / "scores" / f"step_{row.step:06d}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)


@pytest.mark.parametrize("settings", [GDPO, SUMMED])
def test_the_report_reads_what_the_audit_writes(tmp_path: Path, settings: AdvantageSettings) -> None:
    advantages = {"kind": settings.kind, "std_floor": settings.std_floor}
    run = RunDirectory.create(tmp_path / "run", TrainConfig.model_validate({"advantages": advantages}))
    (run.path / "scores").mkdir()
    options: dict[str, Any] = {"settings": settings, "success": [[0, 1, 0, 1]] * 2, "traits": traits(2, 4, gray=0.5)}
    kept(run, *(record(s, BINARY_AND_CONTINUOUS * 2, **options) for s in range(1, 8)))
    run.close()
    audit = write_audit(run.path)
    text = (run.path / "audit.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["formula"] == settings.kind
    problems: list[str] = []
    shown = read_audit(run.path / "audit.json", problems)
    assert not problems
    assert shown is not None
    section = audit_section(shown)
    assert section["head"].endswith(f"all on record; advantages: {settings.kind}")
    (shares,) = section["tables"]
    assert shares.title == "Generation: 14 groups, 1.00 of them with signal"
    assert [row[0] for row in shares.rows] == ["binary", "continuous", "success"]
    assert shares.rows[1][2] == share(scorer(audit, "continuous").share)
    assert shares.rows[2][1] == "held out"
    assert [chart.title for chart in section["shares"]] == ["Generation: binary", "Generation: continuous"]
    assert "configured: from 0.5 to 0.5" in section["shares"][0].description
    assert {"mean red", "AUC of binary"} <= {chart.title for chart in section["others"]["Generation"]}
    (rankings,) = section["folded"]["Whether rewards rank outputs as the truth does"]
    assert rankings.title == "Generation; truth: success"
    # right are those of .31, which the continuous reward knows; of the binary one's pairs two are ties, one is wrong
    assert [(row[0], row[5].partition(" ")[0]) for row in rankings.rows] == [("binary", ".50"), ("continuous", "1.00")]
    assert rankings.rows[0][7] == NONE  # two groups are too few
    (correlations,) = section["folded"]["Correlations inside groups"]
    assert correlations.heads == ("scorer", "binary", "continuous", "success", "brightness", "contrast")
    assert correlations.rows[0][1:4] == (NONE, ".00", ".00")


def test_validity_by_hand_per_category_and_along_the_run() -> None:
    """Five steps of a group each of two categories: the reward ranks colors right and, from step 5 on, digits wrong.

    The verifier grades two of four members alike, so that its ranks are 1, 2.5, 2.5, 4 against 1, 2, 3, 4:
    rho = 4.5 / sqrt(5 * 4.5).
    """
    graded, success = [0.0, 0.5, 0.5, 1.0], [0, 0, 0, 1]
    rising, falling = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]

    def step(number: int) -> RolloutRecord:
        digits = falling if number == 5 else rising
        scores = [[[r, g] for r, g in zip(row, graded, strict=True)] for row in (rising, digits)]
        options: dict[str, Any] = {"names": ["judge", "facts"], "weights": [1, 0], "success": [success] * 2}
        return record(number, scores, categories=("colors", "digits"), **options)

    (found,) = audited(*(step(n) for n in range(1, 6)), verifiers=("facts",)).tasks["generate"].validity
    rho = 4.5 / math.sqrt(5 * 4.5)
    assert (found.name, found.verifier, found.is_success) == ("judge", "facts", False)
    assert (found.whole.rank.n, found.whole.auc.n, found.whole.silent, found.whole.alike) == (10, 10, 0, 0)
    assert found.whole.rank.score == pytest.approx((9 - 1) / 10 * rho)
    assert found.whole.auc.score == pytest.approx(0.9)
    assert {name: r.auc.score for name, r in found.categories.items()} == pytest.approx({"colors": 1, "digits": 0.8})
    assert found.along is not None
    assert (found.along.first.auc.score, found.along.last.auc.score) == (1, 0.5)
    assert found.along.first.rank.score == pytest.approx(rho)
    assert found.along.last.rank.score == pytest.approx(0, abs=1e-12)
    assert found.along.auc_change.score == -0.5
    series = audited(*(step(n) for n in range(1, 6))).tasks["generate"].series
    assert series["auc/judge"] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 0.5)]


def test_validity_without_a_verifier_or_without_the_truth() -> None:
    scores = [[[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]] * 3
    success = [[0, 0, 1, 1]] * 3
    options: dict[str, Any] = {"names": ["exact", "other"], "success": success}
    exact, other = audited(record(1, scores, **options)).tasks["generate"].validity
    assert (exact.verifier, exact.is_success, exact.whole.auc.score, exact.along) == ("success", True, 1, None)
    assert (other.is_success, other.whole.auc.score, other.whole.rank.score) == (False, 0.5, 0)
    assert exact.categories == {}  # as in the records of older versions
    series = audited(record(1, scores, **options)).tasks["generate"].series
    assert [name for name in series if name.startswith("auc/")] == ["auc/other"]
    assert audited(record(1, scores)).tasks["generate"].validity == ()


def test_the_verifier_grades_where_it_applies_and_success_elsewhere() -> None:
    """As in reasoning: images have facts, sums have an answer only."""
    scores = [[[0.1, 0.0], [0.2, 0.5], [0.3, 1.0]], [[0.1, NAN], [0.2, NAN], [0.3, NAN]]]
    applies = np.array([[True, True], [True, False]])
    options: dict[str, Any] = {"names": ["judge", "facts"], "success": [[0, 0, 1], [1, 0, 0]], "applies": applies}
    (found,) = audited(record(1, scores, **options), verifiers=("facts", "absent")).tasks["generate"].validity
    assert found.verifier == "facts, success"
    # ranks 1, 2, 3 against 1, 2, 3, and against 3, 1.5, 1.5: rho = -1.5 / sqrt(2 * 1.5)
    assert found.whole.rank.score == pytest.approx((1 - 1.5 / math.sqrt(3)) / 2)
    assert found.whole.auc.score == 0.5


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"windows": []}', '{"windows": [{"first": 1, "last": 2}]}'])
def test_an_audit_that_cannot_be_read_is_a_notice(tmp_path: Path, content: str) -> None:
    path = tmp_path / "audit.json"
    problems: list[str] = []
    assert read_audit(path, problems) is None
    assert not problems
    path.write_text(content)
    assert read_audit(path, problems) is None
    (line,) = problems
    assert line.startswith("audit.json could not be read")


def test_scheduled_weights_and_scales_of_their_own_are_accounted_for() -> None:
    """Of step 1 all variance is a's, of step 2 all b's; no share is left over though b keeps its own size."""
    scores = torch.rand(6, 4, 2, generator=torch.Generator().manual_seed(5))
    tasks, mask = torch.zeros(6, dtype=torch.int64), scores > -1
    records = []
    for step, weights in ((1, [1.0, 0.0]), (2, [0.0, 1.0]), (3, [1.0, 3.0])):
        A = gdpo_advantages(scores, mask, torch.tensor(weights), tasks, std_floor=1e-4, normalize=[None, "batch"])
        records.append(
            record(
                step, scores.tolist(), names=["a", "b"], weights=weights, normalize=("", "batch"), advantages=A.numpy()
            )
        )
    first, second, third = (audited(each) for each in records)
    assert [scorer(first, "a").share, scorer(first, "a").configured_share] == pytest.approx([1, 1])
    assert [scorer(second, "b").share, scorer(second, "b").configured_share] == pytest.approx([1, 1])
    assert scorer(third, "b").configured_share == pytest.approx(0.9)
    both = audited(*records)
    found = both.tasks["generate"]
    assert found.rest == pytest.approx(0, abs=1e-5)
    assert sum(scorer(both, name).share or 0 for name in "ab") == pytest.approx(1, abs=1e-5)
    assert scorer(both, "b").configured_share == pytest.approx((0 + 1 + 0.9) / 3)
    assert scorer(both, "a").weight == pytest.approx(2 / 3)


def test_a_summed_run_with_scales_of_their_own_leaves_no_rest() -> None:
    scores = torch.rand(6, 4, 2, generator=torch.Generator().manual_seed(6))
    scaled = normalize_rewards(scores, scores > -1, torch.zeros(6, dtype=torch.int64), ["group", None], std_floor=1e-4)
    A = group_relative_advantages(scaled.sum(dim=2), torch.ones(6, 4) > 0, std_floor=1e-4)
    made = record(1, scores.tolist(), names=["a", "b"], settings=SUMMED, normalize=("group", ""), advantages=A.numpy())
    audit = audited(made, settings=SUMMED)
    assert audit.tasks["generate"].rest == pytest.approx(0, abs=1e-5)
    assert (scorer(audit, "a").share or 0) > 0.7


def test_a_reward_that_never_scored_is_missing_and_nothing_else() -> None:
    groups = [[[0, NAN], [1, NAN]]] * 3
    audit = audited(record(1, groups, weights=[1, 0]), record(2, groups, weights=[1, 0]))
    found = scorer(audit, "continuous")
    assert found.missing == 1.0
    assert [share(x) for x in (found.constant, found.all_best, found.all_worst, found.mean.last)] == [NONE] * 4
    assert scorer(audit, "binary").constant == 0.0
    assert audit_section(audit)["tables"][0].rows[1][-4:] == (NONE, NONE, NONE, "1.00")
