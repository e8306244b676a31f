"""Data sets of the user through the library ``datasets``: what is read, in which order, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from lvrpo.cli import main
from lvrpo.commands.data import SIDE
from lvrpo.config import parse_section
from lvrpo.data.base import Task
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.data.table_reading import reading
from lvrpo.data.tables import DatasetConfig, DatasetPrompts
from lvrpo.errors import InputError
from lvrpo.report import grids
from lvrpo.types import Prompt

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLORS = ("red", "green", "blue", "white")


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def png(color: str, side: int = 4) -> bytes:
    file = io.BytesIO()
    PilImage.new("RGB", (side, side), color).save(file, "PNG")
    return file.getvalue()


def folder_of(name: str = "images") -> Path:
    """A folder of images with a folder per class."""
    for i, color in enumerate((*COLORS, *COLORS)):
        place = Path(name, "warm" if color == "red" else "cold")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{color}{i}.png").write_bytes(png(color))
    return Path(name)


def shard(name: str, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    with tarfile.open(name, "w") as archive:
        for key, files in samples.items():
            for end, content in files.items():
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return Path(name)


def jsonl(name: str, *rows: Any) -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def source(split: Any = "train", **keys: Any) -> DatasetPrompts:
    return DatasetPrompts([parse_section(DatasetConfig, keys, "data.datasets")], split)


def prompts(**keys: Any) -> list[Prompt]:
    return source(**keys).in_order()


def shown(prompt: Prompt) -> list[Any]:
    """Texts, and the color of the first pixel of images."""
    return [p if isinstance(p, str) else p[:, 0, 0].tolist() for p in prompt.parts]


RED, GREEN = [1.0, 0.0, 0.0], [0.0, pytest.approx(128 / 255), 0.0]


# --- formats ---


def test_rows_of_a_table_are_those_of_json_lines() -> None:
    """The same fields through the same checks; the library fills in what rows leave out, which does not count."""
    Path("a.png").write_bytes(png("red"))
    facts = [{"question": "is it red ?", "answer": "yes"}, {"question": "how many ?", "answer": "2", "kind": "count"}]
    rows = [
        {"task": "understand", "prompt": "what color ?", "images": ["a.png"], "answer": "red", "id": "x"},
        {"task": "generate", "prompt": "a circle", "facts": facts, "category": "colors"},
        {"task": "edit", "prompt": "make it blue", "images": ["a.png"], "edited": [[0, 0, 2, 2]]},
        {"task": "reason", "prompt": "3 + 4", "rules": {"max_words": 1}},
    ]
    file = jsonl("rows.jsonl", *rows)
    table, lines = source(train=file), JsonlPrompts(JsonlConfig(train=Path(file)))
    assert isinstance(table, Task)
    assert table.tasks == lines.tasks
    for mine, other in zip(table.in_order(), lines.in_order(), strict=True):
        assert shown(mine) == shown(other)
        assert (mine.task, mine.output, mine.answer, mine.facts, mine.rules, mine.category, mine.source) == (
            *(other.task, other.output, other.answer, other.facts, other.rules, other.category, other.source),
        )
        assert (mine.edited is None) == (other.edited is None)
        assert mine.edited is None or torch.equal(mine.edited, other.edited if other.edited is not None else mine)


def test_parquet_with_the_bytes_of_images() -> None:
    """As a bare column of bytes, as ``datasets`` stores images, and as lists of them; columns are mapped by name."""
    stored = [{"bytes": png("red"), "path": None}, {"bytes": png("green"), "path": "b.png"}]
    columns = {
        "bare": [png("red"), png("green")],
        "stored": stored,
        "several": [stored, stored[:1]],
        "words": ["what ?", "which ?"],
        "answers": [{"text": ["red", "r"]}, {"text": ["green"]}],
    }
    parquet.write_table(pa.table(columns), "rows.parquet")
    common = {"train": "rows.parquet", "task": "understand"}
    for column in ("bare", "stored"):
        mapped = {"prompt": "words", "images": column, "answer": "answers.text.0"}
        found = prompts(**common, columns=mapped)
        assert [shown(p) for p in found] == [[RED, "what ?"], [GREEN, "which ?"]]
        assert [p.answer for p in found] == ["red", "green"]
    (first, second) = prompts(**common, columns={"prompt": "words", "images": "several"})
    assert shown(first) == [RED, GREEN, "what ?"]
    assert shown(second) == [RED, "which ?"]


def test_an_answer_of_32_bits_is_the_number_that_was_meant() -> None:
    answers = pa.array([0.1, -2.5, None, 3.0], pa.float32())
    parquet.write_table(pa.table({"prompt": list("abcd"), "answer": answers}), "rows.parquet")
    assert [p.answer for p in prompts(train="rows.parquet", task="reason")] == ["0.1", "-2.5", None, "3.0"]


def test_a_folder_of_images_and_ranges_of_its_rows() -> None:
    """In order all of one class come first, and shuffled the order is the same each time, so that ranges are apart."""
    folder = str(folder_of())
    answers = [p.answer for p in prompts(path=folder, train="train", preset="labels")]
    assert answers == ["cold"] * 6 + ["warm"] * 2
    assert [p.answer for p in prompts(path=folder, train="train[75%:]", preset="labels")] == ["warm"] * 2
    assert len(prompts(train=folder, preset="labels")) == 8
    ranges = {"train": "train[:50%]", "test": "train[50%:]"}
    mixed = {"path": folder, "preset": "labels", "shuffle": True, **ranges}
    train, test = source(**mixed), source("test", **mixed)
    assert [line.where for line in train._lines] == [line.where for line in source(**mixed)._lines]
    images = [{str(line.images[0]) for line in each._lines} for each in (train, test)]
    assert len(images[0] | images[1]) == 8
    assert not images[0] & images[1]


def test_webdataset_shards_in_order_of_their_names() -> None:
    for number, colors in ((0, COLORS[:2]), (1, COLORS[2:])):
        samples = {f"{number}-{c}": {"png": png(c), "txt": c.encode(), "json": b'{"n": 1}'} for c in colors}
        shard(f"s-{number}.tar", samples)
    found = source(train="s-*.tar", preset="captions")
    assert [p.parts for p in found.in_order()] == [(color,) for color in COLORS]
    (image,) = found.examples("generate", 1)[0].outputs
    assert not isinstance(image, str)
    assert image[:, 0, 0].tolist() == RED
    assert found._lines[3].where.endswith("s-1.tar: sample 1-white")


def test_several_sets_are_one_source_with_ids_of_their_own() -> None:
    jsonl("a.jsonl", {"prompt": "a circle", "id": "1"})
    jsonl("b.jsonl", {"text": "3 + 4", "id": "1"})
    sets = [
        DatasetConfig(train="a.jsonl", preset="prompts", columns={"id": "id"}),
        DatasetConfig(train="b.jsonl", task="reason", columns={"prompt": "text"}),
        DatasetConfig(test="b.jsonl"),
    ]
    found = DatasetPrompts(sets)
    assert found.tasks == ("generate", "reason")
    assert [p.id for p in found.in_order()] == ["0/1", "1/1"]


def test_sets_of_one_label_or_one_file_keep_their_own_images() -> None:
    def table(file: str, *rows: tuple[str, str]) -> None:
        Path(file).parent.mkdir(exist_ok=True)
        columns = {
            name: [{"bytes": png(row[i]), "path": None} for row in rows] for i, name in enumerate(("one", "two"))
        }
        columns |= {"prompt": [f"what is {row}?" for row in rows]}
        parquet.write_table(pa.table(columns), file)

    for folder, color in (("first", "red"), ("second", "blue")):
        for part in range(2):
            table(f"{folder}/{part}.parquet", (color, "green"))
    keys = {"columns": {"images": "one"}, "task": "understand"}
    sections = [
        {**keys, "train": "first/*.parquet"},
        {**keys, "train": "second/*.parquet"},
        {**keys, "train": "second/0.parquet"},
        {**keys, "train": "second/0.parquet", "columns": {"images": "two"}},
    ]
    found = DatasetPrompts([parse_section(DatasetConfig, section, "data.datasets") for section in sections])
    shown = [prompt.images[0][:, 0, 0].tolist() for prompt in found.in_order()]
    red, green, blue = [1.0, 0.0, 0.0], [0.0, pytest.approx(128 / 255), 0.0], [0.0, 0.0, 1.0]
    assert shown == [red, red, blue, blue, blue, green]


def test_streaming_reads_a_range_once_and_then_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the range and no others, in order; a run that goes on has them though the source is gone."""
    for number in range(3):
        rows = [{"prompt": f"image {number}{i}"} for i in range(4)]
        jsonl(f"part-{number}.jsonl", *rows)
    Path("set").mkdir()
    for number in range(3):
        Path(f"part-{number}.jsonl").rename(f"set/part-{number}.jsonl")
    keys = {"path": "set", "train": "train[3:6]", "preset": "prompts", "streaming": True}
    first = source(**keys)
    assert [p.parts[0] for p in first.in_order()] == ["image 03", "image 10", "image 11"]
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda self: pytest.fail("read again"))
    again = source(**keys)
    assert again.fingerprint() == first.fingerprint()
    assert [p.id for p in again.prompts("generate", 5)] == [p.id for p in first.prompts("generate", 5)]


def test_streaming_keeps_the_bytes_of_images() -> None:
    folder = folder_of()
    found = source(path=str(folder), train="train[:2]", preset="labels", streaming=True)
    for file in folder.rglob("*.png"):
        file.unlink()
    assert [p.answer for p in found.in_order()] == ["cold", "cold"]


def test_every_pass_has_another_order_that_depends_on_the_seed_alone() -> None:
    jsonl("a.jsonl", *[{"prompt": f"image {i}"} for i in range(20)])
    config = [DatasetConfig(train="a.jsonl", preset="prompts")]
    orders = [[p.id for p in DatasetPrompts(config, seed=s).prompts("generate", 40)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:20]) == sorted(orders[0][20:])
    assert orders[0][:20] != orders[0][20:]
    assert [p.id for p in DatasetPrompts(config).prompts("generate", 3, 30)] == orders[0][30:33]


def test_a_set_of_the_hub_is_asked_for_by_name_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of the library, which here answer from a folder."""
    asked: list[dict[str, Any]] = []
    folder_of("kept")
    for name in ("load_dataset_builder", "load_dataset"):
        real: Callable[..., Any] = getattr(datasets, name)

        def answer(path: str, name: Any, revision: Any, real: Any = real, **rest: Any) -> Any:
            asked.append({"path": path, "name": name, "revision": revision, **rest})
            return real("kept", **rest)

        monkeypatch.setattr(datasets, name, answer)
    keys = {"path": "someone/images", "name": "small", "revision": "abc", "preset": "labels", "root": Path("kept")}
    assert len(source(**keys, train="train[:3]")) == 3
    hub = {"path": "someone/images", "name": "small", "revision": "abc"}
    assert asked == [hub, {**hub, "split": "train"}]


# --- what is refused, in one line that names file and row ---


def bad_cut_shard() -> dict[str, Any]:
    whole = shard("cut.tar", {str(i): {"png": png("red"), "txt": b"red"} for i in range(40)}).read_bytes()
    Path("cut.tar").write_bytes(whole[: len(whole) // 2])
    return {"train": "cut.tar", "preset": "captions"}


def bad_image() -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    PilImage.fromarray(noise).save(file, "PNG")
    rows = [{"png": png("red"), "txt": b"red"}, {"png": file.getvalue()[:5000], "txt": b"noise"}]
    shard("a.tar", {f"k{i}": row for i, row in enumerate(rows)})
    return {"train": "a.tar", "preset": "captions", "check": "pixels"}


def bad_row(name: str, *rows: Any, **keys: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        jsonl(name, *rows)
        return {"train": name, **keys}

    return make


def bad_second_file() -> dict[str, Any]:
    jsonl("p-0.jsonl", *[{"prompt": f"{i}"} for i in range(3)])
    jsonl("p-1.jsonl", {"prompt": "x"}, {"prompt": ""})
    return {"train": "p-*.jsonl", "preset": "prompts"}


def bad_json_in_one_of_two() -> dict[str, Any]:
    jsonl("p-0.jsonl", {"prompt": "x"})
    jsonl("p-1.jsonl", {"prompt": "x"}, '{"prompt"')
    return {"train": "p-*.jsonl", "preset": "prompts"}


def bad_outside() -> dict[str, Any]:
    Path("rows").mkdir()
    Path("secret.png").write_bytes(png("red"))
    table = {"image": [{"bytes": None, "path": str(Path("secret.png").resolve())}], "text": ["x"]}
    parquet.write_table(pa.table(table), "rows/a.parquet")
    return {"train": "rows/a.parquet", "preset": "captions"}


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no mapped column": (
        bad_row("a.jsonl", {"text": "x"}, columns={"prompt": "caption"}),
        r"a\.jsonl: columns\.prompt=caption: no such column: there are text",
    ),
    "no field": (
        bad_row("a.jsonl", {"text": "x"}, task="generate"),
        r"a\.jsonl: row 1: field 'prompt' is missing: add it \(columns: .* its columns are text\)",
    ),
    "another task": (
        bad_row("a.jsonl", {"prompt": "x", "task": "generate"}, {"prompt": "x", "task": "draw"}),
        r"a\.jsonl: row 2: field 'task' is 'draw'",
    ),
    "an image that is missing": (
        bad_row("a.jsonl", {"prompt": "x", "task": "understand", "images": ["no.png"]}),
        r"a\.jsonl: row 1: .*no\.png: no such image file",
    ),
    "an address": (
        bad_row("a.jsonl", {"prompt": "x", "task": "understand", "images": ["http://x/a.png"]}),
        r"a\.jsonl: row 1: image 'http://x/a.png' is an address: fetch",
    ),
    "an image that is damaged": (bad_image, r"a\.tar: sample k1: target\.0: damaged image"),
    "a shard that is cut off": (bad_cut_shard, r"cut\.tar: the archive is cut off"),
    "a row of a second file": (bad_second_file, r"p-1\.jsonl: row 2: no value in prompt"),
    "a second file that cannot be read": (bad_json_in_one_of_two, r"p-1\.jsonl: cannot be read \(.*row 1\): fix"),
    "an unknown preset": (
        bad_row("a.jsonl", {"prompt": "x"}, preset="llav"),
        r"preset=llav: unknown: did you mean llava\?",
    ),
    "an unknown field": (
        bad_row("a.jsonl", {"prompt": "x"}, columns={"promt": "prompt"}),
        r"columns\.promt: no field of a row: did you mean prompt\?",
    ),
    "an empty file": (bad_row("a.jsonl"), r"a\.jsonl: is empty: no rows"),
    "an empty range": (lambda: {"path": str(folder_of()), "train": "train[3:3]", "preset": "labels"}, "no rows"),
    "an unknown split": (
        lambda: {"path": str(folder_of()), "train": "trian", "preset": "labels"},
        r"no split 'trian': did you mean train\?",
    ),
    "a range that is none": (lambda: {"path": "x/y", "train": "train[-5:]"}, r"train=train\[-5:\]: must be a split"),
    "an endless stream": (
        lambda: {"path": "x/y", "train": "train", "streaming": True},
        r"train=train: with streaming a range must end .* train\[:20000\]",
    ),
    "no such file": (lambda: {"train": "none-*.parquet"}, r"train=none-\*\.parquet: no such file"),
    "an unknown kind of file": (bad_row("a.pkl", {}), r"train=a\.pkl: files must all end in one of \.json"),
    "no such folder": (lambda: {"path": "./none", "train": "train"}, r"path=\./none: no such folder"),
    "a file as a path": (
        lambda: {"path": jsonl("a.jsonl", {}), "train": "train"},
        r"path=a\.jsonl: is a file: leave path out and write train: a\.jsonl",
    ),
    "a Hub that is not reached": (lambda: {"path": "no/where", "train": "train"}, r"no/where .* or the Hub id"),
    "an image outside": (bad_outside, r"rows/a\.parquet: row 1: image '.*secret\.png' lies outside"),
    "a name without a path": (lambda: {"train": "a.jsonl", "name": "x"}, "name and revision are of a data set"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line(case: str) -> None:
    make, message = BAD[case]
    keys = make()
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        source(**keys)
    assert "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before


def test_without_the_library_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets: install it with pip install 'lvrpo\[data\]'"):
        source(train=jsonl("a.jsonl", {}))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            ConnectionError("no route"),
            "no folder here has this name: check it, or the Hub id, the network and your login",
        ),
        (FileNotFoundError("gone"), "fix the file"),
    ],
)
def test_an_error_of_the_network_names_the_path_and_the_hub(error: OSError, remedy: str) -> None:
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    with pytest.raises(InputError, match=rf"^name: cannot be read \(.*\): {remedy}"), reading("name", quiet=False):
        raise error
    assert hub.level == before


# --- lvrpo data check ---


def test_check_shows_counts_problems_duplicates_and_leaks(capfd: pytest.CaptureFixture[str]) -> None:
    folder_of()
    row = {"task": "generate", "prompt": "a circle"}
    rows = [row, {**row, "prompt": "A circle."}, {**row, "prompt": ""}, {**row, "fact": 1}]
    jsonl("train.jsonl", *rows)
    assert main(["data", "check", "train.jsonl"]) == 2
    out, err = capfd.readouterr()
    assert "train.jsonl:3: field 'prompt' is ''" in out
    assert "train.jsonl:4: unknown field 'fact': did you mean 'facts'?" in out
    assert "train: 1 rows are there twice; the first: train.jsonl:2 asks what train.jsonl:1 asks" in out
    assert err.startswith("error: 2 rows cannot be used; the first: train.jsonl:3")
    with PilImage.open("rows.png") as sheet:
        pixels = np.asarray(sheet)
    assert (pixels == grids.EMPTY_COLOR).all(-1).sum() == 2 * SIDE**2  # a tile for each row that can be used
    sets = "data.datasets=[{path: images, preset: labels, train: train, test: 'train[:2]'}]"
    Path("own.yaml").write_text("extends: quickstart\ndata: {source: datasets}\n")
    assert main(["data", "check", "train.jsonl"]) == 2  # again, as after a change of the rows
    assert capfd.readouterr().err.startswith("error: 2 rows cannot be used")
    assert Path("rows-2.png").exists()
    assert main(["data", "check", "own.yaml", sets, "--out", "sheet.png"]) == 2
    out, err = capfd.readouterr()
    assert "asks what" in err
    assert err.rstrip().endswith("take it out of one of them")
    assert out.count("understand") >= 2
    assert Path("sheet.png").exists()


def test_check_of_a_folder_and_of_sources_that_it_does_not_know(capfd: pytest.CaptureFixture[str]) -> None:
    folder_of()
    assert main(["data", "check", "images", "preset=labels", "--out", "a.png"]) == 0
    for arguments, message in (
        (["images", "preset=labels", "--out", "a.png"], "exists already"),
        (["quickstart", "--out", "b.png"], "lvrpo data preview shows it"),
        (["images", "preset=lables", "--out", "b.png"], "did you mean labels?"),
        (["nothing", "--out", "b.png"], "nothing: no such file or folder: check the path; an id on the Hub is OWNER"),
        (["imags", "--out", "b.png"], "imags: no such file or folder: did you mean images?"),
        (["images/cat", "--out", "b.png"], "images/cat: no such file or folder: "),
        (["./nothing/here", "--out", "b.png"], "./nothing/here: no such file or folder: "),
    ):
        assert main(["data", "check", *arguments]) == 2
        assert message in capfd.readouterr().err
    assert not Path("b.png").exists()


def test_blank_lines_of_a_text_file_are_no_rows() -> None:
    Path("p.txt").write_text("a red circle\n\n   \na blue square\n\n")
    source = DatasetPrompts([DatasetConfig(train="./p.txt", preset="prompts")])
    assert [prompt.text for prompt in source.in_order()] == ["a red circle", "a blue square"]
    assert [where for where, *_ in source.rows()] == ["./p.txt: row 1", "./p.txt: row 4"]
    Path("blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match="no rows"):
        DatasetPrompts([DatasetConfig(train="blank.txt", preset="prompts")])


def test_streaming_has_the_rows_of_a_text_file_that_reading_it_whole_has() -> None:
    Path("set").mkdir()
    Path("set/p.txt").write_text("\na red circle\n\n   \na blue square\na green star\n\n")
    keys = {"path": "set", "train": "train[1:3]", "preset": "prompts"}
    whole, streamed = (source(**keys, streaming=streaming) for streaming in (False, True))
    assert [prompt.text for prompt in streamed.in_order()] == ["a blue square", "a green star"]
    assert [where for where, *_ in streamed.rows()] == [where for where, *_ in whole.rows()]
    assert streamed.fingerprint() == whole.fingerprint()
