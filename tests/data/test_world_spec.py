"""docs/concepts/world.md is complete and true: a renderer and a checker made from it agree with the library."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from world_checker import (
    COLORS,
    GROUNDS,
    HELD_OUT,
    PAGE,
    SHAPES,
    Thing,
    answer,
    caption,
    digits,
    draw,
    masks,
    obeys,
    reasoning_key,
    scene_key,
    scene_split,
    see,
    split,
    split_of_text,
    table,
    yes,
)

from lvrpo.data.scenes import (
    CATEGORIES,
    COLOR,
    GROUND,
    VOCABULARY,
    CorpusConfig,
    Scene,
    SceneObject,
    ScenePrompts,
    ScenesConfig,
    Split,
    render,
    verifier,
)
from lvrpo.data.scenes import HELD_OUT as OUR_HELD_OUT
from lvrpo.data.scenes.facts import paraphrased
from lvrpo.data.scenes.objects import digit_indices, shape_masks, text_split
from lvrpo.evaluation import BENCHMARKS
from lvrpo.registry import resolve
from lvrpo.types import Example, TaskKind

OUR_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def examples(task: TaskKind, n: int) -> Iterator[tuple[Split, Example]]:
    for which in OUR_SPLITS:
        source = ScenePrompts(ScenesConfig(), which)
        yield from ((which, source.example(task, i)) for i in range(n))


def seen(example: Example) -> list[tuple[str, list[Thing]]]:
    """Every image, of the prompt and of the outputs."""
    parts = [*example.prompt.parts, *example.outputs]
    return [see(part.numpy().astype(np.float64)) for part in parts if not isinstance(part, str)]


def test_the_tables_are_ours() -> None:
    assert {name: tuple(value) for name, value in COLORS.items()} == dict(COLOR)
    assert {name: tuple(value) for name, value in GROUNDS.items()} == dict(GROUND)
    assert set(OUR_HELD_OUT) == HELD_OUT
    assert f"vocabulary of {len(VOCABULARY)} " in PAGE
    for heads, task in ((("category", "caption"), "generate"), (("category", "instruction", "what must hold"), "edit")):
        assert tuple(row[0] for row in table(*heads)) == CATEGORIES[task]  # type: ignore[index]  # a task by name
    questions = table("category", "question", "answer")
    assert tuple(dict.fromkeys(row[0] for row in questions)) == CATEGORIES["understand"]
    assert tuple(dict.fromkeys(row[0] for row in table("category", "prompt", "answer"))) == CATEGORIES["reason"]


def test_the_shapes_are_ours() -> None:
    assert set(masks()) == set(shape_masks())
    for name, alpha in masks().items():
        assert np.abs(alpha - shape_masks()[name]).max() < 1e-6, name


def test_any_scene_is_drawn_as_the_page_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        cells = rng.choice(25, size=5, replace=False)
        things = []
        for cell in cells:
            sample = int(rng.integers(1797)) if rng.random() < 0.4 else -1
            shape = str(digits()[1][sample]) if sample >= 0 else str(rng.choice(SHAPES))
            things.append(Thing(shape, str(rng.choice(list(COLORS))), int(cell) // 5, int(cell) % 5, sample))
        ground = str(rng.choice(list(GROUNDS)))
        ours = Scene(ground, tuple(SceneObject(o.shape, o.color, o.row, o.col, o.sample) for o in things))
        assert np.abs(render(ours, 40).numpy() - draw(ground, things, cells=5)).max() < 1e-6
        assert ours.content == scene_key(ground, things)
        assert ours.split() == scene_split(ground, things)


def test_drawings_mean_what_the_page_says_and_are_of_its_split() -> None:
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    for which, example in examples("generate", 112):
        (text,) = example.prompt.parts
        said = caption(str(text))
        ((ground, things),) = seen(example)
        assert said.means(ground, things), text
        assert said.key() == example.prompt.content
        assert said.held_out() == example.prompt.held_out
        assert split_of_text(said.key(), said.held_out()) == which
        variants = [(ground, things), *almost(ground, things, rng)]
        images = [torch.from_numpy(draw(*variant)).float() for variant in variants]
        for variant, reading in zip(variants, verifier.read(images), strict=True):
            right = said.means(*variant)
            assert verifier.verify(example.prompt.facts, reading) == right, (text, variant)
            verdicts[right] += 1
    assert min(verdicts.values()) > 400


def almost(ground: str, things: list[Thing], rng: random.Random) -> Iterator[tuple[str, list[Thing]]]:
    """Images that differ in one thing, right or wrong: a color, a cell, the ground, one object less or more."""
    free = [divmod(c, 4) for c in range(16) if all((o.row, o.col) != divmod(c, 4) for o in things)]
    (row, col), (far_row, far_col) = rng.sample(free, 2)
    k = rng.randrange(len(things))
    one, rest = things[k], [o for i, o in enumerate(things) if i != k]
    yield ground, [replace(one, color=rng.choice(list(COLORS))), *rest]
    yield ground, [replace(one, row=row, col=col), *rest]
    yield rng.choice(list(GROUNDS)), things
    yield ground, rest
    yield ground, [*things, Thing(rng.choice(SHAPES), rng.choice(list(COLORS)), far_row, far_col)]


def test_questions_have_the_answers_of_the_page() -> None:
    for which, example in examples("understand", 240):
        (shown,) = seen(example)
        text = str(example.prompt.parts[1])
        assert answer(text, *shown) == example.prompt.answer, text
        assert scene_split(*shown) == which
        assert which != "train" or not any((o.color, o.shape) in HELD_OUT for o in shown[1])


@pytest.mark.parametrize("category", ["exists", "position"])
def test_two_way_questions_are_balanced_as_the_page_says(category: str) -> None:
    source = ScenePrompts(ScenesConfig(), "test")
    asked = [p for p in source.prompts("understand", 720) if p.category == category]
    for n, prompt in enumerate(asked):
        text, pair = str(prompt.parts[1]), n // 2
        if category == "position":
            form = ("where is the \\S+ \\?", "relative", "(left|right|above|below)", "edge")[pair % 4]
            assert re.search(form, text)
        else:
            assert any(word in COLORS for word in text.split()) == (pair % 5 < 3)
        if prompt.answer in ("yes", "no"):
            even = (zlib.crc32(f"scenes/test {category} {pair}".encode()) + n % 2) % 2 == 0
            assert prompt.answer == yes(even)


def test_edits_obey_as_the_page_says() -> None:
    for which, example in examples("edit", 60):
        source, target = seen(example)
        assert obeys(str(example.prompt.parts[1]), source, target)
        assert not obeys(str(example.prompt.parts[1]), source, source)
        assert scene_split(*source) == scene_split(*target) == which


def test_reasoning_follows_the_page() -> None:
    for which, example in examples("reason", 150):
        text = str(example.prompt.parts[-1])
        ((ground, things),) = seen(example)
        if text.startswith("draw"):
            values = [int(x) for x in re.findall(r"\d", text)]
            right = max(values) if "larger" in text else min(values) if "smaller" in text else sum(values)
            assert [o.shape for o in things] == [str(right)] == [example.prompt.answer]
            key = reasoning_key(text, [])
        else:
            assert answer(text, ground, things) == example.prompt.answer
            assert scene_split(ground, things) == which
            key = reasoning_key(text, things)
        assert key == example.prompt.content
        assert split_of_text(key) == which
        assert all(split(f"digit {o.sample}", 800, 900) == which for o in things if o.sample >= 0)


def test_examples_of_the_split_rule() -> None:
    for kind, key, expected in table("kind", "key", "split"):
        if kind == "scene":
            found = split(key, 800, 900)
        elif kind == "sample":
            found = split(f"digit {key}", 800, 900)
            assert any(int(key) in row for row in digit_indices(expected))  # type: ignore[arg-type]  # a split by name
        else:
            found = split_of_text(key, kind.startswith("held-out"))
            assert text_split(key, kind.startswith("held-out")) == expected
        assert found == expected, key


def test_paraphrases_are_those_of_the_page() -> None:
    for question, other in table("question", "paraphrase"):
        assert paraphrased(question) == other
    source = ScenePrompts(ScenesConfig(wording="paraphrased"), "test")
    for prompt in source.prompts("generate", 60):
        assert re.match(r"draw a picture of |there (is|are) |a picture with ", str(prompt.parts[0]))
        assert caption(str(prompt.parts[0])).key() == prompt.content


def test_sizes_rates_and_tolerances_are_ours() -> None:
    sizes = {name: int(n) for names, n in table("benchmark", "prompts") for name in names.split(", ")}
    assert sizes == {name: resolve("benchmark", name, BENCHMARKS).n for name in BENCHMARKS}
    for name, rate in table("rate", "share"):
        assert CorpusConfig.model_fields[name].default == float(rate)
    for name, value, _ in table("tolerance", "value", "says"):
        ours = getattr(verifier, name)  # a constant, by its name on the page
        assert (ours if isinstance(ours, tuple) else (ours,)) == tuple(float(x) for x in value.split(" to "))


def test_how_many_different_things_the_test_split_says() -> None:
    source = ScenePrompts(ScenesConfig(), "test")
    contents: dict[str, set[str]] = {}
    for prompt in source.prompts("generate", 2000):
        contents.setdefault(prompt.category, set()).add(prompt.content)
    said = " ".join(PAGE.split())
    assert f"of the test split {len(set().union(*contents.values()))} differ" in said
    assert f"({', '.join(f'{len(found)} {name}' for name, found in contents.items())})" in said
    assert f"have {len({p.content for p in source.prompts('reason', 1000)})} sets of operands" in said
