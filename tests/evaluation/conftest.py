"""What tests of published benchmarks share."""

from __future__ import annotations

import pytest

from lvrpo.evaluation.benchmarks.published import PublishedBenchmark


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks open with a few prompts in place of the official ones."""
    monkeypatch.setattr(PublishedBenchmark, "_official", lambda self, built, where: built)
