"""The page of a run: from everything, from almost nothing, from broken files, and with nothing from outside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lvrpo.errors import InputError
from lvrpo.report import build_report

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """What the tests want to know of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: list[float] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"] or "nan"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def page_of(run: Path) -> str:
    target = build_report(run)
    assert target == run / "report.html"
    return target.read_text(encoding="utf-8")


def estimates(node: Any) -> list[dict[str, Any]]:
    """Every object with a score, at any depth."""
    if not isinstance(node, dict):
        return []
    inside = [e for child in node.values() for e in estimates(child)]
    return ([node] if "score" in node else []) + inside


def test_full_run_has_every_section(tmp_path: Path, make_run: MakeRun) -> None:
    text = page_of(make_run(tmp_path / "example"))
    for section in ("results", "images", "curves", "answers", "worst", "validation", "contract", "record"):
        assert f'id="{section}"' in text
    assert (
        "Generation rose from .24 to .52 (+.28, 95\N{NO-BREAK SPACE}% interval .25 to .31), but reasoning fell." in text
    )
    assert "Question answering (greedy) did not clearly change: .71 to .72" in text
    assert "lvrpo quickstart --seed 0 --out runs/example" in text
    assert "8 min 12 s" in text
    assert "All 4 checks hold." in text
    assert "rolled back" in text
    assert not list((tmp_path / "example").glob(".report*"))


def test_values_on_the_page_are_those_of_the_summary(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "example")
    shown = Page(page_of(run)).values
    summary = json.loads((run / "summary.json").read_text())
    for part in (summary["before"], summary["after"], summary["difference"], summary["baseline"]["difference"]):
        for estimate in estimates(part):
            assert {estimate["score"], estimate["low"], estimate["high"]} <= set(shown)
    known = {e[k] for e in estimates(summary) for k in ("score", "low", "high")}
    assert set(shown) <= known


def test_nothing_is_loaded_from_outside(tmp_path: Path, make_run: MakeRun) -> None:
    text = page_of(make_run(tmp_path / "example"))
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))


def test_every_image_and_plot_has_words(tmp_path: Path, make_run: MakeRun) -> None:
    for tag, attributes in Page(page_of(make_run(tmp_path / "example"))).tags:
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")


def test_text_of_the_run_is_escaped(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "a<b>&")
    evil = '<script>alert("1")</script>'
    for phase in ("before", "after"):
        cases = json.loads((run / "eval" / f"{phase}.json").read_text())
        for case in cases["prompts"]:
            case |= {"text": evil, "category": evil, "answer": evil, "output_text": evil}
            case["facts"] = [{"question": evil, "answer": evil, "holds": True}]
        write_json(run / "eval" / f"{phase}.json", cases)
    (run / "config.yaml").write_text(evil)
    write_json(run / "manifest.json", {"command": evil, evil: {evil: [evil]}})
    write_json(run / "contract.json", [{"check": evil, "value": evil, "ok": False, "detail": evil}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, f"reward/{evil}/x": 1.0, "validation/action": evil}) + "\n")
    text = page_of(run)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<title>a&lt;b&gt;&amp;" in text


def test_config_and_half_a_line_still_give_a_page(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "config.yaml").write_text("run: {seed: 0}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "rewa')
    text = page_of(run)
    assert "still going on or was stopped" in text
    assert "metrics.jsonl: line 1 is unfinished" in text
    assert 'id="results"' not in text


def test_interrupted_run_says_where_it_stands(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "stopped", steps=12)
    (run / "summary.json").unlink()
    (run / "eval" / "after.json").unlink()
    text = page_of(run)
    assert "No final evaluation yet" in text
    assert "The last step on record is 12. It was written after 1 min 36 s, with 0 s left." in text
    assert "the base on the same prompts:" in text
    assert "Time so far" in text
    assert 'id="worst"' not in text


def test_summary_with_only_a_before(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "going")
    raw = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", {"before": raw["before"], "after": {}, "difference": {}})
    text = page_of(run)
    assert "No final evaluation yet" in text
    assert ".240" in text


def test_empty_tasks_missing_intervals_and_odd_numbers(tmp_path: Path) -> None:
    run = tmp_path / "sparse"
    run.mkdir()
    write_json(
        run / "summary.json",
        {
            "before": {"generate": {}, "edit": {"score": 0.5}, "other_task": {"score": None}},
            "after": {"edit": {"score": 0.5}},
            "difference": {"edit": {"score": 0.0}},
        },
    )
    rows = [{"step": 1, "loss": None, "a/b": 3, "text": "x"}, {"step": 1, "a/b": 4}, {"no": "step"}, [1]]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = page_of(run)
    assert "Editing went from .50 to .50 (.00, no interval)." in text
    assert "a: b" not in text
    assert "b: from 4 at step 1 to 4 at step 1" in text
    assert "line 3, 4 is unfinished" in text


def test_images_outside_of_the_run_or_broken_are_left_out(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "example")
    (tmp_path / "secret.png").write_bytes((run / "samples" / "step_000010" / "grid.png").read_bytes())
    (run / "broken.png").write_bytes(b"not a picture")
    cases = [
        {"id": str(i), "task": "generate", "text": "a dog", "image": image}
        for i, image in enumerate(["../secret.png", str(tmp_path / "secret.png"), "broken.png", "missing.png"])
    ]
    for phase in ("before", "step_000030", "after"):
        write_json(run / "eval" / f"{phase}.json", {"prompts": cases})
    text = page_of(run)
    assert text.count("not kept") >= 8
    assert sum(tag == "img" for tag, _ in Page(text).tags) == 3  # the grids


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"before": ', "summary.json: not JSON at column 12"),
        ("[1, 2]", "holds list, not an object"),
        ('{"before": 3}', "before is int, not an object"),
        ('{"after": {"edit": 0.5}}', "after.edit is float, not an object"),
        ('{"after": {"edit": {"score": "high"}}}', "after.edit.score is 'high', not a number"),
        ('{"after": {"edit": {"score": 1, "categories": [1]}}}', "after.edit.categories is list"),
    ],
)
def test_unreadable_summary_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError) as caught:
        build_report(tmp_path)
    message = str(caught.value)
    assert words in message
    assert "evaluate the run again or delete the file" in message
    assert "\n" not in message
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        build_report(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        build_report(tmp_path / "missing")


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "example")
    (run / "report.html").mkdir()
    with pytest.raises(InputError, match="and report again"):
        build_report(run)
    assert not list(run.glob(".report*"))


def test_the_same_run_gives_the_same_page(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "example")
    assert page_of(run) == page_of(run)


def test_a_run_that_is_not_well_says_so_before_anything_else(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    findings = [{"kind": "validation", "words": "validation, step 8: stopped: <b>edit</b> fell"}, {"kind": "odd"}, 3]
    write_json(run / "summary.json", {**summary, "health": {"well": False, "findings": findings}})
    page = page_of(run)
    words = "Not healthy: validation, step 8: stopped: &lt;b&gt;edit&lt;/b&gt; fell."
    assert page.count("Not healthy: ") == 1
    assert page.index(words) < page.index("<main>")
    for odd in (None, [], "x", {"findings": 3}):
        write_json(run / "summary.json", {**summary, "health": odd})
        assert "Not healthy" not in page_of(run)


def test_a_ratio_of_1_is_explained(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def page(*ratios: float | None) -> str:
        rows = [{"step": i, "ratio/text": ratio, "clip_fraction/text": 0.0} for i, ratio in enumerate(ratios, 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return page_of(run)

    assert "as it must be with one update per rollout" in page(1.0, 0.9999999, 1.0)
    assert "as it must be" not in page(1.0, 1.02)
    assert "as it must be" not in page(None)
