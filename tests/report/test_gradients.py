from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvrpo.records import Metrics
from lvrpo.report import build_report
from lvrpo.report.charts import gradient_audit
from lvrpo.report.tables import Cell


def row(step: int, cosine: float) -> dict[str, Any]:
    pair, parts = (
        "understand+generate",
        {"all": cosine, "understand": -0.5, "understand/layer_10": 0.1, "understand/layer_2": 0.2},
    )
    found: dict[str, Any] = {"step": step, "loss/text": 1.0}
    found |= {f"gradient/cosine/{pair}/{part}": value for part, value in parts.items()}
    norms = {"understand": 2.0 * step, "generate": 1.0}
    return found | {f"gradient/norm/{task}/all": norm for task, norm in norms.items()}


def test_means_and_ranges_over_the_audited_steps() -> None:
    audit = gradient_audit(Metrics((row(1, 0.2), {"step": 2}, row(3, -0.4))))
    assert audit is not None
    assert audit.steps == 2
    assert audit.cosines.heads == ("tasks", "all", "understand")
    ((name, whole, understand),) = audit.cosines.rows
    assert (name, whole) == ("Questions and Generation", "−.10 (−.40 to +.20)")
    assert [cell.tone for cell in (whole, understand) if isinstance(cell, Cell)] == ["", "apart"]
    assert [row[0] for row in audit.layers.rows] == ["understand, layer 2", "understand, layer 10"]
    assert [row[:2] for row in audit.norms.rows] == [("Questions", "4"), ("Generation", "1")]


def test_a_run_without_an_audit_has_none() -> None:
    assert gradient_audit(Metrics(({"step": 1, "loss/text": 0.5},))) is None


def test_the_page_shows_the_audit_where_there_is_one(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "example")
    assert 'id="gradients"' not in build_report(run).read_text(encoding="utf-8")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | row(1, 0.2))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = build_report(run).read_text(encoding="utf-8")
    assert 'id="gradients"' in text
    assert "Questions and Generation" in text
    assert "over 1 audited step:" in text
    assert 'class="num apart"' in text
    assert "cosine/understand" not in text  # no curves of single steps
