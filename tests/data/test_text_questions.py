"""Questions from words alone: those that the scene's own facts ask, without a look at the scene."""

from __future__ import annotations

import pytest

from lvrpo.data.scenes import SPLITS, ScenePrompts, ScenesConfig, Split, read
from lvrpo.data.scenes.facts import questions_of_text, read_caption, unchanged_questions_of_text
from lvrpo.data.scenes.grammar import Caption, Mention
from lvrpo.data.scenes.verifier import holds


@pytest.mark.parametrize("split", SPLITS)
def test_a_caption_says_its_facts(split: Split) -> None:
    for prompt in ScenePrompts(split=split).prompts("generate", 420):
        assert questions_of_text(str(prompt.parts[0])) == prompt.facts


def test_an_instruction_says_what_changes() -> None:
    source = ScenePrompts(split="test")
    for index in range(200):
        example = source.example("edit", index)
        before, after = (read(image[None])[0] for image in (example.prompt.parts[0], example.outputs[0]))  # type: ignore[index]
        found = questions_of_text(str(example.prompt.parts[1]))
        assert found
        for fact in found:
            if fact.check:
                assert holds(fact.check, after)
        assert example.prompt.category == "move" or not all(holds(fact.check, before) for fact in found)
        first = example.prompt.facts[0]
        assert found[0].question == first.question or example.prompt.category in ("recolor", "replace")


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("the digit 7", Caption((Mention("7"),))),
        ("draw an orange 3 at the top left", Caption((Mention("3", "orange"),), place="top left")),
        ("a picture of five crosses on a white ground", Caption((Mention("cross", None, 5),), ground="white")),
        ("a cross right of a red star", Caption((Mention("cross"), Mention("star", "red")), "right")),
        ("draw 3 + 4", None),
        ("describe the picture", None),
        ("make the star red", None),
        ("a horse", None),
        ("", None),
    ],
)
def test_captions_are_read(text: str, caption: Caption | None) -> None:
    assert read_caption(text) == caption


def test_what_is_left_alone_is_asked_both_ways() -> None:
    found = [(fact.question, fact.answer) for fact in unchanged_questions_of_text("replace the star with a circle")]
    assert len(found) == 8
    assert ("is there a cross ?", "yes") in found
    assert ("is there a cross ?", "no") in found
    assert not any("star" in question or "circle" in question for question, _ in found)
    assert questions_of_text("what is the sum ?") == ()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_without_labels_nothing_of_the_scene_is_left(split: Split) -> None:
    source = ScenePrompts(ScenesConfig(labels=False), split)
    for task in source.tasks:
        for prompt in source.prompts(task, 42):
            assert (prompt.answer, prompt.facts, prompt.edited, prompt.content) == (None, (), None, "")
    assert all(p.facts for p in ScenePrompts(ScenesConfig(labels=False), "test").prompts("generate", 7))
