"""Benchmarks: the same prompts and noise for every policy, scores with intervals, pairs by prompt."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo import images
from lvrpo.data import rows
from lvrpo.data.scenes import CATEGORIES, ScenePrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import BENCHMARKS, suite
from lvrpo.evaluation.items import cluster_of
from lvrpo.evaluation.results import benchmark_difference, benchmark_result
from lvrpo.evaluation.samples import PER_CATEGORY, first_per_category, write_evaluation
from lvrpo.evaluation.scenes import held_out_prompts
from lvrpo.evaluation.suite import Benchmark, Evaluation, evaluate, find_benchmarks
from lvrpo.images import load_image, png
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.records import BenchmarkRecord, EvaluationRecord, from_json
from lvrpo.registry import allow_code
from lvrpo.report.run import load_run
from lvrpo.report.tables import seed_rows
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory, json_text
from lvrpo.types import FlowSegment, Group, Prompt, Segment, TextSegment, Trajectory

SIZES = {name: 24 if "understand" in name else 14 for name in BENCHMARKS} | {"edit": 10, "reason": 12}


class Oracle:
    """Always right, or always silent and blank."""

    def __init__(self, right: bool) -> None:
        self.right = right
        self.calls: list[tuple[Sampling, list[int]]] = []

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        self.calls.append((sampling, list(seeds)))
        return [Group(p, tuple(self._trajectory(p, m) for m in range(sampling.group_size))) for p in prompts]

    def _trajectory(self, prompt: Prompt, member: int) -> Trajectory:
        source = ScenePrompts(split="test")
        index = int(prompt.id.rpartition("/")[2])
        outputs = source.example(prompt.task, index).outputs
        return Trajectory(prompt, member, tuple(self._segment(o) for o in outputs), seed=0)

    def _segment(self, output: Any) -> Segment:
        none = torch.zeros(0)
        if isinstance(output, str):
            return TextSegment(torch.zeros(0, dtype=torch.int64), none, 1.0, output if self.right else "", True)
        image = output if self.right else torch.ones_like(output)
        return FlowSegment(none, none, (), none, none, none, "ode", 0.0, 1.0, 1.0, "none", "mean", image)


def oracle(right: bool) -> Any:  # Any: it keeps the part of the Policy contract that a benchmark calls
    return Oracle(right)


@pytest.fixture
def policy(small_base: Path) -> Policy:
    return load_policy(small_base)


def test_every_benchmark_has_its_documented_size() -> None:
    found = {b.name: b for b in find_benchmarks(["scenes"])}
    assert list(found) == list(BENCHMARKS)
    assert {name: b.n for name, b in found.items()} == {
        "generate": 2002,
        "generate_guided": 2002,
        "generate_paraphrased": 490,
        "understand": 2400,
        "understand_sampled": 1200,
        "understand_paraphrased": 600,
        "edit": 1000,
        "reason": 1002,
    }
    assert found["generate_guided"].guidance_scale == 1.5
    assert (found["understand_sampled"].temperature, found["understand"].temperature) == (1.0, 0.0)


def test_prompts_are_held_out_and_every_category_has_its_share() -> None:
    prompts = held_out_prompts("generate", 490)
    counts = {c: sum(p.category == c for p in prompts) for c in CATEGORIES["generate"]}
    assert counts == dict.fromkeys(CATEGORIES["generate"], 70)
    assert {p.source for p in prompts} == {"scenes/test"}


def test_the_right_answers_score_one_and_silence_zero() -> None:
    benchmarks = find_benchmarks(["scenes"])
    right = evaluate(oracle(True), benchmarks, sizes=SIZES)
    wrong = evaluate(oracle(False), benchmarks, sizes=SIZES)
    assert {name: r["score"] for name, r in right.results().items()} == dict.fromkeys(BENCHMARKS, 1.0)
    assert {name: r["score"] for name, r in wrong.results().items()} == dict.fromkeys(BENCHMARKS, 0.0)
    difference = wrong.difference(right)
    assert difference["generate"]["score"] == 1.0
    assert difference["generate"]["low"] > 0
    assert set(difference["generate"]["categories"]) == set(CATEGORIES["generate"])


def test_every_policy_gets_the_same_prompts_seeds_and_settings() -> None:
    one, other = oracle(True), oracle(False)
    for each in (one, other):
        evaluate(each, find_benchmarks(["scenes"]), sizes=SIZES)
    assert one.calls == other.calls
    guided = next(sampling for sampling, _ in one.calls if sampling.guidance_scale == 1.5)
    assert guided.temperature == 0.0
    sampled = next(sampling for sampling, _ in one.calls if sampling.temperature == 1.0)
    assert sampled.group_size == 4


def test_an_evaluation_is_repeatable_and_does_not_depend_on_its_size(policy: Policy) -> None:
    benchmarks = find_benchmarks(["understand", "generate"])
    one = evaluate(policy, benchmarks, sizes={"understand": 24, "generate": 7})
    two = evaluate(policy, benchmarks, sizes={"understand": 40, "generate": 14})
    for name in ("understand", "generate"):
        assert one.scored[name].scores == two.scored[name].scores[: len(one.scored[name].ids)]


def test_images_of_rows_are_read_batch_by_batch(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all rows may not fit into memory. Their records are the same as those of a list in memory."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most: list[int] = []

    def load(file: Path) -> torch.Tensor:
        alive.add(image := load_image(file))
        return image

    def sample(*given: Any) -> Any:
        gc.collect()
        most.append(len(alive))
        return whole(*given)

    monkeypatch.setattr(images, "CACHED_BYTES", 2 * 3 * 32 * 32 * 4)
    monkeypatch.setattr(rows, "load_image", load)
    monkeypatch.setattr(suite, "CHUNK", 4)
    lines = []
    for i, prompt in enumerate(held_out_prompts("understand", 40)):
        (tmp_path / f"{i}.png").write_bytes(png(prompt.images[0]))
        row = {"task": "understand", "prompt": prompt.text, "images": [f"{i}.png"], "answer": prompt.answer}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    (benchmark,) = find_benchmarks([str(tmp_path / "rows.jsonl")])
    whole = policy.sample
    held = list(benchmark.prompts(40))
    expected = evaluate(policy, [replace(benchmark, prompts=lambda n: held)]).as_dict()["scores"]
    held.clear()
    monkeypatch.setattr(policy, "sample", sample)
    assert evaluate(policy, [benchmark]).as_dict()["scores"] == expected
    assert len(most) == 10
    assert max(most) <= 4 + 2 + 1  # a batch, the cache, and the last of a loop


def test_questions_about_one_image_are_one_cluster() -> None:
    clusters = [cluster_of(p) for p in held_out_prompts("understand", 12)]
    assert [clusters[i] == clusters[0] for i in range(12)] == [True] * 4 + [False] * 8
    prompt = held_out_prompts("generate", 1)[0]
    assert cluster_of(prompt) == prompt.content


def test_intervals_resample_clusters() -> None:
    scores = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    ids = tuple("abcdefgh")
    alone = benchmark_result(BenchmarkRecord(ids, ("x",) * 8, ids, scores))
    together = benchmark_result(BenchmarkRecord(ids, ("x",) * 8, ("p",) * 4 + ("q",) * 4, scores))
    assert (together.low, together.high) == (0.0, 1.0)
    assert alone.high - alone.low < 1.0


def test_differences_resample_clusters_too() -> None:
    zeros, scores, ids = (0.0,) * 8, (1.0,) * 4 + (0.0,) * 4, tuple("abcdefgh")
    alone, together = (
        benchmark_difference(
            BenchmarkRecord(ids, ("x",) * 8, clusters, zeros), BenchmarkRecord(ids, ("x",) * 8, clusters, scores)
        )
        for clusters in (ids, ("p",) * 4 + ("q",) * 4)
    )
    for found in (together, together.categories["x"]):
        assert (found.low, found.high) == (0.0, 1.0)
    assert alone.high - alone.low < 1.0
    assert together.p > alone.p
    assert together.detectable > alone.detectable


def test_only_the_same_prompts_are_paired() -> None:
    one = BenchmarkRecord(("a",), ("x",), ("a",), (1.0,))
    other = BenchmarkRecord(("b",), ("x",), ("b",), (1.0,))
    with pytest.raises(ContractError, match="different prompts"):
        benchmark_difference(one, other)


def test_other_prompts_of_the_same_ids_are_not_paired(policy: Policy) -> None:
    rows = held_out_prompts("understand", 3)
    shifted = [replace(rows[i - 1], id=row.id) for i, row in enumerate(rows)]  # a row was put in front of the file
    one, other = (
        evaluate(policy, [Benchmark("rows", lambda n, own=own: own, 3)]).scored["rows"] for own in (rows, shifted)
    )
    assert one.ids == other.ids
    with pytest.raises(ContractError, match="different prompts"):
        benchmark_difference(one, other)
    older = replace(other, settings={})  # of a version that knows the ids alone
    assert benchmark_difference(one, older).n == benchmark_difference(one, one).n == 3
    for run, record in (("one", one), ("two", other)):
        for phase in ("before", "after"):
            path = Path(run) / "eval" / f"{phase}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json_text(Evaluation({"rows": record}).as_dict()))
    assert seed_rows([Path("one")])["rows"][0].before == sum(one.scores) / 3
    with pytest.raises(InputError, match="two: rows was evaluated on other prompts than in one"):
        seed_rows([Path("one"), Path("two")])


def test_an_evaluation_survives_json(policy: Policy) -> None:
    one = evaluate(policy, find_benchmarks(["understand"]), sizes={"understand": 12})
    again = Evaluation(from_json(EvaluationRecord, json.loads(json.dumps(one.as_dict())), "file").scores)
    assert again.scored == one.scored
    assert json.dumps(again.results()) == json.dumps(one.results())  # nan of a single cluster is nan again


def test_only_the_images_that_are_kept_stay_in_memory(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    sample = policy.sample

    def counted(*asked: Any) -> list[Group]:
        gc.collect()
        alive.append(sum(image() is not None for image in drawn))
        groups = sample(*asked)
        drawn.extend(weakref.ref(t.image) for group in groups for t in group.trajectories if t.image is not None)
        return groups

    monkeypatch.setattr(policy, "sample", counted)
    monkeypatch.setattr(suite, "CHUNK", 8)
    found = evaluate(policy, find_benchmarks(["generate"]), sizes={"generate": 24}, keep=lambda name, prompts: [0, 9])
    assert [group.prompt for group in found.groups["generate"]] == [held_out_prompts("generate", 24)[i] for i in (0, 9)]
    assert all(group.trajectories[0].image is not None for group in found.groups["generate"])
    assert alive[-1] <= 8 + 1  # the last batch, and what is kept of the one before


def test_kept_cases_are_what_the_report_reads(policy: Policy) -> None:
    evaluation = evaluate(policy, find_benchmarks(["scenes"]), sizes=SIZES, keep=first_per_category)
    with RunDirectory.create(Path("run"), TrainConfig()) as run:
        write_evaluation(run, "before", evaluation)
    cases = load_run(Path("run")).samples("before")
    expected = {(t, c): min(PER_CATEGORY, 2) for t in ("generate", "edit") for c in CATEGORIES[t]}
    counts = {key: sum((c.task, c.category) == key for c in cases.values()) for key in expected}
    assert counts == expected
    for case in cases.values():
        assert case.score in (0.0, 1.0)
        drawn = case.task in ("generate", "edit") or case.category == "draw_answer"
        assert (case.image is not None) == drawn
        assert (case.source_image is not None) == (
            case.task in ("understand", "edit") or case.category in ("sum", "compare")
        )
        for file in (case.image, case.source_image):
            assert file is None or (Path("run") / file).is_file()
        if case.task == "generate":
            assert case.score == float(all(fact.holds for fact in case.facts))


def test_rows_of_the_user_are_a_benchmark(policy: Policy) -> None:
    rows = [
        {"task": "reason", "prompt": f"what is {n} + 2 ?", "answer": str(n + 2), "category": "sum"} for n in range(5)
    ]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (benchmark,) = find_benchmarks(["sums.jsonl"])
    result = evaluate(policy, [benchmark]).results()["sums"]
    assert result["n"] == 5
    assert list(result["categories"]) == ["sum"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["genrate"], "did you mean generate?"),
        (["generate", "generate"], "named twice"),
        (["scenes", "edit"], "named twice"),
        (["nothing.jsonl"], "no such file"),
        (["json:dumps"], "json is part of Python and holds no benchmark"),
    ],
)
def test_wrong_names_are_explained(names: list[str], message: str) -> None:
    allow_code(["yaml"])
    with pytest.raises(InputError) as caught:
        find_benchmarks(names)
    assert message in str(caught.value)


def test_a_row_that_cannot_be_scored_is_named() -> None:
    Path("rows.jsonl").write_text(json.dumps({"id": "first", "task": "generate", "prompt": "a red circle"}) + "\n")
    with pytest.raises(InputError, match="row 'first' of task 'generate' cannot be scored: name rewards"):
        find_benchmarks(["rows.jsonl"])


def test_scores_that_are_rewards_leave_failed_ones_out_of_every_mean() -> None:
    """Pairs count where both rewards are there; a file keeps null for the others."""
    names, kinds = ("a", "b", "c", "d"), ("x", "x", "y", "y")
    before = BenchmarkRecord(names, kinds, names, (0.5, math.nan, 2.0, 4.0), metric="reward")
    after = BenchmarkRecord(names, kinds, names, (1.0, 3.0, math.nan, 5.0), metric="reward")
    assert benchmark_result(before).as_dict()["score"] == pytest.approx(6.5 / 3)
    assert benchmark_result(before).as_dict()["n"] == 3
    assert benchmark_result(before).as_dict()["categories"]["x"]["n"] == 1
    difference = benchmark_difference(before, after).as_dict()
    assert (difference["score"], difference["n"], difference["metric"]) == (0.75, 2, "reward")
    assert "pass_at_k" not in benchmark_result(before).as_dict()
    again = from_json(BenchmarkRecord, json.loads(json_text(before.as_dict())), "file")
    assert again.metric == "reward"
    assert benchmark_result(again).as_dict()["categories"]["y"] == benchmark_result(before).as_dict()["categories"]["y"]
