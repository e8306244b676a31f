"""Small random pipelines, made once: as folders and as policies. Without diffusers all tests of this folder skip."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvrpo.policies.diffusers_flow.create import KINDS, PipelineSizes, create_pipeline
from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.types import Prompt

EDITORS = ("kontext-tiny", "qwen-image-edit-tiny")
"""Pipelines that are others but for their edits, which have tests of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("diffusers") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs diffusers: pip install 'lvrpo[diffusers]'"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("pipelines")

    def folder(kind: str) -> Path:
        if not (place / kind).exists():
            create_pipeline(kind, PipelineSizes(), place / kind)
        return place / kind

    return folder


@pytest.fixture(scope="session")
def policies(folders: Callable[[str], Path]) -> Callable[[str], DiffusersPolicy]:
    """Shared by many tests: never change one."""
    loaded: dict[str, DiffusersPolicy] = {}

    def policy(kind: str) -> DiffusersPolicy:
        if kind not in loaded:
            found = load_policy(folders(kind))
            assert isinstance(found, DiffusersPolicy)
            loaded[kind] = found
        return loaded[kind]

    return policy


@pytest.fixture(params=[kind for kind in KINDS if kind not in EDITORS])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(kind: str, policies: Callable[[str], DiffusersPolicy]) -> DiffusersPolicy:
    return policies(kind)


@pytest.fixture
def sd3(folders: Callable[[str], Path]) -> Path:
    """A copy, whose files a test may change."""
    return Path(shutil.copytree(folders("sd3-tiny"), "sd3")).resolve()


@pytest.fixture
def prompts() -> list[Prompt]:
    texts = ("a red circle", "two blue squares above a green star", "a sign that says 'OPEN'")
    return [Prompt(f"g{i}", "generate", (text,), ("image",)) for i, text in enumerate(texts)]


@pytest.fixture
def pipeline() -> Callable[[Path], Any]:
    """The pipeline of diffusers itself. Any: of an optional package."""

    def load(folder: Path) -> Any:
        from lvrpo.policies.diffusers_flow.checkpoint import diffusers_library, quiet_diffusers

        with quiet_diffusers():
            pipe = diffusers_library().DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load
