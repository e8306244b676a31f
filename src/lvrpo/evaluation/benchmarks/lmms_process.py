"""lmms-eval 0.7.3 as a subprocess in an environment of its own, with lvrpo as its model: a task in, its files out.

Every task is a process. A finished task is not run again; an interrupted one takes the answers that it has given
from a file (``lmms.AnswerFile``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import lvrpo
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.items import ItemStore, file_name
from lvrpo.evaluation.results import benchmark_difference, benchmark_result
from lvrpo.evaluation.suite import Evaluation
from lvrpo.policies.loading import policy_folder
from lvrpo.reading import parse_json, path_exists, read_json_object, read_text
from lvrpo.records import BenchmarkRecord, number

VERSION = "0.7.3"
REQUIREMENTS = "lmms_eval.txt"
"""In ``assets``: what ``install`` puts into the environment."""
LOG, OUTPUT, ANSWERS, IMAGES = "log.txt", "output", "answers.jsonl", "images"
"""In the folder of a task."""
LAST_LINES, MAX_EXCERPT = 3, 300
GRACE_S = 10.0
PROBE = """
import difflib, json, sys
found = {"version": None, "missing": None, "unknown": []}
try:
    from importlib.metadata import version
    import lmms_eval
    found["version"] = version("lmms_eval")
    import lvrpo.policies.loading, lvrpo.evaluation.benchmarks.lmms
    from lmms_eval.tasks import TaskManager
    managers = {}
    for name, folder in json.loads(sys.argv[1]):
        if folder not in managers:
            managers[folder] = TaskManager("ERROR", include_path=folder, model_name="lvrpo")
        manager = managers[folder]
        if not manager.match_tasks([name]):
            found["unknown"].append([name, next(iter(difflib.get_close_matches(name, manager.all_tasks, n=1)), None)])
except ImportError as error:
    found["missing"] = error.name or str(error)
print()
print(json.dumps(found))
"""
"""What an interpreter is asked first: its version of lmms-eval, a package that it lacks, tasks unknown to it."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"[\w.]+(Error|Exception): ")
_FAILED = re.compile(r"Error during evaluation: (.*?)(\. Please set `--verbosity|$)")


@dataclass(frozen=True)
class HarnessTask:
    """A task of lmms-eval, or of a YAML file in its format."""

    name: str
    folder: Path | None = None
    """Of the YAML file, whose other files it may name."""

    @classmethod
    def read(cls, text: str) -> HarnessTask:
        """A name, or FILE.yaml; raises InputError for a file that names no task."""
        if not text.endswith((".yaml", ".yml")):
            return cls(text)
        named = re.search(r"^task:\s*['\"]?([^\s'\"#]+)", read_text(Path(text), "give a YAML file of lmms-eval"), re.M)
        if named is None:
            raise InputError(f"{text}: has no key 'task': name it, as lmms-eval's own files do")
        return cls(named[1], Path(text).resolve().parent)


# --- the environment ---


def default_environment() -> Path:
    """Where the environment is made: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lvrpo" / f"lmms-eval-{VERSION}"


def find_interpreter(path: Path) -> Path:
    """The interpreter of an environment, or the file itself; raises InputError where there is none."""
    found = path / "bin" / "python" if path.is_dir() or not path_exists(path) else path
    if not found.is_file():
        raise InputError(
            f"{found}: no such interpreter: add --lmms-install to make the environment of lmms-eval {VERSION} there "
            "(several GB), or name one that has it (--lmms-env DIR or PYTHON)"
        )
    if not os.access(found, os.X_OK):
        raise InputError(f"{found}: cannot be executed: name an interpreter of Python, or the folder of an environment")
    return found


def install(folder: Path) -> None:
    """Makes the environment, or completes it, by uv where that is on the path and by pip otherwise.

    Raises InputError for a folder of another kind, ContractError where the installation fails.
    """
    if path_exists(folder) and not (folder / "pyvenv.cfg").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there and is no environment of Python: choose another folder (--lmms-env)")
    uv, python = shutil.which("uv"), str(folder / "bin" / "python")
    listed = str(resources.files("lvrpo") / "assets" / REQUIREMENTS)
    make = [uv, "venv", "--python", sys.executable, str(folder)] if uv else [sys.executable, "-m", "venv", str(folder)]
    fill = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    steps = [] if (folder / "bin" / "python").exists() else [make]
    for command in [*steps, [*fill, "-r", listed]]:
        try:
            code = subprocess.run([str(word) for word in command]).returncode
        except OSError as error:
            raise ContractError(f"{command[0]}: {error.strerror}: lmms-eval was not installed") from None
        if code:
            raise ContractError(
                f"{folder}: lmms-eval was not installed (code {code}, see above): repeat the command to continue"
            )


@contextmanager
def plugin_path() -> Iterator[Mapping[str, str]]:
    """The environment variables under which an interpreter imports this lvrpo, and lmms-eval finds its model."""
    with tempfile.TemporaryDirectory(prefix="lvrpo-lmms-") as folder:
        path = Path(folder)
        (path / "lvrpo").symlink_to(Path(lvrpo.__file__).resolve().parent, target_is_directory=True)
        info = path / f"lvrpo-{lvrpo.__version__}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lvrpo\nVersion: {lvrpo.__version__}\n")
        (info / "entry_points.txt").write_text(
            "[lmms_eval.models]\nlvrpo = lvrpo.evaluation.benchmarks.lmms:manifest\n"
        )
        found = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        yield {**os.environ, "PYTHONPATH": found}


def check_environment(python: Path, tasks: Sequence[HarnessTask]) -> str:
    """The version of lmms-eval; raises InputError where the interpreter lacks a package or a task is unknown."""
    asked = json.dumps([(task.name, task.folder and str(task.folder)) for task in tasks])
    with plugin_path() as variables:
        try:
            ended = subprocess.run(
                [python, "-c", PROBE, asked], env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise InputError(f"{python}: {error.strerror}: name an interpreter of Python (--lmms-env)") from None
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        raise InputError(f"{python}: lmms-eval cannot be asked: {excerpt(ended.stderr)}: fix its environment")
    found = parse_json(lines[-1], f"{python}: its answer", "name an interpreter of Python (--lmms-env)")
    remedy = "add --lmms-install, or name an environment that has it (--lmms-env)"
    if found["version"] is None:
        raise InputError(f"{python}: lmms-eval is not installed: {remedy}")
    if found["missing"] is not None:
        raise InputError(f"{python}: lacks the package {found['missing']}: {remedy}")
    if found["unknown"]:
        name, near = found["unknown"][0]
        hint = f"did you mean {near}?" if near else f"{python} -m lmms_eval tasks lists all"
        raise InputError(f"task {name!r}: unknown to lmms-eval {found['version']}: {hint}")
    return str(found["version"])


# --- a task ---


@dataclass(frozen=True)
class Harness:
    """An interpreter with lmms-eval, and how lvrpo answers in it."""

    python: Path
    version: str
    arguments: Mapping[str, str]
    """Of the model (``lmms_model.Lvrpo``), without ``pretrained`` and ``base``."""
    batch_size: int = 1
    limit: int | None = None
    """The first n documents of every task."""

    def run(self, task: HarnessTask, model: str, base: str | None, folder: Path) -> Path:
        """The output folder of a task for a MODEL; one that was finished in ``folder`` is not run again.

        Raises InputError where ``folder`` holds a task of other settings, and ContractError, with the last lines of
        the process, where it fails.
        """
        named = {"pretrained": model, **({} if base is None else {"base": base}), **self.arguments}
        own = ItemStore(folder).open(file_name(task.name), self._settings(task, model, base)).folder
        output = own / OUTPUT
        if result_file(output) is not None:
            return output
        named |= {"output_dir": str((own / IMAGES).resolve()), "answers": str((own / ANSWERS).resolve())}
        if wrong := next((value for value in named.values() if "," in value or "=" in value), None):
            raise InputError(f"{wrong}: lmms-eval takes no ',' or '=' in a value: rename the folder, or link to it")
        command = [str(self.python), "-m", "lmms_eval", "--model", "lvrpo", "--tasks", task.name]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in named.items())]
        command += ["--batch_size", str(self.batch_size), "--log_samples", "--output_path", str(output.resolve())]
        command += [] if self.limit is None else ["--limit", str(self.limit)]
        command += [] if task.folder is None else ["--include_path", str(task.folder)]
        code = run_logged(command, own / LOG)
        if code or result_file(output) is None:
            said = excerpt((own / LOG).read_text(errors="replace"))
            raise ContractError(f"lmms-eval: task {task.name} failed: {said}: see {own / LOG}")
        return output

    def _settings(self, task: HarnessTask, model: str, base: str | None) -> dict[str, Any]:
        """What the results of a task depend on. Any: JSON values."""
        return {
            "model": weights_stamp(model),
            "base": None if base is None else weights_stamp(base),
            "arguments": dict(self.arguments),
            "batch_size": self.batch_size,
            "limit": self.limit,
            "task": task.name,
            "defined_in": None if task.folder is None else str(task.folder),
            "lmms_eval": self.version,
        }


def weights_stamp(model: str) -> str:
    """Identifies the files of weights of a MODEL, by name, size and time, without reading them."""
    folder = policy_folder(model)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".distcp", ".json")]
    marks = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:12]


def result_file(output: Path) -> Path | None:
    """The last results that lmms-eval wrote there; None where it wrote none."""
    return next(iter(sorted(output.rglob("*_results.json"), reverse=True)), None)


def run_logged(command: Sequence[str], log: Path) -> int:
    """The exit code of a process whose output goes to a file; it is terminated with this one."""
    with plugin_path() as variables, log.open("wb") as file:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                process.kill()
                process.wait()


def excerpt(text: str) -> str:
    """Why a process failed, in one line: the error that ends it or that lmms-eval names, else the last lines."""
    lines = [line for each in text.splitlines() if (line := _COLOR.sub("", each).strip())]
    named = [found[1] for line in lines if (found := _FAILED.search(line)) and found[1]]
    named += [line for line in lines[-1:] if _RAISED.match(line)]
    said = named[-1] if named else " | ".join(lines[-LAST_LINES:])
    said = said or "it printed nothing"
    return said if len(said) <= MAX_EXCERPT else f"...{said[-MAX_EXCERPT:]}"


# --- results ---

RESTORE = "delete the folder of the task to run it again"
TOLERANCE = 1e-6
NOT_LOGGED, NO_NUMBER = "lmms-eval logged no answer", "lmms-eval gave no number"


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task."""

    value: float
    """As lmms-eval aggregates it."""
    n: int
    """Documents of the task."""
    record: BenchmarkRecord | None = None
    """Its samples; None where the value is not their mean."""

    def as_dict(self) -> dict[str, Any]:
        """As ``BenchmarkResult.as_dict``, with ``official``, the value of lmms-eval."""
        if self.record is not None:
            return {**benchmark_result(self.record).as_dict(), "official": self.value}
        return {**_plain(self.value, self.n), "official": self.value}

    def difference(self, after: HarnessScore) -> dict[str, Any]:
        """``after`` minus this, paired by document where both have the same."""
        if self.record is not None and after.record is not None and self.record.ids == after.record.ids:
            return benchmark_difference(self.record, after.record).as_dict()
        return _plain(after.value - self.value, self.n)


@dataclass(frozen=True)
class HarnessEvaluation(Evaluation):
    """An evaluation with tasks of lmms-eval beside our own benchmarks."""

    tasks: Mapping[str, HarnessScore] = field(default_factory=dict)
    """By ``task`` or ``task/metric``."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Tasks without results, and why."""

    def results(self) -> dict[str, Any]:
        """By title: score, low, high, n, categories, official."""
        return super().results() | {title: score.as_dict() for title, score in self.tasks.items()}

    def difference(self, after: Evaluation) -> dict[str, Any]:
        """By title that both have: ``after`` minus this."""
        later = after.tasks if isinstance(after, HarnessEvaluation) else {}
        both = {title: score.difference(later[title]) for title, score in self.tasks.items() if title in later}
        return super().difference(after) | both

    def as_dict(self) -> dict[str, Any]:
        """For JSON: results, and the scores of single samples where they are known."""
        found = super().as_dict()
        found["scores"] |= {title: score.record.as_dict() for title, score in self.tasks.items() if score.record}
        return {**found, "failed": dict(self.failed)}


def read_scores(output: Path, task: str) -> dict[str, HarnessScore]:
    """The scores of a finished task (of a group: of each of its tasks, and its own) by title.

    Raises ContractError where no document was scored, InputError for damaged files.
    """
    file = result_file(output)
    assert file is not None  # of a finished task
    found = read_json_object(file, RESTORE, finite=False)
    rows = {name: row for name, row in found.get("results", {}).items() if isinstance(row, Mapping)}
    counts = {name: int(each["effective"]) for name, each in found.get("n-samples", {}).items()}
    higher = found.get("higher_is_better", {})
    if not rows or not sum(counts.values()):
        raise ContractError(f"lmms-eval: task {task} scored no sample: see that its data and --n leave some")
    scores: dict[str, HarnessScore] = {}
    for name, row in rows.items():
        samples = _samples(file, name) if name in counts else {}
        metrics = _metrics(row)
        n = counts.get(name, sum(counts.values()))
        for (metric, kind), value in metrics.items():
            title = name if len(metrics) == 1 else f"{name}/{metric}"
            title += f" ({kind})" if sum(other == metric for other, _ in metrics) > 1 else ""
            title += " (lower is better)" if higher.get(name, {}).get(metric) is False else ""
            scores[title] = HarnessScore(value, n, _record(samples, metric, value, n))
    if not scores:
        raise ContractError(f"lmms-eval: task {task} has no score that is a number: see {file}")
    return scores


def _metrics(row: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """The numbers of a row by metric and filter, without standard errors. Any: JSON values."""
    found = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        as_number = number(value)
        if comma and as_number is not None and "_stderr" not in metric:
            found[metric, kind] = as_number
    return found


def _samples(results: Path, task: str) -> dict[str, Mapping[str, Any]]:
    """The logged samples by document; {} where a document is logged twice, by several filters. Any: JSON values."""
    path = results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
    if not path.is_file():
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    text = read_text(path, RESTORE).split("\n")  # not splitlines: an answer may hold U+2028
    lines = [(place, line) for place, line in enumerate(text, start=1) if line.strip()]
    for place, line in lines:
        row = parse_json(line, f"{path}:{place}", RESTORE, finite=False)
        found[str(row.get("doc_id"))] = row
    return found if len(found) == len(lines) else {}


def _record(samples: Mapping[str, Mapping[str, Any]], metric: str, value: float, n: int) -> BenchmarkRecord | None:
    """The record of a metric whose mean over samples is ``value``, else None. Any: JSON values."""
    found = {
        key: number(float(s) if isinstance(s, bool) else s) for key, row in samples.items() for s in [row.get(metric)]
    }
    known = [each for each in found.values() if each is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    scale = next((s for s in (1.0, 100.0) if math.isclose(s * mean, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)), None)
    if scale is None:
        return None
    lost = [key for key in map(str, range(n)) if key not in found][: max(0, n - len(found))]
    ids = (*found, *lost)
    scores = tuple(math.nan if (each := found.get(key)) is None else scale * each for key in ids)
    reasons = tuple(NOT_LOGGED if key not in found else NO_NUMBER if found[key] is None else "" for key in ids)
    return BenchmarkRecord(
        ids,
        tuple("" for _ in ids),
        tuple(_cluster(samples.get(key), key) for key in ids),
        scores,
        settings={"scored_by": f"lmms-eval, {metric}"},
        metric="success" if all(0 <= each <= 1 for each in known) and scale == 1 else "reward",
        failures=reasons if any(reasons) else (),
    )


def _cluster(sample: Mapping[str, Any] | None, key: str) -> str:
    """The unit of the bootstrap: the images, where they are named, else the document."""
    media: Sequence[Any] = (sample or {}).get("input_media") or ()
    return json.dumps(media) if media else key


def _plain(value: float, n: int) -> dict[str, Any]:
    return {"score": value, "low": None, "high": None, "n": n, "categories": {}, "metric": "reward"}
