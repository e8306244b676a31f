"""Benchmarks: a policy in, scores with intervals out."""

from __future__ import annotations

from collections.abc import Mapping

BENCHMARKS: Mapping[str, str] = {
    "generate": "lvrpo.evaluation.scenes:GENERATE",
    "generate_guided": "lvrpo.evaluation.scenes:GENERATE_GUIDED",
    "understand": "lvrpo.evaluation.scenes:UNDERSTAND",
    "understand_sampled": "lvrpo.evaluation.scenes:UNDERSTAND_SAMPLED",
    "edit": "lvrpo.evaluation.scenes:EDIT",
    "reason": "lvrpo.evaluation.scenes:REASON",
}
"""Every benchmark by name; an own one is named ``my_package.module:NAME``, and a .jsonl file of rows is one too."""

__all__ = ["BENCHMARKS"]
