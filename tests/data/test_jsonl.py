"""The user's own rows and images: what is read, and the one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from pydantic import ValidationError

from lvrpo.data.base import Task
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.errors import InputError
from lvrpo.images import load_image
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.function import reward
from lvrpo.types import Prompt

DRAW = {"task": "generate", "prompt": "a red circle"}
EDIT = {"task": "edit", "prompt": "make it blue", "images": ["a.png"]}
ASK = {"task": "understand", "prompt": "what color ?", "images": ["a.png"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "rows"
    (home / "sub").mkdir(parents=True)
    PilImage.new("RGB", (5, 4), (255, 0, 0)).save(home / "a.png")
    PilImage.new("L", (3, 3), 128).save(home / "sub" / "b.png")
    PilImage.new("RGB", (5, 4)).save(tmp_path / "outside.png")
    PilImage.new("L", (5, 4)).save(home / "black.png")
    mask = PilImage.new("L", (5, 4))
    mask.paste(255, (1, 0, 3, 2))
    mask.save(home / "mask.png")
    (home / "link.png").symlink_to(tmp_path / "outside.png")
    (home / "text.png").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PilImage.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (home / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [PilImage.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(home / "moving.gif", save_all=True, append_images=frames[1:])
    PilImage.new("1", (9000, 8000)).save(home / "huge.png")
    return home


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return file


def source(file: Path, seed: int = 0) -> JsonlPrompts:
    return JsonlPrompts(JsonlConfig(train=file, check="pixels"), "train", seed)


def test_reads_rows(folder: Path) -> None:
    facts = [{"question": "is there a circle ?", "answer": "yes"}]
    rows = [
        {**DRAW, "facts": facts, "category": "colors", "target": "sub/b.png"},
        {**ASK, "id": "mine", "answer": "red", "images": ["a.png", "sub/b.png"]},
        {
            "task": "reason",
            "prompt": "draw 3 + 4",
            "output": ["text", "image"],
            "answer": "7",
            "target": ["7", "a.png"],
        },
    ]
    prompts = source(write(folder, rows[0], "", *rows[1:]))
    assert isinstance(prompts, Task)
    assert prompts.tasks == ("understand", "generate", "reason")
    assert len(prompts) == 3
    draw = prompts.prompt("generate", 0)
    assert (draw.id, draw.output, draw.category, draw.source) == ("rows:1", ("image",), "colors", "rows.jsonl")
    assert [(f.question, f.answer) for f in draw.facts] == [("is there a circle ?", "yes")]
    ask = prompts.prompts("understand", 1)[0]
    assert (ask.id, ask.answer, ask.output, ask.parts[2]) == ("mine", "red", ("text",), "what color ?")
    assert isinstance(ask.parts[0], torch.Tensor)
    assert ask.parts[0].shape == (3, 4, 5)
    assert ask.parts[0] is prompts.prompt("understand", 1).parts[0]
    text, image = prompts.example("reason", 0).outputs
    assert text == "7"
    assert isinstance(image, torch.Tensor)
    with pytest.raises(InputError, match=r"rows\.jsonl:3: no field 'target'"):
        prompts.example("understand", 0)
    with pytest.raises(InputError, match="no rows of task 'edit'"):
        prompts.prompt("edit", 0)


def test_rows_say_where_an_edit_may_change(folder: Path) -> None:
    """As boxes [left, top, right, bottom], or as an image that is white there."""
    boxes, mask, neither = {"edited": [[1, 0, 3, 2], [4, 3, 5, 4]]}, {"edited": "mask.png"}, {}
    rows = [{**EDIT, "id": str(i)} | more for i, more in enumerate((boxes, mask, neither))]
    prompts = {p.id: p for p in source(write(folder, *rows)).prompts("edit", 3)}
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[:2, 1:3] = True
    masked, boxed = prompts["1"].edited, prompts["0"].edited
    assert masked is not None
    assert boxed is not None
    assert torch.equal(masked, expected)
    expected[3, 4] = True
    assert torch.equal(boxed, expected)
    assert prompts["2"].edited is None
    black = source(write(folder, {**EDIT, "edited": "black.png"}))
    with pytest.raises(InputError, match=r"rows\.jsonl:1: mask black\.png is black: make white"):
        black.prompt("edit", 0)


def test_boxes_are_of_the_image_as_it_is_seen(folder: Path) -> None:
    """Not as it is stored: a camera on its side turns it when it is read."""
    exif = PilImage.Exif()
    exif[0x0112] = 6
    PilImage.new("RGB", (6, 2)).save(folder / "turned.jpg", exif=exif)
    row = {**EDIT, "images": ["turned.jpg"], "edited": [[0, 0, 2, 6]]}
    edited = source(write(folder, row)).prompt("edit", 0).edited
    assert edited is not None
    assert edited.shape == (6, 2)
    assert bool(edited.all())


def test_metadata_reaches_reward_functions_and_counts_in_the_fingerprint(folder: Path) -> None:
    plain = source(write(folder, DRAW)).fingerprint()
    found = source(write(folder, {**DRAW, "metadata": {"level": 3}}))
    assert found.in_order()[0].metadata == {"level": 3}
    assert found.fingerprint() != plain
    score = reward(lambda image, metadata: metadata["level"])()
    image = torch.zeros(3, 4, 4)
    prompts = (*found.in_order(), *source(write(folder, DRAW)).in_order())
    groups = [offline_group(prompt, [[image]]) for prompt in prompts]
    scores = score.score(groups, None)  # type: ignore[arg-type]  # it asks no judge
    assert scores.values[0, 0] == 3
    assert "level" in scores.failures[1, 0]


def test_each_pass_is_a_new_deterministic_order(folder: Path) -> None:
    file = write(folder, *({**DRAW, "id": str(k)} for k in range(20)))
    passes = [[p.id for p in source(file).prompts("generate", 20, start)] for start in (0, 20, 0)]
    assert sorted(passes[0], key=int) == sorted(passes[1], key=int) == [str(k) for k in range(20)]
    assert passes[0] == passes[2] != passes[1]
    assert [p.id for p in source(file, seed=1).prompts("generate", 20)] != passes[0]


ROWS = [
    ([], "no rows"),
    (["{not json"], ":1: not JSON at column 2"),
    ([DRAW, "[1, 2]"], ":2: [1, 2] is no JSON object"),
    (['{"task": NaN}'], ":1: NaN is not JSON"),
    (["[" * 100_000], ":1: nested too deeply"),
    ([{**DRAW, "promt": "x"}], "unknown field 'promt': did you mean 'prompt'?"),
    ([{**DRAW, "facts": [{"question": "q", "anwser": "a"}]}], "unknown field 'facts.0.anwser': did you mean 'answer'?"),
    ([{"task": "generate"}], "field 'prompt' is missing"),
    ([{"prompt": "a"}], "field 'task' is missing"),
    ([{**DRAW, "task": "paint"}], "field 'task' is 'paint'"),
    ([{**DRAW, "prompt": "  "}], "field 'prompt' is blank"),
    ([{**DRAW, "prompt": 3}], "field 'prompt' is 3: it should be a valid string: write \"3\""),
    ([{**DRAW, "category": "a \ud83d"}], r"field 'category' is 'a \ud83d': holds half of a character: write it whole"),
    ([{**DRAW, "facts": [{"question": "\udc00?", "answer": "a"}]}], "field 'facts' is ["),
    ([{**DRAW, "answer": 7.5}], "field 'answer' is 7.5: it should be a valid string: write \"7.5\""),
    ([{**DRAW, "images": "a.png"}], "field 'images' is 'a.png': it should be a valid list"),
    ([{**DRAW, "target": 5}], "field 'target' is 5"),
    ([{**DRAW, "edited": [[0, 0, 1, 1]]}], "field 'edited' is about edits, and task is 'generate'"),
    ([{**EDIT, "edited": []}], "field 'edited' is empty"),
    (
        [{**EDIT, "edited": [[3, 0, 3, 2]]}],
        "field 'edited' has the box [3, 0, 3, 2]: must be [left, top, right, bottom]",
    ),
    ([{**EDIT, "edited": [[0, 0, 6, 2]]}], "the box [0, 0, 6, 2], which leaves the source of 5 x 4 pixels"),
    ([{**EDIT, "edited": [[0, 0, 1]]}], "field 'edited' has the box [0, 0, 1]: must be [left, top"),
    ([{**EDIT, "edited": [[-1, 0, 1, 1]]}], "field 'edited' has the box [-1, 0, 1, 1]: must be"),
    ([{**EDIT, "edited": "sub/b.png"}], "mask 'sub/b.png' of field 'edited' has 3 x 3 pixels, its source 5 x 4"),
    ([{**EDIT, "edited": "gone.png"}], "gone.png: no such image file"),
    ([{"task": "understand", "prompt": "what ?"}], "task 'understand' needs an image"),
    ([{"task": "edit", "prompt": "make it red"}], "task 'edit' needs an image"),
    ([{**DRAW, "output": ["text"]}], "task 'generate' produces image"),
    ([{**DRAW, "target": ["a.png", "a.png"]}], "field 'target' has 2 entries for 1 outputs"),
    ([{**DRAW, "id": "x"}, {**DRAW, "id": "x"}], ":2: id 'x' is already that of line 1"),
    ([{**ASK, "images": ["no.png"]}], "no such image file"),
    ([{**ASK, "images": ["sub"]}], "sub: is a folder, not a regular file: give an image file"),
    ([{**ASK, "images": [""]}], "image '' is no path"),
    ([{**ASK, "images": ["../outside.png"]}], "lies outside"),
    ([{**ASK, "images": ["/etc/hostname"]}], "lies outside"),
    ([{**ASK, "images": ["C:\\a.png"]}], "lies outside"),
    ([{**ASK, "images": ["link.png"]}], "lies outside"),
    ([{**DRAW, "target": "../outside.png"}], "lies outside"),
    ([{**ASK, "images": ["text.png"]}], "not an image that can be read"),
    ([{**ASK, "images": ["cut.png"]}], "damaged image"),
    ([{**ASK, "images": ["moving.gif"]}], "animated"),
    ([{**ASK, "images": ["huge.png"]}], "9000 x 8000 pixels, more than 64 megapixels"),
]


@pytest.mark.parametrize(("rows", "message"), ROWS, ids=[m[:40] for _, m in ROWS])
def test_errors_are_one_line_with_file_and_line(folder: Path, rows: list[Any], message: str) -> None:
    file = write(folder, *rows)
    with pytest.raises(InputError) as caught:
        source(file)
    text = str(caught.value)
    print(text)
    assert message in text
    assert "\n" not in text
    assert text.startswith(str(file))


def test_errors_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no validation file"):
        JsonlPrompts(JsonlConfig(train=tmp_path / "none.jsonl"), "validation")
    (tmp_path / "latin.jsonl").write_bytes(b'{"task": "generate", "prompt": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        source(tmp_path / "latin.jsonl")
    with pytest.raises(ValidationError):
        JsonlConfig.model_validate({"trian": "x"})


def test_headers_only_finds_damage_at_first_use(folder: Path) -> None:
    prompts = JsonlPrompts(JsonlConfig(train=write(folder, {**ASK, "images": ["cut.png"]})))
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*damaged"):
        prompts.prompt("understand", 0)


def test_byte_order_mark_and_windows_lines(folder: Path) -> None:
    file = folder / "w.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(DRAW).encode() + b"\r\n" + json.dumps(DRAW).encode() + b"\r\n")
    assert len(source(file)) == 2


def saved(tmp_path: Path, pil: PilImage.Image, name: str = "x.png", **options: Any) -> torch.Tensor:
    pil.save(tmp_path / name, **options)
    image = load_image(tmp_path / name)
    assert image.dtype == torch.float32
    assert image.ndim == 3
    assert 0 <= image.min() <= image.max() <= 1
    return image


def test_modes(tmp_path: Path) -> None:
    def first(image: torch.Tensor) -> list[float]:
        return [round(v, 2) for v in image[:, 0, 0].tolist()]

    assert first(saved(tmp_path, PilImage.new("RGBA", (2, 2), (255, 0, 0, 0)))) == [1, 1, 1]
    assert first(saved(tmp_path, PilImage.new("RGBA", (2, 2), (0, 0, 0, 128)))) == [0.5, 0.5, 0.5]
    assert first(saved(tmp_path, PilImage.new("LA", (2, 2), (0, 0)))) == [1, 1, 1]
    assert first(saved(tmp_path, PilImage.new("L", (2, 2), 51))) == [0.2, 0.2, 0.2]
    assert first(saved(tmp_path, PilImage.new("1", (2, 2), 1))) == [1, 1, 1]
    assert first(saved(tmp_path, PilImage.new("CMYK", (2, 2), (0, 0, 0, 0)), "x.tiff")) == [1, 1, 1]
    assert first(saved(tmp_path, PilImage.fromarray(np.full((2, 2), 13107, np.uint16)))) == [0.2, 0.2, 0.2]
    palette = PilImage.new("P", (2, 2), 0)
    palette.putpalette([0, 255, 0])
    assert first(saved(tmp_path, palette)) == [0, 1, 0]
    assert first(saved(tmp_path, palette, transparency=0)) == [1, 1, 1]
    PilImage.new("F", (2, 2)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match="float pixels"):
        load_image(tmp_path / "f.tiff")


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = PilImage.Exif()
    exif[0x0112] = 6
    assert saved(tmp_path, PilImage.new("RGB", (6, 2)), "x.jpg", exif=exif).shape == (3, 6, 2)


def test_the_longest_row_of_each_size_of_images_is_checked(folder: Path) -> None:
    texts = [{**DRAW, "prompt": text} for text in ("a", "the longest of all texts")]
    images = ("a.png", "sub/b.png")
    asks = [{**ASK, "prompt": text, "images": [image]} for text in ("b ?", "who ?", "c ?") for image in images]
    rows, checked = source(write(folder, *texts, *asks, EDIT)), []
    rows.require_possible(lambda prompt: checked.append(prompt.id), {"generate", "understand"})
    assert checked == ["rows:1", "rows:2", "rows:5", "rows:6"]

    def refuse(prompt: Prompt) -> None:
        raise InputError(f"prompt {prompt.id!r}: 9 tokens")

    with pytest.raises(InputError, match=r"rows\.jsonl:9: prompt 'rows:9': 9 tokens"):
        rows.require_possible(refuse, {"edit"})
