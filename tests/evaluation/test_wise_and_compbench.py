"""WISE and T2I-CompBench++: files, questions, formulas by hand, a perfect and a blank model, judges that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.benchmarks import compbench, vqa, wise
from lvrpo.evaluation.benchmarks.compbench import CATEGORIES, FILES, facts_of
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs
from lvrpo.evaluation.benchmarks.wise import LEGACY, VERIFIED, Protocol, read_rows, read_scores, wi_score
from lvrpo.evaluation.suite import EvaluationOptions, evaluate, find_benchmarks
from lvrpo.policies.base import Sampling
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.types import Group, Prompt

LINES = {
    "color": "a red apple and yellow bananas\nA white sink with a black tap.\n",
    "shape": "an oval mirror and a square box.\n",
    "texture": "rubber gloves and a wooden table\n",
    "spatial": "a horse on the right of a car\n",
    "3d_spatial": "a cat hidden by a box\n",
    "numeracy": "one banana, two bicycles\nsix fish swam in the sea\n",
    "non_spatial": "A woman is holding a yoga mat.\n",
    "complex": "The red hat was on top of the brown coat rack.\n",
}


@pytest.fixture
def data(tmp_path: Path, few_prompts: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files of the official formats; the versions of WISE have two prompts a category."""
    folder = tmp_path / "t2i_compbench"
    folder.mkdir()
    for name, lines in LINES.items():
        (folder / f"{name}_val.txt").write_text(lines)
    for name, protocol in (("LEGACY", LEGACY), ("VERIFIED", VERIFIED)):
        small = replace(protocol, categories={name: ids[:2] for name, ids in protocol.categories.items()})
        write_wise(tmp_path / protocol.name, small)
        published = wise._published(small, "here")
        monkeypatch.setattr(wise, {"LEGACY": "WISE", "VERIFIED": "WISE_VERIFIED"}[name], published)
    return tmp_path


def write_wise(folder: Path, protocol: Protocol) -> None:
    folder.mkdir()
    parts = (("culture",), ("time", "space"), ("biology", "physics", "chemistry"))
    for file, categories in zip(protocol.files, parts, strict=True):
        rows = [
            {
                "Prompt": f"{name} {i}",
                "Explanation": f"means {name} {i}",
                "Category": "x",
                "Subcategory": "y",
                "prompt_id": i,
            }
            for name in categories
            for i in protocol.categories[name]
        ]
        (folder / file).write_text(json.dumps(rows))


class Draws:
    def __init__(self, level: float) -> None:
        self.level = level

    def default_sampling(self, task: str) -> Sampling:
        return Sampling()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        members = range(sampling.group_size)
        return [offline_group(p, [(torch.full((3, 4, 4), self.level),) for _ in members]) for p in prompts]


class Reads:
    """Finds the best of a bright image and the worst of a dark one nearly sure."""

    image_size = None
    counts: ClassVar = {"bananas": "one", "bicycles": "two", "fish": "six"}

    def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        sure = []
        for (image, words), text in zip(contexts, texts, strict=True):
            right = self.counts[words.split()[2]] if "How many" in words else "yes"
            good = text.endswith(": 1" if "<0 or 1>" in words else (right, ": 2"))
            bad = text.endswith(("no", "three", ": 0"))
            sure.append(0.98 if (good if float(image.mean()) > 0.5 else bad) else 1e-4)
        return torch.tensor(sure).log()


def results(data: Path, level: float, name: str, vlm: Path | None = None) -> Any:
    policy: Any = Draws(level)
    judge: Any = Reads()
    benchmarks = find_benchmarks([name], inputs=BenchmarkInputs(data, vlm=vlm))
    return evaluate(policy, benchmarks, options=EvaluationOptions(0, judge=judge)).results()[name]


class Endpoint:
    """Says what it is told."""

    said: Callable[[Any, str], Any] = lambda self, words: "yes"

    def __init__(self, config: Any) -> None:
        self.identity = f"{config.model} at {config.base_url}"

    def ask(self, conversations: Sequence[Any]) -> list[Any]:
        return [self.said(str(words)) for _, words in conversations]


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vqa, "ChatEndpoint", Endpoint)
    file = tmp_path / "judge.yaml"
    file.write_text("base_url: http://localhost:1/v1\nmodel: m\n")
    return file


# --- WISE ---


@pytest.mark.parametrize(
    ("numbers", "score"), [((2, 2, 2), 1.0), ((0, 0, 0), 0.0), ((1, 2, 0), 0.55), ((2, 0, 1), 0.75), ((0, 1, 2), 0.2)]
)
def test_wi_score_by_hand(numbers: tuple[int, ...], score: float) -> None:
    """(.7 c + .2 r + .1 a) / 2."""
    assert wi_score(numbers, LEGACY) == pytest.approx(score)
    assert sum(aspect.weight for aspect in LEGACY.aspects) == pytest.approx(1.0)


def test_the_official_weights_are_the_shares_of_the_categories() -> None:
    sizes = [len(ids) for ids in LEGACY.categories.values()]
    assert [size / 1000 for size in sizes] == [0.4, 0.167, 0.133, 0.1, 0.1, 0.1]
    assert [len(ids) / 1000 for ids in VERIFIED.categories.values()] == [0.4, *[0.12] * 5]


GOOD = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"


@pytest.mark.parametrize("said", [GOOD, "**Consistency:** 2\n\n**realism**: 1\n aesthetic quality : 0 \n"])
def test_an_answer_is_read(said: str) -> None:
    assert read_scores(said, LEGACY) == (2, 1, 0)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "2\n1\n0",
        "Consistency: 2\nRealism: 1",
        "Consistency: 3\nRealism: 1\nAesthetic Quality: 0",
        "Consistency: -1\nRealism: 1\nAesthetic Quality: 0",
        "Consistency: 1.5\nRealism: 1\nAesthetic Quality: 0",
        "Consistency: 2\nConsistency: 2\nRealism: 1\nAesthetic Quality: 0",
        "Consistency: 2 (mostly)\nRealism: 1\nAesthetic Quality: 0",
        "Here you are:\n" + GOOD,
        GOOD + "\nI hope this helps.",
        "Consistency: 2, Realism: 1, Aesthetic Quality: 0",
        "I cannot rate this image.",
        "Score: 1",
    ],
)
def test_a_chatty_or_wrong_answer_is_no_answer(said: str) -> None:
    found = read_scores(said, LEGACY)
    assert isinstance(found, NoAnswer)
    assert "not 0 to 2 for Consistency, Realism, Aesthetic Quality alone" in found.reason


def test_the_verified_version_is_right_or_wrong() -> None:
    assert (read_scores("Score: 1", VERIFIED), read_scores("score: 0", VERIFIED)) == ((1,), (0,))
    assert isinstance(read_scores("Score: 2", VERIFIED), NoAnswer)
    assert (wi_score((1,), VERIFIED), wi_score((0,), VERIFIED)) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["wise", "wise_verified", "t2i_compbench"])
def test_a_perfect_and_a_blank_model_before_a_reader(data: Path, name: str) -> None:
    perfect, blank = results(data, 1.0, name), results(data, 0.0, name)
    assert (perfect["score"], blank["score"]) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.0, abs=0.01))
    assert len(perfect["categories"]) == (8 if name == "t2i_compbench" else 6)


@pytest.mark.parametrize("name", ["wise", "wise_verified", "t2i_compbench"])
def test_a_perfect_and_a_blank_model_before_an_endpoint(
    data: Path, endpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for best, score in ((True, 1.0), (False, 0.0)):

        def said(self: Any, words: str, best: bool = best) -> str:
            if "Rate the picture" in words:
                top = "1" if "<0 or 1>" in words else "2"
                form = words[words.rindex("nothing else:") + 13 :]
                return form.replace("<0, 1 or 2>", top if best else "0").replace("<0 or 1>", top if best else "0")
            if "How many" in words:
                noun = words.split()[2]
                return {"bananas": "1", "bicycles": "two", "fish": "6"}[noun] if best else "0"
            return "yes" if best else "no"

        monkeypatch.setattr(Endpoint, "said", said)
        assert results(data, 1.0, name, endpoint)["score"] == score


def test_one_chatty_answer_masks_its_prompt_alone(data: Path, endpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(self: Any, words: str) -> Any:
        if "Prompt: space 568" in words:
            return "A nice image. " + GOOD
        assert "Explanation: means" in words
        return NoAnswer("HTTP 429 (5 tries)") if "Prompt: time 401" in words else GOOD

    monkeypatch.setattr(Endpoint, "said", said)
    found = results(data, 1.0, "wise", endpoint)
    assert (found["score"], found["n"]) == (pytest.approx(0.8), 10)
    assert (found["masked"]["prompts"], found["masked"]["of"]) == (2, 12)
    assert "HTTP 429 (5 tries)" in found["masked"]["reasons"]
    monkeypatch.setattr(Endpoint, "said", lambda self, words: "Well, hard to say")
    with pytest.raises(ContractError, match="no output could be scored: the judge said 'Well, hard to say'"):
        results(data, 1.0, "wise", endpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_id": 5000}, "prompt_id 5000: stands twice, has no text or is none of 1 to 1000"),
        ({"prompt_id": 2}, "prompt_id 2: stands twice"),
        ({"Prompt": " "}, "has no text"),
        ({"prompt_id": "1"}, "prompt_id"),
        ({"Explanation": None}, "Explanation"),
    ],
)
def test_rows_of_another_form_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = tmp_path / LEGACY.files[0]
    row = {"Prompt": "a", "Explanation": "b", "prompt_id": 1}
    file.write_text(json.dumps([{**row, "prompt_id": 2}, {**row, **change}]))
    with pytest.raises(InputError, match=r"cultural_common_sense\.json") as raised:
        read_rows(file, LEGACY)
    assert says in str(raised.value)


def test_a_shortened_version_is_refused(tmp_path: Path) -> None:
    write_wise(tmp_path / "wise", replace(LEGACY, categories={n: ids[:3] for n, ids in LEGACY.categories.items()}))
    with pytest.raises(InputError, match=r"wise: holds 18 prompts, .* official version 1000 prompts: get all of it"):
        find_benchmarks(["wise"], inputs=BenchmarkInputs(tmp_path))
    (tmp_path / "wise" / LEGACY.files[2]).write_text("[]")
    with pytest.raises(InputError, match=r"natural_science\.json: has no prompts"):
        find_benchmarks(["wise"], inputs=BenchmarkInputs(tmp_path))


# --- T2I-CompBench++ ---


def asked(text: str, category: str) -> list[tuple[str, str]]:
    return [(fact.question, fact.answer) for fact in facts_of(text, category)]


@pytest.mark.parametrize(
    ("text", "category", "questions"),
    [
        (
            "a red apple and yellow bananas.",
            "color",
            [("Is there a red apple in the picture?", "yes"), ("Are there yellow bananas in the picture?", "yes")],
        ),
        (
            "A cubic Rubik's cube and a drinking glass",
            "shape",
            [
                ("Is there a cubic Rubik's cube in the picture?", "yes"),
                ("Is there a drinking glass in the picture?", "yes"),
            ],
        ),
        (
            "a white sink with a tap and a black bath",
            "color",
            [('Does the picture show exactly this: "a white sink with a tap and a black bath"?', "yes")],
        ),
        (
            "a horse on side of an apple",
            "spatial",
            [
                ("Is there a horse in the picture?", "yes"),
                ("Is there an apple in the picture?", "yes"),
                ("Is the horse on side of the apple in the picture?", "yes"),
            ],
        ),
        (
            "One sheep, two lights and six people rest",
            "numeracy",
            [
                ("How many sheep are in the picture?", "one"),
                ("How many lights are in the picture?", "two"),
                ("How many people are in the picture?", "six"),
            ],
        ),
        ("two men talk.", "non_spatial", [('Does the picture show exactly this: "two men talk"?', "yes")]),
    ],
)
def test_questions_follow_from_the_form_of_a_prompt(text: str, category: str, questions: list[tuple[str, str]]) -> None:
    assert asked(text, category) == questions


def test_answers_are_combined_by_category() -> None:
    prompt = Prompt("p", "generate", ("x",), ("image",), category="color")
    assert compbench.combine(prompt, [0.5, 0.5]) == 0.25
    assert compbench.combine(replace(prompt, category="numeracy"), [1.0, 0.0]) == 0.5


def test_categories_have_equal_weight_and_files_are_checked(
    data: Path, endpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "said", lambda self, words: "6" if "How many" in words else "yes")
    found = results(data, 1.0, "t2i_compbench", endpoint)
    assert found["categories"]["numeracy"]["score"] == 0.5  # the fish alone
    assert found["score"] == pytest.approx((7 + 0.5) / 8)
    assert set(found["categories"]) == set(CATEGORIES)
    other = data / "colors.txt"
    other.write_text("a red cup\n")
    with pytest.raises(InputError, match=r"colors\.txt: is no file of T2I-CompBench"):
        compbench.read_prompts(other)
    assert compbench.read_prompts(data / "t2i_compbench" / FILES[0])[0].category == "color"
    (data / "t2i_compbench" / FILES[3]).write_text("\n")
    with pytest.raises(InputError, match=r"spatial_val\.txt: is empty"):
        find_benchmarks(["t2i_compbench"], inputs=BenchmarkInputs(data))
