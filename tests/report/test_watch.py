"""The report of runs that go on, over HTTP on the loopback address."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lvrpo.errors import InputError
from lvrpo.report.watch import LOCK, overview, run_state, serve


@contextmanager
def served(folder: Path) -> Iterator[Callable[..., tuple[int, str, str | None]]]:
    with serve(folder, 0, 7) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def get(path: str, host: str = "localhost") -> tuple[int, str, str | None]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            found = answer.status, answer.read().decode(), answer.getheader("Refresh")
            connection.close()
            return found

        try:
            yield get
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def finished(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes, alone in its folder."""
    return make_run(tmp_path_factory.mktemp("runs") / "mine", steps=5)


def test_a_run_that_goes_on_is_shown_anew(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", steps=5)
    assert run_state(run) == "finished"
    with served(run) as get:
        assert get("/")[0::2] == (200, None)
        (run / "summary.json").rename(run / "hidden.json")
        (run / "plan.json").write_text("{}")
        assert run_state(run) == "stopped"
        (run / LOCK).write_text(f"{os.getpid()}\n")
        assert run_state(run) == "running"
        code, body, refresh = get("/")
        assert (code, refresh) == (200, "7")
        assert run.name in body


def test_several_runs_have_an_overview_with_links(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run = make_run(folder / "mine", steps=5)
    (folder / "no run").mkdir()
    assert [row.name for row in overview(folder)] == [run.name]
    with served(folder) as get:
        code, body, refresh = get("/")
        assert (code, refresh) == (200, "7")
        assert f'href="/{run.name}"' in body
        assert "finished" in body
        assert "lvrpo report" in get(f"/{run.name}")[1]


@pytest.mark.parametrize("path", ["/nothing", "/..", "/%2e%2e/other", "/no%20run", "//etc/passwd"])
def test_nothing_else_is_served(finished: Path, path: str) -> None:
    with served(finished.parent) as get:
        assert get(path)[0] == 404


def test_a_page_under_another_name_of_this_machine_is_refused(finished: Path) -> None:
    with served(finished) as get:
        assert get("/", host="evil.example:80")[0] == 403


def test_a_folder_without_runs_and_a_port_in_use_are_one_line(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no run directory"):
        serve(tmp_path / "empty", 0, 7)
    with serve(finished, 0, 7) as server, pytest.raises(InputError, match="choose another with --port"):
        serve(finished, server.server_port, 7)
