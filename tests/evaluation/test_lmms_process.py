"""``lvrpo evaluate --lmms-eval`` with an interpreter that stands for one with lmms-eval and writes its files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lvrpo.cli import main
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.benchmarks import lmms_process as process
from lvrpo.evaluation.benchmarks.lmms_process import NO_NUMBER, NOT_LOGGED, HarnessEvaluation, read_scores

Output = pytest.CaptureFixture[str]
STUB = """#!{python}
import json, pathlib, sys, time
here = pathlib.Path(__file__).parent
plan = json.loads((here / "plan.json").read_text())
if sys.argv[1] == "-c":
    unknown = [[name, "mme"] for name, _ in json.loads(sys.argv[3]) if name in plan.get("unknown", [])]
    print("a line of a library")
    print(json.dumps({{"version": "0.7.3", "missing": None, "unknown": unknown, **plan.get("probe", {{}})}}))
    sys.exit(plan.get("probe_code", 0))
words = [word for word in sys.argv[3:] if word != "--log_samples"]
given = dict(zip(words[::2], words[1::2]))
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps(given) + "\\n")
print("\\x1b[31mLoading\\x1b[0m")
task = plan["tasks"][given["--tasks"]]
if "sleep" in task:
    time.sleep(task["sleep"])
if "said" in task:
    print(task["said"])
    sys.exit(task.get("code", 0))
model = given["--model_args"].split(",")[0].split("=")[1].rpartition("/")[2]
out = pathlib.Path(given["--output_path"]) / model
out.mkdir(parents=True)
(out / "20261130_1_results.json").write_text(json.dumps(task["results"]))
for name, samples in task.get("samples", {{}}).items():
    rows = samples[model] if isinstance(samples, dict) else samples
    (out / f"20261130_1_samples_{{name}}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def results(n: int = 4, name: str = "pope", higher: bool = True, **metrics: Any) -> dict[str, Any]:
    """A results file as lmms-eval 0.7.3 writes it, as far as it is read."""
    row = {"alias": name, **{f"{key},none": value for key, value in metrics.items()}}
    row |= {f"{key}_stderr,none": 0.1 for key in metrics} | {f"{key}_stderr_clustered,none": "N/A" for key in metrics}
    return {
        "results": {name: row},
        "n-samples": {name: {"original": 9, "effective": n}},
        "higher_is_better": {name: dict.fromkeys(metrics, higher)},
    }


def samples(values: list[Any], metric: str = "acc") -> list[dict[str, Any]]:
    return [{"doc_id": i, "target": "x", metric: value} for i, value in enumerate(values)]


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    folder = tmp_path / "stub"
    folder.mkdir()
    python = folder / "python"
    python.write_text(STUB.format(python=sys.executable))
    python.chmod(0o755)
    return python


def plan(stub: Path, tasks: dict[str, Any], **more: Any) -> None:
    (stub.parent / "plan.json").write_text(json.dumps({"tasks": tasks, **more}))


def calls(stub: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (stub.parent / "calls.jsonl").read_text().splitlines()]


def command(stub: Path, tasks: str, out: Path, model: str | Path = "tiny", *more: str) -> list[str]:
    return ["evaluate", str(model), "--lmms-eval", tasks, "--lmms-env", str(stub), "--out", str(out), *more]


def test_a_task_is_in_the_same_table_and_is_not_run_twice(stub: Path, tmp_path: Path, capsys: Output) -> None:
    plan(stub, {"pope": {"results": results(acc=0.75), "samples": {"pope": samples([1, 0, 1.0, True])}}})
    out = tmp_path / "out"
    line = command(stub, "pope", out, "tiny", "--n", "4", "--seed", "3", "--num-steps", "2", "--guidance", "4")
    line += ["--lmms-args", "mode=generate,batch_size=8"]
    assert main(line) == 0
    assert ".75 [" in capsys.readouterr().out
    (called,) = calls(stub)
    assert called["--model_args"].split(",")[:5] == [
        *("pretrained=tiny", "seed=3", "num_steps=2", "guidance_scale=4.0", "mode=generate")
    ]
    assert (called["--limit"], called["--batch_size"], called["--tasks"]) == ("4", "8", "pope")
    assert f"answers={(out / 'lmms-eval/pope' / process.ANSWERS).resolve()}" in called["--model_args"]
    found = json.loads((out / "results.json").read_text())
    assert found["results"]["pope"]["score"] == found["results"]["pope"]["official"] == 0.75
    assert found["scores"]["pope"]["scores"] == [1.0, 0.0, 1.0, 1.0]
    assert main(line) == 0
    assert len(calls(stub)) == 1
    assert main([*line[:-1], "mode=edit"]) == 2
    assert "holds an evaluation with arguments" in capsys.readouterr().err


def test_before_and_after_are_paired_by_document(stub: Path, small_base: Path, tmp_path: Path, capsys: Output) -> None:
    other = tmp_path / "better"
    shutil.copytree(small_base, other)
    scores = {small_base.name: samples([0, 0, 1, 1]), "better": samples([1, 0, 1, 1])}
    plan(stub, {"pope": {"results": results(acc=0.0), "samples": {"pope": scores}}})
    stub_text = stub.read_text().replace(
        'json.dumps(task["results"])',
        'json.dumps(task["results"]).replace("0.0", "0.75" if model == "better" else "0.5")',
    )
    stub.write_text(stub_text)
    out = tmp_path / "out"
    assert main([*command(stub, "pope", out, other), "--against", str(small_base)]) == 0
    assert "difference [95 %]" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert (found["before"]["results"]["pope"]["score"], found["results"]["pope"]["score"]) == (0.5, 0.75)
    difference = found["difference"]["pope"]
    assert (difference["score"], difference["n"]) == (0.25, 4)
    assert difference["low"] <= 0.25 <= difference["high"]
    assert {path.name for path in out.iterdir()} == {"before", "after", "results.json"}


def written(folder: Path, content: dict[str, Any], logged: dict[str, list[Any]]) -> Path:
    folder.mkdir()
    (folder / "1_results.json").write_text(json.dumps(content))
    for name, rows in logged.items():
        (folder / f"1_samples_{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
    return folder


def test_what_was_not_scored_or_not_logged_is_masked_and_counted(tmp_path: Path) -> None:
    rows = samples([1, None, 0])  # of five
    rows[0] |= {"filtered_resps": ["yes\u2028and\x85no"]}  # lines to str.splitlines, not to JSON
    found = read_scores(written(tmp_path / "o", results(5, acc=0.5), {"pope": rows}), "pope")["pope"].as_dict()
    assert (found["score"], found["n"]) == (0.5, 2)
    assert found["masked"] == {"prompts": 3, "of": 5, "reasons": {NOT_LOGGED: 2, NO_NUMBER: 1}}


def test_a_value_that_is_no_mean_of_its_samples_has_no_interval(tmp_path: Path) -> None:
    content = results(3, "mme", perception=1500.5, accuracy=66.66666666666667)
    rows = [{"doc_id": i, "perception": {"score": 1}, "accuracy": i % 2} for i in (1, 2, 3)]
    found = read_scores(written(tmp_path / "o", content, {"mme": rows}), "mme")
    assert set(found) == {"mme/perception", "mme/accuracy"}
    sums = found["mme/perception"]
    assert (sums.as_dict()["score"], sums.as_dict()["low"], sums.record) == (1500.5, None, None)
    assert found["mme/accuracy"].as_dict()["score"] == pytest.approx(200 / 3)  # 100 times the mean
    assert sums.difference(sums)["score"] == 0


def test_groups_filters_and_directions_are_named(tmp_path: Path) -> None:
    content = results(2, "a", wer=0.5, higher=False)
    content["results"]["group"] = {"alias": "group", "wer,none": 0.25}
    content["results"]["b"] = {"em,strict": 0.5, "em,flexible": 1.0}
    content["n-samples"]["b"] = {"effective": 2}
    twice = [{"doc_id": i % 2, "em": 1} for i in range(4)]
    found = read_scores(written(tmp_path / "o", content, {"a": samples([0, 1], "wer"), "b": twice}), "group")
    assert set(found) == {"a (lower is better)", "group", "b/em (strict)", "b/em (flexible)"}
    assert (found["group"].n, found["group"].record, found["b/em (strict)"].record) == (4, None, None)
    assert found["a (lower is better)"].record is not None
    assert set(HarnessEvaluation({}, tasks=found).results()) == set(found)


def test_own_benchmarks_and_tasks_are_one_table(stub: Path, small_base: Path, tmp_path: Path, capsys: Output) -> None:
    plan(stub, {"pope": {"results": results(acc=0.5), "samples": {"pope": samples([1, 0, 1, 0])}}})
    out = tmp_path / "out"
    asked = [
        *command(stub, "pope", out, small_base),
        "--against",
        str(small_base),
        "--benchmark",
        "understand",
        "--n",
        "4",
    ]
    asked += ["--sampled-prompts", "0"]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "understand" in shown
    assert "pope" in shown
    found = json.loads((out / "results.json").read_text())
    assert set(found["results"]) == set(found["difference"]) == set(found["scores"]) == {"understand", "pope"}
    assert found["before"]["results"]["understand"]["score"] == found["results"]["understand"]["score"]
    assert found["difference"]["pope"]["score"] == 0
    assert (out / "after/understand/items.jsonl").is_file()
    plan(stub, {}, unknown=["pope"])  # nothing is drawn for a command that cannot end
    assert main([*asked, "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("said", "code", "line"),
    [
        ("Traceback\nRuntimeError: CUDA out of memory", 1, "RuntimeError: CUDA out of memory"),
        ("x | ERROR | Error during evaluation: no such split. Please set `--verbosity=DEBUG`", 0, "no such split"),
        ("all is well", 0, "Loading | all is well"),
    ],
)
def test_a_task_that_fails_does_not_stop_the_others(
    stub: Path, tmp_path: Path, capsys: Output, said: str, code: int, line: str
) -> None:
    good = {"results": results(acc=0.5), "samples": {"pope": samples([1, 0, 1, 0])}}
    plan(stub, {"bad": {"said": said, "code": code}, "pope": good})
    out = tmp_path / "out"
    assert main(command(stub, "bad,pope", out)) == 1
    shown = capsys.readouterr()
    assert f"task bad failed: {line}: see" in shown.err
    assert ".50 [" in shown.out
    assert "bad" in json.loads((out / "results.json").read_text())["failed"]
    plan(stub, {"bad": {**good, "results": results(acc=0.5, name="bad")}, "pope": {"said": "is not run again"}})
    assert main(command(stub, "bad,pope", out)) == 0
    assert [call["--tasks"] for call in calls(stub)] == ["bad", "pope", "bad"]


def test_no_samples_is_no_score(stub: Path, tmp_path: Path, capsys: Output) -> None:
    plan(stub, {"pope": {"results": results(0, acc=0.0)}})
    assert main(command(stub, "pope", tmp_path / "out")) == 1
    assert "task pope scored no sample" in capsys.readouterr().err
    with pytest.raises(ContractError, match="no score that is a number"):
        read_scores(written(tmp_path / "o", results(3, acc="N/A"), {}), "pope")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"probe": {"version": None}}, "lmms-eval is not installed: add --lmms-install"),
        ({"probe": {"missing": "pydantic"}}, "lacks the package pydantic: add --lmms-install"),
        ({"unknown": ["mmee"]}, "task 'mmee': unknown to lmms-eval 0.7.3: did you mean mme?"),
        ({"probe_code": 3}, "lmms-eval cannot be asked"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(
    stub: Path, tmp_path: Path, capsys: Output, answer: dict[str, Any], says: str
) -> None:
    plan(stub, {}, **answer)
    assert main(command(stub, "mmee", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--lmms-eval", "pope"], "add --out DIR"),
        (["--lmms-args", "mode=edit"], "--lmms-args: belongs to --lmms-eval"),
        (["--lmms-install"], "--lmms-install: belongs to --lmms-eval"),
        (["--lmms-eval", "pope", "--out", "o", "--benchmark", "scenes", "--tune", "f"], "--tune: chooses sampling"),
        (["--lmms-eval", "pope", "--out", "o", "--judge", "tiny"], "--judge: applies to lvrpo's own benchmarks only"),
        (["--lmms-eval", "pope", "--out", "o", "--guidance", "1,4"], "takes one scale"),
        (["--lmms-eval", "pope,pope", "--out", "o"], "task 'pope': named twice"),
        (["--lmms-eval", "pope", "--out", "o", "--lmms-args", "mode"], "write KEY=VALUE"),
        (["--lmms-eval", "pope", "--out", "o", "--lmms-args", "batch_size=0"], "batch_size=0: must be"),
        (["--lmms-eval", "none.yaml", "--out", "o"], "none.yaml: no such file"),
        (["--lmms-eval", "untitled.yaml", "--out", "o"], "has no key 'task'"),
        (["--lmms-eval", "pope", "--out", "o", "--lmms-env", "nowhere"], "no such interpreter: add --lmms-install"),
        (["--lmms-eval", "pope", "--out", "o", "--lmms-env", "untitled.yaml"], "cannot be executed"),
        (["--lmms-eval", "pope", "--out", "o", "--lmms-install", "--lmms-env", "."], "is no environment of Python"),
    ],
)
def test_wrong_options_are_one_line(stub: Path, capsys: Output, line: list[str], says: str) -> None:
    plan(stub, {})
    Path("untitled.yaml").write_text("dataset_path: json\n")
    env = [] if "--lmms-env" in line or "--lmms-eval" not in line else ["--lmms-env", str(stub)]
    assert main(["evaluate", "tiny", *line, *env]) == 2
    assert says in capsys.readouterr().err
    assert not Path("o").exists()


def test_an_unknown_model_and_a_name_with_a_comma(stub: Path, small_base: Path, tmp_path: Path, capsys: Output) -> None:
    plan(stub, {})
    assert main(command(stub, "pope", tmp_path / "out", "tinny")) == 2
    assert "did you mean tiny?" in capsys.readouterr().err
    odd = tmp_path / "a,b"
    shutil.copytree(small_base, odd)
    assert main(command(stub, "pope", tmp_path / "out", odd)) == 2
    assert "takes no ',' or '='" in capsys.readouterr().err


def test_a_file_of_a_task_is_found_by_its_name(stub: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# of mine\ntask: 'my_task'  # a name\ndoc_to_visual: !function utils.see\n")
    assert process.HarnessTask.read(str(file)) == process.HarnessTask("my_task", tmp_path)
    plan(stub, {"my_task": {"results": results(name="my_task", acc=0.5)}})
    assert main(command(stub, str(file), tmp_path / "out")) == 0
    assert calls(stub)[0]["--include_path"] == str(tmp_path)


def test_other_weights_of_the_same_name_are_another_evaluation(
    stub: Path, small_base: Path, tmp_path: Path, capsys: Output
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_base, model)
    plan(stub, {"pope": {"results": results(acc=0.5)}})
    assert main(command(stub, "pope", tmp_path / "out", model)) == 0
    weights = next(model.glob("*.safetensors"))
    os.utime(weights, (0, 0))
    assert main(command(stub, "pope", tmp_path / "out", model)) == 2
    assert "holds an evaluation with model" in capsys.readouterr().err


def test_an_interrupt_ends_the_process_too(stub: Path, tmp_path: Path) -> None:
    plan(stub, {"pope": {"sleep": 60, "results": results(acc=0.5)}})
    out = tmp_path / "out"
    own = [sys.executable, "-m", "lvrpo", *command(stub, "pope", out)]
    running = subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = out / "lmms-eval" / "pope" / process.LOG
    deadline = time.monotonic() + 60
    while not (stub.parent / "calls.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, error = running.communicate(timeout=30)
    assert (running.returncode, error.strip()) == (130, f"interrupted: repeat the command to continue from {out}")
    assert time.monotonic() - started < process.GRACE_S
    assert log.exists()


# --- with a real interpreter, and a package that stands for lmms-eval ---

PACKAGE = {
    "lmms_eval/__init__.py": "",
    "lmms_eval/tasks.py": """
class TaskManager:
    all_tasks = ["scene_qa", "mme"]
    def __init__(self, verbosity, include_path=None, model_name=None): ...
    def match_tasks(self, names):
        return [name for name in names if name in self.all_tasks]
""",
    "lmms_eval/__main__.py": """
from importlib.metadata import entry_points
found = [e for e in entry_points(group="lmms_eval.models") if e.name == "lvrpo"]
print("Error during evaluation:", [e.value for e in found])
""",
    "lmms_eval-0.7.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: lmms_eval\nVersion: 0.7.3\n",
}


def test_this_lvrpo_is_the_one_that_the_interpreter_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(InputError, match=r"task 'scenes_qa': unknown to lmms-eval 0\.7\.3: did you mean scene_qa"):
        process.check_environment(python, [process.HarnessTask("mme"), process.HarnessTask("scenes_qa")])
    harness = process.Harness(python, "0.7.3", {})
    with pytest.raises(ContractError, match=r"failed: \['lvrpo.evaluation.benchmarks.lmms:manifest'\]"):
        harness.run(process.HarnessTask("mme"), "tiny", None, tmp_path / "out")


def test_an_environment_is_made_of_the_pinned_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    codes = iter((0, 1))

    def run(command: list[str]) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(process.subprocess, "run", run)
    monkeypatch.setattr(process.shutil, "which", lambda name: None)
    with pytest.raises(
        ContractError, match="was not installed \\(code 1, see above\\): repeat the command to continue"
    ):
        process.install(tmp_path / "env")
    assert asked[0] == [sys.executable, "-m", "venv", str(tmp_path / "env")]
    assert asked[1][:5] == [str(tmp_path / "env" / "bin" / "python"), "-m", "pip", "install", "-r"]
    pins = Path(asked[1][5]).read_text().splitlines()
    assert "lmms-eval==0.7.3" in pins
    assert "wandb==0.25.0" in pins
