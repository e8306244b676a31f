"""Evaluations kept in a folder: interrupted anywhere and resumed they give the same table; before and after in one."""

from __future__ import annotations

import copy
import errno
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from processes import finish, in_ranks, start

from lvrpo.atomic_io import write_atomic
from lvrpo.cli import main, parse_command
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import items
from lvrpo.evaluation.items import ITEMS, SETTINGS, ItemStore, file_name, prompt_digest
from lvrpo.evaluation.suite import Benchmark, EvaluationOptions, evaluate, find_benchmarks, with_guidance_scales
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.success import HeldOutScorer
from lvrpo.rewards.table import build_rewards
from lvrpo.training.run_directory import json_text
from lvrpo.types import Fact, Group, Prompt

SIZES = {"generate": 21, "understand": 40}
NAMES = ["generate", "understand"]


@pytest.fixture
def policy(small_base: Path) -> Policy:
    return load_policy(small_base)


def kept(folder: Path) -> EvaluationOptions:
    return EvaluationOptions(sampled_prompts=0, store=ItemStore(folder))


class Killed(Exception):  # noqa: N818  # stands for a signal
    pass


@pytest.mark.parametrize(("calls", "rest"), [(1, 45), (2, 40), (4, 8)])
def test_an_evaluation_that_was_killed_resumes_to_the_same_table(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, rest: int
) -> None:
    whole = evaluate(policy, find_benchmarks(NAMES), sizes=SIZES, options=kept(tmp_path / "whole"))
    sample, made = policy.sample, []

    def killed(prompts: Sequence[Prompt], *more: Any) -> list[Group]:
        made.append(len(prompts))
        if len(made) > calls:
            raise Killed
        return sample(prompts, *more)

    monkeypatch.setattr(policy, "sample", killed)
    with pytest.raises(Killed):
        evaluate(policy, find_benchmarks(NAMES), sizes=SIZES, options=kept(tmp_path / "cut"))
    file = tmp_path / "cut/generate" / ITEMS
    done = len(file.read_text().splitlines())
    assert done == min(16 * calls, 21)
    with file.open("a") as unfinished:
        unfinished.write('{"id": "scenes/te')  # what a killed process left of a line
    made.clear()
    monkeypatch.setattr(policy, "sample", lambda prompts, *more: made.append(len(prompts)) or sample(prompts, *more))
    again = evaluate(policy, find_benchmarks(NAMES), sizes=SIZES, options=kept(tmp_path / "cut"))
    assert sum(made) == rest
    assert json_text(again.as_dict()["scores"]) == json_text(whole.as_dict()["scores"])
    assert again.results() == whole.results()


def test_outputs_are_kept_for_people_to_look_at(policy: Policy, tmp_path: Path) -> None:
    evaluate(policy, find_benchmarks(NAMES), sizes={"generate": 7, "understand": 8}, options=kept(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "understand" / ITEMS).read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["texts"][0] is not None and row["answer"] and row["prompt"] for row in rows)
    drawn = [json.loads(line) for line in (tmp_path / "generate" / ITEMS).read_text().splitlines()]
    assert all((tmp_path / "generate" / name).is_file() for row in drawn for name in row["images"])
    assert json.loads((tmp_path / "generate" / SETTINGS).read_text())["seed"] == 0


@pytest.mark.parametrize("which", [1, 2])  # the settings, the first image
def test_a_full_disk_is_one_line(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    written: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == which:
            raise OSError(errno.ENOSPC, "no space")
        write_atomic(path, content)

    monkeypatch.setattr(items, "write_atomic", full)
    with pytest.raises(InputError, match=r"generate.*: cannot be written: the disk is full"):
        evaluate(policy, find_benchmarks(["generate"]), sizes={"generate": 1}, options=kept(tmp_path))


def test_a_folder_of_another_evaluation_is_refused(policy: Policy, tmp_path: Path) -> None:
    benchmarks, sizes = find_benchmarks(["understand"]), {"understand": 8}
    evaluate(policy, benchmarks, sizes=sizes, options=kept(tmp_path))
    with pytest.raises(InputError, match="holds an evaluation with seed 0, this one has 1: choose another folder"):
        evaluate(policy, benchmarks, 1, sizes, options=kept(tmp_path))
    (tmp_path / "understand" / ITEMS).write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"items\.jsonl:1: "):
        evaluate(policy, benchmarks, sizes=sizes, options=kept(tmp_path))


def test_texts_with_line_separators_are_read_again(policy: Policy, tmp_path: Path) -> None:
    asked = ("two red\u2028circles", "two\x85red circles", "two red\u2029circles")
    prompts = [Prompt(f"p/{i}", "generate", (text,), ("image",)) for i, text in enumerate(asked)]
    flaky: Any = Flaky()
    flaky.down = False
    benchmark = Benchmark("judged", lambda n: prompts[:n], 3, metric="reward", reward=flaky, own_sampling=True)
    found = [evaluate(policy, [benchmark], options=kept(tmp_path)).as_dict()["scores"] for _ in range(2)]
    assert found[0] == found[1]
    assert (tmp_path / "judged" / ITEMS).read_bytes().count(b"\n") == 3


def test_another_prompt_of_the_same_id_is_evaluated_anew(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"task": "generate", "prompt": "two red circles"}, {"task": "generate", "prompt": "a blue star"}]
    flaky: Any = Flaky()
    flaky.down, made, sample = False, [], policy.sample
    for turn, (order, expected) in enumerate([(rows, 2), (rows, 0), (rows[::-1], 2), (rows[::-1], 0)]):
        path = tmp_path / f"{turn}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        prompts = [
            replace(p, id=f"rows:{i}") for i, p in enumerate(JsonlPrompts(JsonlConfig(test=path), "test").in_order())
        ]
        benchmark = Benchmark(
            "judged", lambda n, own=prompts: own[:n], 2, metric="reward", reward=flaky, own_sampling=True
        )
        made.clear()
        monkeypatch.setattr(policy, "sample", lambda asked, *more: made.extend(asked) or sample(asked, *more))
        evaluate(policy, [benchmark], options=kept(tmp_path / "out"))
        assert len(made) == expected
    one, *others = [
        Prompt("p", "edit", (torch.zeros(3, 4, 4), "a star"), ("image",), facts=(Fact("color", "what ?", "red"),)),
        Prompt("p", "edit", (torch.ones(3, 4, 4), "a star"), ("image",), facts=(Fact("color", "what ?", "red"),)),
        Prompt("p", "edit", (torch.zeros(3, 4, 4), "a star"), ("image",), facts=(Fact("color", "what ?", "blue"),)),
        Prompt("p", "edit", (torch.zeros(3, 4, 4), "A star"), ("image",), facts=(Fact("color", "what ?", "red"),)),
    ]
    others.append(replace(one, metadata={"level": 3}))
    assert prompt_digest(one) not in map(prompt_digest, others)
    assert prompt_digest(one) == prompt_digest(replace(one, id="q", category="c"))


def test_an_evaluation_by_other_rewards_or_without_reading_back_is_another_one(policy: Policy, tmp_path: Path) -> None:
    asked = Prompt(
        "p", "generate", ("two red circles",), ("image",), facts=(Fact("color", "what color is the circle ?", "red"),)
    )
    benchmark = Benchmark("g", lambda n: [asked], 1, metric="reward", own_sampling=True)

    def scored_by(weight: float, judge: Policy) -> EvaluationOptions:
        rewards = build_rewards([RewardConfig(name="self_vqa", weight=weight), RewardConfig(name="caption_back")])
        return replace(kept(tmp_path), scorer=HeldOutScorer(tuple(rewards)), reward_judge=judge)

    other = copy.deepcopy(policy)
    for parameter in cast(torch.nn.Module, other).parameters():
        parameter.data += 0.1
    evaluate(policy, [benchmark], options=scored_by(1.0, policy))
    for options, key in ((scored_by(0.5, policy), "rewards"), (scored_by(1.0, other), "reward_judge")):
        with pytest.raises(InputError, match=f"holds an evaluation with {key} "):
            evaluate(policy, [benchmark], options=options)
    drawn = find_benchmarks(["generate"])
    evaluate(policy, drawn, sizes={"generate": 2}, options=kept(tmp_path))
    with pytest.raises(InputError, match="holds an evaluation with read_back False, this one has True"):
        evaluate(policy, drawn, sizes={"generate": 2}, options=replace(kept(tmp_path), sampled_prompts=1))


class Flaky:
    """A judge that fails on every other prompt until it is mended."""

    judges = ("image",)
    down = True

    def applies(self, prompt: Prompt) -> bool:
        return True

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        failures = {(p, 0): "HTTP 503 (5 tries)" for p in range(0, len(groups), 2)} if self.down else {}
        return Scores(torch.full((len(groups), 1), 0.25), failures)


def drawings(n: int) -> list[Prompt]:
    return [Prompt(f"p/{i}", "generate", ("two red circles",), ("image",)) for i in range(n)]


def test_what_a_judge_failed_on_is_masked_and_tried_again_on_resume(policy: Policy, tmp_path: Path) -> None:
    flaky: Any = Flaky()
    prompts = drawings(4)
    benchmark = Benchmark("judged", lambda n: prompts[:n], 4, metric="reward", reward=flaky, own_sampling=True)
    found = evaluate(policy, [benchmark], options=kept(tmp_path)).results()["judged"]
    assert (found["score"], found["n"]) == (0.25, 2)
    assert found["masked"] == {"prompts": 2, "of": 4, "reasons": {"HTTP 503 (5 tries)": 2}}
    flaky.down = False
    found = evaluate(policy, [benchmark], options=kept(tmp_path)).results()["judged"]
    assert (found["score"], found["n"], "masked" in found) == (0.25, 4, False)


def test_a_difference_counts_prompts_that_either_side_lacks(policy: Policy) -> None:
    flaky: Any = Flaky()
    prompts = drawings(4)
    benchmark = Benchmark("judged", lambda n: prompts[:n], 4, metric="reward", reward=flaky, own_sampling=True)
    before = evaluate(policy, [benchmark])
    flaky.down = False
    difference = before.difference(evaluate(policy, [benchmark]))["judged"]
    assert (difference["score"], difference["n"], difference["masked"]) == (0.0, 2, {"prompts": 2, "of": 4})


def test_each_guidance_is_a_row_of_its_own() -> None:
    plain, own = Benchmark("a", lambda n: [], 0), Benchmark("b", lambda n: [], 0, own_sampling=True)
    found = with_guidance_scales([plain, own], [1.0, 4.0], 20)
    assert [b.name for b in found] == ["a", "b@1", "b@4"]
    base = Sampling(guidance_scale=7.0, num_steps=49)
    assert [(s.guidance_scale, s.num_steps) for s in (b.sampling(base, "generate") for b in found[1:])] == [
        (1.0, 20),
        (4.0, 20),
    ]
    assert with_guidance_scales([own], (), None)[0].sampling(base, "generate") == base


def test_names_of_files_are_one_per_id() -> None:
    ids = ["a/b", "a+b", "a_b", "a%2Fb", "../x", "é", "x" * 300, "x" * 301]
    names = [file_name(each) for each in ids]
    assert len({*names}) == len(ids)
    assert all("/" not in name and len(name) <= 100 for name in names)


def test_before_and_after_in_one_command(small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["evaluate", str(small_base), "--against", str(small_base), "--benchmark", "understand", "--n", "12"]
    command += ["--sampled-prompts", "0", "--out", str(out)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "difference [95 %]" in first
    assert "after: understand: 12 prompts" in first
    found = json.loads((out / "results.json").read_text())
    assert found["difference"]["understand"]["score"] == 0
    assert found["before"]["results"] == found["results"]
    assert {path.parent.parent.name for path in out.glob(f"*/*/{ITEMS}")} == {"before", "after"}
    assert main(command) == 0  # resumed: everything is there
    assert [*map(str.split, capsys.readouterr().out.splitlines())] == [*map(str.split, first.splitlines())]
    assert main([*command, "--tune", str(tmp_path / "t.json")]) == 2


def test_nothing_of_a_missing_score_is_a_number(policy: Policy, tmp_path: Path) -> None:
    flaky: Any = Flaky()
    benchmark = Benchmark("judged", lambda n: drawings(2), 2, metric="reward", reward=flaky, own_sampling=True)
    record = evaluate(policy, [benchmark], options=kept(tmp_path)).scored["judged"]
    assert [math.isnan(score) for score in record.scores] == [True, False]
    rows = [json.loads(line) for line in (tmp_path / "judged" / ITEMS).read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[None], [0.25]]
    assert replace(record).failures == ("HTTP 503 (5 tries)", "")


def test_a_process_that_is_interrupted_at_a_random_item_resumes_to_the_same_table(
    small_base: Path, request: pytest.FixtureRequest
) -> None:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, found))
    options = ["--benchmark", "generate", "--n", "112", "--sampled-prompts", "0", "--num-steps", "2", "--out"]
    command = [sys.executable, "-m", "lvrpo", "evaluate", str(small_base), *options, "cut"]
    items = Path("cut/generate", ITEMS)

    def interrupted(_: int) -> tuple[int, int, str]:
        """The exit code, the number of items that were waited for, and the messages."""
        shutil.rmtree("cut", ignore_errors=True)
        least = random.randint(1, 50)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (not items.exists() or len(items.read_bytes().splitlines()) < least):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        return process.returncode, least, error

    code, least, error = next(run for run in map(interrupted, range(5)) if run[0] != 0)  # it may end before the signal
    assert (code, least <= len(items.read_bytes().splitlines()) < 112) == (130, True), error
    assert error.splitlines()[-1] == "interrupted: repeat the command to continue from cut"
    for folder in ("cut", "whole"):
        assert main(["evaluate", str(small_base), *options, folder]) == 0
    cut, whole = (json.loads(Path(folder, "results.json").read_text()) for folder in ("cut", "whole"))
    assert {**cut, "seconds": 0} == {**whole, "seconds": 0}


# --- several processes ---


def scores_of(evaluation: Any) -> str:
    return json_text({"scores": evaluation.as_dict()["scores"], "results": evaluation.results()})


def shared(base: Path, folder: Path, ranks: int, calls: int | None = None) -> list[Any]:
    """The evaluations of so many ranks, of which the last fails after so many calls."""

    def work(rank: int) -> Any:
        policy: Any = load_policy(base)  # a method is replaced
        sample, made = policy.sample, []

        def limited(prompts: Sequence[Prompt], *more: Any) -> list[Group]:
            made.append(len(prompts))
            if calls is not None and rank == ranks - 1 and len(made) > calls:
                raise RuntimeError("out of memory")
            return sample(prompts, *more)

        policy.sample = limited
        return evaluate(policy, find_benchmarks(NAMES), sizes=SIZES, options=kept(folder))

    return in_ranks(ranks, work)


def test_several_processes_give_the_table_of_one(policy: Policy, small_base: Path, tmp_path: Path) -> None:
    one = evaluate(policy, find_benchmarks(NAMES), sizes=SIZES, options=kept(tmp_path / "one"))
    found = shared(small_base, tmp_path / "two", 2)
    assert [scores_of(each) for each in found] == [scores_of(one)] * 2
    for name in NAMES:
        lines = [(tmp_path / side / name / ITEMS).read_text().splitlines() for side in ("one", "two")]
        assert sorted(lines[0]) == sorted(lines[1])
        assert len(lines[1]) == SIZES[name]
    assert not list(tmp_path.glob("two/*/items.*.jsonl"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_two_processes_began_another_number_ends(
    policy: Policy, small_base: Path, tmp_path: Path, ranks: int
) -> None:
    one = evaluate(policy, find_benchmarks(NAMES), sizes=SIZES)
    failed = shared(small_base, tmp_path / "cut", 2, calls=1)
    assert all(isinstance(each, ContractError) for each in failed), failed
    assert "process 1 of 2: RuntimeError: out of memory" in str(failed[0])
    parts = sorted(path.name for path in (tmp_path / "cut" / "understand").glob("items*"))
    assert parts == ["items.0.jsonl", "items.1.jsonl"] or parts == ["items.0.jsonl"]
    with (tmp_path / "cut" / "understand" / parts[0]).open("a") as file:
        file.write('{"id": "cut off in the mid')
    before = {row for path in tmp_path.glob("cut/*/items*") for row in path.read_text().splitlines()[:-1]}
    found = shared(small_base, tmp_path / "cut", ranks)
    assert {scores_of(each) for each in found} == {scores_of(one)}
    after = [row for path in tmp_path.glob("cut/*/items*") for row in path.read_text().splitlines()]
    assert before <= {*after}
    assert len(after) == sum(SIZES.values())


def test_torchrun_evaluates_and_resumes_with_another_number(
    small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--benchmark", "understand", "--num-prompts", "40", "--sampled-prompts", "0", "--out"]
    assert main(["evaluate", str(small_base), *options, "one"]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    output = finish(start("evaluate", small_base, *options, "two"))
    assert [*map(str.split, output.splitlines()[-len(table) :])] == [*map(str.split, table)]
    one, two = (json.loads(Path(name, "results.json").read_text()) for name in ("one", "two"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    items = Path("two/understand", ITEMS)
    lines = items.read_text().splitlines(keepends=True)
    items.write_text("".join(lines[:20]))
    Path("two/understand/items.5.jsonl").write_text("".join(lines[20:33]))
    Path("two/results.json").unlink()
    shutil.rmtree("one")
    assert main(["evaluate", str(small_base), *options, "two"]) == 0
    again = json.loads(Path("two/results.json").read_text())
    assert {**again, "seconds": 0} == {**two, "seconds": 0}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "add --out DIR"),
        (["--tune", "t.json"], "--tune: works in one process only"),
        (["--lmms-eval", "x", "--out", "o"], "--lmms-eval: works in one process only"),
    ],
)
def test_what_several_processes_cannot_share(more: list[str], says: str) -> None:
    parsed = parse_command(["evaluate", "tiny", *more])
    assert parsed is not None
    found = in_ranks(2, lambda rank: parsed[0].load()(parsed[1]))
    assert all(isinstance(each, InputError) and says in str(each) for each in found), found
