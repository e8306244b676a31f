"""The process of a tracker: follows the files of a run directory and sends new content.

python -m lvrpo.training.tracker_process RUN KIND, started by ``lvrpo.training.trackers``, whose death or closing of the
standard input ends it. It loads no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import io
import json
import os
import re
import select
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lvrpo.config import parse_section, read_yaml
from lvrpo.errors import describe_error
from lvrpo.training.trackers import FOLDER, MlflowConfig, TensorBoardConfig, TrackioConfig, WandbConfig

POLL_S = 1.0
"""Seconds between two looks at the files."""
RETRY_S = 30.0
"""Seconds after which a tracker that failed is connected again."""
ANSWERS = ("task", "prompt", "right answer", "member", "answer", "success", "rewards")
RESULTS = ("benchmark", "before", "after", "difference", "low", "high")


class Tracker(Protocol):
    """Sends the files of a run to a tracker."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""
        ...

    def image(self, step: int, name: str, file: Path) -> None:
        """An image file."""
        ...

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table. Any: texts, numbers and None."""
        ...

    def finish(self) -> None:
        """Sends the remaining content."""
        ...


class TensorBoardTracker:
    """Event files by tensorboardX; a table is a text in Markdown."""

    def __init__(self, config: TensorBoardConfig, run: Path, settings: Mapping[str, Any], state: dict[str, Any]):
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # loaded where it is found, for nothing
        library = importlib.import_module("tensorboardX")
        suffix = f".{os.getpid()}"  # else a file of the same second is written over
        self.writer = library.SummaryWriter(str(run / FOLDER / "tensorboard"), flush_secs=5, filename_suffix=suffix)
        if "id" not in state:
            self.writer.add_text("config", f"```\n{json.dumps(settings, indent=1)}\n```", 0)
            state["id"] = run.name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, file: Path) -> None:
        content = file.read_bytes()  # a PNG, as it is
        width, height = struct.unpack(">II", content[16:24])
        proto = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        encoded = proto.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self.writer.file_writer.add_summary(proto(value=[proto.Value(tag=name, image=encoded)]), step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in line] for line in lines]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)

    def finish(self) -> None:
        self.writer.close()


class _LogTracker:
    """A tracker with the calls of Weights & Biases: ``log``, ``Image``, ``Table``. Any: a package, functions, cells."""

    def __init__(
        self, library: Any, log: Any, finish: Callable[[], object], cell: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """``cell``: what a table holds of a value."""
        self.library, self.log, self.cell, self._finish = library, log, cell, finish

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.log(dict(values), step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self.log({name: self.library.Image(str(file))}, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        data = [[self.cell(value) for value in row] for row in rows]
        self.log({name: self.library.Table(columns=list(columns), data=data)}, step=step)

    def finish(self) -> None:
        self._finish()


class WandbTracker(_LogTracker):
    """Weights & Biases."""

    def __init__(self, config: WandbConfig, run: Path, settings: Mapping[str, Any], state: dict[str, Any]):
        library = importlib.import_module("wandb")
        quiet = library.Settings(console="off", silent=True)
        started = library.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=run.name,
            id=state.setdefault("id", os.urandom(6).hex()),
            resume="allow",
            dir=str(run / FOLDER),
            config=dict(settings),
            settings=quiet,
        )
        super().__init__(library, started.log, started.finish, _cell)


class TrackioTracker(_LogTracker):
    """trackio."""

    def __init__(self, config: TrackioConfig, run: Path, settings: Mapping[str, Any], state: dict[str, Any]):
        library = importlib.import_module("trackio")
        name = state.setdefault("id", f"{run.name}-{os.urandom(3).hex()}")
        # a Space that does not exist is created, by default for everybody to read
        where = {} if config.space_id is None else {"space_id": config.space_id, "private": True}
        library.init(project=config.project, name=name, config=dict(settings), resume="allow", **where)
        super().__init__(library, library.log, library.finish)


class MlflowTracker:
    """MLflow, whose names have letters, digits, _, -, ., / and spaces."""

    def __init__(self, config: MlflowConfig, run: Path, settings: Mapping[str, Any], state: dict[str, Any]):
        # the library would repeat a request for minutes without a word; a later connection sends what is missing
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use to its makers
        self.library = importlib.import_module("mlflow")
        self.library.end_run()  # of a connection that was lost
        folder, server = (run / FOLDER).resolve(), config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.library.set_tracking_uri(server or f"sqlite:///{folder / 'mlflow.db'}")
        if server is None and self.library.get_experiment_by_name(config.experiment) is None:
            # the default is a folder mlruns in the current folder
            self.library.create_experiment(config.experiment, (folder / "mlflow").as_uri())
        self.library.set_experiment(config.experiment)
        known = {"run_id": state["id"]} if "id" in state else {"run_name": run.name}
        state["id"] = self.library.start_run(**known).info.run_id
        self.library.log_dict(dict(settings), "config.json")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.library.log_metrics({_mlflow_name(name): value for name, value in values.items()}, step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self.library.log_artifact(str(file), f"{_mlflow_name(name)}/step_{step:06d}")

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        data = {column: [_cell(row[i]) for row in rows] for i, column in enumerate(columns)}
        self.library.log_table(data, f"{_mlflow_name(name)}/step_{step:06d}.json")

    def finish(self) -> None:
        self.library.end_run()


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-./ ]", "_", name)


def _cell(value: Any) -> Any:
    """One type in a column: texts. Any: texts, numbers and None."""
    return "" if value is None else str(value)


CLASSES = {
    "tensorboard": (TensorBoardConfig, TensorBoardTracker),
    "wandb": (WandbConfig, WandbTracker),
    "trackio": (TrackioConfig, TrackioTracker),
    "mlflow": (MlflowConfig, MlflowTracker),
}


# --- what is sent ---


class Follower:
    """Sends the new parts of a run directory: what was sent before, by the state that is kept, is not sent again.

    A resumed run writes the steps after its checkpoint again, with the same numbers, so they count as sent.
    """

    def __init__(self, run: Path, tracker: Tracker, state: dict[str, Any]) -> None:
        self.run, self.tracker, self.state = run, tracker, state
        self._offset = 0

    def send_new(self, keep: Callable[[], object] = lambda: None) -> bool:
        """Sends new content, and calls ``keep`` after each step; returns whether there was any."""
        sent = False
        for row in self._rows():
            step = int(row["step"])
            if step > self.state.get("step", -1):
                numbers = {k: v for k, v in row.items() if type(v) in (int, float) and k != "step"}
                self.tracker.scalars(step, numbers)
                self._samples(step)
                self.state["step"] = step
                keep()
                sent = True
        return self._summary() or sent

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The whole lines of metrics.jsonl that were not seen yet."""
        file = self.run / "metrics.jsonl"
        if not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)

    def _samples(self, step: int) -> None:
        """The grid and the answers of a step, which are written before its metrics."""
        folder = self.run / "samples" / f"step_{step:06d}"
        if (folder / "grid.png").exists():
            self.tracker.image(step, "samples", folder / "grid.png")
        if (folder / "groups.jsonl").exists():
            rows = []
            for line in (folder / "groups.jsonl").read_text(encoding="utf-8").splitlines():
                group = json.loads(line)
                for number, member in enumerate(group["members"]):
                    texts = (group["task"], group["prompt"], group["answer"], number, member["text"])
                    rewards = " ".join(f"{k}={v:.3g}" for k, v in member["rewards"].items() if v is not None)
                    rows.append((*texts, member["success"], rewards))
            self.tracker.table(step, "answers", ANSWERS, rows)

    def _summary(self) -> bool:
        """The final table, once for each summary.json."""
        file = self.run / "summary.json"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text or digest == self.state.get("summary"):
            return False
        summary, rows = json.loads(text), []
        for name, after in summary.get("after", {}).items():
            before, change = (summary.get(part, {}).get(name, {}) for part in ("before", "difference"))
            rows.append((name, before.get("score"), after["score"], *(change.get(k) for k in ("score", "low", "high"))))
        if rows:  # none without an evaluation
            self.tracker.table(max(self.state.get("step", 0), 0), "results", RESULTS, rows)
        self.state["summary"] = digest
        return True


def follow(follower: Follower, keep: Callable[[], None], ended: Callable[[], bool]) -> None:
    """Sends new content until the run has ended, then the rest; ``keep``: writes the state."""
    keep()
    while True:
        last = ended()
        if follower.send_new(keep):
            keep()
        if last:
            follower.tracker.finish()
            return


def _write(file: Path, text: str) -> None:
    """Whole or not at all; ``lvrpo.atomic_io`` loads torch."""
    whole = file.with_name(f".{file.name}.tmp")
    whole.write_text(text, encoding="utf-8")
    whole.replace(file)


def main(run: Path, kind: str) -> int:
    """The process: 0 when the run has ended and all is sent, 1 when something could not be sent.

    The first failure prints one line; then the tracker is connected again every ``RETRY_S`` until the run ends.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    console = os.dup(2)
    log = os.open(folder / f"{kind}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)  # libraries print as they like
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the process ends without a flush
    # of this process alone, as those that libraries start inherit log; writable, else NFS refuses an exclusive lock
    lock = os.open(folder / f"{kind}.log", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the tracker of a killed run, which sends the rest
    ended, warned = False, False
    while True:
        try:
            _send(run, kind)
            return 0
        except Exception as error:  # of libraries, the network, the disk: the run goes on
            importlib.import_module("traceback").print_exc()
            words = " ".join(describe_error(error).split())[:200]
            later = f"the run continues, and it is tried again every {RETRY_S:g} s (see {folder / f'{kind}.log'})"
            if not warned:
                os.write(console, f"warning: tracker {kind}: {words}: {later}\n".encode())
            if ended:
                return 1
            ended, warned = _run_ended(RETRY_S), True


def _run_ended(seconds: float) -> bool:
    """Whether the standard input is closed, at once or within so many seconds."""
    return bool(select.select([0], [], [], seconds)[0])


def _send(run: Path, kind: str) -> None:
    """Connects the tracker and follows the run to its end; raises any error of the library."""
    file = run / FOLDER / f"{kind}.json"
    settings = read_yaml(run / "config.yaml")
    section = next(each for each in settings["trackers"] if each["kind"] == kind)
    config_class, tracker_class = CLASSES[kind]
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tracker = tracker_class(parse_section(config_class, section, f"trackers.{kind}"), run, settings, state)
    try:
        follow(Follower(run, tracker, state), lambda: _write(file, json.dumps(state)), lambda: _run_ended(POLL_S))
    finally:
        _write(file, json.dumps(state))  # a failure in the middle: what was sent before it is not sent again


if __name__ == "__main__":
    os._exit(main(Path(sys.argv[1]), sys.argv[2]))  # no thread of a library holds up the end
