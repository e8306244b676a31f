"""A task of one's own: prompts, a reward and a metric of success in one class, or a rule for the rows of a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from discrete_policy import DiscretePolicy

import lvrpo
from lvrpo import ContractError, InputError, Prompt, TextSegment, Trajectory
from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.evaluation import BENCHMARKS
from lvrpo.evaluation.items import ItemStore
from lvrpo.evaluation.suite import Benchmark, EvaluationOptions, evaluate, find_benchmarks, prompt_benchmarks
from lvrpo.registry import allow_code
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.function import as_reward
from lvrpo.rewards.success import HeldOutScorer
from lvrpo.training.components import PromptList, open_components, success_metric, task_scorer
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import group_successes
from lvrpo.training.reward_metrics import reward_means
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.validation import ValidationReport, Validator
from lvrpo.types import Group, RewardTable, TaskKind

TASK = """
import lvrpo


class Red(lvrpo.Task):
    tasks = ("generate",)

    def __init__(self, options, split, seed):
        self.split, self.count = split, options.get("count", 4)

    def prompt(self, task, index):
        return lvrpo.Prompt(f"{self.split}/{index % self.count}", task, ("draw red",), ("image",))

    def success(self, image):
        return bool(image[0].mean() > 0.5)

    def reward(self, image, least=0.0):
        return float(image[0].mean()) - least


class Silent(Red):
    success = reward = None


class Half(lvrpo.Task):
    tasks = ("generate",)


class Needy(Red):
    def __init__(self, options, split, seed):
        self.needed = options["needed"]


class Plain:
    def prompt(self, task, index): ...


def is_short(text):
    return len(text) < 4


def is_red(image):
    return bool(image[0].mean() > 0.5)
"""
RUN = """
name: own
policy: policy
device: cpu
allow_code: [discrete_policy, ./red.py]
data: {source: "./red.py:Red", options: {count: 3}, prompts_per_step: {generate: 2}}
rewards: [{name: task, options: {least: 0.1}}]
tokens: {lr_scale: 0.8}
rollout: {group_size: 4, max_new_tokens: 4}
steps: 1
validation: {every: 1, prompts: {generate: 3}, overoptimization: {reward: task, watch: success}}
"""


def write_run() -> None:
    Path("red.py").write_text(TASK)
    Path("own.yaml").write_text(RUN)
    DiscretePolicy(("tokens",)).save(Path("policy"))


def said(text: str, right: str | None = None) -> Group:
    prompt = Prompt(f"{text}/{right}", "understand", ("x",), ("text",), right)
    segment = TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 0.0, text, True)
    return Group(prompt, (Trajectory(prompt, 0, (segment,), 0),))


def scorer(rule: Any) -> HeldOutScorer:
    return HeldOutScorer((), ConfiguredReward(RewardConfig(name="my:rule", label="rule"), as_reward(rule)()))


def test_a_run_trains_on_the_tasks_reward_and_is_measured_by_its_success() -> None:
    write_run()
    assert main(["train", "own.yaml", "--out", "run"]) == 0
    run = RunDirectory.read(Path("run"))
    first, step = run.metrics()[:2]
    assert first["validation/generate"] in (0, 1 / 3, 2 / 3, 1)  # of three prompts
    assert 0 <= step["reward/generate/success"] <= 1
    assert -0.1 <= step["reward/generate/task"] <= 0.9
    after = json.loads(Path("run/eval/after.json").read_text())
    assert after["scores"]["test"]["metric"] == "success"
    assert [sample["score"] in (0, 1) for sample in after["prompts"]] == [True] * 3
    (line, *_) = Path("run/samples/step_000001/groups.jsonl").read_text().splitlines()
    assert all(member["success"] in (0, 1) for member in json.loads(line)["members"])
    allow_code(["*"])
    found = task_scorer(run.config(TrainConfig))
    assert found.success is not None
    assert found.rewards[0].scores(Prompt("1", "generate", ("draw red",), ("image",)))


def test_a_rule_is_asked_first_and_a_failed_one_is_no_wrong_output() -> None:
    def is_red(text: str) -> bool | None:
        return None if text == "?" else text == "red"

    groups = [said("red", "blue"), said("?"), said("blue", "blue")]
    scores, reasons = scorer(is_red).scores(groups)
    assert reasons == {1: "success 'rule': the function gave no score"}
    assert [scores[0], scores[2]] == [[1.0], [0.0]]
    assert math.isnan(scores[1][0])
    table = RewardTable(
        (), torch.zeros(0), torch.zeros(3, 1, 0), torch.zeros(3, 1, 0, dtype=torch.bool), {}, ("understand",) * 3
    )
    assert reward_means("reward", table, group_successes(groups, scorer(is_red))) == {
        "reward/understand/success": 0.5,
        "reward_failed/understand/success": pytest.approx(1 / 3),
    }


def test_prompts_without_such_an_output_are_judged_by_their_answers() -> None:
    def is_bright(image: torch.Tensor) -> bool:
        return bool(image.mean() > 0.5)

    told, open_ended = said("red", "red"), said("red")
    assert scorer(is_bright).scores([told]) == ([[1.0]], {})
    assert scorer(is_bright).metric(open_ended.prompt) is None


def test_a_list_of_prompts_has_a_rule_too() -> None:
    task = PromptList([said("red").prompt], lambda text: text == "red")
    found = HeldOutScorer((), success_metric(TrainConfig(), task))
    assert found.scores([said("red"), said("blue", "blue")]) == ([[1.0], [0.0]], {})


def test_a_rule_that_grades_stops() -> None:
    with pytest.raises(ContractError, match=r"success 'rule' is 0.4: must be true or false, 1 or 0"):
        scorer(lambda text: 0.4).scores([said("a"), said("b")])


def test_a_rule_that_fails_on_most_of_all_outputs_stops_validation() -> None:
    def rule(text: str) -> bool | None:
        return True if text == "a" else None

    groups = [said("b"), said("a"), said("c"), said("d")]
    _, reasons = scorer(rule).scores(groups[:1])  # a part may fail as a whole
    assert list(reasons) == [0]
    prompts: dict[TaskKind, list[Prompt]] = {"understand": [group.prompt for group in groups]}
    policies: Any = None  # no reward, no judge
    validator = Validator(prompts, TrainConfig(), scorer(rule))
    words = (
        r"validation of understand: 3 of 4 outputs, more than half, have no score; .* \(3\): success 'rule': the func"
    )
    with pytest.raises(ContractError, match=words):
        validator._scores({"understand": groups}, policies)
    validator = Validator({"understand": prompts["understand"][:2]}, TrainConfig(), scorer(rule))
    scores = validator._scores({"understand": groups[:2]}, policies)
    assert ValidationReport({}, "kept", (), scores).row() == {"validation_failed/understand": 0.5}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.source='./red.py:Plain'", r"data.source=./red.py:Plain: is no task: write class Plain\(lvrpo.Task\)"),
        ("data.source='./red.py:Half'", "data.source=./red.py:Half: has no prompt: define what lvrpo.Task asks for"),
        (
            "data.source='./red.py:Needy'",
            "Needy: the train split cannot be made: KeyError: 'needed': correct data.options",
        ),
        ("data.source='./red.py:Silent'", "rewards.task: data.source=./red.py:Silent has no reward of its own"),
        (
            "rewards=[{name: task, options: {lest: 1}}]",
            "rewards.task.options: got an unexpected keyword argument 'lest'",
        ),
        ("data.success={name: self_vqa}", "data.success.name=self_vqa: asks a model for its verdict"),
        ("data.success={name: './red.py:is_short', options: {n: 1}}", r"data.success.options \(n\)"),
        (
            "rewards=[{name: task, where: {ray: {}}}]",
            "rewards.task.where: a task scores in this process: leave where out",
        ),
        ("data.success={name: 'python:rule'}", "data.success.name=python:rule: was handed over in Python, and only"),
        ("data.success={name: own_vqa}", "data.success.name=own_vqa: is called self_vqa now"),
        (
            "data.success={name: ocr, options: {api_key: hidden}}",
            "data.success.options: api_key: looks like a key, and",
        ),
    ],
)
def test_a_wrong_task_is_one_line(setting: str, words: str) -> None:
    write_run()
    allow_code(["*"])
    with pytest.raises(InputError, match=words):
        open_components(load_config(TrainConfig, Path("own.yaml"), [setting]))


def test_rows_of_a_file_have_a_rule_too() -> None:
    write_run()
    allow_code(["*", "discrete_policy"])
    row = {"task": "understand", "prompt": "say red", "images": []}
    Path("t.jsonl").write_text(json.dumps({**row, "task": "reason"}) + "\n")
    given = [
        "data={source: jsonl, options: {}, jsonl: {train: t.jsonl}, prompts_per_step: {reason: 1}}",
        "data.success={name: './red.py:is_short'}",
        "rewards=[{name: text_length, options: {limit: 3}}]",
        "validation.overoptimization=null",
    ]
    parts = open_components(load_config(TrainConfig, Path("own.yaml"), given))
    assert parts.scorer.metric(parts.source.prompt("reason", 0)) == "success"


def test_the_rule_scores_the_runs_own_prompts_alone() -> None:
    policy, rows = DiscretePolicy(("tokens",)), [Prompt("1", "understand", ("draw red",), ("text",), "no word")]
    found = [scorer(lambda text: True), scorer(lambda text: False)]
    benchmarks = [Benchmark("given", lambda n: rows, 1), *prompt_benchmarks("own", rows, found[0])]
    assert [b.own_rule for b in (*find_benchmarks(["scenes"]), *benchmarks)].index(True) == len(BENCHMARKS) + 1

    def scores(by: HeldOutScorer, store: ItemStore | None = None) -> dict[str, tuple[float, ...]]:
        options = EvaluationOptions(0, scorer=by, store=store)
        return {k: v.scores for k, v in evaluate(policy, benchmarks, options=options).scored.items()}

    assert [scores(by) for by in found] == [{"given": (0.0,), "own": (1.0,)}, {"given": (0.0,), "own": (0.0,)}]
    scores(found[0], ItemStore(Path("kept")))
    other = HeldOutScorer((), ConfiguredReward(RewardConfig(name="my:other"), as_reward(lambda text: False)()))
    with pytest.raises(
        InputError, match=r"own: holds an evaluation with success 'my:rule \{\}', this one has 'my:other"
    ):
        scores(other, ItemStore(Path("kept")))


def test_a_runs_success_is_asked_where_it_counts() -> None:
    write_run()
    with pytest.raises(InputError, match="allow"):
        task_scorer(load_config(TrainConfig, Path("own.yaml"), allow_code=False))
    allow_code(["*"])
    plain = ["rewards=[{name: task}]", "validation.rewards=[{name: task, label: held}]", "data.options={count: 3}"]
    parts = open_components(load_config(TrainConfig, Path("own.yaml"), plain))
    assert [source.config.title for source in parts.validator.scorer.rewards] == ["held"]
    unused = [
        "data.source='./red.py:Needy'",
        "data.success={name: './red.py:is_red'}",
        "rewards=[{name: './red.py:is_short'}]",
    ]
    config = load_config(TrainConfig, Path("own.yaml"), [*unused, "validation.overoptimization=null"])
    assert task_scorer(config).rule.endswith("red.py:is_red {}")  # the class, which wants other options, is not made


def test_a_list_of_prompts_keeps_the_rule_of_its_configuration() -> None:
    write_run()
    allow_code(["*", "discrete_policy"])
    rows = [Prompt(str(i), "generate", ("red",), ("image",)) for i in range(2)]
    plain = ["rewards=[{name: text_length}]", "validation.overoptimization=null"]
    config = load_config(TrainConfig, Path("own.yaml"), ["data.success={name: './red.py:is_red'}", *plain])
    with pytest.raises(InputError, match=r"success: data.success names another, ./red.py:is_red: leave one of the two"):
        lvrpo.train(config, prompts=rows, success=lambda image: True)
    done = lvrpo.train(
        config, prompts=rows, validation=rows, rewards=[lambda image: float(image.mean())], progress=False
    )
    assert RunDirectory.read(done.run).metrics()[0]["validation/generate"] in (0, 0.5, 1)
    kept = RunDirectory.read(done.run).config(TrainConfig).data.success
    assert kept is not None
    assert kept.name.endswith("red.py:is_red")

    def bright(image: torch.Tensor, target: float = 0.5) -> float:
        return -abs(float(image.mean()) - target)

    low = {"name": bright, "label": "low", "weight": 2.0, "options": {"target": -10.0}}
    rewards: list[Any] = [bright, low, {"name": bright, "label": "high", "options": {"target": 10.0}}]
    for wrong, said in (
        ([bright, bright], "two entries are called 'bright': give one a label of its own"),
        (
            [{"name": bright, "options": {"tagret": 1}}],
            "'bright': options: got an unexpected .* 'tagret'",
        ),
        ([{"name": lvrpo.reward(bright)(), "options": {"target": 1}}], "it is made already: leave them out"),
        ([{"weight": 2.0}], r"rewards\.0\.name: is missing"),
    ):
        with pytest.raises(InputError, match=said):
            lvrpo.train(config, prompts=rows, rewards=wrong, progress=False)
    config, given = load_config(TrainConfig, Path("own.yaml"), plain), rewards
    done = lvrpo.train(
        config, prompts=rows, validation=rows, rewards=given, success=lambda image: True, out="d", progress=False
    )
    recorded = RunDirectory.read(done.run).config(TrainConfig)
    assert [(r.title, r.weight) for r in recorded.rewards] == [("bright", 1.0), ("low", 2.0), ("high", 1.0)]
    first = next(row for row in RunDirectory.read(done.run).metrics() if "reward/generate/low" in row)
    assert first["reward/generate/low"] + first["reward/generate/high"] == pytest.approx(-20)
    with pytest.raises(InputError, match=r"data.success.name=python:<lambda>: was handed over in Python, and only its"):
        success_metric(recorded, None)
