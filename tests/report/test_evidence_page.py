"""Packed summaries, the values read from them, and the page that they make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvrpo.errors import InputError
from lvrpo.metrics import pass_at_k
from lvrpo.report.evidence import (
    MEASURES,
    SEEN,
    Column,
    Evidence,
    Outcome,
    PromptSet,
    RowPlan,
    Summary,
    TablePlan,
    balanced_weights,
    column,
    difference,
    prompts_file,
)
from lvrpo.report.evidence_page import evidence_page, strongest_rival

RUNS = (("one", 0), ("two", 1), ("three", 2), ("four", 3), ("five", 4))
PLAN = TablePlan(
    "small",
    True,
    {
        "base": RowPlan("as it is", "base", RUNS),
        "best_of_4": RowPlan("four drawings", "inference", RUNS, of="base", best_of=4),
        "weak": RowPlan("a rival", "rival", RUNS, untuned="it has nothing to tune"),
        "strong": RowPlan("another", "rival", RUNS),
        "absent": RowPlan("a third", "rival", RUNS),
        "ours": RowPlan("ours", "ours", RUNS),
    },
    "ours",
)
DRAWINGS, UNGUIDED, UNSEEN, PASS, EDITS, QUESTIONS, REASONING = MEASURES
P = 40
PROMPTS = PromptSet(("colors",) * P, tuple(range(P)), (True,) * 8 + (False,) * (P - 8), ("",) * P, (None,) * P)
ASKED = PromptSet(("exists",) * 4, (0, 0, 1, 2), (False,) * 4, ("is there",) * 4, ("yes", "yes", "yes", "no"))


def outcome(share: float, seed: int, n: int = P, prompts: str = "drawn") -> Outcome:
    """A share of the prompts right at the first try; the first five are sampled 16 times."""
    first = np.random.default_rng(seed).random(n) < share
    counts = np.full(n, np.nan)
    counts[:5] = round(16 * share)
    best = np.full(n, np.nan)
    best[:5] = 0.8
    return Outcome(prompts, first.astype(float), 16, counts, {4: best}, {}, {"generate": {"guidance_scale": 1.5}})


def answered(right: list[float], answers: dict[str, int]) -> Outcome:
    return Outcome("asked", np.array(right), 1, np.full(4, np.nan), {}, {"is there": answers}, {})


def write(folder: Path, row: str, base: str, seed: int, share: float, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    benchmarks: dict[str, Any] = {
        name: outcome(share, seed).as_dict() for name in ("generate", "edit", "reason", "edit_plain")
    }
    benchmarks["generate_plain"] = "generate"
    benchmarks["understand"] = answered([1, 1, 0, 1], {"yes": 2, "no": 2}).as_dict()
    raw = {"row": row, "base": base, "seed": seed, "experiment": "small", "benchmarks": benchmarks}
    cost = {"steps": 3, "flops": 6e9, "flops_per_step": 2e9, "budget_flops": 6.5e9}
    rest = {"training_seconds": 60.0, "test_seconds": 30.0, "test_opened": "2026-11-29", "hardware": "a processor"}
    content = {**raw, **cost, **rest, "code": "1+abc", **changes}
    (folder / f"{row}-{base}-{seed}.json").write_text(json.dumps(content))
    for fingerprint, prompts in (("drawn", PROMPTS), ("asked", ASKED)):
        path = prompts_file(folder, fingerprint)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(prompts.as_dict()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five runs of every row that has run."""
    for row, share in (("base", 0.2), ("weak", 0.3), ("strong", 0.5), ("ours", 0.9)):
        for base, seed in RUNS:
            write(tmp_path / "small", row, base, seed, share)
    return tmp_path / "small"


def test_a_summary_is_read_as_it_was_written(folder: Path) -> None:
    written, read = outcome(0.4, 3), Outcome.from_dict(json.loads(json.dumps(outcome(0.4, 3).as_dict())))
    np.testing.assert_array_equal(read.first, written.first)
    np.testing.assert_array_equal(read.counts, written.counts)
    np.testing.assert_allclose(read.best_of[4], written.best_of[4], atol=1 / 510)
    assert (read.prompts, read.samples, read.settings) == (written.prompts, 16, written.settings)
    assert PromptSet.from_dict(json.loads(json.dumps(ASKED.as_dict()))) == ASKED
    summary = Summary.read(folder / "ours-one-0.json")
    assert summary.outcomes["generate_plain"].first is not None
    np.testing.assert_array_equal(summary.outcomes["generate_plain"].first, summary.outcomes["generate"].first)


def test_balanced_accuracy_is_a_weighted_mean(folder: Path) -> None:
    weights = balanced_weights(ASKED)
    np.testing.assert_allclose(weights, [1 / 6, 1 / 6, 1 / 6, 1 / 2])  # two answers, three and one of them
    found = column(PLAN, "ours", QUESTIONS, Evidence.read(folder))
    assert found.mean == pytest.approx((2 / 3 + 1) / 2)


def test_values_of_the_columns(folder: Path) -> None:
    evidence = Evidence.read(folder)
    drawn = {row: column(PLAN, row, DRAWINGS, evidence) for row in ("base", "ours", "best_of_4", "absent")}
    assert not drawn["absent"].known
    assert drawn["best_of_4"].mean == pytest.approx(0.8)
    assert np.isfinite(next(iter(drawn["best_of_4"].values.values()))).sum() == 5
    assert column(PLAN, "base", PASS, evidence).mean == pytest.approx(pass_at_k(16, 3, 16))
    seen, unseen = (column(PLAN, "ours", measure, evidence) for measure in (SEEN, UNSEEN))
    assert seen.mean * 32 + unseen.mean * 8 == pytest.approx(drawn["ours"].mean * P)
    change = difference(drawn["ours"], drawn["base"], by_base=True)
    assert change is not None
    assert change.interval.n == 5
    assert change.interval.score == pytest.approx(drawn["ours"].mean - drawn["base"].mean)
    many = [column(PLAN, row, DRAWINGS, evidence, many=True) for row in ("ours", "best_of_4")]
    against = difference(many[0], many[1], by_base=True)
    assert against is not None
    assert against.interval.score == pytest.approx(14 / 16 - 0.8, abs=1 / 255)  # on the prompts sampled often alone
    rival = strongest_rival(PLAN, DRAWINGS, evidence)
    assert rival is not None
    assert rival[0] == "strong"


def test_the_page_says_what_there_is_and_what_there_is_not(folder: Path) -> None:
    page = evidence_page(PLAN, Evidence.read(folder))
    assert page == evidence_page(PLAN, Evidence.read(folder))
    lines = page.splitlines()
    assert "20 of 25 runs are there." in lines
    assert "The test split was opened 2026-11-29." in lines
    assert any("30 min 00 s in all on a processor" in line for line in lines)
    assert next(line for line in lines if line.startswith("| absent |")).count("not run") == len(MEASURES)
    (against,) = [line for line in lines if line.startswith("| generation | strong |")]
    assert "higher" in against
    assert "†" not in against
    assert any(line.startswith("| weak | no grid: it has nothing to tune |") for line in lines)
    assert "not evidence" not in page


def test_what_an_experiment_does_not_measure_is_left_out(folder: Path) -> None:
    for path in folder.glob("*.json"):
        raw = json.loads(path.read_text())
        raw["benchmarks"] = {name: of for name, of in raw["benchmarks"].items() if not name.startswith("edit")}
        path.write_text(json.dumps(raw))
    lines = evidence_page(PLAN, Evidence.read(folder)).splitlines()
    assert "## Edits" not in lines
    assert "## Reasoning" in lines
    assert not any(line.startswith("| editing |") for line in lines)
    assert next(line for line in lines if line.startswith("| absent |")).count("not run") == len(MEASURES) - 1


def test_too_few_seeds_are_marked(folder: Path) -> None:
    for base in ("three", "four", "five"):
        for path in folder.glob(f"*-{base}-*.json"):
            path.unlink()
    page = evidence_page(PLAN, Evidence.read(folder))
    (against,) = [line for line in page.splitlines() if line.startswith("| generation | strong |")]
    assert "too few seeds" in against
    assert "†" in against


def test_without_summaries_nothing_has_run(tmp_path: Path) -> None:
    page = evidence_page(PLAN, Evidence.read(tmp_path))
    assert "0 of 25 runs are there." in page
    assert page.count("Not run.") == len(MEASURES)
    trial = TablePlan("small", False, PLAN.rows, "ours")
    assert "not evidence" in evidence_page(trial, Evidence.read(tmp_path))


def test_a_form_that_collapsed_is_named(folder: Path) -> None:
    path = folder / "ours-one-0.json"
    raw = json.loads(path.read_text())
    raw["benchmarks"]["understand"]["answers"] = {"is there": {"yes": 30}}
    path.write_text(json.dumps(raw))
    page = evidence_page(PLAN, Evidence.read(folder))
    assert "Forms of questions that collapsed to one answer, of 15 runs: ours: 'is there' to 'yes' in 1." in page


def _other_prompts(folder: Path) -> None:
    raw = json.loads((folder / "ours-one-0.json").read_text())
    raw["benchmarks"]["generate"]["prompts"] = "others"
    (folder / "ours-one-0.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_prompts, "was evaluated on other prompts than in"),
        (lambda folder: (folder / "ours-one-0.json").write_text("{}"), "is no summary of a run"),
        (lambda folder: (folder / "ours-one-0.json").write_text("{"), "not JSON"),
        (lambda folder: prompts_file(folder, "drawn").unlink(), "are missing"),
        (lambda folder: write(folder, "ours", "one", 0, 0.5, experiment="other"), "is of 'other', and this page of"),
    ],
)
def test_what_cannot_be_compared_is_one_line(damage: Callable[[Path], Any], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        evidence_page(PLAN, Evidence.read(folder))
    assert "\n" not in str(caught.value)


def test_a_run_is_compared_with_its_own_drawings_chosen_among_many_not_with_those_of_another_seed() -> None:
    own = {("one", seed): np.array([0.0, seed, 1.0]) for seed in range(3)}
    best = Column({run: values + 1 for run, values in own.items()}, (0, 1, 2))
    change = difference(Column(own, (0, 1, 2)), best, by_base=True)
    assert change is not None
    assert (change.interval.score, change.interval.low, change.interval.high) == (-1.0, -1.0, -1.0)
    of_base = difference(Column(own, (0, 1, 2)), Column({("one", 9): np.zeros(3)}, (0, 1, 2)), by_base=True)
    assert of_base is not None
    assert of_base.interval.score == pytest.approx(2 / 3)
