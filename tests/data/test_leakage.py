"""Leaks between splits are found, whatever they are dressed in; the splits of the built-in world have none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage

from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.data.leakage import (
    PHASH_BITS,
    ComparedPrompt,
    Index,
    Overlap,
    compared_pixels,
    differing_bits,
    leaks,
    ngrams,
    normalized,
    operands,
    perceptual_hash,
    prompts_fingerprint,
    without_wording,
)
from lvrpo.data.scenes import CorpusConfig, ScenePrompts, ScenesConfig, render, web_corpus
from lvrpo.data.scenes.leakage import CAPTION_PREFIXES, caption_key, compared_examples, compared_prompts, operands_key
from lvrpo.data.scenes.objects import Scene, SceneObject
from lvrpo.errors import InputError
from lvrpo.training.config import TrainConfig
from lvrpo.training.leakage import require_disjoint_splits, require_unseen, require_unseen_by
from lvrpo.training.rollout import prompts_of_step
from lvrpo.types import TASKS

Output = pytest.CaptureFixture[str]
Row = Mapping[str, Any]
words = st.lists(
    st.sampled_from(
        ["a", "an", "the", "red", "circle", "two", "3", "3.5", "1,000", "+", "star's", "left-of", "café", "ß"]
    ),
    min_size=1,
)


# --- texts ---


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalized(normalized(text)) == normalized(text)


@given(words, st.sampled_from(["", ".", "?", " !", "…", "  \n"]))
def test_case_spaces_articles_and_marks_at_the_end_do_not_count(said: list[str], end: str) -> None:
    plain = [*said, "x"]
    dressed = "  The  ".join(plain).upper().replace("ẞ", "SS") + end
    assert normalized(dressed) == normalized(" ".join(plain))


@given(st.integers(0, 999), st.sampled_from("+-*/<>=%"), st.integers(0, 999))
def test_numbers_and_signs_count(a: int, sign: str, b: int) -> None:
    assert normalized(f"Draw {a} {sign} {b}.") == f"draw {a} {sign} {b}"
    assert normalized(f"{a}.{b}") == f"{a}.{b}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What color is the Circle?", "what color is circle"),
        ("“A red circle”, left of a star.", "a red circle left of the star"),
        ("a left-handed cup", "A left handed cup"),
        ("ﬁne ＡＢＣ", "fine abc"),
    ],
)
def test_wordings_of_one_text(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(
    ("one", "other"), [("2 + 3", "2 - 3"), ("2 * (3 + 4)", "2 * 3 + 4"), ("1.5", "15"), ("A", "the")]
)
def test_other_texts_stay_apart(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


def test_the_longest_beginning_is_taken_off() -> None:
    beginnings = ["draw", "draw a picture of"]
    assert without_wording(normalized("Draw a picture of a cat"), beginnings) == "cat"
    assert without_wording("drawn cat", beginnings) == "drawn cat"
    assert without_wording("draw", beginnings) == "draw"


def test_ngrams_of_five_words() -> None:
    assert ngrams("1 2 3 4 5 6") == {("1", "2", "3", "4", "5"), ("2", "3", "4", "5", "6")}
    assert ngrams("1 2") == {("1", "2")}


def test_operands_whatever_their_order() -> None:
    assert operands("draw 3 + 2") == operands("Draw 2 + 3.") != operands("draw 2 + 2")
    assert operands("draw 3 apples") == ""


# --- images ---


def scene_image(color: str = "red", row: int = 0) -> torch.Tensor:
    return render(Scene("gray", (SceneObject("star", color, row, 2), SceneObject("cross", "blue", 3, 3))))


def test_equal_pixels_have_one_digest_and_others_another() -> None:
    saved = torch.from_numpy((scene_image() * 255).round().numpy()) / 255  # as a file of 8 bits gives it back
    assert compared_pixels(scene_image()) == compared_pixels(saved)
    one_pixel = scene_image()
    one_pixel[0, 0, 0] += 1 / 255
    assert compared_pixels(one_pixel).digest != compared_pixels(scene_image()).digest


def test_noise_looks_alike_and_another_color_does_not() -> None:
    def bits(image: torch.Tensor) -> int:
        look = compared_pixels(scene_image()).phash
        return int(differing_bits(look, [compared_pixels(image).phash])[0])

    noisy = scene_image() + 0.004 * torch.randn(3, 32, 32)
    assert bits(scene_image()) == 0
    assert bits(noisy) <= PHASH_BITS
    assert bits(scene_image("green")) > PHASH_BITS
    assert bits(scene_image(row=1)) > PHASH_BITS


def test_different_images_of_the_world_are_told_apart() -> None:
    prompts = ScenePrompts(ScenesConfig(), "train").prompts("understand", 1200)
    images = {compared_pixels(p.parts[0], phash=False).digest: p.parts[0] for p in prompts}  # type: ignore[arg-type]
    looks = [perceptual_hash((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images.values()]  # type: ignore[union-attr]
    alike = sum(int((differing_bits(look, looks[:i]) <= PHASH_BITS).sum()) for i, look in enumerate(looks) if i)
    assert len(looks) > 290
    assert alike / (len(looks) * (len(looks) - 1) / 2) < 5e-4


# --- the world ---


def test_a_caption_says_the_same_in_all_wordings_and_orders() -> None:
    assert caption_key("draw a star left of a red circle") == caption_key("a red circle right of a star")
    assert caption_key("there is the digit 7 at the top left") == caption_key("the digit 7 at the top left")
    assert caption_key("a star and a circle on a black ground") == caption_key(
        "a picture with a circle and a star on a black ground"
    )
    assert caption_key("a star left of a circle") != caption_key("a circle left of a star")
    assert caption_key("a red star and a blue circle") != caption_key("a blue star and a red circle")


def test_operands_are_those_of_the_question() -> None:
    assert operands_key("draw 3 + 0 + 2", None) == "sum 0 2 3"
    assert operands_key("draw the smaller of 5 and 3", None) == operands_key("draw the larger of 3 and 5", None)


def sample(task_counts: Sequence[int], split: Any) -> list[ComparedPrompt]:
    source = ScenePrompts(ScenesConfig(), split)
    prompts = [p for task, n in zip(TASKS, task_counts, strict=True) for p in source.prompts(task, n)]
    return compared_prompts(prompts, phash=False)


def test_the_splits_of_the_world_are_apart() -> None:
    config = load_config(TrainConfig, None, [])
    source = ScenePrompts(config.data.scenes, "train", 0)
    train = [a for step in range(20) for a in compared_prompts(prompts_of_step(source, config, step), phash=False)]
    corpus = web_corpus(CorpusConfig(scenes=1000, edits=300, reasons=900))
    train += list(compared_examples(corpus.examples()))
    splits = {"train": train, "validation": sample((200, 140, 50, 120), "validation")}
    test = sample((400, 280, 80, 180), "test")
    for others in splits.values():
        found = Index(others, CAPTION_PREFIXES).overlaps(test)
        assert not leaks(found)
        assert not sum(each.image for each in found)
        assert {each.task: each.normalized for each in found}["generate"] == 0
    assert not leaks(Index(train, CAPTION_PREFIXES).overlaps(splits["validation"]))
    assert all(each.content for each in (*train, *test) if each.task in ("generate", "reason"))


def test_a_leak_of_the_world_is_seen() -> None:
    train = sample((40, 40, 10, 24), "train")
    found = Index(train, CAPTION_PREFIXES).overlaps(train)
    assert {each.task: len(each.shared) for each in found} == {
        "understand": 40,
        "generate": 40,
        "edit": 10,
        "reason": 24,
    }
    drawing = next(each for each in train if each.task == "generate")
    spoken = ComparedPrompt("t", "generate", f"Draw the image of {drawing.text}!", (), "")
    index = Index([drawing], [*CAPTION_PREFIXES, "draw the image of"])
    assert index.same(spoken) == drawing.where


def test_a_caption_of_the_corpus_is_a_drawing_seen() -> None:
    corpus = web_corpus(CorpusConfig(scenes=5, edits=0, reasons=0))
    (first, *_) = corpus.caption
    index = Index(compared_examples(corpus.caption), CAPTION_PREFIXES)
    assert index.same(ComparedPrompt("t", "generate", f"draw {first.outputs[0]}")) == first.prompt.id


# --- files ---


def save(name: str, rows: Sequence[Row]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def photo(name: str, seed: int = 0, quality: int | None = None) -> str:
    """A smooth image, the same for a seed."""
    rough = np.random.default_rng(seed).uniform(0, 255, (6, 6, 3)).astype(np.uint8)
    image = PilImage.fromarray(rough).resize((96, 96), PilImage.Resampling.BICUBIC)
    image.save(name, **({} if quality is None else {"quality": quality}))
    return name


TRAIN: list[Row] = [
    {"task": "generate", "prompt": "a red cat", "id": "cat"},
    {"task": "understand", "prompt": "what is it?", "images": ["one.png"], "answer": "a cat"},
    {"task": "reason", "prompt": "what is 12 + 30?", "answer": "42"},
    {"task": "generate", "prompt": "one two three four five six"},
]


@pytest.fixture
def train() -> str:
    photo("one.png")
    return save("train.jsonl", TRAIN)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "generate", "prompt": "A red cat!"}, "test.jsonl:2 asks what train.jsonl:1 asks, word for word"),
        (
            {"task": "understand", "prompt": "What is it", "images": ["copy.png"], "answer": "a dog"},
            "test.jsonl:2 asks what train.jsonl:2 asks, word for word",
        ),
        (
            {"task": "understand", "prompt": "what is it?", "images": ["again.jpg"], "answer": "a cat"},
            "test.jsonl:2 asks what train.jsonl:2 asks of images that look alike",
        ),
        (
            {"task": "reason", "prompt": "What is 30 + 12?", "answer": "42"},
            "test.jsonl:2 asks what train.jsonl:3 asks in other words",
        ),
    ],
)
def test_a_leak_of_each_kind_is_named(train: str, row: Row, said: str, capsys: Output) -> None:
    PilImage.open("one.png").save("copy.png", compress_level=1)  # other bytes, same pixels
    photo("again.jpg", quality=90)
    test = save("test.jsonl", [{"task": "generate", "prompt": "a blue dog"}, row])
    assert main(["audit", "--data", train, test]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_leak(train: str, capsys: Output) -> None:
    photo("two.png", seed=1)
    rows: list[Row] = [
        {"task": "understand", "prompt": "what is it?", "images": ["two.png"], "answer": "a dog"},
        {"task": "understand", "prompt": "how large is it?", "images": ["one.png"], "answer": "large"},
        {"task": "generate", "prompt": "zero one two three four five"},
        {"task": "reason", "prompt": "what is 12 - 30?", "answer": "-18"},
    ]
    validation = save("validation.jsonl", [{"task": "generate", "prompt": "a green bird"}])
    assert main(["audit", "--data", train, validation, save("test.jsonl", rows), "--json", "found.json"]) == 0
    assert "apart" in capsys.readouterr().out
    found = {o["task"]: o for o in json.loads(Path("found.json").read_text())["overlaps"]["test in train"]}
    assert (found["understand"]["verbatim"], found["understand"]["image"]) == (1, 1)
    assert (found["generate"]["some_ngrams"], found["generate"]["all_ngrams"]) == (1, 0)


def test_a_wording_can_be_left_out(train: str, capsys: Output) -> None:
    test = save("test.jsonl", [{"task": "generate", "prompt": "Please paint a red cat"}])
    assert main(["audit", "--data", train, test]) == 0
    assert main(["audit", "--data", train, test, "--wording", "please paint"]) == 2
    assert "test.jsonl:1 asks what train.jsonl:1 asks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--data", "train.jsonl"], "give two or three .jsonl files, or a CONFIG"),
        (["--data", "train.jsonl", "train.jsonl", "--steps", "3"], "--steps 3: every row of a file counts"),
        (["--data", "quickstart", "pretrain"], "give one CONFIG"),
        (["--steps", "3"], "--steps: belongs to --data"),
        (["run", "--data"], "--data and run: give one of the two"),
        (["--data", "data={source: jsonl, jsonl: {train: train.jsonl}}"], "data.jsonl has train alone"),
    ],
)
def test_wrong_options(train: str, given: list[str], said: str, capsys: Output) -> None:
    assert main(["audit", *given]) == 2
    assert said in capsys.readouterr().err


# --- runs ---


def own(**files: str) -> TrainConfig:
    named = ", ".join(f"{split}: {path}" for split, path in files.items())
    return load_config(
        TrainConfig, None, [f"data={{source: jsonl, jsonl: {{{named}}}, prompts_per_step: {{generate: 1}}}}"]
    )


def test_a_run_refuses_a_test_row_that_it_trains_on(train: str, capsys: Output) -> None:
    test = save("test.jsonl", [{"task": "generate", "prompt": "the Red cat."}])
    with pytest.raises(
        InputError, match=r"^test.jsonl:1: the same text and images as train.jsonl:1 of data.jsonl.train"
    ):
        require_disjoint_splits(own(train=train, test=test))
    with pytest.raises(InputError, match=r"^test.jsonl:1: .* as held.jsonl:1 of data.jsonl.validation"):
        require_disjoint_splits(
            own(train=save("other.jsonl", TRAIN[3:]), validation=save("held.jsonl", TRAIN[:1]), test=test)
        )
    sums, same = save("sums.jsonl", TRAIN[2:3]), save("same.jsonl", [{**TRAIN[2], "prompt": "What is 12 + 30"}])
    held = save("sums_held.jsonl", [{**TRAIN[2], "prompt": "what is 40 + 2?"}])
    files = f"{{train: {sums}, validation: {held}, test: {same}}}"
    data = f"data={{source: jsonl, jsonl: {files}, prompts_per_step: {{reason: 2}}}}"
    for command in ("train", "check"):
        assert main([command, "quickstart", data]) == 2
        assert "same.jsonl:1: the same text and images as sums.jsonl:1" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_manifest_says_what_was_compared(train: str) -> None:
    test = save("test.jsonl", [{"task": "generate", "prompt": "a blue dog"}])
    found = require_disjoint_splits(own(train=train, test=test))
    assert found["rows"] == {"train": 4, "test": 1}
    assert found["shared"] == 0
    assert found["test_sha256"] == prompts_fingerprint([ComparedPrompt("x", "generate", "The blue dog!")])
    assert require_disjoint_splits(own(train=train)) == {"compared": False}
    world = require_disjoint_splits(load_config(TrainConfig, None, []))
    assert (world["shared"], world["prompts"]) == (0, {"train": 256, "validation": 240, "test": 240})
    other = require_disjoint_splits(load_config(TrainConfig, None, ["seed=1"]))
    assert other["test_sha256"] == world["test_sha256"]


def test_a_benchmark_of_rows_that_a_run_was_tuned_on_is_refused(train: str) -> None:
    held = save("held.jsonl", [{"task": "generate", "prompt": "a bird"}])
    config = own(train=train, validation=held)
    fresh = save("fresh.jsonl", [{"task": "generate", "prompt": "a fish"}])
    require_unseen(["scenes", fresh], config)
    with pytest.raises(InputError, match=r"^train.jsonl:1: .* the run trains on it"):
        require_unseen([train], config)
    with pytest.raises(InputError, match=r"^held.jsonl:1: .* the run chooses its weights by it"):
        require_unseen([held], config)
    require_unseen_by("tiny", [held])
    Path("run").mkdir()
    Path("run/config.yaml").write_text(
        f"data: {{source: jsonl, jsonl: {{train: {train}, validation: {held}}}, prompts_per_step: {{generate: 1}}}}\n"
    )
    with pytest.raises(InputError, match=r"run chooses its weights by it: name a file of rows that it has not seen"):
        require_unseen_by("run", [held])
    require_unseen_by("run", [fresh])


def test_overlaps_start_at_nothing() -> None:
    assert Index([]).overlaps([ComparedPrompt("t", "generate", "a cat")]) == [Overlap("generate", 1)]
