"""Benchmarks: a policy in, scores with intervals out."""

from __future__ import annotations

from collections.abc import Mapping

BENCHMARKS: Mapping[str, str] = {
    "generate": "lvrpo.evaluation.scenes:GENERATE",
    "generate_guided": "lvrpo.evaluation.scenes:GENERATE_GUIDED",
    "generate_paraphrased": "lvrpo.evaluation.scenes:GENERATE_PARAPHRASED",
    "understand": "lvrpo.evaluation.scenes:UNDERSTAND",
    "understand_sampled": "lvrpo.evaluation.scenes:UNDERSTAND_SAMPLED",
    "understand_paraphrased": "lvrpo.evaluation.scenes:UNDERSTAND_PARAPHRASED",
    "edit": "lvrpo.evaluation.scenes:EDIT",
    "reason": "lvrpo.evaluation.scenes:REASON",
}
"""Every benchmark by name; an own one is named ``my_package.module:NAME``, and a .jsonl file of rows is one too."""

PUBLISHED: Mapping[str, str] = {
    "geneval": "lvrpo.evaluation.benchmarks.geneval:GENEVAL",
    "geneval_vqa": "lvrpo.evaluation.benchmarks.geneval:GENEVAL_VQA",
    "geneval2": "lvrpo.evaluation.benchmarks.vqa:GENEVAL2",
    "geneval2_am": "lvrpo.evaluation.benchmarks.vqa:GENEVAL2_AM",
    "dpg": "lvrpo.evaluation.benchmarks.vqa:DPG",
    "t2i_compbench": "lvrpo.evaluation.benchmarks.compbench:BENCHMARK",
    "wise": "lvrpo.evaluation.benchmarks.wise:WISE",
    "wise_verified": "lvrpo.evaluation.benchmarks.wise:WISE_VERIFIED",
    "ocr": "lvrpo.evaluation.benchmarks.ocr:BENCHMARK",
}
"""Published benchmarks, whose prompts the user provides in a folder."""

__all__ = ["BENCHMARKS", "PUBLISHED"]
