"""Records survive JSON, are refused where a value is of another type, and take files of older versions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lvrpo.audit_records import (
    Alarms,
    Change,
    Correlation,
    GroupAudit,
    JudgeAudit,
    JudgeScore,
    MissingScores,
    Overoptimization,
    Ranking,
    RankingChange,
    RewardAudit,
    RewardRanking,
    SampleAudit,
    SampleQuality,
    ScorerAudit,
    Window,
)
from lvrpo.errors import InputError
from lvrpo.metrics import ReadBack
from lvrpo.records import (
    BenchmarkRecord,
    BenchmarkResult,
    Cost,
    Estimate,
    EvaluationRecord,
    FactCheck,
    Sample,
    Summary,
    from_json,
)
from lvrpo.statistics import Interval
from lvrpo.training.run_directory import json_text

HALF = Interval(0.5, 0.25, 0.75, 12)
RANKING = RewardRanking(
    "self", "facts", False, Ranking(HALF, HALF, 1, 2), {"colors": Ranking(HALF, HALF, 0, 0)},
    RankingChange(Ranking(HALF, HALF, 0, 0), Ranking(HALF, HALF, 0, 0), HALF, HALF),
)  # fmt: skip
CHANGE = Change(0.25, 0.5, HALF, 0.125)
SCORER = ScorerAudit("self", 1.0, CHANGE, 0.5, 0.5, None, 0.0, 0.1, 0.0, 0.0, {"tokens": Correlation(0.5, 12)})
TASK = GroupAudit(
    groups=12,
    with_signal=0.5,
    rest=0.0,
    scorers=(SCORER,),
    validity=(RANKING,),
    drift={"tokens": CHANGE},
    series={"share/self": [(1.0, 0.5)]},
    control_series={},
)
ALARMS = Alarms(
    (Overoptimization("generate", "self", "facts", Window(1, 2), Window(3, 4), HALF, HALF, "it rose"),),
    3, 0.99, (("generate", "self", "facts"),), (MissingScores("edit", "self", 0.5, "half failed"),),
)  # fmt: skip
RECORDS: tuple[Any, ...] = (
    RewardAudit("gdpo", "summed", Window(1, 4), 4, (Window(1, 2), Window(3, 4)), {"generate": TASK}, ALARMS),
    JudgeAudit("Tiny:1", (JudgeScore("self", "image", "color", "", HALF, 0),), {"self": 1.5}),
    SampleAudit("Tiny:1", "Tiny:2", {"generate": SampleQuality(12, 0.5, {"self": 0.0}, (RANKING,))}),
    Cost(1.5, 2.5),
    Sample(
        "a", "rows", "edit", "recolor", "red", None, "red", 1.0, None, "a.png", None, (FactCheck("is it", "yes", True),)
    ),
    BenchmarkResult(0.5, 0.25, 0.75, 12, None, None, None, {"colors": Estimate(0.5)}, {}, "success", {}),
)  # fmt: skip
BENCHMARK = BenchmarkRecord(
    ids=("a", "b"),
    categories=("x", ""),
    clusters=("a", "b"),
    scores=(1.0, 0.0),
    successes=((1.0, 0.0), (0.0,)),
    judged=((0.5, None), ()),
    read_back=(ReadBack(2, 1, 2, 1), None),
    forms=("", "is it ?"),
    right=(None, "yes"),
    answers=((), ("yes",)),
    settings={"judge": "base"},
    held_out=(True, False),
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_survives_json(record: Any) -> None:
    assert from_json(type(record), json.loads(json_text(asdict(record))), "file") == record


def test_a_benchmark_survives_json_and_null_is_nan() -> None:
    assert from_json(BenchmarkRecord, json.loads(json_text(BENCHMARK.as_dict())), "file") == BENCHMARK
    failed = replace(BENCHMARK, scores=(1.0, math.nan))
    again = from_json(BenchmarkRecord, json.loads(json_text(failed.as_dict())), "file")
    assert math.isnan(again.scores[1])
    with pytest.raises(InputError, match="its lists differ in length"):
        from_json(BenchmarkRecord, {**BENCHMARK.as_dict(), "ids": ["a"]}, "file")


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a place."""
    if not path:
        return value
    changed = tree.copy()
    changed[path[0]] = put(tree[path[0]], path[1:], value)
    return changed


def refusal(kind: Any, tree: Any) -> str:
    """The message, or nothing where the tree is a record."""
    try:
        from_json(kind, tree, "run/file.json")
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "record",
    [*RECORDS, EvaluationRecord({"generate": BENCHMARK}, 1.0, (RECORDS[4],), Cost(1.0, 2.0))],
    ids=lambda record: type(record).__name__,
)
def test_a_value_of_another_type_is_one_line(record: Any) -> None:
    tree = json.loads(json_text(asdict(record)))
    refused = 0
    for path in places(tree):
        for wrong in (True, 0.5, "text", [[]], {"deep": [None]}, 10**400):
            line = refusal(type(record), put(tree, path, wrong))
            refused += bool(line)
            assert line.startswith("run/file.json: ") or not line
            assert "\n" not in line
            assert len(line) < 300
    assert refused > 4


def test_what_older_versions_did_not_write_has_a_default() -> None:
    tree = json.loads(json_text(asdict(RECORDS[0])))
    del tree["tasks"]["generate"]["validity"]
    del tree["alarms"]["missing"]
    found = from_json(RewardAudit, {**tree, "of_a_later_version": 1}, "file")
    assert (found.tasks["generate"].validity, found.alarms.missing) == ((), ())


def test_a_summary_leaves_out_what_has_no_score() -> None:
    path = Path("summary.json")
    assert Summary.read(path) is None
    category = {"score": 0.5, "low": 0.25, "high": None, "n": 12}
    results = {"edit": {**category, "categories": {"add": category, "move": {"score": None}}}, "reason": None}
    path.write_text(json.dumps({"before": results, "after": {"edit": {"score": math.nan}}}))
    found = Summary.read(path)
    assert found is not None
    assert list(found.before) == ["edit"]
    assert found.before["edit"].categories == {"add": Estimate(0.5, 0.25, None, 12)}
    assert (found.after, found.difference, found.baseline) == ({}, {}, None)
