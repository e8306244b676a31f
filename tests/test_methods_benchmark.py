"""The comparison of methods, on a small policy and a few prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lvrpo.training.run_directory import RunDirectory

TINY = [
    "device=cpu",
    "data.prompts_per_step={generate: 2, understand: 4, edit: 1, reason: 2}",
    "rollout.group_size=4",
    "rewards=[{name: own_vqa}, {name: exact_answer}]",
    "advantages.std_floor=1e-4",
    "guard={every: 2, prompts: {generate: 2, understand: 2}}",
    "checkpoint_every=2",
]
CORPUS = [
    "device=cpu",
    "batch={generate: 4, caption: 2, question: 8, edit: 2, reason: 3}",
    "corpus={scenes: 30, edits: 10, reasons: 12}",
]


def methods(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "methods.py"), *arguments, "--n", "4", "--out", "out"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def small(base: Path) -> list[str]:
    return ["--set", f"policy={base}", *TINY, "--set-supervised", f"init={base}", *CORPUS]


def test_methods_share_a_budget_of_questions(root: Path, small_base: Path) -> None:
    done = methods(root, "lvrpo", "best_of", "repa", "--seeds", "0", "1", "--questions", "8", *small(small_base))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| method | steps | seconds | mean of four | generate | generate guided | understand |")
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["base", "lvrpo", "best_of", "repa"]
    assert [row.split("|")[2].strip() for row in rows[3:]] == ["2", "2", "1"]  # 8 questions at 4 and at 8 a step
    assert all(cell.count("[") == 1 for row in rows[3:] for cell in row.split("|")[4:-1])
    for name in ("lvrpo-0", "lvrpo-1", "best_of-0", "repa-1"):
        summary = RunDirectory.read(Path("out") / name).read_summary()
        assert summary is not None
        assert set(summary["after"]) == set(summary["before"]) == set(summary["difference"])
        assert (Path("out") / name / "report.html").exists()
    before = Path("out/lvrpo-0/metrics.jsonl").stat().st_mtime_ns
    again = methods(root, "lvrpo", "--seeds", "0", "--questions", "8", *small(small_base))
    assert again.returncode == 0, again.stderr
    assert Path("out/lvrpo-0/metrics.jsonl").stat().st_mtime_ns == before  # a finished run is read, not repeated


def test_seconds_are_measured_method_by_method(root: Path, small_base: Path) -> None:
    done = methods(root, "understanding_only", "--seeds", "3", "--seconds", "0.01", *small(small_base))
    assert done.returncode == 0, done.stderr
    assert "understanding_only: 1 steps" in done.stdout
    assert "1 seed; in brackets" in done.stdout
    more = ("understanding_only", "--seeds", "4", "--seconds", "0.01", "--steps", "understanding_only=2")
    assert "| understanding_only | 2 |" in methods(root, *more, *small(small_base)).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generation_only", "--questions", "8"), "asks none: give --seconds"),
        (("lvrop", "--questions", "8"), "did you mean lvrpo?"),
        (("lvrpo", "--seconds", "8", "--steps", "dpo=3"), "--steps dpo=3: give METHOD=N"),
    ],
)
def test_a_budget_that_does_not_fit_is_one_line(arguments: tuple[str, ...], message: str, root: Path) -> None:
    done = methods(root, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line
