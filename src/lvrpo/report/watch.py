"""The live report: an HTTP server on the loopback address for ``lvrpo watch``, a page per run and an overview."""

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

import markupsafe

from lvrpo.errors import InputError
from lvrpo.records import number
from lvrpo.report.charts import Chart, headline_charts
from lvrpo.report.page import HERE, config_of, environment, render
from lvrpo.report.run import MARKERS, load_run
from lvrpo.report.scores import verdict

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
