"""The baseline beside an alignment: a supervised run of the same base, trained and evaluated in its own process."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from lvrpo.errors import ContractError, InputError, LvrpoError
from lvrpo.evaluation.cases import read_evaluation
from lvrpo.evaluation.suite import Evaluation, Measuring, evaluate, find_benchmarks
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import START, load_policy
from lvrpo.reading import is_there
from lvrpo.records import Cost
from lvrpo.training.checkpoint import SEAL
from lvrpo.training.memory import peak_memory_gib
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.run_directory import RunDirectory

RESULT = "eval/after.json"


class Baseline:
    """A second process; ``wait`` gives its evaluation."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        benchmarks: Sequence[str],
        sizes: Mapping[str, int],
        sampling: Sampling,
        sampled_prompts: int = 0,
    ) -> None:
        self.config = config
        self.folder = folder
        self.arguments = (config, folder, list(benchmarks), dict(sizes), sampling, sampled_prompts)
        self.process: SpawnProcess | None = None

    @property
    def finished(self) -> bool:
        """Whether its evaluation is written."""
        return is_there(self.folder / RESULT)

    def start(self) -> None:
        """Starts it, or lets it go on from its last checkpoint."""
        if not self.finished:
            self.process = multiprocessing.get_context("spawn").Process(target=_work, args=self.arguments, daemon=True)
            self.process.start()

    def wait(self) -> tuple[Evaluation, Cost]:
        """Its evaluation and what it took; raises ContractError if it failed."""
        if self.process is not None:
            self.process.join()
            if self.process.exitcode != 0:
                why = _text(self.folder.with_suffix(".error")) or f"exit code {self.process.exitcode}"
                raise ContractError(f"the baseline in {self.folder} failed: {why}: run again, or use --no-baseline")
        record = read_evaluation(RunDirectory.read(self.folder), RESULT)
        if record.cost is None:
            raise InputError(f"{self.folder / RESULT}: cost is missing: restore the file")
        return Evaluation(record.scores, seconds=record.seconds), record.cost

    def stop(self) -> None:
        """Ends the process; what it has done up to its last checkpoint stays."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _work(
    config: PretrainConfig,
    folder: Path,
    benchmarks: Sequence[str],
    sizes: Mapping[str, int],
    sampling: Sampling,
    sampled_prompts: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    error_file = folder.with_suffix(".error")
    try:
        error_file.unlink(missing_ok=True)
        train_and_evaluate(config, folder, benchmarks, sizes, sampling, sampled_prompts)
    except BaseException as error:
        line = " ".join(str(error).split()) or type(error).__name__
        error_file.write_text(line if isinstance(error, LvrpoError) else traceback.format_exc(limit=-2))
        sys.exit(1)


def train_and_evaluate(
    config: PretrainConfig,
    folder: Path,
    benchmarks: Sequence[str],
    sizes: Mapping[str, int],
    sampling: Sampling,
    sampled_prompts: int = 0,
) -> None:
    """The whole baseline in this process, or what an interruption left of it; ends with eval/after.json.

    Its best of n is chosen by the base that it started from, as that of the alignment is.
    """
    parent = multiprocessing.parent_process()

    def end_with_parent(row: Mapping[str, Any]) -> None:
        if parent is not None and not parent.is_alive():
            sys.exit(1)

    begun = (folder / START / SEAL).exists()
    trainer = Pretrainer.resume(folder, config) if begun else Pretrainer.start(config, folder)
    with trainer.run as run:
        trainer.train(end_with_parent)
        judge = None if config.init is None else load_policy(config.init, config.device, "float32").make_reference()
        measuring = Measuring(sampled_prompts, judge=judge)
        found = find_benchmarks(benchmarks)
        evaluation = evaluate(trainer.state.average, found, sizes=sizes, sampling=sampling, measuring=measuring)
        cost = Cost(trainer.state.seconds, peak_memory_gib())
        run.write_json(RESULT, {**evaluation.as_dict(), "cost": asdict(cost)})


def _text(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split()) if path.exists() else ""
