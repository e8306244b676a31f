"""What ``lvrpo new`` writes works as it is, and completion knows all commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lvrpo.cli import COMMANDS, main
from lvrpo.registry import allow_code
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.table import build_rewards

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("output", ["image", "text"])
def test_a_new_reward_passes_its_own_test_and_is_built(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "reward", "mine", "--output", output]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert max(len(line) for file in Path().glob("*.py") for line in file.read_text().splitlines()) <= 120
    allow_code(["./mine.py"])
    (source,) = build_rewards([RewardConfig.model_validate({"name": "./mine.py:mine", "options": {"target": 1}})])
    assert source.judges == (output,)


@pytest.mark.parametrize("name", ["3x", "a-b", "class", "../x", "_x"])
def test_a_name_that_is_none_leaves_no_file(name: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["new", "reward", name, "--out", str(tmp_path)]) == 2
    assert "is no name of a Python function" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["os", "torch", "pytest"])
def test_a_file_that_would_hide_a_module_is_not_written(name: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["new", "reward", name, "--out", str(tmp_path)]) == 2
    assert "is the name of a module" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "test_mine.py").write_text("kept")
    assert main(["new", "reward", "mine", "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]


def test_completion_knows_all_commands(capsys: Output) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert f"_shtab_lvrpo_{name.replace(' ', '_')}_option_strings" in script


def test_completion_without_shtab_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'lvrpo[completion]'" in capsys.readouterr().err
