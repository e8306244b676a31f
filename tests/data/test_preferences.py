from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage

from lvrpo.data.preferences import Pair, PairCounts, read_pairs
from lvrpo.errors import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    PilImage.new("RGB", size, (level,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def row(caption: str = "a cat", won: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    labels = {"label_0": won, "label_1": None if won is None else 1 - won}
    return {"caption": caption, "jpg_0": png(10), "jpg_1": png(200), "has_label": True, **labels, **changes}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path: Path, **options: Any) -> tuple[list[Pair], PairCounts]:
    counts = PairCounts()
    return list(read_pairs(path, counts, **options)), counts


def test_pick_a_pics_columns_from_parquet() -> None:
    rows = [row(), row(won=0.0), row(won=0.5), row(won=None), row(has_label=False), row(has_label=True)]
    pairs, counts = read(write_parquet(Path("a.parquet"), rows))
    assert [pair.share for pair in pairs] == [1, 0, 0.5, 1]
    assert (counts.rows, counts.total, counts.pairs, counts.ties, counts.unlabelled) == (6, 6, 4, 1, 2)
    first = pairs[0]
    assert first.prompt.parts == ("a cat",)
    assert (first.prompt.task, first.prompt.output) == ("generate", ("image",))
    assert [round(float(picture.mean()) * 255) for picture in first.outputs] == [10, 200]  # type: ignore[union-attr]


def test_the_same_columns_from_json_lines_with_paths_or_base_64() -> None:
    Path("cat.png").write_bytes(png(30))
    stored = {"jpg_0": "cat.png", "jpg_1": base64.b64encode(png(60)).decode()}
    pairs, _ = read(write_lines(Path("a.jsonl"), [row(**stored)]))
    assert [round(float(picture.mean()) * 255) for picture in pairs[0].outputs] == [30, 60]  # type: ignore[union-attr]


def test_plain_lines_tell_pictures_texts_and_edits_apart() -> None:
    for name in ("a", "b", "c"):
        Path(f"{name}.png").write_bytes(png(50))
    rows = [
        {"prompt": "a cat", "better": "a.png", "worse": "b.png"},
        {"prompt": "what is it?", "better": "a cat", "worse": "a dog", "images": ["c.png"]},
        {"prompt": "why?", "better": "because", "worse": "no", "tie": True},
        {"prompt": "make it red", "better": "a.png", "worse": "b.png", "images": ["c.png"]},
    ]
    pairs, counts = read(write_lines(Path("plain.jsonl"), rows))
    assert [pair.prompt.task for pair in pairs] == ["generate", "understand", "reason", "edit"]
    assert [pair.share for pair in pairs] == [1, 1, 0.5, 1]
    assert pairs[1].outputs == ("a cat", "a dog")
    assert (counts.pairs, counts.ties) == (4, 1)


def test_ties_are_dropped_where_asked_and_counted_anyway() -> None:
    pairs, counts = read(write_parquet(Path("a.parquet"), [row(), row(won=0.5)]), ties="drop")
    assert len(pairs) == 1
    assert (counts.pairs, counts.ties) == (1, 1)


def test_pictures_are_resized_to_the_models_side() -> None:
    pairs, _ = read(write_parquet(Path("a.parquet"), [row(jpg_0=png(10, (40, 20)))]), side=16)
    assert [tuple(picture.shape) for picture in pairs[0].outputs] == [(3, 16, 16)] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jpg_0": None}, "row 1, jpg_0: the picture is missing"),
        ({"jpg_1": png(3)[:40]}, "row 1, jpg_1: not a picture"),
        ({"jpg_1": b"no picture"}, "row 1, jpg_1: not a picture"),
        ({"label_1": 1.0}, "row 1: labels 1.0 and 1.0"),
        ({"caption": " "}, "row 1: the caption is empty"),
    ],
)
def test_damaged_rows_are_counted_and_stop_the_reading_above_a_share(changes: dict[str, Any], reason: str) -> None:
    rows = [row(f"prompt {i}") for i in range(10)]
    rows[1] |= changes
    path = write_parquet(Path("a.parquet"), rows)
    pairs, counts = read(path, max_broken=0.1)
    assert len(pairs) == 9
    assert len(counts.broken) == 1
    assert reason in counts.broken[0]
    with pytest.raises(InputError, match=r"1 of 10 rows cannot be used, more than max_broken=0\.05") as error:
        read(path, max_broken=0.05)
    assert reason in str(error.value)


def test_a_missing_picture_of_a_plain_file_is_damage() -> None:
    path = write_lines(Path("plain.jsonl"), [{"prompt": "a cat", "better": "a.png", "worse": "b.png"}])
    with pytest.raises(InputError, match=r"plain.jsonl:1: .*a.png: no such picture file"):
        read(path)


def test_what_is_no_data_is_one_line() -> None:
    cases: list[tuple[Path, str]] = [
        (Path("nowhere"), "no such file or folder"),
        (write_parquet(Path("b.parquet"), [{"caption": "x"}]), "no column 'jpg_0'"),
        (write_lines(Path("c.jsonl"), [{"prompt": "x", "better": "y", "wrose": "z"}]), "field 'worse'"),
        (write_lines(Path("d.jsonl"), [{"caption": "x"}]), "no field 'jpg_0'"),
        (write_lines(Path("e.jsonl"), []), "no rows"),
        (Path(__file__), "give a .parquet or .jsonl file"),
    ]
    Path("f.jsonl").write_text("{}\n{oops\n")
    Path("g.parquet").write_bytes(b"PAR1 and then nothing")
    Path("h").mkdir()
    cases += [(Path("g.parquet"), "truncated or no parquet"), (Path("h"), "holds no .parquet or .jsonl file")]
    for path, message in cases:
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_prompts_are_one_whatever_their_case_and_spacing() -> None:
    pairs, _ = read(write_parquet(Path("a.parquet"), [row("A  cat"), row("a cat"), row("a dog")]))
    assert pairs[0].key == pairs[1].key != pairs[2].key
