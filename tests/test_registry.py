"""Names become objects; a name from outside the tables becomes code only where the user allows its package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from lvrpo.cli import main
from lvrpo.config import dump_config, load_config, read_yaml, tree_sha256
from lvrpo.errors import InputError
from lvrpo.policies.loading import load_policy
from lvrpo.registry import ANY, allow_code, isolated_permissions, resolve
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory

FEW = (
    "data.prompts_per_step={generate: 1}",
    "rollout={group_size: 4, num_steps: 2}",
    "validation.prompts={generate: 1}",
)
"""Of an estimate of memory that takes a moment."""
MARK = object()
TABLE = {"fraction": "fractions:Fraction", "mark": MARK, "gone": "lvrpo_no_such_package.part:Thing"}
EVIL = """
from pathlib import Path

Path({trace!r}).write_text("ran")

class P:
    pass
"""


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable module ``evil`` that leaves this file behind when it is imported."""
    trace = Path("trace").absolute()
    Path("evil.py").write_text(EVIL.format(trace=str(trace)))
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return trace


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with 2 and writes nothing, but for the trace of an allowed module."""
    before = written()
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert written() == before
    return line


def written() -> list[Path]:
    """Every file and folder here, but for a trace and Python's own."""
    return [path for path in sorted(Path().rglob("*")) if not {"trace", "__pycache__", ".lock"} & set(path.parts)]


def test_an_entry_is_imported_or_returned_unchanged() -> None:
    assert resolve("reward", "fraction", TABLE) is Fraction
    assert resolve("reward", "mark", TABLE) is MARK


def test_a_user_class_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvrpo_test_plugin.py").write_text("class Mine:\n    class Inner:\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    allow_code(["lvrpo_test_plugin"])
    mine = resolve("reward", "lvrpo_test_plugin:Mine", TABLE)
    assert mine.__name__ == "Mine"
    assert resolve("reward", "lvrpo_test_plugin:Mine.Inner", TABLE) is mine.Inner
    del sys.modules["lvrpo_test_plugin"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fractoin",
            "reward 'fractoin': unknown: did you mean fraction? there are fraction, gone, mark; "
            "your own is given as my_package.module:Name",
        ),
        (
            "zzz",
            "reward 'zzz': unknown: there are fraction, gone, mark; your own is given as my_package.module:Name",
        ),
        (
            "fractions:Fraction",
            "reward 'fractions:Fraction': fractions is part of Python and holds no reward: name a module of your own",
        ),
        ("evil:Q", "reward 'evil:Q': evil has no 'Q': name something that evil defines"),
        ("evil:P", "reward 'evil:P': has no method 'applies': a reward has 'applies' and 'score'"),
        ("evil:Path.home", "reward 'evil:Path.home': is a method, not a class: name a class of a reward"),
        ("evil:", "reward 'evil:': write it as my_package.module:Name"),
        (":Fraction", "reward ':Fraction': write it as my_package.module:Name"),
        ("../evil:P", "reward '../evil:P': write it as my_package.module:Name"),
        (
            "lvrpo_nothing:Thing",
            "reward 'lvrpo_nothing:Thing': no module 'lvrpo_nothing': install it or put its folder on PYTHONPATH",
        ),
        (
            "gone",
            "reward 'lvrpo_no_such_package.part:Thing': no module 'lvrpo_no_such_package': "
            "install it or put its folder on PYTHONPATH",
        ),
    ],
)
def test_a_wrong_name_gets_one_line(name: str, message: str, trace: Path) -> None:
    allow_code([ANY])
    with pytest.raises(InputError) as caught:
        resolve("reward", name, TABLE, ("applies", "score"))
    assert str(caught.value) == message


def test_a_plugin_that_misses_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvrpo_test_needy.py").write_text("import lvrpo_absent_dependency.sub\n")
    monkeypatch.syspath_prepend(tmp_path)
    allow_code([ANY])
    with pytest.raises(InputError, match=r"needs the package 'lvrpo_absent_dependency'.*pip install"):
        resolve("policy", "lvrpo_test_needy:Thing", {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def f(:\n  pass", r"SyntaxError: invalid syntax \(lvrpo_test_broken_1.py, line 1\)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("\tx = 1\n  y = 2", "IndentationError: unexpected indent"),
        ("from lvrpo.rewards.function import nothing", "ImportError: cannot import name 'nothing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_inside_a_plugin_is_one_line_that_names_both(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name = f"lvrpo_test_broken_{request.node.callspec.indices['text']}"
    (tmp_path / f"{name}.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    allow_code([ANY])
    with pytest.raises(InputError, match=rf"policy '{name}:Thing': {name} cannot be imported: {said}") as caught:
        resolve("policy", f"{name}:Thing", {})
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


# --- consent ---


@pytest.mark.parametrize(
    ("allowed", "name", "from_model", "runs"),
    [
        ([], "evil:P", False, False),
        (["other"], "evil:P", False, False),
        (["evil"], "evil:P", False, True),
        (["evil.part"], "evil:P", False, False),
        ([ANY], "evil:P", False, True),
        ([ANY], "evil:P", True, False),
        (["evil"], "evil:P", True, True),
    ],
)
def test_what_was_allowed_decides(allowed: list[str], name: str, from_model: bool, runs: bool, trace: Path) -> None:
    allow_code(allowed)
    if runs:
        assert resolve("reward", name, {}, from_model=from_model).__name__ == "P"
    else:
        with pytest.raises(InputError, match="is code of evil, not of lvrpo"):
            resolve("reward", name, {}, from_model=from_model)
    assert trace.exists() == runs


@pytest.mark.parametrize("package", ["", "my package", "./here", "a..b", "a:B"])
def test_only_names_of_packages_can_be_allowed(package: str) -> None:
    with pytest.raises(InputError, match="must be the name of a package"):
        allow_code([package])


def test_consent_ends_with_the_command() -> None:
    allow_code(["absent"])
    with isolated_permissions():
        with pytest.raises(InputError, match="is code of absent"):
            resolve("reward", "absent:P", {})
        allow_code(["other"])
    with pytest.raises(InputError, match="is code of other"):
        resolve("reward", "other:P", {})
    with pytest.raises(InputError, match="no module 'absent'"):
        resolve("reward", "absent:P", {})  # allowed again, and not there


@pytest.mark.parametrize("consent", [[], ["--allow-code"], ["allow_code=[os]"]])
def test_a_configuration_runs_no_shell(consent: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    Path("evil.yaml").write_text("rewards: [{name: 'os:system', options: {command: 'touch trace'}}]\n")
    assert "os is part of Python and holds no reward" in refused(capfd, "train", "evil.yaml", "policy=tiny", *consent)
    assert not Path("trace").exists()


@pytest.mark.parametrize(
    "tree",
    [
        "rewards: [{name: 'evil:P'}]",
        "rewards: [{name: ocr, options: {reader: 'evil:P'}}]",
        "data: {source: 'evil:P'}",
    ],
)
def test_every_name_of_a_configuration_asks(tree: str, trace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("evil.yaml").write_text(tree)
    for command in (["train", "evil.yaml"], ["check", "evil.yaml", *FEW]):
        assert "is code of evil, not of lvrpo" in refused(capfd, *command)
    assert not trace.exists()


def test_a_benchmark_asks(trace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is code of evil" in refused(capfd, "evaluate", "tiny", "--benchmark", "evil:P")
    assert not trace.exists()


def test_a_file_that_is_extended_allows_nothing(trace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("downloaded.yaml").write_text("allow_code: [evil]\nrewards: [{name: 'evil:P'}]\n")
    Path("mine.yaml").write_text("extends: downloaded.yaml\n")
    assert "is code of evil" in refused(capfd, "train", "mine.yaml")
    assert not trace.exists()
    Path("mine.yaml").write_text("extends: downloaded.yaml\nallow_code: [evil]\n")
    assert "has no method 'applies'" in refused(capfd, "train", "mine.yaml")
    assert trace.exists()


def test_a_run_allows_nothing(trace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config(TrainConfig, None, ["allow_code=[evil]", "rewards=[{name: 'evil:P'}]"])
    assert config.allow_code == ("evil",)
    assert "allow_code" not in dump_config(config)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("allow_code: [evil]\n" + dump_config(config))
    Path("run/manifest.json").write_text(json.dumps({"config_sha256": tree_sha256(read_yaml(Path("run/config.yaml")))}))
    assert RunDirectory.read(Path("run")).config(TrainConfig).allow_code == ()
    for command in (["--resume", "run"], ["run/config.yaml"]):
        assert "is code of evil" in refused(capfd, "train", *command)
    assert not trace.exists()
    assert "has no method 'applies'" in refused(capfd, "train", "--resume", "run", "--allow-code")


def test_a_models_folder_names_no_code(trace: Path, small_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(small_base, "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"model_type": "evil:P"}))
    for consent in ([], ["--allow-code"]):
        line = refused(capfd, "generate", "model", "--prompt", "a red circle", "--out", "new", *consent)
        assert "a model's folder cannot allow it: if you trust evil, add --allow-code=evil" in line
    with pytest.raises(InputError, match="model's folder cannot allow it"):
        load_policy("model")
    assert not trace.exists()
    line = refused(capfd, "generate", "model", "--prompt", "a red circle", "--out", "new", "--allow-code=evil")
    assert "model type 'evil:P': has no method 'load'" in line


@pytest.mark.parametrize("flag", ["-m", "-um"])
def test_the_working_directory_holds_no_modules(flag: str, root: Path) -> None:
    for name in ("torch", "yaml", "typing", "difflib", "argparse", "pydantic"):
        Path(f"{name}.py").write_text("raise SystemExit('ran')\n")
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, flag, "lvrpo", "train", "missing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stderr.startswith("error: missing.yaml: no such file")
    assert done.returncode == 2
