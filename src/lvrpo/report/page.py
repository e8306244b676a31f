"""One self-contained HTML page from a run directory."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml

from lvrpo.atomic_io import write_atomic
from lvrpo.errors import InputError
from lvrpo.records import number
from lvrpo.report import formatting
from lvrpo.report.audit import audit_section, read_audit
from lvrpo.report.charts import (
    Chart,
    gradient_audit,
    headline_charts,
    other_charts,
    ratio_note,
    reward_charts,
    validation_charts,
)
from lvrpo.report.formatting import label
from lvrpo.report.run import MARKERS, RunRecord, load_run
from lvrpo.report.samples import EmbeddedImage, ImageStore, sample_sections, task_label
from lvrpo.report.scores import score_table, verdict
from lvrpo.report.tables import TextTable, collapses, measure_tables, summary_phases

HERE = Path(__file__).parent
GRID_SIDE = 1400


def build_report(run: Path) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    Works for a run that is still going on. Raises ``InputError`` where the folder is no run directory, its summary is
    unreadable, or the page cannot be written; what was there before then stays.
    """
    target = Path(run) / "report.html"
    try:
        write_atomic(target, render(load_run(Path(run))).encode())
    except OSError as error:
        why = f"{error.strerror or error} ({error.filename or target})"
        raise InputError(f"no report of {run}: {why}: free the disk or the permission and report again") from error
    return target


def render(run: RunRecord) -> str:
    """The page as a string."""
    store = ImageStore(run.path)
    validation_keys = [key for key in run.metrics.numeric_keys() if key.startswith("validation/")]
    raw = run.summary.raw if run.summary else {}
    problems = list(run.problems)
    audit = read_audit(run.path / "audit.json", problems)
    found = (*audit.alarms.missing, *audit.alarms.found) if audit else ()
    alarms = [f"Alarm of the reward audit: {alarm.words}." for alarm in found]
    alarms += [f"Answers have collapsed: {words}." for words in collapses(raw.get("difference"))]
    context: dict[str, Any] = {
        "run": run,
        "style": markupsafe.Markup((HERE / "style.css").read_text(encoding="utf-8")),
        "verdict": verdict(run),
        "facts": _run_facts(run),
        "command": _command(run.manifest),
        "scores": score_table(run.summary) if run.summary and (run.summary.before or run.summary.after) else None,
        "measures": measure_tables(summary_phases(raw), raw.get("difference"), full=True),
        "rewards": reward_charts(run.metrics),
        "strip": headline_charts(run.metrics),
        "others": other_charts(run.metrics),
        "ratio_note": ratio_note(run.metrics),
        "gradients": gradient_audit(run.metrics),
        "validation_charts": validation_charts(run.metrics),
        "validation_history": _validation_history(run, validation_keys),
        "validation_summary": raw.get("validation"),
        "judge": raw.get("judge"),
        "audit": audit and audit_section(audit),
        "notices": [*not_well(raw.get("health")), *alarms, *problems, *_notes(raw.get("notes"))],
        "samples": sample_sections(run, store),
        "grids": _selected_grids(run, store),
    }
    return environment().get_template("page.html").render(context)


def not_well(health: object) -> list[str]:
    """The reasons why a finished run is not healthy."""
    findings = health.get("findings") if isinstance(health, Mapping) else None
    rows = findings if isinstance(findings, list) else []
    return [f"Not healthy: {row['words']}." for row in rows if isinstance(row, Mapping) and row.get("words")]


def _validation_history(run: RunRecord, keys: list[str]) -> TextTable:
    """A row per step on which validation ran."""
    heads = ("step", *(label(key.removeprefix("validation/")) for key in keys), "what it did")
    ran = [row for row in run.metrics.rows if any(key.startswith("validation/") for key in row)]
    rows = []
    for row in ran:
        scores = (formatting.NONE if number(row.get(k)) is None else formatting.score(row[k]) for k in keys)
        rows.append((str(int(row["step"])), *scores, str(row.get("validation/action") or formatting.NONE)))
    return TextTable("", heads, tuple(rows))


def _run_facts(run: RunRecord) -> list[tuple[str, str]]:
    """(term, value) pairs for the head of the page, as far as they were recorded."""
    raw = run.summary.raw if run.summary else {}
    last = run.metrics.rows[-1] if run.metrics.rows else {}
    seconds = number(raw.get("seconds"))
    so_far = number(last.get("seconds"))
    memory = number(raw.get("peak_memory_gib"))
    policy = _find(run.manifest, ("policy", "model")) or _find(config_of(run), ("policy", "model"))
    facts = [
        ("Policy", policy if isinstance(policy, str) else ""),
        ("Seed", _flat(raw.get("seed", _find(run.manifest, ("seed", "seeds"))))),
        ("Steps", f"{run.metrics.last_step:,}" if run.metrics.last_step else ""),
        ("Time", formatting.duration(seconds) if seconds is not None else ""),
        ("Peak memory", f"{memory:.2f} GiB" if memory is not None else ""),
        ("Hardware", _flat(_find(run.manifest, ("hardware", "device")))),
    ]
    if seconds is None and so_far is not None:
        facts[3] = ("Time so far", formatting.duration(so_far))
    return [(term, value) for term, value in facts if value]


def config_of(run: RunRecord) -> object:
    """The values of config.yaml; None while it is being written."""
    try:
        return yaml.safe_load(run.config)
    except yaml.YAMLError:
        return None  # half written; the text itself is on the page


def _command(manifest: Mapping[str, Any]) -> str:
    command = _find(manifest, ("command", "argv"))
    return " ".join(map(str, command)) if isinstance(command, list) else _flat(command)


def _find(tree: object, names: tuple[str, ...]) -> Any:
    """The value of the first of these names, the upper levels before the lower ones."""
    level = [tree]
    while level:
        for name in names:
            for node in level:
                if isinstance(node, Mapping) and node.get(name) not in (None, "", {}, []):
                    return node[name]
        level = [child for node in level if isinstance(node, Mapping) for child in node.values()]
    return None


def _flat(value: object) -> str:
    """A nested value in one line."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        parts = [(str(k).replace("_", " "), _flat(v)) for k, v in value.items()]
        return " · ".join(
            f"{k.removesuffix(' gib')} {v} GiB" if k.endswith(" gib") else f"{k} {v}" for k, v in parts if v
        )
    if isinstance(value, list):
        return ", ".join(_flat(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(notes: object) -> list[str]:
    if not notes:
        return []
    return [_flat(note) for note in notes] if isinstance(notes, list) else [_flat(notes)]


def _selected_grids(run: RunRecord, store: ImageStore) -> list[tuple[int, EmbeddedImage]]:
    """The first, the middle and the last picture of sampled groups."""
    last = len(run.grids) - 1
    chosen = dict.fromkeys((0, last // 2, last)) if run.grids else {}
    read = [(step, store.picture(path.resolve(), GRID_SIDE)) for step, path in (run.grids[i] for i in chosen)]
    return [(step, picture) for step, picture in read if picture is not None]


def environment() -> jinja2.Environment:
    """The templates of this folder, with their filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        score=formatting.score,
        compact=formatting.compact,
        words=lambda text: formatting.words(str(text)),
        tone=lambda cell: getattr(cell, "tone", ""),  # only a Cell has one
    )
    environment.globals.update(task_label=task_label)
    environment.tests["table"] = lambda value: isinstance(value, Mapping)
    environment.tests["listing"] = lambda value: isinstance(value, list | tuple)
    return environment


# --- the live report ---

LOOPBACK = "127.0.0.1"
LOCAL_HOSTS = (LOOPBACK, "localhost")
"""Names in requests that are answered; others are of a page that points its own name at this machine."""
LOCK = ".lock"
"""File of a run with the id of the process that writes it."""


@dataclass(frozen=True)
class RunRow:
    """One run of the overview."""

    name: str
    state: str
    """running, finished, not healthy, stopped."""
    step: int | None
    steps: int | None
    headline: str
    charts: tuple[Chart, ...]


def overview(folder: Path) -> list[RunRow]:
    """The runs directly below a folder, the latest first. Raises InputError if there is none."""
    runs = [path for path in folder.iterdir() if _is_run(path)]
    if not runs:
        raise InputError(f"{folder}: holds no run directory: give a run, or the folder that holds some")
    rows = []
    for path in sorted(runs, key=_modified, reverse=True):
        run = load_run(path)
        config = config_of(run)
        steps = number(config.get("steps")) if isinstance(config, Mapping) else None
        rows.append(
            RunRow(
                path.name,
                run_state(path),
                run.metrics.last_step,
                None if steps is None else int(steps),
                verdict(run).headline,
                tuple(headline_charts(run.metrics)[:2]),
            )
        )
    return rows


def run_state(path: Path) -> str:
    """Whether a run is running, finished, not healthy (finished, exit code 3), or stopped before its end."""
    run = load_run(path)
    if _is_written(path):
        return "running"
    if not run.finished:
        return "stopped"
    health = run.summary.raw.get("health") if run.summary is not None else None
    return "not healthy" if isinstance(health, Mapping) and health.get("well") is False else "finished"


def page(folder: Path, name: str = "") -> str:
    """The report of ``folder``, if it is a run, or of its run ``name``; else the overview. Raises InputError."""
    if name:
        if name in (".", "..") or Path(name).name != name or not _is_run(folder / name):
            raise InputError(f"{name}: no run of {folder}")
        return render(load_run(folder / name))
    if _is_run(folder):
        return render(load_run(folder))
    style = markupsafe.Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return (
        environment().get_template("runs.html").render(folder=folder.resolve().name, rows=overview(folder), style=style)
    )


def serve(folder: Path, port: int, every_s: int) -> ThreadingHTTPServer:
    """A server on the loopback address; ``port`` 0: a free one. ``serve_forever`` runs it. Raises InputError.

    ``every_s``: seconds between two requests of a browser during a run.
    """
    page(folder)
    try:
        return ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, folder, every_s))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"port {port}: {why}: choose another with --port") from None


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, every_s: int, *connection: object) -> None:
        self.folder, self.every_s = folder, every_s
        super().__init__(*connection)  # type: ignore[arg-type]  # request, address and server, of the server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not printed."""

    def do_GET(self) -> None:
        """Answers with a page."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in LOCAL_HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        name = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        try:
            body = page(self.folder, name).encode()
        except InputError as error:
            self.send_error(HTTPStatus.NOT_FOUND, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if self._is_running(name):
            self.send_header("Refresh", str(self.every_s))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def _is_running(self, name: str) -> bool:
        run = self.folder / name if name else self.folder
        return not _is_run(run) or run_state(run) in ("running", "stopped")


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in MARKERS)


def _modified(path: Path) -> float:
    return max((path / name).stat().st_mtime for name in MARKERS if (path / name).is_file())


def _is_written(run: Path) -> bool:
    """Whether the process that is named in the lock of a run lives; locking it here could refuse a run that starts."""
    try:
        os.kill(int((run / LOCK).read_text(encoding="ascii")), 0)
    except (OSError, ValueError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True
