"""What ``import lvrpo`` promises, and that the project's own files agree with each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import grimp
import pytest

import lvrpo

HEAVY = ("torch", "numpy", "scipy", "sklearn", "pydantic", "transformers", "diffusers", "tokenizers")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_import_loads_no_library() -> None:
    assert not loaded_after("import lvrpo; lvrpo.__version__; lvrpo.InputError") & set(HEAVY)


def test_names_load_no_model_library() -> None:
    foreign = {"transformers", "diffusers", "sklearn", "scipy"}
    assert not loaded_after("from lvrpo import Policy, Prompt, load_config") & foreign


def test_every_export_is_there() -> None:
    assert {name for names in lvrpo._MODULES.values() for name in names} < set(lvrpo.__all__)
    assert lvrpo.__all__ == sorted(lvrpo.__all__)
    for name in lvrpo.__all__:
        assert getattr(lvrpo, name) is not None
        assert name in dir(lvrpo)
    with pytest.raises(AttributeError, match="no attribute 'Prompts'"):
        _ = lvrpo.Prompts


def test_version_is_the_installed_one() -> None:
    assert lvrpo.__version__ == metadata.version("lvrpo")


def test_constraints_pin_every_direct_dependency(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    assert {re.match(r"[\w-]+", line)[0].lower() for line in wanted} <= pinned


def test_continuous_integration_runs_make_test(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert [line for line in script.read_text().splitlines() if line.startswith("make ")] == ["make test"]


@pytest.mark.parametrize("target", ["quickstart", "test", "check"])
def test_make_prepares_the_environment_first(root: Path, target: str) -> None:
    makefile = (root / "Makefile").read_text()
    assert re.search(rf"^{target}: \$\(STAMP\)$", makefile, re.MULTILINE)


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count; those for types alone do not."""
    graph = grimp.build_graph("lvrpo", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
