from __future__ import annotations

import json
from pathlib import Path

import crash_work
import pytest
from ranks import CONTEXT

from lvrpo.errors import InputError
from lvrpo.rewards.questions import TextCache, cache_folder


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_text_is_found_under_its_whole_key(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "new")
    assert cache.get("a", "b") is None
    cache.put("is it red? yes\n\ud800", "a", "b")
    assert TextCache(tmp_path / "new").get("a", "b") == "is it red? yes\n\ud800"
    assert cache.get("ab", "") is None
    assert cache.get("a", "b", "c") is None
    cache.put("other", "a", "b")
    assert cache.get("a", "b") == "other"
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"text": "x"}', '{"text": 1, "sha256": "y"}', "null"])
def test_a_torn_file_counts_as_absent(damage: str, tmp_path: Path) -> None:
    cache = TextCache(tmp_path)
    cache.put("whole", "key")
    (path,) = files(tmp_path)
    path.write_text(damage)
    assert cache.get("key") is None
    cache.put("again", "key")
    assert cache.get("key") == "again"


def test_a_text_that_was_changed_counts_as_absent(tmp_path: Path) -> None:
    cache = TextCache(tmp_path)
    cache.put("whole", "key")
    (path,) = files(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text": "whol"}))
    assert cache.get("key") is None
    path.write_bytes(b"\xff\xfe")
    assert cache.get("key") is None


def test_processes_share_a_folder(tmp_path: Path) -> None:
    writers = [CONTEXT.Process(target=crash_work.write_texts, args=(tmp_path, who)) for who in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(files(tmp_path)) == 4


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be written \(.*\): name another folder"):
        TextCache(tmp_path / "file").put("text", "key")


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVRPO_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("LVRPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/lvrpo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lvrpo"
