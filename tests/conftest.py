"""What every test starts from: one thread, known seeds, an empty working directory, a quiet home for plots."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / f"lvrpo-matplotlib-{os.getuid()}"))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "lvrpo", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lvrpo")


@pytest.fixture(autouse=True)
def _known_start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, and a working directory of its own: a test that forgets a path writes nothing into the checkout."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent
