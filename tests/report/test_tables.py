"""Tables of samples and answers, and the table over seeds, from files alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvrpo.errors import InputError
from lvrpo.records import Estimate
from lvrpo.report.formatting import NONE
from lvrpo.report.page import render
from lvrpo.report.run import load_run
from lvrpo.report.tables import collapses, measure_tables, seed_rows, seeds_table, summary_phases, summary_table
from lvrpo.statistics import seeds_and_prompts_interval


def estimate(score: float, **more: float) -> dict[str, float]:
    return {"score": score, "low": score - 0.1, "high": score + 0.1, "n": 40, **more}


def results(shift: float) -> dict[str, Any]:
    forms = {"is it ?": {"balanced": 0.5 + shift, "accuracy": 0.5, "entropy": 1 - shift, "entropy_right": 1.0, "n": 30}}
    return {
        "generate": {
            **estimate(0.3 + shift),
            "categories": {},
            "pass_at_k": {k: estimate(s + shift) for k, s in (("1", 0.25), ("4", 0.5), ("16", 0.75))},
            "best_of": {n: estimate(s + shift) for n, s in (("2", 0.3), ("4", 0.4), ("8", 0.45))},
            "groups": {"std": 0.4, "signal": 0.8, "groups": 40, "samples": 16},
            "agreement": {k: estimate(0.7) for k in ("confirmed", "hold", "agree")} | {"kappa": None, "facts": 99},
        },
        "understand": {**estimate(0.8), "categories": {}, "balanced": estimate(0.5 + shift), "forms": forms},
        "edit": None,
    }


def test_a_table_without_a_value_is_left_out() -> None:
    few = {"balanced": None, "accuracy": 0.0, "entropy": 0.0, "entropy_right": 0.0, "n": 1}
    assert (
        measure_tables({"after": {"own/understand": {**estimate(0.0), "categories": {}, "forms": {"own": few}}}}) == []
    )


DIFFERENCE: dict[str, Any] = {
    "generate": {
        **estimate(0.1, detectable=0.06),
        "categories": {},
        "pass_at_k": {"1": estimate(0.1, detectable=0.06)},
        "groups": {"std": 0.0, "signal": -0.1},
        "against_best_of": {"4": estimate(-0.05, detectable=0.07)},
    },
    "understand": {
        **estimate(0.0),
        "categories": {},
        "balanced": estimate(0.1),
        "collapsed": [{"form": "is it ?", "answer": "no", "share": 0.95, "before": 0.5}],
    },
}
SUMMARY = {"before": results(0.0), "after": results(0.1), "difference": DIFFERENCE}


def test_tables_of_a_summary() -> None:
    samples, answers, agreement = measure_tables(summary_phases(SUMMARY), SUMMARY["difference"])
    heads = ("benchmark", "", "single sample", "pass@4", "pass@16", "best of 4", "spread", "with signal")
    assert samples.heads == heads
    assert [row[:2] for row in samples.rows] == [
        ("Generation", "before"),
        ("", "after"),
        ("", "difference"),
        ("", "single sample minus best of 4 before"),
    ]
    assert samples.rows[0][2] == ".25 [.15, .35]"
    assert samples.rows[2][2] == "+.10 [.00, +.20] ≥ .06"
    assert samples.rows[3][2] == "−.05 [−.15, +.05] ≥ .07"
    assert answers.rows[0][1:3] == (".50 [.40, .60]", ".60 [.50, .70]")
    assert answers.rows[1][0] == "  is it ?"
    assert answers.rows[1][-1] == "collapsed: 95% “no”"
    assert agreement.heads == ("benchmark", "", "reader finds", "verifier finds", "they agree")  # no kappa, no column
    full = measure_tables(summary_phases(SUMMARY), SUMMARY["difference"], full=True)[0]
    assert {"best of 2", "best of 8"} <= set(full.heads)


def test_results_of_before_there_were_samples_have_no_tables() -> None:
    old = {"generate": {**estimate(0.3), "categories": {}}, "edit": None}
    assert measure_tables({"before": old, "after": {}}, {"generate": {**estimate(0.1), "categories": {}}}) == []
    assert summary_phases({}) == {}
    assert collapses(None) == []


def test_a_table_as_markdown() -> None:
    text = measure_tables({"": results(0.0)})[0].markdown()
    assert text.splitlines()[0].startswith("| benchmark | single sample | pass@4 |")
    assert text.splitlines()[2].startswith("| Generation | .25 [.15, .35] |")


def test_the_page_shows_them_and_warns_of_a_collapse(make_run: Any) -> None:
    run = make_run(Path("run"))
    summary = json.loads((run / "summary.json").read_text())
    for phase in ("before", "after"):
        summary[phase]["understand"] |= results(0.0)["understand"]
        summary[phase]["generate"] |= {k: v for k, v in results(0.0)["generate"].items() if k != "categories"}
    summary["difference"]["understand"] |= {"collapsed": DIFFERENCE["understand"]["collapsed"], "detectable": 0.123}
    (run / "summary.json").write_text(json.dumps(summary))
    page = render(load_run(run))
    assert "Alignment or sharpening" in page
    assert "best of 8" in page
    assert "Answers have collapsed: Questions, greedy, “is it ?”" in page
    assert "detectable" in page
    assert ".123" in page


def test_a_category_is_told_only_after_the_correction() -> None:
    assert Estimate(0.1, 0.02, 0.2, 40, p_holm=0.04).direction == "up"
    assert Estimate(0.1, 0.02, 0.2, 40, p_holm=0.06).direction == "flat"
    assert Estimate(0.1, 0.02, 0.2, 40).direction == "up"


# --- over seeds ---


def write_seed(name: str, seed: int, effect: float, prompts: int = 60) -> Path:
    rng = np.random.default_rng(seed)
    ids = [f"p{i}" for i in range(prompts)]
    run = Path(name)
    (run / "eval").mkdir(parents=True)
    for phase, rate in (("before", 0.3), ("after", 0.3 + effect)):
        scores = [float(x) for x in rng.random(prompts) < rate]
        record = {"ids": ids, "categories": ["a", "b"] * (prompts // 2), "clusters": ids, "scores": scores}
        (run / "eval" / f"{phase}.json").write_text(json.dumps({"scores": {"generate": record}, "seconds": 1.0}))
    return run


def test_the_table_over_seeds_is_that_of_the_statistics() -> None:
    runs = [write_seed(f"s{seed}", seed, 0.4) for seed in range(4)]
    whole, *categories = seed_rows(runs)["generate"]
    records = [
        [json.loads((run / "eval" / f"{phase}.json").read_text())["scores"]["generate"]["scores"] for run in runs]
        for phase in ("before", "after")
    ]
    expected = seeds_and_prompts_interval(np.array(records[1]) - np.array(records[0]), [f"p{i}" for i in range(60)])
    assert whole.change == expected
    assert whole.verdict == "up"
    assert [row.name for row in categories] == ["a", "b"]
    assert all(row.p >= row.change.p for row in categories)
    text = seeds_table(runs).markdown()
    assert "| Generation | " in text
    assert "too few" not in text


def test_too_few_seeds_are_marked() -> None:
    runs = [write_seed(f"s{seed}", seed, 0.6) for seed in range(2)]
    assert {row[-1] for row in seeds_table(runs).rows} == {"too few seeds (2)"}
    assert {row[-1] for row in seeds_table(runs[:1]).rows} == {"too few seeds (1)"}


def test_runs_that_cannot_be_seeds_of_one_recipe_are_named() -> None:
    one, two, other = write_seed("one", 0, 0.1), write_seed("two", 1, 0.1), write_seed("other", 2, 0.1, prompts=58)
    with pytest.raises(InputError, match="other: generate was evaluated on other prompts than in one"):
        seed_rows([one, two, other])
    with pytest.raises(InputError, match="named twice"):
        seed_rows([one, two, one])
    with pytest.raises(InputError, match="name runs that have been evaluated"):
        seed_rows([Path("missing")])
    (one / "eval" / "after.json").write_text("{}")
    with pytest.raises(InputError, match=r"after\.json: scores"):
        seed_rows([one])


def test_rewards_that_failed_are_left_out_over_seeds() -> None:
    """One seed could not score p0: no seed counts it, for differences are paired."""
    runs = [write_seed(f"s{seed}", seed, 0.4) for seed in range(3)]
    path = runs[1] / "eval" / "after.json"
    raw = json.loads(path.read_text())
    raw["scores"]["generate"]["scores"][0] = None
    path.write_text(json.dumps(raw))
    whole, first, second = seed_rows(runs)["generate"]
    scores = np.array(
        [
            [json.loads((run / "eval" / f"{phase}.json").read_text())["scores"]["generate"]["scores"] for run in runs]
            for phase in ("before", "after")
        ],
        dtype=float,
    )[:, :, 1:]
    assert whole.change == seeds_and_prompts_interval(scores[1] - scores[0], [f"p{i}" for i in range(1, 60)])
    assert np.isfinite([first.before, first.after, second.before, second.after]).all()
    raw["scores"]["generate"]["scores"] = [None] * 60
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="no prompt has a score in all of the runs"):
        seed_rows(runs)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is a pipe"):
        seed_rows(runs)


def test_a_category_that_one_side_could_not_score_has_a_dash() -> None:
    both, one = {"sum": estimate(0.5), "compare": estimate(0.25)}, {"sum": estimate(0.5)}
    sides = [{"reason": {**estimate(0.5), "categories": each}} for each in (both, one)]
    for before, after in (sides, sides[::-1]):
        table = summary_table({"before": before, "after": after, "difference": sides[1]})
        assert [row[0] for row in table.rows] == ["reason", "  sum", "  compare"]
        assert sorted(table.rows[2][1:]) == [".25", NONE, NONE]
