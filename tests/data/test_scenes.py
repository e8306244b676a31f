"""The world: objects, splits, language, prompts."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lvrpo.commands.data import world_sheet
from lvrpo.data.base import DATASETS, Task
from lvrpo.data.scenes import (
    CATEGORIES,
    COLOR,
    COLORS,
    DESCRIBE,
    GROUND,
    HELD_OUT,
    SHAPES,
    SPLITS,
    VOCABULARY,
    CorpusConfig,
    Scene,
    SceneObject,
    ScenePrompts,
    ScenesConfig,
    Split,
    normalize,
    read,
    render,
    verify,
    web_corpus,
)
from lvrpo.data.scenes.grammar import (
    NUMBER_WORDS,
    PARAPHRASED_WORDINGS,
    PLACES,
    WORDINGS,
    Caption,
    Mention,
    clear_relation,
    place,
)
from lvrpo.data.scenes.layout import SEEN_PAIRS, Layout
from lvrpo.data.scenes.objects import GROUNDS, digit_indices, digit_samples, shape_masks
from lvrpo.images import png
from lvrpo.registry import resolve
from lvrpo.types import TASKS, Prompt, TaskKind

WORDS = frozenset(VOCABULARY)


def texts(prompt: Prompt) -> list[str]:
    said = [p for p in prompt.parts if isinstance(p, str)] + ([prompt.answer] if prompt.answer else [])
    return said + [t for f in prompt.facts for t in (f.question, f.answer)]


def test_the_table_of_objects() -> None:
    assert len(COLORS) == 8
    assert len(SHAPES) == 6
    assert len(HELD_OUT) == 6
    assert {s for _, s in HELD_OUT} == set(SHAPES)
    assert all(c in COLOR for c, _ in HELD_OUT)
    rgb = np.array(list(COLOR.values()))
    grounds = np.array(list(GROUND.values()))
    assert np.sort(np.linalg.norm(rgb[:, None] - rgb, axis=2), axis=1)[:, 1].min() > 0.4
    assert np.linalg.norm(rgb[:, None] - grounds, axis=2).min() > 0.4
    masks = np.stack([m.ravel() / np.linalg.norm(m) for m in shape_masks().values()])
    assert np.triu(masks @ masks.T, 1).max() < 0.9


def test_digits_are_the_scans_in_a_color() -> None:
    alphas, labels = digit_samples()
    assert alphas.shape == (1797, 8, 8)
    index = digit_indices("train")[7][3]
    assert labels[index] == 7
    image = render(Scene("black", (SceneObject("7", "yellow", 1, 2, index),)))
    ground, color = (torch.tensor(t)[:, None, None] for t in (GROUND["black"], COLOR["yellow"]))
    expected = ground + torch.from_numpy(alphas[index]) * (color - ground)
    assert torch.allclose(image[:, 8:16, 16:24], expected)
    assert torch.equal(image[:, :8, :8], ground.expand(3, 8, 8))


def test_handwriting_of_the_splits_is_disjoint_and_complete() -> None:
    rows = [[i for row in digit_indices(s) for i in row] for s in SPLITS]
    assert sum(map(len, rows)) == len(set().union(*rows)) == 1797
    assert all(len(row) >= 8 for s in SPLITS for row in digit_indices(s))


def test_render_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        render(Scene("white", ()), 30)
    with pytest.raises(ValueError, match="outside"):
        render(Scene("white", (SceneObject("star", "red", 4, 0),)))


def test_split_ignores_the_order_of_objects() -> None:
    a, b = SceneObject("star", "pink", 0, 1), SceneObject("circle", "blue", 2, 2)
    assert Scene("gray", (a, b)).split() == Scene("gray", (b, a)).split()


def _scenes(split: Split, seed: int, n: int) -> set[str]:
    """Keys of the images shown, and in training of those drawn."""
    source, keys = ScenePrompts(ScenesConfig(), split, seed), set()
    for task in source.tasks:
        for index in range(n):
            example = source.example(task, index)
            drawn = () if task == "generate" and split != "train" else example.outputs
            for part in (*example.prompt.parts, *drawn):
                if isinstance(part, torch.Tensor):
                    keys.add(part.numpy().tobytes())
    return keys


def test_splits_share_no_image() -> None:
    train, validation, test = (_scenes(s, 0, 700) for s in SPLITS)
    corpus = web_corpus(CorpusConfig(scenes=2000, edits=400, reasons=400))
    web = {
        p.numpy().tobytes()
        for e in corpus.examples()
        for p in (*e.prompt.parts, *e.outputs)
        if isinstance(p, torch.Tensor)
    }
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert not web & (validation | test)
    assert len(web) > 2000


def test_splits_share_no_content() -> None:
    for task, n in {"generate": 2000, "understand": 1200, "edit": 400, "reason": 1000}.items():
        sources = [ScenePrompts(ScenesConfig(), split) for split in SPLITS]
        train, validation, test = ({p.content for p in source.prompts(cast(TaskKind, task), n)} for source in sources)
        assert not train & (validation | test)
        assert not validation & test
        assert min(map(len, (train, validation, test))) > 15


def _bare(text: str) -> str:
    return text.removeprefix("draw ").removeprefix("a picture of ")


def test_nothing_trained_on_says_what_a_test_prompt_says() -> None:
    """By the texts themselves: of captions in either order, of addends in any."""

    def said(text: str) -> str:
        text = _bare(text)
        if "+" in text:
            return " ".join(sorted(re.findall(r"\d", text)))
        body, ground = re.fullmatch(r"(.*?)((?: on a \w+ ground)?)", text).groups()  # type: ignore[union-attr]
        for one, other in (("right of", "left of"), ("below", "above")):
            if f" {one} " in body:
                body = f" {other} ".join(reversed(body.split(f" {one} ")))
        return " and ".join(sorted(body.split(" and "))) + ground

    corpus = web_corpus(CorpusConfig(scenes=4000, edits=0, reasons=2000))
    trained = {said(str(corpus.generate[i].prompt.parts[0])) for i in range(len(corpus.generate))}
    trained |= {said(str(row.prompt.parts[0])) for row in corpus.reason if row.prompt.category == "draw_answer"}
    source = ScenePrompts(ScenesConfig(), "train")
    trained |= {said(str(p.parts[0])) for p in source.prompts("generate", 2000)}
    trained |= {said(str(p.parts[0])) for p in source.prompts("reason", 600) if p.category == "draw_answer"}
    test = ScenePrompts(ScenesConfig(), "test")
    tested = [*test.prompts("generate", 700), *test.prompts("reason", 300)]
    assert not trained & {said(str(p.parts[0])) for p in tested if isinstance(p.parts[0], str)}


@pytest.mark.parametrize("split", SPLITS)
def test_two_way_forms_are_balanced(split: Split) -> None:
    source = ScenePrompts(ScenesConfig(), split)
    counts: Counter[tuple[str, str]] = Counter()
    for p in [*source.prompts("understand", 2400), *source.prompts("reason", 1000)]:
        if p.answer in ("yes", "no"):
            text = str(p.parts[-1])
            form = next(f for f in ("edge", "more", "of the", "above", "below", "there") if f in text or f == "there")
            counts["relation" if form in ("of the", "above", "below") else form, p.answer] += 1
    for form in ("edge", "more", "relation", "there"):
        assert abs(counts[form, "yes"] - counts[form, "no"]) <= 1
        assert counts[form, "yes"] >= 50


def test_paraphrases_say_the_same_in_other_words() -> None:
    usual, other = (
        ScenePrompts(ScenesConfig(wording=wording), "test")  # type: ignore[arg-type]
        for wording in ("trained", "paraphrased")
    )
    for task in ("generate", "understand"):
        for a, b in zip(usual.prompts(task, 420), other.prompts(task, 420), strict=True):  # type: ignore[arg-type]
            assert (a.content, a.facts, a.answer) == (b.content, b.facts, b.answer)
            assert a.parts[-1] != b.parts[-1]
            assert set(str(b.parts[-1]).split()) <= WORDS


def _pairs(image: torch.Tensor) -> set[tuple[str, str]]:
    return {(o.color, o.shape) for o in read(image[None])[0].objects}


@pytest.mark.parametrize(
    ("split", "held_out"), [("train", "mixed"), ("test", "mixed"), ("test", "never"), ("test", "only")]
)
def test_held_out_combinations(split: Split, held_out: str) -> None:
    source = ScenePrompts(ScenesConfig.model_validate({"held_out": held_out}), split)
    shows: list[bool] = []
    spoken = re.compile("|".join(f"{c} {s}" for c, s in sorted(HELD_OUT)))
    for task in source.tasks:
        for index in range(0, 480, 4):
            example = source.example(task, index + index // 4 % 4)
            images = [p for p in (*example.prompt.parts, *example.outputs) if isinstance(p, torch.Tensor)]
            shows.append(any(_pairs(image) & HELD_OUT for image in images))
            if split == "train" or held_out == "never":
                assert not any(spoken.search(text) for text in texts(example.prompt))
    share = sum(shows) / len(shows)
    low, high = {"train": (0, 0), "never": (0, 0), "only": (1, 1), "mixed": (0.06, 0.2)}[
        "train" if split == "train" else held_out
    ]
    print(f"{split} {held_out}: {share:.3f} of the prompts show a held-out combination")
    assert low <= share <= high
    assert ("reason" in source.tasks) == (held_out != "only")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_prompts(task: TaskKind, split: Split) -> None:
    source = ScenePrompts(ScenesConfig(), split)
    prompts = source.prompts(task, 420)
    assert len({p.id for p in prompts}) == 420
    counts = Counter(p.category for p in prompts)
    assert set(counts) == set(CATEGORIES[task])
    assert len(set(counts.values())) == 1
    for p in prompts:
        assert p.task == task
        assert p.source == f"scenes/{split}"
        for text in texts(p):
            assert set(text.split()) <= WORDS, text
            assert normalize(text) == text
        drawn = "image" in p.output
        assert bool(p.facts) == drawn
        assert (p.answer is None) == (p.output == ("image",))
        if drawn:
            assert p.facts[-1].kind == "total"
            json.dumps([dict(f.check) for f in p.facts])
    assert prompts[0].id == f"scenes/{split}/{task}/{CATEGORIES[task][0]}/000000"


@pytest.mark.parametrize("task", TASKS)
def test_random_access_is_pure(task: TaskKind) -> None:
    first, second = (ScenePrompts(ScenesConfig(), "test", seed=5) for _ in range(2))
    in_order = [first.example(task, i) for i in range(60)]
    for i in reversed(range(60)):
        again = second.example(task, i)
        assert again.prompt.id == in_order[i].prompt.id
        assert again.prompt.facts == in_order[i].prompt.facts
        for a, b in zip(
            (*again.prompt.parts, *again.outputs), (*in_order[i].prompt.parts, *in_order[i].outputs), strict=True
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    other = ScenePrompts(ScenesConfig(), "test", seed=6)
    assert other.prompt(task, 0).id != in_order[0].prompt.id
    assert any(texts(other.prompt(task, i)) != texts(in_order[i].prompt) for i in range(20))


def test_questions_share_their_image() -> None:
    prompts = ScenePrompts(ScenesConfig(questions_per_picture=3), "train").prompts("understand", 9)
    assert [p.parts[0] is prompts[0].parts[0] for p in prompts] == [True] * 3 + [False] * 6
    assert prompts[3].parts[0] is prompts[5].parts[0]


def test_weights_and_their_errors() -> None:
    weights = {
        "generate/counting": 3,
        "generate/digits": 0,
        "reason/sum": 0,
        "reason/compare": 0,
        "reason/draw_answer": 0,
    }
    source = ScenePrompts(ScenesConfig(weights=weights))
    assert source.tasks == ("understand", "generate", "edit")
    assert Counter(source.category_cycles["generate"])["counting"] == 3
    assert "digits" not in source.category_cycles["generate"]
    with pytest.raises(ValidationError, match="no category"):
        ScenesConfig(weights={"counting": 1})
    with pytest.raises(ValidationError, match="multiple of 8"):
        ScenesConfig(size=36)


def test_other_sizes() -> None:
    source = ScenePrompts(ScenesConfig(size=40), "test")
    for task in source.tasks:
        for index in range(60):
            example = source.example(task, index)
            for part, kind in zip(example.outputs, example.prompt.output, strict=True):
                if kind == "image":
                    assert isinstance(part, torch.Tensor)
                    assert part.shape == (3, 40, 40)
                    assert verify(example.prompt.facts, read(part[None])[0])


def test_answers_are_balanced() -> None:
    source = ScenePrompts(ScenesConfig(), "train", seed=9)
    answers: dict[str, Counter[str | None]] = {}
    for p in source.prompts("understand", 6000):
        answers.setdefault(p.category, Counter())[p.answer] += 1
    assert answers["exists"]["yes"] == answers["exists"]["no"]
    for category, most in {"color": 0.2, "count": 0.35, "shape": 0.25, "digit": 0.2, "position": 0.35}.items():
        assert max(answers[category].values()) < most * answers[category].total()
    assert set(answers["count"]) == set(NUMBER_WORDS[1:])


def _answer(question: str, image: torch.Tensor) -> str:
    """Answers from the image by its own parser: an independent check of the questions."""
    objects = read(image[None])[0].objects
    singular = {"crosses": "cross"} | {f"{s}s": s for s in (*SHAPES, "object")}
    w = [singular.get(x, x) for x in question.removesuffix(" ?").split() if x not in ("a", "an")]

    def named(words: list[str]) -> list:
        color = next((x for x in words if x in COLORS), None)
        shape = next((x for x in words if x not in COLORS), "object")
        digit = shape == "digit"
        return [
            o
            for o in objects
            if color in (None, o.color) and (shape in ("object", o.shape) or (digit and o.shape.isdigit()))
        ]

    if question == "what color is the ground ?":
        return read(image[None])[0].ground or ""
    if question.startswith("what color"):
        return next(iter({o.color for o in named(w[4:])}))
    if question.startswith("what shape"):
        return next(iter({o.shape for o in named(w[4:])}))
    if question.startswith("how many"):
        return NUMBER_WORDS[len(named(w[2:-2]))]
    if question.startswith("is there"):
        return "yes" if named(w[2:]) else "no"
    if question == "what digit is there ?":
        return next(o.shape for o in objects if o.shape.isdigit())
    if question == "what is the sum ?":
        return str(sum(int(o.shape) for o in objects))
    if question == "which digit is larger ?":
        return max(o.shape for o in objects)
    if question == "which digit is smaller ?":
        return min(o.shape for o in objects)
    if question.startswith("are there more"):
        return "yes" if len(named([w[3]])) > len(named([w[5]])) else "no"
    if " edge" in question:
        (o,) = named([w[2]])
        return (
            "yes" if {"left": o.col == 0, "right": o.col == 3, "top": o.row == 0, "bottom": o.row == 3}[w[5]] else "no"
        )
    (a,) = named([w[3 if w[0] == "where" else 2]])
    if "relative" in w:
        (b,) = named([w[-1]])
        return clear_relation((a.row, a.col), (b.row, b.col)) or ""
    if w[0] == "where":
        return place(a.row, a.col, 4) or ""
    (b,) = named([w[-1]])
    side = {"left": a.col < b.col, "right": a.col > b.col, "above": a.row < b.row, "below": a.row > b.row}
    return "yes" if side[w[3]] else "no"


@pytest.mark.parametrize("task", ["understand", "reason"])
def test_answers_agree_with_an_independent_parser(task: TaskKind) -> None:
    source = ScenePrompts(ScenesConfig(), "validation", seed=2)
    for p in source.prompts(task, 900):
        if p.output == ("text",):
            image, question = p.parts
            assert isinstance(image, torch.Tensor)
            assert isinstance(question, str)
            assert _answer(question, image) == p.answer, question


def test_sums_and_drawn_answers() -> None:
    for p in ScenePrompts(ScenesConfig(), "train").prompts("reason", 600):
        text = p.parts[-1]
        assert isinstance(text, str)
        if p.category == "draw_answer":
            values = [int(value) for value in re.findall(r"\d", text)]
            assert p.output == ("text", "image")
            assert p.answer == str((sum if "+" in text else max if "larger" in text else min)(values))
            assert p.facts[0].answer == p.answer


def test_web_corpus() -> None:
    config = CorpusConfig(scenes=3000, edits=1000, reasons=900)
    start = time.perf_counter()
    corpus = web_corpus(config)
    print(f"{len(corpus)} rows in {time.perf_counter() - start:.1f} s: {corpus.rates}")
    assert [len(x) for x in (corpus.generate, corpus.caption, corpus.question)] == [3000, 3000, 12000]
    expected = {
        n: getattr(config, n)
        for n in ("drop_color", "drop_object", "wrong_slot", "relation", "attribution", "place", "ground")
    }
    expected |= {
        n: getattr(config, n) for n in ("wrong_yes", "wrong_count", "wrong_answer", "wrong_edit", "wrong_reason")
    }
    expected["wrong_question"] = 0.115
    for name, rate in expected.items():
        assert corpus.rates[name] == pytest.approx(rate, abs=0.045), name
    assert len({e.prompt.id for e in corpus.examples()}) == len(corpus)
    spoken = re.compile("|".join(f"{c} {s}\\b" for c, s in sorted(HELD_OUT)))
    for e in corpus.examples():
        said = [p for p in (*e.prompt.parts, *e.outputs) if isinstance(p, str)]
        for text in said:
            assert set(text.split()) <= WORDS
            assert not spoken.search(text)
        assert len(e.outputs) == len(e.prompt.output)
    assert corpus.generate[5].outputs[0] is corpus.caption[5].prompt.parts[0] is corpus.question[20].prompt.parts[0]
    assert corpus.caption[5].prompt.parts[1] == DESCRIBE
    assert not any(scene.held_out() for scene in corpus.scenes)
    assert {scene.split() for scene in corpus.scenes} == {"train"}
    wrong = [_answer(str(e.prompt.parts[1]), _image(e.prompt.parts[0])) != e.outputs[0] for e in corpus.question[:2000]]
    print(f"wrong answers by the independent parser: {sum(wrong) / len(wrong):.3f}")
    assert sum(wrong) / len(wrong) == pytest.approx(0.115, abs=0.025)


def _image(part: object) -> torch.Tensor:
    assert isinstance(part, torch.Tensor)
    return part


def test_web_corpus_is_deterministic() -> None:
    a, b = (web_corpus(CorpusConfig(scenes=50, edits=20, reasons=20, seed=3)) for _ in range(2))
    for x, y in zip(a.examples(), b.examples(), strict=True):
        for p, q in zip((*x.prompt.parts, *x.outputs), (*y.prompt.parts, *y.outputs), strict=True):
            assert torch.equal(p, q) if isinstance(p, torch.Tensor) and isinstance(q, torch.Tensor) else p == q


def test_web_corpus_refuses_unknown_shares() -> None:
    with pytest.raises(ValidationError, match="use names among"):
        CorpusConfig(question_shares={"smell": 1.0})


def test_language() -> None:
    assert tuple(sorted(VOCABULARY)) == VOCABULARY
    assert normalize("What color is the Circle?") == "what color is the circle ?"
    assert normalize("Draw 3+4.") == "draw 3 + 4"
    assert normalize("two red circles, left of a star") == "two red circles left of a star"
    assert Mention("circle", "orange").phrase == "an orange circle"
    assert Mention("8", "red").phrase == "a red 8"
    assert Mention("cross", None, 3).phrase == "three crosses"
    assert Caption((Mention("7"),)).text() == "the digit 7"
    related = Caption((Mention("star", "red"), Mention("circle")), "left", ground="black")
    assert related.text(WORDINGS[2]) == "a picture of a red star left of a circle on a black ground"
    placed = Caption((Mention("cross", None, 2),), place="top left")
    assert [placed.text(w) for w in PARAPHRASED_WORDINGS[1:]] == [
        "there are two crosses at the top left",
        "a picture with two crosses at the top left",
    ]
    assert [clear_relation(*c) for c in (((0, 0), (1, 3)), ((3, 0), (0, 1)), ((1, 1), (2, 2)))] == [
        "left",
        "below",
        None,
    ]


def test_every_word_is_used() -> None:
    used: set[str] = set()
    corpus = web_corpus(CorpusConfig(scenes=500, edits=100, reasons=100))
    for e in corpus.examples():
        used |= {w for p in (*e.prompt.parts, *e.outputs) if isinstance(p, str) for w in p.split()}
    assert used == WORDS


@given(st.text(max_size=60))
def test_normalize_is_idempotent(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize("split", SPLITS)
def test_speed(split: Split) -> None:
    source = ScenePrompts(ScenesConfig(), split)
    for task in source.tasks:
        source.prompt(task, 0)
        start = time.process_time()
        source.prompts(task, 400, start=8)
        rate = 400 / (time.process_time() - start)
        print(f"{split} {task}: {rate:.0f} prompts/s")
        assert rate > 200


def test_preview() -> None:
    sheet = world_sheet("test", 0)
    assert sheet.width > 8 * 3 * ScenesConfig().size
    assert len(png(sheet)) > 10_000


def test_table_of_sources() -> None:
    source = resolve("dataset", "scenes", DATASETS)(ScenesConfig(), "train", 0)
    assert isinstance(source, Task)
    assert source.tasks == TASKS
    assert resolve("dataset", "jsonl", DATASETS).__name__ == "JsonlPrompts"


def test_a_caption_without_a_scene_of_its_split_is_passed_over() -> None:
    """One object of a color in a quadrant of a ground has four scenes, and now and then none is of the train split."""
    by_quadrant = [[cell for cell in itertools.product(range(4), repeat=2) if place(*cell, 4) == q] for q in PLACES]
    without = [
        caption
        for ground, (color, shape), (q, cells) in itertools.product(
            GROUNDS, SEEN_PAIRS, zip(PLACES, by_quadrant, strict=True)
        )
        if (caption := Caption((Mention(shape, color),), place=q, ground=ground)).split == "train"
        and all(Scene(ground, (SceneObject(shape, color, *cell),)).split() != "train" for cell in cells)
    ]
    assert without
    another = next(c for color, shape in SEEN_PAIRS if (c := Caption((Mention(shape, color),))).split == "train")
    offered = iter([without[0], another])
    found = Layout(random.Random(0), "train").described(lambda: next(offered))
    assert found.caption == another
    assert found.scene.split() == "train"
