"""Numbers, ticks, curves, cases, grids and the comparison, each by itself."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from lvrpo.commands.progress import text_table
from lvrpo.errors import InputError
from lvrpo.records import Estimate, Metrics
from lvrpo.report import Tile, compare_runs, formatting, image_grid
from lvrpo.report.charts import nice_ticks, reward_charts
from lvrpo.report.formatting import change, interval
from lvrpo.report.tables import TextTable

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.524, False, ".524"),
        (1.0, False, "1.000"),
        (0.284, True, "+.284"),
        (-0.017, True, "−.017"),
        (-0.0001, True, ".000"),
    ],
)
def test_scores(value: float, signed: bool, text: str) -> None:
    assert formatting.score(value, signed=signed) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.4e-7, "2.4e−7"),
        (1e-6, "1e−6"),
        (0.03124, "0.0312"),
        (1240.0, "1,240"),
        (-1.5, "−1.5"),
        ("a", "a"),
        (3, "3"),
    ],
)
def test_compact(value: object, text: str) -> None:
    assert formatting.compact(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(45.2, "45 s"), (492.4, "8 min 12 s"), (11100, "3 h 05 min")])
def test_duration(seconds: float, text: str) -> None:
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
    ("estimate", "direction", "text"),
    [
        (Estimate(0.28, 0.25, 0.31), "up", "+.28, 95\N{NO-BREAK SPACE}% interval .25 to .31"),
        (Estimate(-0.06, -0.09, -0.03), "down", "−.06, 95\N{NO-BREAK SPACE}% interval −.09 to −.03"),
        (Estimate(0.01, -0.02, 0.04), "flat", "+.01, 95\N{NO-BREAK SPACE}% interval −.02 to +.04"),
        (Estimate(0.011, 0.001, 0.021), "up", "+.011, 95\N{NO-BREAK SPACE}% interval .001 to .021"),
        (Estimate(0.1), "unsure", "+.10, no interval"),
    ],
)
def test_a_change_in_words_never_hides_its_sign(estimate: Estimate, direction: str, text: str) -> None:
    assert estimate.direction == direction
    assert change(estimate) == text


def test_an_interval_of_a_difference_hides_no_sign_either() -> None:
    risen = Estimate(0.02, 0.003, 0.04)
    assert interval(risen, signed=True) == "+.020 [+.003, +.040]"
    assert interval(Estimate(-0.001, -0.004, 0.002, detectable=0.06), signed=True) == "−.001 [−.004, +.002] ≥ .060"
    assert interval(risen) == ".02 [.00, .04]"  # a share has no sign
    assert interval(Estimate(0.0, -0.1, 0.1), signed=True) == ".00 [−.10, +.10]"


def test_nice_ticks() -> None:
    assert nice_ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(1, 60, 4) == [20, 40, 60]
    assert nice_ticks(3, 3, 4) == [3]


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1}\n{"step": 1, "a": 5}\n{"step": 2, "a": 3}\n{"step": 3, "a')
    metrics = Metrics.read(path)
    assert metrics.series("a") == [(1.0, 5.0), (2.0, 3.0)]
    assert metrics.broken_lines == (4,)


def test_a_reason_with_a_line_separator_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward_failed_why": "it said \u2028 and \x85", "a": 5}\n', encoding="utf-8")
    assert Metrics.read(path).series("a") == [(1.0, 5.0)]


def test_a_curve_stands_where_its_numbers_are() -> None:
    rows = tuple({"step": s, "reward/generate/facts": s / 4, "control/generate/facts": 0.0} for s in range(5))
    (chart,) = reward_charts(Metrics(rows))
    control, now = chart.lines
    assert chart.title == "Generation: facts"
    assert (now.label, control.label) == ("1.00", "0")
    assert now.dots[0][:2] == control.dots[0][:2]
    assert now.dots[4][1] < now.dots[0][1]
    assert [text for _, text in chart.x_ticks] == ["step 0", "1", "2", "3", "4"]
    assert {text: y for y, text in chart.y_ticks}["1"] == pytest.approx(now.end[1], abs=0.11)


def test_thousands_of_steps_stay_small() -> None:
    rows = tuple({"step": s, "reward/edit/facts": 0.5 + 0.1 * (s % 7)} for s in range(20_000))
    (chart,) = reward_charts(Metrics(rows))
    assert len(chart.lines[0].raw) + len(chart.lines[0].smooth) < 12_000


def test_grid_of_tensors_and_images() -> None:
    red = torch.zeros(3, 32, 32)
    red[0] = 1
    gray = Image.new("RGB", (32, 32), (128, 128, 128))
    rows = [
        ("two red circles left of a blue star", [Tile(red, "reward .5", True), Tile(gray, "reward .0", False)]),
        (
            "a title that is much too long for this image " * 5,
            [Tile(None, "nothing"), Tile(Image.new("RGB", (8, 4)))],
        ),
    ]
    grid = image_grid(rows, tile_size=96)
    assert grid.mode == "RGB"
    colors = {color for _, color in grid.getcolors(maxcolors=1 << 24) or []}
    assert {(255, 0, 0), (128, 128, 128), (0, 122, 94), (200, 70, 20)} <= colors
    enlarged = sum(count for count, color in grid.getcolors(maxcolors=1 << 24) or [] if color == (255, 0, 0))
    assert enlarged == 96 * 96
    assert image_grid([]).size[0] > 0


def test_comparison(tmp_path: Path, make_run: MakeRun) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", seed=8)
    (second / "summary.json").unlink()
    comparison = compare_runs([first, second])
    assert [row[0] for row in comparison.rows] == ["first", "first: continued pretraining", "second (not finished)"]
    markdown = comparison.markdown()
    assert "| first | .240 → .524<br>+.284 [+.253, +.315] |" in markdown
    assert "| second (not finished) | – |" in markdown
    assert len({line.count("|") for line in markdown.splitlines()}) == 1
    console = Console(width=200, file=io.StringIO())
    console.print(text_table(comparison))
    assert ".240 → .524" in console.file.getvalue()  # type: ignore[attr-defined]
    assert comparison.rows[0][1].tone == "up"  # type: ignore[attr-defined]  # a Cell
    (first / "summary.json").unlink()
    with pytest.raises(InputError, match="no run has results"):
        compare_runs([first, second])


def test_names_that_look_like_markup_are_printed() -> None:
    table = TextTable("[/b] of :star:", ("task", "[red]", "[/red]"), (("[i]", "1", "[b]2"),), "note [x]")
    console = Console(width=200, file=io.StringIO())
    console.print(text_table(table))
    shown = console.file.getvalue().split()  # type: ignore[attr-defined]
    assert shown == ["[/b]", "of", ":star:", "task", "[red]", "[/red]", "[i]", "1", "[b]2", "note", "[x]"]


def test_comparison_of_nothing() -> None:
    with pytest.raises(InputError, match="no run to compare"):
        compare_runs([])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, make_run: MakeRun) -> None:
    names = [row[0] for row in compare_runs([make_run(tmp_path / x / "run") for x in "ab"]).rows]
    assert str(tmp_path / "a" / "run") in names
    assert json.dumps(names)
