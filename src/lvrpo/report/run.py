"""A run directory read back from its files. Everything but config and metrics may be missing or unfinished."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvrpo.errors import InputError
from lvrpo.reading import path_exists, read_bytes, read_json
from lvrpo.records import Metrics, Sample, SampleKey, Summary, from_json

MARKERS = ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json")
"""A folder that holds none of these is not a run directory."""


@dataclass(frozen=True)
class RunRecord:
    """All that the report knows about a run."""

    path: Path
    config: str
    manifest: Mapping[str, Any]
    metrics: Metrics
    summary: Summary | None
    contract: tuple[Mapping[str, Any], ...]
    phases: tuple[tuple[str, Mapping[SampleKey, Sample]], ...]
    """(label, samples by key) in order of time: before, step 20, ..., after."""
    grids: tuple[tuple[int, Path], ...]
    """(step, image of sampled groups) in order of steps."""
    problems: tuple[str, ...]
    """Files that could not be read, described for the page."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether it came to its end, measured or not."""
        if self.summary is None:  # a pretraining run has none, and no plan of an evaluation either
            return (self.path / "policy.json").is_file() and not (self.path / "plan.json").exists()
        return bool(self.summary.after) or not self.summary.before

    def samples(self, label: str) -> Mapping[SampleKey, Sample]:
        return next((samples for name, samples in self.phases if name == label), {})


def load_run(path: Path) -> RunRecord:
    """Read a run directory. Raises ``InputError`` for a folder that is none and for a summary that is unreadable."""
    path = Path(path)
    if not path.is_dir() or not any((path / name).is_file() for name in MARKERS):
        why = "holds none of " + ", ".join(MARKERS) if path.is_dir() else "is not a folder"
        raise InputError(
            f"{path} is not a run directory (it {why}): give a folder that lvrpo train or quickstart wrote"
        )
    problems: list[str] = []
    manifest = _tolerant_json(path / "manifest.json", problems)
    contract = _tolerant_json(path / "contract.json", problems)
    metrics = Metrics.read(path / "metrics.jsonl")
    if metrics.broken_lines:
        lines = ", ".join(map(str, metrics.broken_lines[:8]))
        problems.append(f"metrics.jsonl: line {lines} is unfinished or not readable and was left out.")
    return RunRecord(
        path=path,
        config=_text(path / "config.yaml"),
        manifest=manifest if isinstance(manifest, dict) else {},
        metrics=metrics,
        summary=Summary.read(path / "summary.json"),
        contract=tuple(c for c in contract if isinstance(c, dict)) if isinstance(contract, list) else (),
        phases=tuple(_phases(path, problems)),
        grids=tuple(
            (step, folder / "grid.png")
            for step, folder in _numbered(path / "samples", "step_*")
            if (folder / "grid.png").is_file()
        ),
        problems=tuple(problems),
    )


def _phases(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[SampleKey, Sample]]]:
    """Before, what was kept in between, after."""
    yield "before", _samples(path / "eval" / "before.json", problems)
    for step, file in _numbered(path / "eval", "step_*.json"):
        samples = _samples(file, problems)
        if samples:
            yield f"step {step}", samples
    yield "after", _samples(path / "eval" / "after.json", problems)


def _samples(path: Path, problems: list[str]) -> dict[SampleKey, Sample]:
    raw = _tolerant_json(path, problems)
    rows = (raw.get("prompts") if isinstance(raw, dict) else None) or []
    try:
        samples = from_json(tuple[Sample, ...], rows, f"{path.parent.name}/{path.name}: prompts")
    except InputError as error:
        problems.append(f"{error}.")
        return {}
    return {sample.key: sample for sample in samples}


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step_(\d+)", entry.stem), entry) for entry in folder.glob(pattern))
    return sorted((int(match[1]), entry) for match, entry in found if match)


def _text(path: Path) -> str:
    """The file's text; empty where there is none. Bytes that are no text become a replacement character."""
    return read_bytes(path, "delete it").decode("utf-8", errors="replace") if path_exists(path) else ""


def _tolerant_json(path: Path, problems: list[str]) -> Any:
    if not path_exists(path):
        return None
    try:
        return read_json(path, finite=False)
    except InputError as error:
        problems.append(
            f"{path.parent.name + '/' if path.parent.name == 'eval' else ''}{path.name} could not be read: {error}."
        )
        return None
