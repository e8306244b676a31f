"""Trackers: a run shown in TensorBoard, Weights & Biases, trackio or MLflow.

Each tracker is a process that follows the files of the run directory, in which everything stands (``metrics.jsonl``,
``samples/``, ``summary.json``), and sends on what is new. The run does nothing for it in a step and never waits for it;
a tracker that fails says so in one line, and is connected again until the run ends. It keeps in ``trackers/KIND.json``
which run of its own it continues, and what it has sent.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from lvrpo.child import module_command
from lvrpo.config import Config
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from lvrpo.training.run_directory import RunDirectory  # loads torch, which the process of a tracker does without

FOLDER = "trackers"
"""Folder in the run directory."""
Text = Annotated[str, Field(min_length=1)]


class TrackerConfig(Config):
    """Fields of all trackers."""

    timeout_s: float = Field(default=15.0, gt=0, le=3600)
    """Seconds that a run waits at its end for unsent content."""


class TensorBoardConfig(TrackerConfig):
    """Event files, for ``tensorboard --logdir RUN/trackers``."""

    kind: Literal["tensorboard"]


class WandbConfig(TrackerConfig):
    """Weights & Biases; the key is that of ``wandb login`` or of the variable WANDB_API_KEY."""

    kind: Literal["wandb"]
    project: Text = "lvrpo"
    """Name of the project; the run in it has the name of its folder."""
    entity: Text | None = None
    """The user or team; null: that of the key."""
    mode: Literal["online", "offline"] = "online"
    """offline: into RUN/trackers, for ``wandb sync``."""


class TrackioConfig(TrackerConfig):
    """trackio, on this machine or in a Space of the Hub."""

    kind: Literal["trackio"]
    project: Text = "lvrpo"
    """Name of the project; the run in it has the name of its folder."""
    space_id: Text | None = None
    """A Space such as user/name, private if it has to be created; null: on this machine."""


class MlflowConfig(TrackerConfig):
    """MLflow, on this machine or on a server."""

    kind: Literal["mlflow"]
    experiment: Text = "lvrpo"
    """The experiment of the run, which has the name of its folder."""
    tracking_uri: Text | None = None
    """Address of the server, such as http://host:5000; null: MLFLOW_TRACKING_URI, else files in RUN/trackers."""

    @model_validator(mode="after")
    def _is_an_address(self) -> MlflowConfig:
        if self.tracking_uri is not None and not re.match(
            r"(https?|file|sqlite|postgresql|mysql)[^:]*://?.", self.tracking_uri
        ):
            raise ValueError(f"tracking_uri={self.tracking_uri}: must be an address such as http://host:5000")
        return self


AnyTracker = Annotated[TensorBoardConfig | WandbConfig | TrackioConfig | MlflowConfig, Field(discriminator="kind")]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def require_trackers(configs: Sequence[AnyTracker]) -> None:
    """Raises InputError for a tracker named twice, one whose package is not installed, and one that has no key."""
    kinds = [config.kind for config in configs]
    for config in configs:
        if kinds.count(config.kind) > 1:
            raise InputError(f"trackers: {config.kind} is named twice: name each once")
        if importlib.util.find_spec(PACKAGES[config.kind]) is None:
            raise InputError(
                f"trackers.{config.kind}: needs the package {PACKAGES[config.kind]}: install it with pip install "
                f"'lvrpo[{config.kind}]'"
            )
        if isinstance(config, WandbConfig) and config.mode == "online" and not _has_wandb_key():
            raise InputError(
                "trackers.wandb: there is no key: say wandb login, set WANDB_API_KEY, or use mode: offline"
            )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    with suppress(OSError):
        return f"machine {host}" in file.read_text(encoding="utf-8", errors="replace")
    return False


# --- in the process that trains ---


@dataclass
class TrackerProcesses:
    """The running trackers of a run."""

    run: Path
    configs: Sequence[AnyTracker]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Starts a process for each. It ends when this one closes its standard input, or dies."""
        for config in self.configs:
            command, environment = module_command("lvrpo.training.tracker_process", str(self.run), config.kind)
            # a session of its own: Ctrl-C ends the run, which then ends the trackers
            self.processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)
            )

    def close(self) -> None:
        """Lets all send the rest, for ``timeout_s`` at most; warns of one that has to be stopped."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        began = time.monotonic()
        for config, process in zip(self.configs, self.processes, strict=False):
            try:
                process.wait(max(config.timeout_s - (time.monotonic() - began), 0.1))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                warnings.warn(
                    f"tracker {config.kind}: did not finish within {config.timeout_s:g} s: what it lacks stands in "
                    f"{self.run / 'metrics.jsonl'}",
                    stacklevel=2,
                )
        self.processes.clear()


def start_trackers(run: RunDirectory, configs: Sequence[AnyTracker]) -> None:
    """Starts the trackers of a run on rank 0; closing the run directory ends them."""
    from lvrpo.distributed import is_main  # loads torch, which the process of a tracker does without

    if configs and is_main():
        processes = TrackerProcesses(run.path, configs)
        run.close_first(processes.close)
        processes.start()
