"""What a record of samples says, from small records worked by hand; old records stay readable."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lvrpo.errors import ContractError
from lvrpo.evaluation.results import PromptResult, benchmark_difference, benchmark_result, compare, measure
from lvrpo.metrics import ReadBack
from lvrpo.records import BenchmarkRecord, BenchmarkResult, from_json
from lvrpo.training.run_directory import json_text


def drawings(successes: list[list[int]], judged: list[list[float | None]] | None = None) -> list[PromptResult]:
    return [
        PromptResult(f"p{i}", tuple(map(float, row)), tuple(judged[i]) if judged else ())
        for i, row in enumerate(successes)
    ]


def asked(form: str, right: str, given: str, cluster: str) -> PromptResult:
    return PromptResult(cluster, (float(given == right),), form=form, right=right, answers=(given,))


BEFORE = drawings([[1, 0, 0, 0], [0, 0, 0, 0]], [[0.9, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])
AFTER = drawings([[1, 1, 0, 0], [1, 0, 0, 0]], [[0.9, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])


def test_samples_by_hand() -> None:
    found = measure(BEFORE)
    assert {k: v["score"] for k, v in found["pass_at_k"].items()} == {"1": 1 / 8, "4": 1 / 2}
    # the right image has the top score: it is chosen whenever it is in the pair (3 of 6), and of all four
    assert {n: v["score"] for n, v in found["best_of"].items()} == {"2": 1 / 4, "4": 1 / 2}
    assert found["groups"] == {"std": pytest.approx(3**0.5 / 8), "signal": 0.5, "groups": 2, "samples": 4}
    assert set(found) == {"pass_at_k", "best_of", "groups"}


def test_two_policies_by_hand() -> None:
    found = compare(BEFORE, AFTER)
    # pass@1: 1/4 -> 1/2 and 0 -> 1/4
    assert found["pass_at_k"]["1"]["score"] == pytest.approx(1 / 4)
    assert found["pass_at_k"]["4"]["score"] == pytest.approx(1 / 2)
    # one sample of after (3/8) against the best of four of before (1/2)
    assert found["against_best_of"]["4"]["score"] == pytest.approx(-1 / 8)
    assert found["best_of"]["4"]["score"] == 0.0
    assert found["groups"]["signal"] == 0.5
    assert found["pass_at_k"]["1"]["detectable"] is not None


def test_prompts_that_share_a_image_are_resampled_together() -> None:
    before, after = drawings([[0, 0]] * 8), drawings([[1, 1]] * 4 + [[0, 0]] * 4)
    alone = compare(before, after)["pass_at_k"]["1"]
    before, after = ([replace(row, cluster="pq"[i // 4]) for i, row in enumerate(rows)] for rows in (before, after))
    together, own = compare(before, after)["pass_at_k"]["1"], measure(after)["pass_at_k"]["1"]
    assert (together["low"], together["high"]) == (own["low"], own["high"]) == (0.0, 1.0)
    assert alone["high"] - alone["low"] < 1.0
    assert together["detectable"] > alone["detectable"]


def test_only_the_prompts_that_were_sampled_most_count() -> None:
    rows = [*BEFORE, *drawings([[1], [1], [1]])]
    assert measure(rows)["pass_at_k"]["1"] == measure(BEFORE)["pass_at_k"]["1"]
    assert "pass_at_k" not in measure(drawings([[1], [0]]))


def test_a_drawing_that_could_not_be_judged_leaves_its_prompt_out() -> None:
    rows = drawings([[1, 0], [1, 1]], [[0.9, None], [0.1, 0.2]])
    best = measure(rows)["best_of"]["2"]
    assert (best["score"], best["n"]) == (1.0, 1)
    assert "best_of" not in measure(drawings([[1, 0]], [[None, None]]))


def test_answers_by_hand() -> None:
    rows = [asked("is it ?", "yes", "yes", f"p{i}") for i in range(3)]
    rows += [asked("is it ?", "no", given, f"p{i}") for i, given in enumerate(["yes", "no"])]
    rows += [asked("which ?", "a", "a", "p0"), asked("which ?", "b", "b", "p1")]
    rows += [asked("one answer ?", "a", "b", "p2")]
    found = measure(rows)
    assert found["balanced"]["score"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["balanced"]["n"] == 7
    assert found["forms"]["is it ?"]["balanced"] == pytest.approx(0.75)
    assert found["forms"]["is it ?"]["accuracy"] == pytest.approx(0.8)
    assert found["forms"]["is it ?"]["entropy"] == pytest.approx(0.721928, abs=1e-6)  # shares .8 and .2
    assert found["forms"]["is it ?"]["entropy_right"] == pytest.approx(0.970951, abs=1e-6)
    assert found["forms"]["one answer ?"]["balanced"] is None


def test_answers_that_flip_from_one_to_the_other_are_not_better_and_collapse() -> None:
    right = ["yes", "no"] * 20
    mixed = [asked("is it ?", r, "yes" if i % 4 < 2 else "no", f"p{i}") for i, r in enumerate(right)]
    no = [asked("is it ?", r, "no", f"p{i}") for i, r in enumerate(right)]
    found = compare(mixed, no)
    assert found["balanced"]["score"] == pytest.approx(0.0)
    assert [(c["form"], c["answer"], c["share"]) for c in found["collapsed"]] == [("is it ?", "no", 1.0)]
    assert found["forms"]["is it ?"]["entropy"] == pytest.approx(-1.0)
    assert compare(no, no)["collapsed"] == []


def test_a_question_is_compared_with_itself_whatever_failed_on_either_side() -> None:
    rows = [asked("is it ?", right, "yes", f"p{i}") for i, right in enumerate(["yes"] * 4 + ["no"] * 3)]
    before, after = ([replace(r, successes=()) if i == failed else r for i, r in enumerate(rows)] for failed in (0, 4))
    found = compare(before, after)["balanced"]  # nobody changed an answer
    assert (found["score"], found["low"], found["high"], found["n"]) == (0.0, 0.0, 0.0, 5)
    assert compare(before, rows)["balanced"]["n"] == 6


def test_what_is_read_back_by_hand() -> None:
    rows = [
        replace(row, read_back=back)
        for row, back in zip(drawings([[1], [0]]), (ReadBack(4, 3, 2, 3), ReadBack(6, 3, 3, 4)), strict=True)
    ]
    found = measure(rows)["agreement"]
    assert (found["confirmed"]["score"], found["hold"]["score"], found["agree"]["score"]) == (0.6, 0.5, 0.7)
    assert found["kappa"] == pytest.approx(0.4)
    assert (found["confirmed"]["n"], found["facts"]) == (2, 10)


def record() -> BenchmarkRecord:
    return BenchmarkRecord(
        ("a", "b"),
        ("x", "y"),
        ("p", "q"),
        (0.5, 1.0),
        2,
        ((1.0, 0.0, 1.0), (1.0, 1.0)),
        ((0.5, None, 0.25), ()),
        (ReadBack(3, 2, 1, 2), None),
        ("", "is it ?"),
        (None, "yes"),
        ((), ("yes", "yes")),
        {"judge": "base"},
    )


def test_a_record_survives_json_with_its_tables() -> None:
    again = from_json(BenchmarkRecord, json.loads(json_text(record().as_dict())), "file")
    assert again == record()
    assert json_text(benchmark_result(again).as_dict()) == json_text(benchmark_result(record()).as_dict())
    assert json_text(benchmark_difference(again, record()).as_dict()) == json_text(
        benchmark_difference(record(), again).as_dict()
    )


def test_records_of_before_there_were_samples_are_readable() -> None:
    old = {"ids": ["a", "b"], "categories": ["x", "x"], "clusters": ["a", "b"], "scores": [1.0, 0.0]}
    read = from_json(BenchmarkRecord, old, "file")
    assert set(benchmark_result(read).as_dict()) == {"score", "low", "high", "n", "categories", "metric"}
    assert benchmark_difference(read, read).score == 0.0
    newer = replace(record(), categories=("x", "x"))
    assert "pass_at_k" not in benchmark_difference(read, newer).measures
    assert from_json(BenchmarkRecord, {**old, "of_a_later_version": 1}, "file") == read


def test_a_difference_says_what_could_have_been_told() -> None:
    ids = tuple(f"p{i}" for i in range(40))
    categories = tuple("xy"[i % 2] for i in range(40))
    before = BenchmarkRecord(ids, categories, ids, tuple(float(i % 4 == 0) for i in range(40)))
    after = BenchmarkRecord(ids, categories, ids, tuple(float(i % 4 in (0, 2) and i < 30) for i in range(40)))
    found = benchmark_difference(before, after).as_dict()
    assert found["detectable"] > 0
    p = {name: row["p"] for name, row in found["categories"].items()}
    adjusted = {name: row["p_holm"] for name, row in found["categories"].items()}
    first, second = sorted(p, key=lambda name: p[name])
    assert adjusted[first] == pytest.approx(2 * p[first])
    assert adjusted[second] == pytest.approx(max(p[second], adjusted[first]))
    with pytest.raises(ContractError, match="different prompts"):
        benchmark_difference(before, replace(after, ids=ids[::-1]))


def of_categories(before: list[float], after: list[float], categories: str) -> BenchmarkResult:
    ids = tuple(f"p{i}" for i in range(len(categories)))
    one, two = (
        BenchmarkRecord(ids, tuple(categories), ids, tuple(scores), mean_over="categories")
        for scores in (before, after)
    )
    return benchmark_difference(one, two)


def test_a_mean_over_categories_has_its_own_p_and_detectable_effect() -> None:
    gains = [0.1, 0.2] * 20 + [-0.4, 0.4]  # b has two prompts, and half of the weight
    found = of_categories([0.5] * 42, [0.5 + gain for gain in gains], "a" * 40 + "b" * 2)
    assert found.score == pytest.approx((0.15 + 0.0) / 2)
    # residuals .05 and .4, weights 1 / 80 and 1 / 4
    error = (42 / 41 * (40 * (0.05 / 80) ** 2 + 2 * (0.4 / 4) ** 2)) ** 0.5
    assert found.detectable == pytest.approx(2.801585 * error, rel=1e-5)
    assert (found.low or 0.0) < 0
    assert found.p == pytest.approx(0.6035, abs=1e-3)


def test_equal_differences_of_categories_have_the_interval_of_equal_differences() -> None:
    same = of_categories([0.25] * 6, [0.25] * 6, "aaabbb")
    assert (same.score, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    risen, fallen = of_categories([0.0] * 6, [1.0] * 6, "aaabbb"), of_categories([1.0] * 6, [0.0] * 6, "aaabbb")
    assert 0 < (risen.low or 0.0) < 1
    assert risen.low == pytest.approx(-(fallen.high or 0.0))
    lost = of_categories([0.25, 0.25], [0.25, math.nan], "ab")
    assert math.isnan(lost.score)
