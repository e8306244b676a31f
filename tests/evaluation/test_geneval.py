"""GenEval: the questions of its metadata, its rules on detections, both benchmarks, and the official layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.cli import main
from lvrpo.data import geneval as data
from lvrpo.data.geneval import COLORS, NUMBERS, facts_of, interleave_categories, plural, read_metadata
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.data.rows import parse_row
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import PUBLISHED
from lvrpo.evaluation.benchmarks import geneval
from lvrpo.evaluation.benchmarks.geneval import (
    ConfirmedFacts,
    Detection,
    GenEvalRules,
    geneval_benchmark,
    most_confident,
    problems,
    relations,
    write_layout,
)
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs
from lvrpo.evaluation.suite import evaluate, find_benchmarks
from lvrpo.policies.base import Sampling
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.types import Group, Image, Prompt

ROWS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a cow",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "blue"}, {"class": "apple", "count": 1, "color": "black"}],
        "prompt": "a photo of a blue cup and a black apple",
    },
    {"tag": "single_object", "include": [{"class": "skis", "count": 1}], "prompt": "a photo of a skis"},
]


def written(folder: Path, rows: Sequence[Any] = ROWS) -> Path:
    path = folder / data.METADATA
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> list[data.GenEvalRow]:
    return read_metadata(written(tmp_path))


# --- metadata and questions ---


def test_the_questions_of_the_metadata(rows: list[data.GenEvalRow]) -> None:
    asked = [[(f.kind, f.question, f.answer, f.choices) for f in row.prompt.facts] for row in rows]
    assert asked == [
        [("exists", "Is there a bench in the picture?", "yes", ())],
        [("count", "How many clocks are in the picture?", "2", NUMBERS)],
        [
            ("exists", "Is there a cow in the picture?", "yes", ()),
            ("exists", "Is there a dog in the picture?", "yes", ()),
            ("position", "Is the dog to the right of the cow in the picture?", "yes", ()),
        ],
        [
            ("color", "What color is the cup in the picture?", "blue", COLORS),
            ("color", "What color is the apple in the picture?", "black", COLORS),
        ],
        [("exists", "Are there skis in the picture?", "yes", ())],
    ]
    assert [row.prompt.category for row in rows] == [row["tag"] for row in ROWS]


def test_questions_of_rows_that_the_official_prompts_do_not_have() -> None:
    def asked(include: list[dict[str, Any]], exclude: Sequence[dict[str, Any]] = ()) -> list[tuple[str, str]]:
        metadata = data.Metadata.model_validate({"tag": "x", "include": include, "exclude": [*exclude], "prompt": "x"})
        return [(f.question, f.answer) for f in facts_of(metadata)]

    assert asked([{"class": "bus", "count": 2}]) == [("Are there at least 2 buses in the picture?", "yes")]
    assert asked([{"class": "car", "count": 1, "color": "red"}, {"class": "car", "count": 1, "color": "orange"}]) == [
        ("Is there a red car in the picture?", "yes"),
        ("Is there an orange car in the picture?", "yes"),
    ]
    none = [{"class": "dog", "count": 1}, {"class": "cat", "count": 3}]
    assert asked([{"class": "cow", "count": 1}], none)[1:] == [
        ("Is there a dog in the picture?", "no"),
        ("Are there 3 or more cats in the picture?", "no"),
    ]
    assert asked([{"class": "cow", "count": 12}], [{"class": "cow", "count": 13}]) == [
        ("Are there exactly 12 cows in the picture?", "yes")
    ]
    assert [plural(name) for name in ("person", "knife", "wine glass", "couch", "scissors", "tie")] == [
        *("people", "knives", "wine glasses", "couches", "scissors", "ties")
    ]


def test_categories_take_turns(rows: list[data.GenEvalRow]) -> None:
    turns = interleave_categories([row.prompt for row in rows])
    assert [p.id[-1] for p in turns] == ["0", "1", "2", "3", "4"]
    assert [p.id[-1] for p in interleave_categories([turns[4], turns[0], turns[1]])] == ["4", "1", "0"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tag": "x", "prompt": "a"}, "include: field required"),
        ({**ROWS[0], "vqa": 1}, "vqa: extra inputs are not permitted"),
        ({**ROWS[0], "include": [{"class": "cow", "count": 0}]}, "include.0.count"),
        ({**ROWS[0], "include": [{"class": "cow", "count": 1, "position": ["above", 0]}]}, "must be an earlier one"),
        ({**ROWS[0], "include": [{"class": "cow", "count": 1, "color": "mauve"}]}, "include.0.color"),
        ([1], "the row: input should be a valid dictionary"),
    ],
)
def test_a_row_of_another_format_is_one_line(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(InputError, match=r"evaluation_metadata.jsonl:2: ") as raised:
        read_metadata(written(tmp_path, [ROWS[0], row]))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


# --- the rules ---


def box(left: float, top: float, size: float = 10, score: float = 0.95) -> Detection:
    return Detection(score, (left, top, left + size, top + size))


LEFT, RIGHT, FAR_RIGHT = box(0, 0), box(40, 0), box(80, 0)
TABLE: list[tuple[int, dict[str, list[Detection]], dict[str, list[str]], bool]] = [
    # row, objects, their colors, right: by hand, a case for each branch of the rules
    (0, {}, {}, False),
    (0, {"bench": [LEFT]}, {}, True),
    (0, {"bench": [LEFT, RIGHT]}, {}, True),
    (0, {"cow": [LEFT]}, {}, False),
    (1, {"clock": [LEFT]}, {}, False),
    (1, {"clock": [LEFT, RIGHT]}, {}, True),
    (1, {"clock": [LEFT, RIGHT, FAR_RIGHT]}, {}, False),
    (2, {"dog": [RIGHT]}, {}, False),  # nothing to be right of
    (2, {"cow": [LEFT]}, {}, False),
    (2, {"cow": [LEFT], "dog": [RIGHT]}, {}, True),
    (2, {"cow": [RIGHT], "dog": [LEFT]}, {}, False),
    (2, {"cow": [LEFT], "dog": [box(1, 1)]}, {}, False),  # within the margin
    (2, {"cow": [LEFT], "dog": [box(2, 40)]}, {}, False),  # below
    (2, {"cow": [LEFT], "dog": [box(40, 40)]}, {}, True),  # right of and below
    (2, {"cow": [LEFT, FAR_RIGHT], "dog": [RIGHT]}, {}, True),  # the surest cow alone counts
    (2, {"cow": [FAR_RIGHT, LEFT], "dog": [RIGHT]}, {}, False),
    (3, {"cup": [LEFT], "apple": [RIGHT]}, {"cup": ["blue"], "apple": ["black"]}, True),
    (3, {"cup": [LEFT], "apple": [RIGHT]}, {"cup": ["black"], "apple": ["blue"]}, False),
    (3, {"cup": [LEFT, RIGHT], "apple": [RIGHT]}, {"cup": ["red", "blue"], "apple": ["black"]}, False),
    (3, {"cup": [LEFT]}, {"cup": ["blue"]}, False),
]


@pytest.mark.parametrize(("index", "objects", "colors", "right"), TABLE)
def test_the_rules_on_detections(
    rows: list[data.GenEvalRow],
    index: int,
    objects: dict[str, list[Detection]],
    colors: dict[str, list[str]],
    right: bool,
) -> None:
    found = problems(rows[index].metadata, objects, lambda name, chosen: colors[name][: len(chosen)])
    assert (not found) == right


def test_an_object_of_the_wrong_color_is_nothing_to_be_beside() -> None:
    metadata = data.Metadata.model_validate(
        {
            "tag": "x",
            "include": [
                {"class": "cow", "count": 1, "color": "red"},
                {"class": "dog", "count": 2, "position": ["right of", 0]},
            ],
            "prompt": "x",
        }
    )
    objects = {"cow": [LEFT], "dog": [RIGHT, FAR_RIGHT]}
    assert problems(metadata, objects, lambda name, chosen: ["red"]) == []
    assert problems(metadata, objects, lambda name, chosen: ["blue"]) == [
        "cow is blue, red is right",
        "no cow for dog to be right of",
    ]
    assert problems(metadata, {**objects, "dog": [RIGHT, box(-60, 0)]}, lambda name, chosen: ["red"]) == [
        "dog is left of, right of is right"
    ]


def test_relations_by_hand() -> None:
    # centers 40 apart, sizes 10 + 10: 40 - .1 * 20 = 38, 38 / 40 > .5
    assert relations(RIGHT, LEFT) == {"right of"}
    assert relations(LEFT, RIGHT) == {"left of"}
    assert relations(box(0, 40), LEFT) == {"below"}
    assert relations(box(3, -40), LEFT) == {"above"}
    assert relations(box(2, 2), LEFT) == frozenset()
    # offset (40, 20), length 44.7: left (38, 18), and 18 / 44.7 = .40 is too little
    assert relations(box(40, 20), LEFT) == {"right of"}
    # (4, 0): 4 - 2 = 2, and 2 / 4 is not more than .5
    assert relations(box(4, 0), LEFT) == frozenset()


def test_the_surest_detections_count() -> None:
    found = [box(0, 0, score=s / 100) for s in range(100)]
    kept = most_confident(found, 0.9)
    assert [round(each.score * 100) for each in kept] == list(range(99, 90, -1))
    assert len(most_confident(found, 0.3)) == 16


# --- the benchmarks ---


class Drawer:
    """Draws images whose level is the number of the prompt, or blank ones."""

    def __init__(self, level: Callable[[Prompt, int], float]) -> None:
        self.level = level

    def default_sampling(self, task: str) -> Sampling:
        return Sampling(guidance_scale=4.0, num_steps=3)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        assert (sampling.guidance_scale, sampling.num_steps) == (4.0, 3)
        members = range(sampling.group_size)
        return [offline_group(p, [(torch.full((3, 4, 4), self.level(p, m)),) for m in members]) for p in prompts]


def perfect(prompt: Prompt, member: int) -> float:
    return (1 + int(prompt.id[-5:])) / 16


def drawer(level: Callable[[Prompt, int], float]) -> Any:  # Any: it keeps the part of the contract that is called
    return Drawer(level)


class Sees:
    """Finds what the metadata of the prompt with the image's number asks for; fails on one level."""

    thresholds = (0.3, 0.9)

    def __call__(self, image: Image, names: Sequence[str]) -> Mapping[str, list[Detection]]:
        number = round(float(image.mean()) * 16) - 1
        if number == 14:
            raise RuntimeError("out of memory")
        wanted = {c["class"]: c["count"] for c in ROWS[number]["include"]} if number >= 0 else {}
        places = iter((LEFT, RIGHT))
        return {name: [next(places) for _ in range(wanted.get(name, 0))] for name in names}


def true_colors(image: Image, name: str, objects: Sequence[Detection]) -> list[str]:
    return [{"cup": "blue", "apple": "black"}[name]] * len(objects)


@pytest.fixture
def official(rows: list[data.GenEvalRow]) -> Any:
    reward = GenEvalRules({row.prompt.id: row.metadata for row in rows}, Sees(), true_colors)
    return geneval_benchmark("geneval", [row.prompt for row in rows], reward, "a double")


def test_a_perfect_model_scores_one_and_a_blank_one_zero(official: Any) -> None:
    right = evaluate(drawer(perfect), [official])
    blank = evaluate(drawer(lambda prompt, member: 0.0), [official])
    for found, score in ((right, 1.0), (blank, 0.0)):
        result = found.results()["geneval"]
        assert (result["score"], result["n"]) == (score, 5)
        assert {c["score"] for c in result["categories"].values()} == {score}
    assert right.scored["geneval"].samples == 4
    assert right.scored["geneval"].settings["tasks"]["generate"]["guidance_scale"] == 4.0
    assert blank.difference(right)["geneval"]["score"] == 1.0


def test_the_score_is_the_mean_over_categories(official: Any) -> None:
    """Bench right in 3 of 4, skis never: single_object .375; counting and position 1, color_attr 0."""

    def level(prompt: Prompt, member: int) -> float:
        number = int(prompt.id[-5:])
        wrong = (number == 0 and member == 2) or number in (3, 4)
        return 0.0 if wrong else perfect(prompt, member)

    result = evaluate(drawer(level), [official]).results()["geneval"]
    assert {name: each["score"] for name, each in result["categories"].items()} == {
        "single_object": 0.375,
        "counting": 1.0,
        "position": 1.0,
        "color_attr": 0.0,
    }
    assert result["score"] == pytest.approx((0.375 + 1 + 1 + 0) / 4)
    assert result["low"] <= result["score"] <= result["high"]


def test_what_the_detector_fails_on_is_masked_and_counted(official: Any) -> None:
    def level(prompt: Prompt, member: int) -> float:
        return 15 / 16 if prompt.id.endswith("4") and member == 1 else perfect(prompt, member)

    record = evaluate(drawer(level), [official])
    result = record.results()["geneval"]
    assert (result["score"], result["n"]) == (1.0, 4)
    reason = "the detector failed: RuntimeError: out of memory"
    assert result["masked"] == {"prompts": 1, "of": 5, "reasons": {reason: 1}}
    assert record.as_dict()["scores"]["geneval"]["failures"] == ["", "", "", "", reason]
    with pytest.raises(ContractError, match=r"geneval: no output could be scored: the detector failed: RuntimeError"):
        evaluate(drawer(lambda prompt, member: 15 / 16), [official])


def test_a_category_without_any_score_has_no_mean(official: Any) -> None:
    lost = evaluate(drawer(lambda p, m: 15 / 16 if p.id.endswith("1") else perfect(p, m)), [official])
    result = lost.results()["geneval"]
    assert math.isnan(result["score"])
    assert (result["n"], result["masked"]["prompts"]) == (4, 1)


class Reader:
    """Answers as the metadata says of the image's number, or the opposite; nan for one level."""

    image_size = None

    def __init__(self, rows: Sequence[data.GenEvalRow], knows: bool) -> None:
        self.rows, self.knows = rows, knows

    def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        out = []
        for (image, question), text in zip(contexts, texts, strict=True):
            number = round(float(image.mean()) * 16) - 1
            facts = self.rows[number].prompt.facts if 0 <= number < len(self.rows) else ()
            right = any(question.startswith(f.question) and text == f.answer for f in facts)
            out.append(math.nan if number == 14 else math.log(0.6 if right == self.knows else 0.05))
        return torch.tensor(out)


def test_the_judge_of_geneval_vqa(rows: list[data.GenEvalRow]) -> None:
    prompts = [row.prompt for row in rows]
    groups = [
        offline_group(p, [(torch.full((3, 4, 4), level),) for level in (perfect(p, 0), 15 / 16)]) for p in prompts
    ]
    judge: Any = Reader(rows, True)
    scores = ConfirmedFacts().score(groups, judge)
    assert scores.values[:, 0].tolist() == [1.0] * 5
    assert {cell: why for cell, why in scores.failures.items() if cell[1] == 0} == {}
    assert set(scores.failures) == {(p, 1) for p in range(5)}
    wrong: Any = Reader(rows, False)
    assert ConfirmedFacts().score(groups, wrong).values[:, 0].tolist() == [0.0] * 5
    # .6 among ten choices: .6 / (.6 + 9 * .05) = .571; of yes and no: .6 / .65
    confidences = ConfirmedFacts().vqa.confidences(groups, judge, judge)[0]
    assert confidences[1, 0].tolist() == pytest.approx([0.6 / 1.05])
    assert confidences[0, 0].tolist() == pytest.approx([0.6 / 0.65])


@pytest.mark.usefixtures("few_prompts")
def test_a_file_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "geneval"
    folder.mkdir()
    written(folder)
    inputs = BenchmarkInputs(tmp_path)
    with pytest.raises(InputError, match=r"5 rows with fingerprint .* are not the 553 official prompts"):
        find_benchmarks(["geneval_vqa"], inputs=inputs)
    monkeypatch.setattr(geneval, "OFFICIAL", data.fingerprint(read_metadata(folder / data.METADATA)))
    (found,) = find_benchmarks(["geneval_vqa"], inputs=inputs)
    assert (found.name, found.n, found.samples) == ("geneval_vqa", 5, 4)
    with pytest.raises(InputError, match="named twice"):
        find_benchmarks(["geneval_vqa", "geneval_vqa"], inputs=inputs)
    with pytest.raises(InputError, match="needs --detector and --color-classifier"):
        find_benchmarks(["geneval"], inputs=inputs)
    with pytest.raises(InputError, match=r"holds no evaluation_metadata.jsonl, nor geneval/ with it"):
        find_benchmarks(["geneval_vqa"], inputs=BenchmarkInputs(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"name the folder that holds it \(--data DIR\)"):
        find_benchmarks(["geneval_vqa"])


def test_the_official_layout(tmp_path: Path, rows: list[data.GenEvalRow]) -> None:
    images = {row.prompt.id: [b"first", b"second"] for row in rows}
    write_layout(tmp_path / "out", rows, images)
    assert (tmp_path / "out/00003/samples/0001.png").read_bytes() == b"second"
    lines = (tmp_path / "out/00003/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [ROWS[3]]
    with pytest.raises(InputError, match="prompt geneval/00004 has no image"):
        write_layout(tmp_path / "other", rows, {**images, "geneval/00004": []})
    assert not (tmp_path / "other").exists()


# --- as rows of a run ---


def test_the_prompts_as_rows_for_rewards_and_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["data", "benchmark", "geneval", str(written(tmp_path)), "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"5 rows in {out}\n"
    source = JsonlPrompts(JsonlConfig(validation=out), "validation")
    found = source.in_order()
    rows = [row.prompt for row in read_metadata(tmp_path / data.METADATA)]
    assert [(p.id, p.category, p.facts) for p in found] == [(p.id, p.category, p.facts) for p in rows]
    assert all(SelfVQA().applies(prompt) for prompt in found)
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["data", "benchmark", "genevl", str(out), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "benchmark 'genevl': unknown: did you mean geneval" in capsys.readouterr().err


@pytest.mark.parametrize("choices", [["red"], ["blue", "green"], ["red", "red"]])
def test_choices_of_a_row_hold_the_answer(choices: list[str]) -> None:
    row = {"task": "generate", "prompt": "x", "facts": [{"question": "q", "answer": "red", "choices": choices}]}
    with pytest.raises(ValueError, match="must hold two or more different answers"):
        parse_row(row)


def test_every_published_benchmark_is_listed_with_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmarks"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*PUBLISHED, "--detector", "MIT", "2310.11513"))
    assert "553 prompts, 4 images each" in listed
    assert f"{round(553 * 4 * 11.7 / 60)} minutes" in listed
