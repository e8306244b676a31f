"""GenEval 2 and DPG-Bench: their files, how answers are combined, a perfect and a blank model, judges that fail."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.benchmarks import vqa
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs
from lvrpo.evaluation.benchmarks.vqa import dpg_score, geometric_mean, read_dpg, read_geneval2
from lvrpo.evaluation.suite import EvaluationOptions, evaluate, find_benchmarks
from lvrpo.policies.base import Sampling
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.types import Group, Prompt

ROW = {
    "prompt": "two metal toys",
    "atom_count": 3,
    "vqa_list": [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]],
    "skills": ["count", "attribute"],
}
HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
TABLE = """HEAD
a,A red cup on a table,,1,0,entity,whole,x,Is there a cup?
a,A red cup on a table,,2,1,attribute,color,x,Is the cup red?
a,A red cup on a table,,3,0,entity,whole,x,Is there a table?
a,A red cup on a table,,4,"1,3",relation,spatial,x,Is the cup on the table?
""".replace("HEAD", HEAD)


@pytest.fixture
def data(tmp_path: Path, few_prompts: None) -> Path:
    for name in ("geneval2", "dpg"):
        (tmp_path / name).mkdir()
    (tmp_path / "geneval2" / vqa.GENEVAL2_FILE).write_text(json.dumps(ROW) + "\n")
    (tmp_path / "dpg" / vqa.DPG_FILE).write_text(TABLE)
    return tmp_path


class Draws:
    def __init__(self, level: float) -> None:
        self.level = level

    def default_sampling(self, task: str) -> Sampling:
        return Sampling()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        members = range(sampling.group_size)
        return [offline_group(p, [(torch.full((3, 4, 4), self.level),) for _ in members]) for p in prompts]


class Reads:
    """Gives the right answer .9 of a bright image, .05 of a dark one; every other answer .05."""

    image_size = None
    right = ("yes", "two")

    def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        bright = [float(image.mean()) > 0.5 for image, _ in contexts]
        sure = [0.9 if (text in self.right) == b else 0.05 for text, b in zip(texts, bright, strict=True)]
        return torch.tensor(sure).log()


def results(data: Path, level: float, name: str, vlm: Path | None = None) -> Any:
    policy: Any = Draws(level)
    judge: Any = Reads()
    benchmarks = find_benchmarks([name], inputs=BenchmarkInputs(data, vlm=vlm))
    return evaluate(policy, benchmarks, options=EvaluationOptions(0, judge=judge)).results()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([ROW] * 799, "geneval2: holds 799 prompts, .* official version 800 prompts, 669b30703f73: get all of it"),
        ([ROW] * 800, "geneval2: holds 800 prompts, .* official version 800 prompts, 669b30703f73"),
    ],
)
def test_a_file_that_is_not_the_official_one_is_refused(tmp_path: Path, rows: list[Any], says: str) -> None:
    file = tmp_path / "geneval2" / vqa.GENEVAL2_FILE
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=says):
        find_benchmarks(["geneval2"], inputs=BenchmarkInputs(tmp_path))


def test_a_table_without_all_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / vqa.DPG_FILE).write_text(TABLE)
    with pytest.raises(InputError, match=r"dpg: .*: holds 1 prompts, .* official version 1065 prompts: get all of it"):
        find_benchmarks(["dpg"], inputs=BenchmarkInputs(tmp_path))


def test_soft_tifa_by_hand(data: Path) -> None:
    """Number: .9 / (.9 + 9 * .05) = 2/3; yes or no: .9 / .95."""
    found = results(data, 1.0, "geneval2") | results(data, 1.0, "geneval2_am")
    number, attribute = 0.9 / 1.35, 0.9 / 0.95
    assert found["geneval2"]["score"] == pytest.approx(math.sqrt(number * attribute), abs=1e-5)
    assert found["geneval2_am"]["score"] == pytest.approx((number + attribute) / 2, abs=1e-5)
    assert found["geneval2"]["categories"]["3 atoms"]["n"] == 1


def test_dpg_counts_a_question_where_its_parents_hold(data: Path) -> None:
    _, parents = read_dpg(data / "dpg" / vqa.DPG_FILE)
    assert parents == {"dpg/a": [[], [0], [], [0, 2]]}
    assert dpg_score(parents["dpg/a"], [0.9, 0.9, 0.9, 0.9]) == 1.0
    assert dpg_score(parents["dpg/a"], [0.1, 0.9, 0.9, 0.9]) == 0.25  # no cup: neither red nor on the table
    assert dpg_score(parents["dpg/a"], [0.9, 0.9, 0.2, 0.9]) == 0.5
    assert (results(data, 1.0, "dpg")["dpg"]["score"], results(data, 0.0, "dpg")["dpg"]["score"]) == (1.0, 0.0)


class Endpoint:
    """Says what it is told, whatever it is asked."""

    said: Any = "yes"

    def __init__(self, config: Any) -> None:
        self.identity = f"{config.model} at {config.base_url}"

    def ask(self, conversations: Sequence[Any]) -> list[Any]:
        return [self.said(str(words)) if callable(self.said) else self.said for _, words in conversations]


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vqa, "ChatEndpoint", Endpoint)
    file = tmp_path / "judge.yaml"
    file.write_text("base_url: http://localhost:1/v1\nmodel: m\n")
    return file


def test_a_perfect_and_a_blank_model_before_an_endpoint(
    data: Path, endpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "said", lambda self, words: "2" if "How many" in words else "Yes.")
    found = results(data, 1.0, "geneval2", endpoint) | results(data, 1.0, "geneval2_am", endpoint)
    assert (found["geneval2"]["score"], found["geneval2_am"]["score"]) == (1.0, 1.0)
    monkeypatch.setattr(Endpoint, "said", lambda self, words: "0" if "How many" in words else "no")
    assert results(data, 1.0, "geneval2", endpoint)["geneval2"]["score"] == pytest.approx(vqa.SMALLEST)
    assert results(data, 1.0, "geneval2_am", endpoint)["geneval2_am"]["score"] == 0.0


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (NoAnswer("HTTP 429 (5 tries)"), r"HTTP 429 \(5 tries\)"),
        (NoAnswer("no answer within 60 s (5 tries)"), "no answer within 60 s"),
        ("As an AI I cannot tell", "a refusal|neither yes nor no|no number"),
        ("It is hard to say, yes and no", "both yes and no|a refusal"),
    ],
)
def test_a_judge_without_an_answer_masks_the_prompt(
    data: Path, endpoint: Path, monkeypatch: pytest.MonkeyPatch, said: Any, reason: str
) -> None:
    monkeypatch.setattr(Endpoint, "said", said)
    with pytest.raises(ContractError, match=f"no output could be scored: ({reason})"):
        results(data, 1.0, "dpg", endpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vqa_list": []}, "a question with its answer for each of skills"),
        ({"skills": ["count"]}, "a question with its answer for each of skills"),
        ({"vqa_list": [["a"], ["b"]]}, "a question with its answer for each of skills"),
        ({"atom_count": "3"}, "atom_count"),
    ],
)
def test_rows_of_another_form_are_named(data: Path, change: dict[str, Any], says: str) -> None:
    file = data / "geneval2" / vqa.GENEVAL2_FILE
    file.write_text(json.dumps({**ROW, **change}) + "\n")
    with pytest.raises(InputError, match=r"geneval2_data.jsonl:1: .*") as raised:
        read_geneval2(file)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (TABLE, "version https://git-lfs.github.com/spec/v1\n", r"has no column 'item_id'.*not a pointer of Git LFS"),
        ('4,"1,3"', '4,"1,9"', r"item 'a': depends on question \[9\], which it lacks"),
        ("a,A red cup on a table,,2,1", "a,A red cup on a table,,x,1", r"dpg_bench.csv:3: .* whole numbers"),
    ],
)
def test_tables_of_another_form_are_named(data: Path, old: str, new: str, says: str) -> None:
    file = data / "dpg" / vqa.DPG_FILE
    file.write_text(TABLE.replace(old, new))
    with pytest.raises(InputError, match=says):
        read_dpg(file)


def test_a_score_near_zero_does_not_erase_the_others() -> None:
    prompt = Prompt("p", "generate", ("x",), ("image",))
    assert geometric_mean(prompt, [1.0, 0.0]) == pytest.approx(math.sqrt(1e-6))
