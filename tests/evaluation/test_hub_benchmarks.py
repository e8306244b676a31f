"""Published benchmarks from data sets in the layout of the Hub, which lie in small local folders here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks import published, wise
from lvrpo.evaluation.benchmarks.compbench import FILES
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, hub_id
from lvrpo.evaluation.suite import Benchmark, find_benchmarks

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def stored(folder: Path, tables: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> Path:
    """A data set as the Hub stores it: parquet files, and a README that names configurations with their splits."""
    folder.mkdir(parents=True)
    lines = ["configs:"]
    for name, (split, rows) in tables.items():
        (folder / name).mkdir()
        file = f"{name}/{split}-00000-of-00001.parquet"
        parquet.write_table(pa.Table.from_pylist([*rows]), folder / file)
        lines += [f"- config_name: '{name}'", "  data_files:", f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---"]) + "\n")
    return folder


PROMPTS = {file: [f"a {n} thing and a bench", f"two cats of {n}"] for n, file in enumerate(FILES)}


def compbench(folder: Path, text: str = "text") -> Path:
    tables = {}
    for file, lines in PROMPTS.items():
        name = file.removesuffix(".txt")
        tables[name] = (name.removeprefix("3d_"), [{text: line} for line in lines])  # as there: no digit first
    return stored(folder, tables)


def content(benchmarks: Sequence[Benchmark]) -> Any:
    (found,) = benchmarks
    rows = [(p.id, p.parts, p.facts, p.category, p.source) for p in found.prompts(found.n)]
    return rows, found.n, dict(found.details)


def opened(name: str, data: Path) -> Any:
    return content(find_benchmarks([name], inputs=BenchmarkInputs(data)))


@pytest.mark.usefixtures("few_prompts")
def test_a_data_set_gives_the_prompts_of_the_official_files(tmp_path: Path) -> None:
    official = tmp_path / "official" / "t2i_compbench"
    official.mkdir(parents=True)
    for file, lines in PROMPTS.items():
        (official / file).write_text("\n".join(lines) + "\n")
    compbench(tmp_path / "hub" / "t2i_compbench")
    rows, n, details = opened("t2i_compbench", tmp_path / "official")
    assert (rows, n, details) == opened("t2i_compbench", tmp_path / "hub")
    assert (rows, n) == opened("t2i_compbench", tmp_path / "hub" / "t2i_compbench")[:2]
    assert n == 16


def test_rows_of_one_table_are_told_apart_by_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(wise.LEGACY, categories={name: ids[:1] for name, ids in wise.LEGACY.categories.items()})
    monkeypatch.setattr(wise, "WISE", wise._published(small, "here", "org/wise"))
    rows = [
        {"Prompt": name, "Explanation": f"means {name}", "Category": "x", "prompt_id": ids[0]}
        for name, ids in small.categories.items()
    ]
    stored(tmp_path / "wise", {"default": ("train", rows)})
    found, n, _ = opened("wise", tmp_path)
    assert [(parts[0], category) for _, parts, _, category, _ in found] == [(name, name) for name in small.categories]
    assert n == 6


@pytest.mark.usefixtures("few_prompts")
def test_an_id_or_the_word_hub_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compbench(tmp_path / "t2i_compbench")
    asked: list[str] = []
    read = published.read_table

    def from_here(path: str, *rest: Any) -> Any:
        asked.append(path)
        return read(str(folder), *rest)

    monkeypatch.setattr(published, "read_table", from_here)
    assert opened("t2i_compbench", Path("hub"))[1] == opened("t2i_compbench", Path("my-org/my.copy"))[1] == 16
    assert {*asked} == {"NinaKarine/t2i-compbench", "my-org/my.copy"}
    Path("hub").mkdir()  # a folder of that name is the folder
    assert hub_id(Path("hub"), None) is None
    with pytest.raises(InputError, match=r"hub: holds no color_val\.txt and 7 more"):
        find_benchmarks(["t2i_compbench"], inputs=BenchmarkInputs(Path("hub")))


def test_data_sets_of_another_form_are_one_line(tmp_path: Path) -> None:
    compbench(tmp_path / "a" / "t2i_compbench", text="prompt")
    with pytest.raises(
        InputError, match=r"t2i_compbench \(color_val\): has no column 'text': name the benchmark's own"
    ):
        opened("t2i_compbench", tmp_path / "a")
    stored(tmp_path / "b" / "t2i_compbench", {"color_val": ("color_val", [{"text": "a"}])})
    with pytest.raises(InputError, match=r"t2i_compbench \(shape_val\): cannot be read"):
        opened("t2i_compbench", tmp_path / "b")
    two = stored(tmp_path / "c" / "wise", {"default": ("train", [{"Prompt": "a"}])})
    (two / "README.md").unlink()
    parquet.write_table(pa.Table.from_pylist([{"Prompt": "b"}]), two / "default" / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="has the splits train, test: a data set with one split is read"):
        opened("wise", tmp_path / "c")


def test_benchmarks_without_a_data_set_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "tiny", "--benchmark", "geneval_vqa", "--data", "hub"]) == 2
    assert "lvrpo knows no data set of the Hub for it: get evaluation_metadata.jsonl" in capsys.readouterr().err
    assert main(["evaluate", "tiny", "--benchmark", "wise"]) == 2
    assert "or take Yuwei-Niu/WISE of the Hub (--data hub)" in capsys.readouterr().err
    assert main(["benchmarks"]) == 0
    listed = capsys.readouterr().out
    words = (
        "NinaKarine/t2i-compbench",
        "Yuwei-Niu/WISE",
        "none stated",
        "2400 prompts, 10 images each, license: MIT",
    )
    assert all(word in listed for word in words)
