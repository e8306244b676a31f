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


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy of small sizes, trained for a moment: it answers something, and draws blurs."""
    from lvrpo.config import load_config
    from lvrpo.data.scenes import web_corpus
    from lvrpo.training.pretrain import PretrainConfig, Supervised, fresh_policy

    sizes = "policy={tower_width: 64, transformer: {width: 64, depth: 2, heads: 2, key_heads: 2, mlp_width: 128}}"
    rows = "batch={generate: 8, caption: 4, question: 32, edit: 4, reason: 8}"
    corpus = "corpus={scenes: 100, edits: 40, reasons: 40}"
    config = load_config(PretrainConfig, None, [sizes, rows, corpus, "steps=70", "device=cpu"])
    trainer = Supervised(config, fresh_policy(config), web_corpus(config.corpus))
    for _ in range(config.steps):
        trainer.step()
    folder = tmp_path_factory.mktemp("policies") / "small"
    trainer.average.save(folder)
    return folder
