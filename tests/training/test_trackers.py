"""Trackers: what they are sent, once, over resumptions; a tracker that is down or slow costs the run nothing."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from lvrpo.config import load_config, parse_section
from lvrpo.errors import InputError
from lvrpo.registry import allow_code
from lvrpo.strict_yaml import dump_yaml
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.tracker_process import CLASSES, Follower
from lvrpo.training.trackers import AnyTracker, MlflowConfig, TrackerProcesses, TrackioConfig, require_trackers
from lvrpo.training.trainer import Trainer

ROWS = [
    {"step": 0, "validation/generate": 0.25},
    {"step": 1, "reward/generate/a:b": 0.5, "seconds": 3, "validation/action": "best", "ok": True, "lost": None},
    {"step": 2, "reward/generate/a:b": 0.75},
]
GROUP = {
    "task": "understand",
    "prompt": "what | color ?",
    "answer": "red",
    "members": [
        {"text": "blue", "success": 0.0, "rewards": {"exact": 0.0, "failed": None}},
        {"text": "red", "success": 1.0, "rewards": {"exact": 1.0, "failed": None}},
    ],
}
SUMMARY = {
    "before": {"generate": {"score": 0.25}},
    "after": {"generate": {"score": 0.5}},
    "difference": {"generate": {"score": 0.25, "low": 0.1, "high": 0.4}},
}


def write_run(rows: list[dict[str, Any]], trackers: list[dict[str, Any]], summary: bool = True) -> Path:
    run = Path("myrun")
    (run / "samples/step_000001").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_yaml({"name": "myrun", "steps": 2, "trackers": trackers}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (6, 4), "red").save(run / "samples/step_000001/grid.png")
    (run / "samples/step_000001/groups.jsonl").write_text(json.dumps(GROUP) + "\n")
    if summary:
        (run / "summary.json").write_text(json.dumps(SUMMARY))
    return run


class Recorder:
    """A tracker that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def scalars(self, step: int, values: Any) -> None:
        self.sent.append((step, dict(values)))

    def image(self, step: int, name: str, file: Path) -> None:
        self.sent.append((step, name, file.name))

    def table(self, step: int, name: str, columns: Any, rows: Any) -> None:
        self.sent.append((step, name, len(columns), list(rows)))

    def finish(self) -> None:
        self.sent.append(("finished",))


SENT = [
    (0, {"validation/generate": 0.25}),
    (1, {"reward/generate/a:b": 0.5, "seconds": 3}),
    (1, "samples", "grid.png"),
    (
        1,
        "answers",
        7,
        [
            ("understand", "what | color ?", "red", 0, "blue", 0.0, "exact=0"),
            ("understand", "what | color ?", "red", 1, "red", 1.0, "exact=1"),
        ],
    ),
    (2, {"reward/generate/a:b": 0.75}),
    (2, "results", 6, [("generate", 0.25, 0.5, 0.25, 0.1, 0.4)]),
]


def test_numbers_samples_answers_and_the_final_table_are_sent_once() -> None:
    run, tracker, state = write_run(ROWS[:2], [], summary=False), Recorder(), dict[str, Any]()
    follower = Follower(run, tracker, state)
    assert follower.send_new()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[2])[:10])
        file.flush()
        assert not follower.send_new()  # a line that is not whole
        file.write(json.dumps(ROWS[2])[10:] + "\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    assert follower.send_new()
    assert not follower.send_new()
    assert tracker.sent == SENT


def test_a_resumed_run_is_continued_and_not_sent_twice() -> None:
    """The steps after a checkpoint are written again."""
    state: dict[str, Any] = {}
    first, second = Recorder(), Recorder()
    Follower(write_run(ROWS[:2], [], summary=False), first, state).send_new()
    state = json.loads(json.dumps(state))
    Follower(write_run(ROWS[:1], [], summary=False), second, state).send_new()
    assert second.sent == []
    Follower(write_run(ROWS, []), second, state).send_new()
    assert first.sent + second.sent == SENT


# --- the libraries ---


def events(folder: Path) -> Iterator[Any]:
    """The events of event files: length, checksum, event, checksum."""
    event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    for file in sorted(folder.glob("events.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            yield event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16


def process_of(run: Path, kind: str, **keys: Any) -> TrackerProcesses:
    return TrackerProcesses(run, [TypeAdapter(AnyTracker).validate_python({"kind": kind, **keys})])


def test_tensorboard_reads_back_what_the_run_wrote() -> None:
    pytest.importorskip("tensorboardX")
    run = write_run(ROWS, [{"kind": "tensorboard"}])
    for _ in range(2):  # the second has nothing to send
        processes = process_of(run, "tensorboard", timeout_s=60)
        processes.start()
        processes.close()
    found = [(e.step, v) for e in events(run / "trackers/tensorboard") for v in e.summary.value]
    numbers = {(step, v.tag): v.simple_value for step, v in found if v.WhichOneof("value") == "simple_value"}
    assert numbers == {
        (0, "validation/generate"): 0.25,
        (1, "reward/generate/a_b"): 0.5,
        (1, "seconds"): 3.0,
        (2, "reward/generate/a_b"): 0.75,
    }
    (image,) = [v.image for _, v in found if v.WhichOneof("value") == "image"]
    assert (image.width, image.height) == (6, 4)
    texts = {v.tag.partition("/")[0]: v.tensor.string_val[0].decode() for _, v in found if v.tensor.string_val}
    assert '"steps": 2' in texts["config"]
    assert r"| understand | what \| color ? | red | 1 | red | 1.0 | exact=1 |" in texts["answers"]
    assert "| generate | 0.25 | 0.5 | 0.25 | 0.1 | 0.4 |" in texts["results"]
    assert len([1 for _, v in found if v.tag.startswith("config")]) == 1


def test_wandb_offline_writes_its_files() -> None:
    pytest.importorskip("wandb")
    run = write_run(ROWS, [{"kind": "wandb", "mode": "offline"}])
    processes = process_of(run, "wandb", mode="offline", timeout_s=120)
    processes.start()
    processes.close()
    (file,) = (run / "trackers/wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(name in content for name in (b"reward/generate/a:b", b"validation/generate", b"answers", b"results"))
    tables = {f.name.partition("_")[0]: json.loads(f.read_text()) for f in file.parent.rglob("*.table.json")}
    assert tables["results"]["data"] == [["generate", "0.25", "0.5", "0.25", "0.1", "0.4"]]
    assert len(tables["answers"]["data"]) == 2
    state = json.loads((run / "trackers/wandb.json").read_text())
    assert file.name == f"run-{state['id']}.wandb"
    assert state["step"] == 2


def send_twice(kind: str) -> tuple[Path, dict[str, Any]]:
    """A run sent to a local store, in parts as over a resumption: the run, and the state of its tracker."""
    for rows, summary in ((ROWS[:2], False), (ROWS, True)):
        processes = process_of(write_run(rows, [{"kind": kind}], summary), kind, timeout_s=120)
        processes.start()
        (process,) = processes.processes
        processes.close()
        assert process.returncode == 0
    return Path("myrun"), json.loads(Path(f"myrun/trackers/{kind}.json").read_text())


def test_mlflow_keeps_a_run_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, state = send_twice("mlflow")
    assert {path.name for path in Path().iterdir()} == {"myrun"}
    code = (
        "import json, sys, mlflow\nclient = mlflow.MlflowClient(sys.argv[1])\n"
        "(found,) = client.search_runs([client.get_experiment_by_name('lvrpo').experiment_id])\n"
        "history = client.get_metric_history(found.info.run_id, 'reward/generate/a_b')\n"
        "print(json.dumps([found.info.run_id, found.info.status, [[m.step, m.value] for m in history]]))"
    )
    store = f"sqlite:///{run.resolve()}/trackers/mlflow.db"
    read = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, check=True)
    assert json.loads(read.stdout.splitlines()[-1]) == [state["id"], "FINISHED", [[1, 0.5], [2, 0.75]]]
    kept = {f"{path.parent.name}/{path.name}" for path in (run / "trackers/mlflow").rglob("*.*") if path.is_file()}
    assert kept == {
        "artifacts/config.json",
        "step_000001/grid.png",
        "answers/step_000001.json",
        "results/step_000002.json",
    }


def test_trackio_keeps_every_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(Path("store").resolve()))
    _, state = send_twice("trackio")
    with closing(sqlite3.connect("store/lvrpo.db")) as store:
        found = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in found} == {state["id"]}
    logged = [(step, json.loads(metrics)) for _, step, metrics in found]
    assert [(step, m) for step, m in logged if not {"samples", "answers", "results"} & m.keys()] == [
        (0, {"validation/generate": 0.25}),
        (1, {"reward/generate/a:b": 0.5, "seconds": 3}),
        (2, {"reward/generate/a:b": 0.75}),
    ]
    tables = {name: m[name]["_value"] for _, m in logged for name in ("answers", "results") if name in m}
    assert [row["answer"] for row in tables["answers"]] == ["blue", "red"]
    assert [(row["benchmark"], row["after"]) for row in tables["results"]] == [("generate", 0.5)]
    assert len(list(Path("store/media").rglob("*.png"))) == 1


class Stub(SimpleNamespace):
    """A library that keeps its calls."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.calls.append((name, *given, *named.items()))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"), given=given)

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def tracked(kind: str, config: AnyTracker, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any]) -> Stub:
    run, library = write_run(ROWS, []), Stub()
    monkeypatch.setitem(sys.modules, kind, library)  # type: ignore[arg-type]  # a stub of a module
    tracker = CLASSES[kind][1](config, run, {"steps": 2}, state)  # type: ignore[arg-type]  # the class of the kind
    Follower(run, tracker, state).send_new()
    tracker.finish()
    return library


def test_mlflow_is_called_as_its_interface_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_section(MlflowConfig, {"kind": "mlflow", "tracking_uri": "http://host:5000"}, "t")
    state: dict[str, Any] = {}
    library = tracked("mlflow", config, monkeypatch, state)
    assert library.named("set_tracking_uri") == [("http://host:5000",)]
    assert library.named("start_run") == [(("run_name", "myrun"),)]
    assert library.named("log_metrics")[1] == ({"reward/generate/a_b": 0.5, "seconds": 3}, ("step", 1))
    assert library.named("log_dict") == [({"steps": 2}, "config.json")]
    assert [table[1] for table in library.named("log_table")] == [
        "answers/step_000001.json",
        "results/step_000002.json",
    ]
    assert library.named("log_artifact")[0][1] == "samples/step_000001"
    assert library.calls[-1] == ("end_run",)
    again = tracked("mlflow", config, monkeypatch, state)
    assert again.named("start_run") == [(("run_id", "r1"),)]
    assert not again.named("log_metrics")


def test_trackio_is_called_as_its_interface_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_section(TrackioConfig, {"kind": "trackio", "space_id": "me/space"}, "t")
    state: dict[str, Any] = {}
    library = tracked("trackio", config, monkeypatch, state)
    (given,) = library.named("init")
    assert dict(given) == {
        "project": "lvrpo",
        "name": state["id"],
        "config": {"steps": 2},
        "resume": "allow",
        "space_id": "me/space",
        "private": True,  # nothing public by accident
    }
    logged = library.named("log")
    assert logged[1] == ({"reward/generate/a:b": 0.5, "seconds": 3}, ("step", 1))
    assert [next(iter(call[0])) for call in logged[2:4]] == ["samples", "answers"]
    assert library.calls[-1] == ("finish",)
    again = tracked("trackio", config, monkeypatch, state)
    assert dict(again.named("init")[0])["name"] == state["id"]


# --- trackers that are down or slow ---


def stub_package(monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """A library of this name for the processes that are started."""
    Path("stubs").mkdir()
    Path(f"stubs/{name}.py").write_text(code)
    paths = [str(Path("stubs").resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_a_tracker_that_is_down_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "def init(**given):\n    print('noise')\n    raise ConnectionError('no route to host')\n"
    stub_package(monkeypatch, "trackio", code)
    run = write_run(ROWS, [{"kind": "trackio"}])
    processes = process_of(run, "trackio", timeout_s=30)
    processes.start()
    (process,) = processes.processes
    processes.close()
    assert process.returncode == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "warning: tracker trackio: ConnectionError: no route to host: the run continues, and it is tried" in err
    assert (run / "trackers/trackio.log").read_text().count("noise") == 2  # at its start, and when the run ended


def test_a_tracker_that_is_back_gets_what_it_missed_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import pathlib\nsent = pathlib.Path('sent.txt')\nImage = Table = lambda *given, **named: None\n"
        "def init(**given):\n    pass\ndef finish():\n    pass\n"
        "def log(values, step):\n"
        "    with sent.open('a') as file:\n        file.write(f'{step} {sorted(values)}\\n')\n"
        "    if step == 1 and len(sent.read_text().splitlines()) == 2:\n        raise ConnectionError('gone')\n"
    )
    stub_package(monkeypatch, "trackio", code)
    processes = process_of(write_run(ROWS, [{"kind": "trackio"}]), "trackio", timeout_s=30)
    processes.start()
    (process,) = processes.processes
    processes.close()
    assert process.returncode == 0
    assert capfd.readouterr().err.count("\n") == 1
    numbers = ["0 ['validation/generate']", *["1 ['reward/generate/a:b', 'seconds']"] * 2]
    rest = ["1 ['samples']", "1 ['answers']", "2 ['reward/generate/a:b']", "2 ['results']"]
    assert Path("sent.txt").read_text().splitlines() == [*numbers, *rest]


def test_a_run_resumed_while_its_old_tracker_still_sends_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import pathlib, time\nImage = Table = lambda *given, **named: None\n"
        "def init(**given):\n    pass\ndef finish():\n    pass\n"
        "def log(values, step):\n    with pathlib.Path('sent.txt').open('a') as file:\n"
        "        file.write(f'{step} {sorted(values)[0]}\\n')\n    time.sleep(1)\n"
    )
    stub_package(monkeypatch, "trackio", code)
    run = write_run(ROWS, [{"kind": "trackio"}], summary=False)
    old, new = (process_of(run, "trackio", timeout_s=30) for _ in range(2))
    old.start()
    while not Path("sent.txt").exists():
        time.sleep(0.01)
    stdin = old.processes[0].stdin
    assert stdin is not None
    stdin.close()  # as when the run is killed
    new.start()
    new.close()
    old.close()
    sent = ["0 validation/generate", "1 reward/generate/a:b", "1 samples", "1 answers", "2 reward/generate/a:b"]
    assert Path("sent.txt").read_text().splitlines() == sent


def test_a_tracker_that_hangs_is_stopped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_package(monkeypatch, "trackio", "import time\ndef init(**given):\n    time.sleep(600)\n")
    processes = process_of(write_run(ROWS, [{"kind": "trackio"}]), "trackio", timeout_s=0.5)
    began = time.monotonic()
    processes.start()
    assert time.monotonic() - began < 1
    (process,) = processes.processes
    with pytest.warns(UserWarning, match=r"tracker trackio: did not finish within 0\.5 s: what it lacks stands in"):
        processes.close()
    assert time.monotonic() - began < 5
    assert process.returncode == -9


def test_a_tracker_ends_with_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with one that is killed: the rest is sent, and the process ends."""
    pytest.importorskip("tensorboardX")
    run = write_run(ROWS, [{"kind": "tensorboard"}])
    code = (
        "import sys, os, time; from pathlib import Path; from lvrpo.training.trackers import *\n"
        "t = TrackerProcesses(Path(sys.argv[1]), [TensorBoardConfig(kind='tensorboard')]); t.start()\n"
        "print(t.processes[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == -9
    limit = time.monotonic() + 60
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert json.loads((run / "trackers/tensorboard.json").read_text())["step"] == 2


def test_the_process_of_a_tracker_loads_no_torch() -> None:
    code = "import sys, lvrpo.training.tracker_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- what is refused before a run starts ---


def test_a_missing_package_a_missing_key_and_a_wrong_address_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, *kinds: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=message):
            require_trackers([TypeAdapter(AnyTracker).validate_python(each) for each in kinds])

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        r"trackers\.mlflow: needs the package mlflow: install it with pip install 'lvrpo\[mlflow\]'", {"kind": "mlflow"}
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(Path("none").resolve()))
    refused(r"trackers\.wandb: there is no key: say wandb login", {"kind": "wandb"})
    Path("netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    monkeypatch.setenv("NETRC", str(Path("netrc").resolve()))
    require_trackers([TypeAdapter(AnyTracker).validate_python({"kind": "wandb"})])
    require_trackers([TypeAdapter(AnyTracker).validate_python({"kind": "wandb", "mode": "offline"})])
    refused("tensorboard is named twice", {"kind": "tensorboard"}, {"kind": "tensorboard"})
    with pytest.raises(ValidationError, match="must be an address such as"):
        TypeAdapter(AnyTracker).validate_python({"kind": "mlflow", "tracking_uri": "host"})


def test_a_run_is_shown_step_by_step_over_a_resumption(lively_base: Path) -> None:
    """Every step once, with the numbers of metrics.jsonl."""
    pytest.importorskip("tensorboardX")
    given = ["steps=4", "device=cpu", "rollout={group_size: 4, num_steps: 2}", "samples_every=2", "checkpoint_every=1"]
    given += [
        "data.prompts_per_step={understand: 0, generate: 1, edit: 0, reason: 0}",
        "trackers=[{kind: tensorboard}]",
    ]
    Path("t.jsonl").write_text('{"task": "generate", "prompt": "red circle"}\n')
    Path("mine.py").write_text("def mean(image):\n    return 100 * float(image.mean())\n")
    rows, data = "rewards=[{name: mine.py:mean}]", "data.jsonl={train: t.jsonl, validation: null, test: null}"
    config = load_config(TrainConfig, None, [f"policy={lively_base}", *given, rows, "data.source=jsonl", data])
    allow_code(["*"])
    seen: list[int] = []
    with pytest.warns(UserWarning, match="validation is not set"):
        trainer = Trainer.start(config, Path("run"))
    with trainer.run:
        assert not trainer.train(lambda row: seen.append(row["step"]), lambda: len(seen) >= 2)
    with pytest.warns(UserWarning, match="validation is not set"):
        trainer = Trainer.resume(Path("run"))
    with trainer.run:
        assert trainer.train()
    found = [(e.step, v) for e in events(Path("run/trackers/tensorboard")) for v in e.summary.value]
    shown = [(step, v.simple_value) for step, v in found if v.tag == "reward/generate/mean"]
    written = [(row["step"], row["reward/generate/mean"]) for row in RunDirectory.read(Path("run")).metrics()[1:]]
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    assert [value for _, value in shown] == pytest.approx([value for _, value in written])
    assert len([1 for _, v in found if v.WhichOneof("value") == "image"]) == 2


def test_a_pretraining_is_shown_too_over_a_resumption(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    given = [f"init={small_base}", "device=cpu", "steps=3", "batch={generate: 1}", "held_out_every=0"]
    given += ["corpus={scenes: 2, edits: 1, reasons: 1}", "checkpoint_every=1"]
    seen: list[int] = []
    config = load_config(PretrainConfig, None, [*given, "trackers=[{kind: tensorboard}]"])
    trainer = Pretrainer.start(config, Path("run"))
    with trainer.run:
        assert not trainer.train(lambda row: seen.append(row["step"]), lambda: bool(seen))
    trainer = Pretrainer.resume(Path("run"))
    with trainer.run:
        assert trainer.train()
    found = [(e.step, v) for e in events(Path("run/trackers/tensorboard")) for v in e.summary.value]
    assert [step for step, v in found if v.tag == "loss/image"] == [1, 2, 3]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package mlflow"):
        Pretrainer.start(load_config(PretrainConfig, None, [*given, "trackers=[{kind: mlflow}]"]), Path("other"))
    assert not Path("other").exists()
