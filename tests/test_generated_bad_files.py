"""Bad files that nobody wrote down: every kind of file, and every file that a command opens, as nothing, half, zeros,
noise, another kind, a link to itself, a folder, a pipe, or not there.

Which files of a run a command reads is not listed here but seen: a file that is read from now on is covered by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from refusals import complaint, require_none
from wrong_values import bounded, damages, placed, sections, subclasses, thinned, wrong_fields

from lvrpo import atomic_io
from lvrpo.cli import main
from lvrpo.evaluation.benchmarks.vqa import GenEval2Row
from lvrpo.evaluation.benchmarks.wise import WiseRow
from lvrpo.evaluation.experiment import PlanRecord
from lvrpo.evaluation.items import ItemRecord
from lvrpo.evaluation.reproduce.plan import RecipeRecord
from lvrpo.images import FORMATS
from lvrpo.reading import Record
from lvrpo.training.run_directory import Manifest, MetricsRow
from lvrpo.training.state import StateRecord, ValidationRecord

QUESTION = "what color is the circle ?"
ROW = {"task": "understand", "prompt": QUESTION, "images": ["red.png"], "answer": "red"}
SMALL_RUN = (
    *("train", "quickstart", "policy=small", "steps=2", "device=cpu", "advantages.std_floor=1e-6"),
    "data.prompts_per_step={generate: 2, understand: 4, edit: 0, reason: 2}",
    "rollout={group_size: 4, num_steps: 3}",
    "rewards=[{name: self_vqa}, {name: exact_answer}]",
    "validation.prompts={generate: 2, understand: 4, reason: 2}",
    *("--benchmark", "rows.jsonl", "--out", "run"),
)
FILES: Mapping[str, tuple[str, ...]] = {
    "yaml of train": ("train", "{yaml}", "--out", "new"),
    "yaml of check": ("check", "{yaml}"),
    "yaml of pretrain": ("pretrain", "{yaml}", "--out", "new"),
    "yaml of reproduce": ("reproduce", "{yaml}", "--list"),
    "rows of evaluate": ("evaluate", "small", "--benchmark", "{jsonl}"),
    "rows of ask": ("ask", "small", "--questions", "{jsonl}"),
    "rows of generate": ("generate", "small", "--prompts", "{jsonl}", "--out", "new"),
    "rows of audit": ("audit", "--data", "{jsonl}", "rows.jsonl"),
    **{f"{kind} of ask": ("ask", "small", "--image", f"{{{kind.lower()}}}", QUESTION) for kind in FORMATS},
    "png of edit": ("edit", "small", "--image", "{png}", "remove the circle", "--out", "new.png"),
}
"""Commands by the file that they read; {kind} stands for a file of that kind."""


@dataclass(frozen=True)
class OnFolder:
    """A command and the folder that it reads."""

    command: tuple[str, ...]
    folder: str
    writes: bool = False
    """Whether it goes on writing the folder before it comes to all of it."""


ON_FOLDERS: Mapping[str, OnFolder] = {
    "report": OnFolder(("report", "run"), "run", writes=True),
    "audit": OnFolder(("audit", "run"), "run"),
    "compare": OnFolder(("compare", "run"), "run"),
    "ask of a run": OnFolder(("ask", "run", "--image", "red.png", QUESTION), "run"),
    "resume": OnFolder(("train", "--resume", "stopped"), "stopped", writes=True),
    "ask of a model": OnFolder(("ask", "small", "--image", "red.png", QUESTION), "small"),
}
SHOWS = "lvrpo.report"
"""What only this package opens may as well be left out: the page says what could not be read."""
PREFIXES = ("metrics.jsonl", "groups.jsonl")
"""Logs that are appended to: what a crash cut off is still one."""
Put = Callable[[Path], object]
EVERY = 5
"""Of the damages, each file of a folder gets one of so many."""


@pytest.fixture(scope="module")
def shelf(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run that is done and one that is not, and a file of every kind."""
    shelf, here = tmp_path_factory.mktemp("shelf"), Path.cwd()
    os.chdir(shelf)
    try:
        shutil.copytree(small_base, "small")
        for kind in FORMATS:
            Image.new("RGB", (32, 32), "red").save(f"whole.{kind.lower()}")
        shutil.copy("whole.png", "red.png")
        Path("whole.yaml").write_text('{steps: 3, policy: nowhere, data: {source: "scenes"}}\n')
        Path("whole.jsonl").write_text(json.dumps(ROW) + "\n")
        shutil.copy("whole.jsonl", "rows.jsonl")
        Path("whole.json").write_text('["no object"]')
        assert main(SMALL_RUN) == 0
        shutil.copytree("run", "stopped")
        for name in ("summary.json", "policy.json"):
            Path("stopped", name).unlink()
    finally:
        os.chdir(here)
    return shelf


@pytest.fixture
def workplace(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be damaged."""
    shutil.copytree(shelf, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return shelf


def put_bytes(content: bytes) -> Put:
    return lambda path: path.write_bytes(content)


PLACES: Mapping[str, Put] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


def cases_of(path: Path, kinds: Mapping[str, bytes], defaults: bool = True) -> dict[str, Callable[[Path], object]]:
    """What may stand in the place of a file; ``defaults``: whether YAML may leave keys out."""
    content = path.read_bytes()
    kind = path.suffix.removeprefix(".")
    image = kind.upper() in FORMATS  # one is as good as another: it is told by its content
    others = {other: text for other, text in kinds.items() if other != kind and not (image and other == "png")}
    found = damages(content, others)
    for fine in ("nothing", "its first half") if path.name in PREFIXES else ():
        del found[fine]
    for fine in ("nothing", "its first half") if kind == "yaml" and defaults else ():
        del found[fine]
    return {**{name: put_bytes(damaged) for name, damaged in found.items()}, **PLACES}


def kinds_of_files() -> dict[str, bytes]:
    return {kind: Path(f"whole.{kind}").read_bytes() for kind in ("png", "json")}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_refused_where_it_is_none(name: str, workplace: Path) -> None:
    (placeholder,) = [part for part in FILES[name] if part.startswith("{")]
    kind = placeholder.strip("{}")
    case = Path(f"case.{kind}")
    command = [part.replace(placeholder, case.name) for part in FILES[name]]
    found = {"not there": complaint(command, [case.name])}
    for what, put in cases_of(Path(f"whole.{kind}"), kinds_of_files(), name != "yaml of reproduce").items():
        put(case)
        found[what] = complaint(command, [case.name])
        shutil.rmtree(case) if case.is_dir() else case.unlink()
    require_none(found)
    assert len(found) > 8


# --- records of a run ---

RECORDS: Mapping[str, type[Record]] = {
    "manifest.json": Manifest,
    "plan.json": PlanRecord,
    "metrics.jsonl": MetricsRow,
}
"""What a resumed run reads of itself, by file."""
READ_OTHERWISE = {StateRecord, ValidationRecord, RecipeRecord, ItemRecord, GenEval2Row, WiseRow}
"""In sealed files, of which another byte is refused; of the evidence (evaluation/test_reproduce.py);
of evaluations and benchmarks (evaluation/test_items.py, test_vqa_benchmarks.py)."""


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_record_is_refused_where_it_is_of_another_type(name: str, workplace: Path) -> None:
    record, path = RECORDS[name], Path("stopped", name)
    whole = path.read_text(encoding="utf-8")
    *before, last = whole.splitlines() if path.suffix == ".jsonl" else [whole]
    found = {}
    fields = {field for section in sections(record) for field in section.model_fields}
    for case in thinned(wrong_fields(record), 2 * EVERY):
        added = not fields.issuperset(case.names)  # other versions may write more, and a missing number is nan
        if not added and bounded(case.value) and case.value == json.loads(json.dumps(case.value)):
            shutil.rmtree("stopped")
            shutil.copytree(workplace / "stopped", "stopped")
            changed = json.dumps(placed(case, json.loads(last)))
            path.write_text("\n".join([*before, changed, ""]), encoding="utf-8")
            said = complaint(("train", "--resume", "stopped"), [path.name], Path("stopped"))
            found[f"{'.'.join(case.path)}={case.value!r:.60}"] = said
    require_none(found)
    assert len(found) >= 3


def test_every_record_is_in_a_file() -> None:
    known = {cls for cls in subclasses(Record) if cls.__module__.startswith("lvrpo.")}
    assert known == {section for record in RECORDS.values() for section in sections(record)} | READ_OTHERWISE


# --- folders ---


class Opened:
    """What was opened below a folder while somebody looked; a hook cannot be taken away."""

    def __init__(self) -> None:
        self.below: Path | None = None
        self.found: dict[Path, bool] = {}
        """By path in the folder: whether it is only shown."""
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.below is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
            self.note(arguments[0], arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY) == 0)

    def note(self, name: Any, reads: bool = True) -> None:
        path = Path(os.path.realpath(name))
        if reads and self.below is not None and path.is_relative_to(self.below):
            within = path.relative_to(self.below)
            self.found[within] = self.found.get(within, True) and shown()

    @contextmanager
    def looking(self, below: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        safe_open = atomic_io.safe_open

        def noted(name: str, *more: Any, **options: Any) -> Any:  # it opens files without Python
            self.note(name)
            return safe_open(name, *more, **options)

        monkeypatch.setattr(atomic_io, "safe_open", noted)
        self.below, self.found = Path(os.path.realpath(below)), {}
        try:
            yield
        finally:
            self.below = None


def shown() -> bool:
    """Whether it is a page or a table that opens a file now."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(SHOWS):
            return True
        frame = frame.f_back
    return False


OPENED = Opened()


@pytest.mark.parametrize("name", ON_FOLDERS)
def test_every_file_that_a_command_opens_is_refused_where_it_is_none(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = ON_FOLDERS[name]
    folder, whole = Path(on.folder), workplace / on.folder
    with OPENED.looking(folder, monkeypatch):
        assert main(on.command) == 0
    read = {path: only_shown for path, only_shown in OPENED.found.items() if (whole / path).is_file()}
    found = {}
    for number, (path, only_shown) in enumerate(read.items()):
        cases = list(cases_of(whole / path, kinds_of_files()).items())
        for what, put in cases[number % EVERY :: EVERY]:
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            (folder / path).unlink()
            put(folder / path)
            names, own = [path.name, path.parent.name or folder.name], folder if on.writes else None
            found[f"{path}: {what}"] = complaint(on.command, names, own, tolerant=only_shown)
    require_none(found)
    assert len(found) >= len(read) > 1
