"""The wheel in a clean environment, without the repository: the commands of a first-time user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_MIB = 25
MAX_SECONDS = 300
"""From an environment with the wheel to the first step on own data."""


@pytest.mark.slow
def test_the_wheel_trains_on_own_rows_in_five_commands(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lvrpo-*.whl")
    assert wheel.stat().st_size < MAX_MIB * 2**20

    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["OMP_NUM_THREADS"] = "1"
    torch = next(row for row in (ROOT / "constraints.txt").read_text().splitlines() if row.startswith("torch=="))
    shutil.copytree(ROOT / "examples" / "own_data", tmp_path / "own_data")
    started = time.monotonic()
    for command in (
        [sys.executable, "-m", "venv", "env"],
        ["env/bin/pip", "install", "-c", str(ROOT / "constraints.txt"), torch, str(wheel)],
        ["env/bin/lvrpo", "check", "own_data/own.yaml"],
        ["env/bin/lvrpo", "train", "own_data/own.yaml", "steps=1", "--out", "runs/own"],
        ["env/bin/lvrpo", "report", "runs/own"],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 3), (command, done.stdout, done.stderr)
    assert time.monotonic() - started < MAX_SECONDS
    page = (tmp_path / "runs" / "own" / "report.html").read_text(encoding="utf-8")
    assert "own" in page
    quick = ["env/bin/lvrpo", "quickstart", "--quick", "--out", "runs/quick"]
    subprocess.run(quick, cwd=tmp_path, env=environment, check=True, capture_output=True)
    asked = ["env/bin/lvrpo", "generate", "tiny", "--prompt", "a red circle", "--out", "images"]
    subprocess.run(asked, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "images" / "00000.png").stat().st_size > 0
