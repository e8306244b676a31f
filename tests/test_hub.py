"""``lvrpo push`` and ``lvrpo pull`` against a local server that answers as the Hub's API does."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from settings import SMALL

from lvrpo.cli import main
from lvrpo.policies.loading import load_policy, policy_folder

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
Output = pytest.CaptureFixture[str]


class Hub(ThreadingHTTPServer):
    """Repositories in memory; the token "good" is of "me", a member of "lab"."""

    repos: dict[str, dict[str, Any]]
    down = False


class Api(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, tree: Any, code: int = 200, **headers: str) -> None:
        body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.down:
            self._answer({"error": "maintenance"}, 503)
        elif path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer good"
            found = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"type": "access_token"}}
            self._answer(found if known else {"error": "Invalid username or password."}, 200 if known else 401)
        elif path.startswith("/api/models/"):
            org, name, *rest = path.removeprefix("/api/models/").split("/")
            repo = self.server.repos.get(f"{org}/{name}")
            if repo is None:
                self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif rest[:1] == ["tree"]:
                self._answer(
                    [{"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in repo["files"].items()]
                )
            else:
                files = [{"rfilename": file} for file in repo["files"]]
                self._answer({"id": f"{org}/{name}", "private": repo["private"], "sha": "a" * 40, "siblings": files})
        elif "/resolve/" not in path:
            self._answer({"error": "unknown"}, 404)
        else:
            org, name, _, _, *rest = path.strip("/").split("/")
            data = self.server.repos[f"{org}/{name}"]["files"].get("/".join(rest))
            if data is None:
                self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self._answer(data, ETag=f'"{hash(data)}"', X_Repo_Commit="a" * 40)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            private = made.get("private", made.get("visibility") == "private")
            self.server.repos[name] = {"private": private, "files": {}}
            self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/{name}", "name": name})
            return
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
            return
        org, name, what = path.removeprefix("/api/models/").split("/")[:3]
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self._answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        else:
            rows = [json.loads(row) for row in body.splitlines()]
            kept = self.server.repos[f"{org}/{name}"]["files"]
            kept.update(
                {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
            )
            self._answer(
                {
                    "commitUrl": f"http://127.0.0.1:{self.server.server_port}/{org}/{name}/commit/{'a' * 40}",
                    "commitOid": "a" * 40,
                    "success": True,
                }
            )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(("127.0.0.1", 0), Api)
    found.repos = {}
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture(scope="module")
def run(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "run"
    command = ["train", "quickstart", f"policy={small_base}", *SMALL, "steps=1", "--no-evaluate", "--out", str(folder)]
    assert main(command) == 0
    return folder


def test_a_run_is_pushed_privately_with_a_card_and_pulled_again(run: Path, server: Hub, tmp_path: Path) -> None:
    assert main(["push", str(run), "lab/aligned", "--license", "mit"]) == 0
    repo = server.repos["lab/aligned"]
    assert repo["private"]
    folder = policy_folder(run)
    assert set(repo["files"]) == {"README.md", "config.json", "model.safetensors", "tokenizer.json"} & set(
        repo["files"]
    )
    assert repo["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = repo["files"]["README.md"].decode()
    data = hub.ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "lvrpo", "any-to-any")
    assert "prompts_per_step" in card
    assert "not evaluated" in card

    assert main(["pull", "lab/aligned", str(tmp_path / "here")]) == 0
    one, other = load_policy(tmp_path / "here"), load_policy(folder)
    assert all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))  # type: ignore[attr-defined]
    assert main(["push", str(run), "lab/aligned", "--license", "mit"]) == 2
    assert main(["push", str(run), "lab/aligned", "--license", "mit", "--force"]) == 0


def test_nothing_is_sent_without_a_token_a_right_or_a_license(
    run: Path, server: Hub, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str, words: str, code: int = 2) -> None:
        assert main(["push", str(run), *arguments]) == code
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
        assert not any(repo["files"] for repo in server.repos.values())

    refused("aligned", "--license", "mit", words="write ORG/NAME")
    refused("me/aligned", words="add --license ID")
    refused("somebody/aligned", "--license", "mit", words="cannot write there: use me, lab")
    server.repos["me/open"] = {"private": False, "files": {}}
    refused("me/open", "--license", "mit", words="is public: add --public")
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused("me/aligned", "--license", "mit", words="not allowed")
    server.down = True
    refused("me/aligned", "--license", "mit", words="answered 503", code=1)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    refused("me/aligned", "--license", "mit", words="set HF_TOKEN")


def test_a_repository_is_called_what_it_is(run: Path, server: Hub, capsys: Output) -> None:
    server.repos["me/closed"] = {"private": True, "files": {}}
    assert main(["push", str(run), "me/closed", "--license", "mit", "--public"]) == 2
    assert "is private: leave out --public" in capsys.readouterr().err
    assert main(["push", str(run), "me/new", "--license", "mit", "--public"]) == 0
    assert "public" in capsys.readouterr().out
    assert not server.repos["me/new"]["private"]


def test_files_that_are_not_of_a_model_are_neither_sent_nor_fetched(
    run: Path, server: Hub, capsys: Output, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(policy_folder(run), folder)
    own = (".env", "train.py", "notes.docx", "state/x.json", ".git/config.json", "model.pkl")
    for name in own:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert main(["push", str(folder), "me/clean", "--license", "mit"]) == 0
    files = server.repos["me/clean"]["files"]
    assert "model.safetensors" in files
    assert not set(own) & set(files)
    files |= dict.fromkeys(("evil.py", "evil.pkl", "evil.so", "pytorch_model.bin"), b"code")
    assert main(["pull", "me/clean", str(tmp_path / "here")]) == 0
    assert not [path for path in (tmp_path / "here").rglob("*") if "evil" in path.name or path.suffix == ".bin"]


def test_a_card_can_be_read_before_anything_is_sent(run: Path, server: Hub, capsys: Output) -> None:
    assert main(["push", str(run), "me/aligned", "--license", "mit", "--card"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert not server.repos


def test_a_pull_of_what_is_not_there_leaves_nothing(server: Hub, capsys: Output, tmp_path: Path) -> None:
    assert main(["pull", "me/nothing", str(tmp_path / "here")]) == 2
    assert "not on the Hub" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()
    shutil.rmtree(tmp_path / "here.part", ignore_errors=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["pull", "me/nothing", str(tmp_path / "full")]) == 2
