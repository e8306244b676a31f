"""Line charts of the metrics of a run, and the tables of the gradient audit, as the template draws them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lvrpo.records import Metrics
from lvrpo.report.formatting import MINUS, NONE, TASK_LABELS, compact, label, score, task_name
from lvrpo.report.tables import Cell, TextTable

WIDTH, HEIGHT = 360.0, 196.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 44.0, 10.0, 26.0
MAX_POINTS = 400
NOT_PLOTTED = ("step", "seconds", "seconds_left")
Points = list[tuple[float, float]]
Marks = Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """One series."""

    kind: str
    """now or control."""
    raw: str
    """Every step, drawn faintly; empty where there is nothing to smooth."""
    smooth: str
    dots: tuple[tuple[float, float, str], ...]
    """(x, y, tooltip) of single points, where there are few."""
    end: tuple[float, float]
    label_y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One small plot."""

    title: str
    description: str
    """Alternative text."""
    lines: tuple[Line, ...]
    area: str
    """Between the series and its control."""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...]
    """(x, label): actions of validation."""
    window: int


@dataclass(frozen=True)
class ChartGroup:
    title: str
    charts: tuple[Chart, ...]


def reward_charts(metrics: Metrics) -> list[Chart]:
    """``reward/TASK/NAME`` with ``control/TASK/NAME`` beside it; equal curves are drawn once."""
    titles: dict[tuple[str, tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]], list[str]] = {}
    for key in metrics.numeric_keys():
        parts = key.split("/")
        if parts[0] != "reward":
            continue
        task, name = (parts[1], "/".join(parts[2:])) if len(parts) > 2 else ("", "/".join(parts[1:]) or key)
        control = metrics.series("/".join(["control", *parts[1:]]))
        titles.setdefault((task, tuple(metrics.series(key)), tuple(control)), []).append(name)
    charts = []
    for (task, points, control), names in titles.items():
        named = " = ".join(names)
        title = f"{task_name(task)}: {named}" if task else named
        charts.append(line_chart(title.replace("_", " "), list(points), list(control), _validation_marks(metrics), 0.1))
    return charts


def headline_charts(metrics: Metrics) -> list[Chart]:
    """One curve per task for the head of the page: of validation, else of the first reward."""
    held_out = validation_charts(metrics)
    if any(len(metrics.series(key)) > 1 for key in metrics.numeric_keys() if key.startswith("validation/")):
        return [replace(chart, title=f"Held out: {chart.title}") for chart in held_out[:4]]
    first: dict[str, Chart] = {}
    for chart in reward_charts(metrics):
        first.setdefault(chart.title.partition(":")[0], chart)
    return list(first.values())[:4]


def validation_charts(metrics: Metrics) -> list[Chart]:
    """``validation/...`` on the steps where validation ran."""
    keys = [key for key in metrics.numeric_keys() if key.startswith("validation/")]
    return [
        line_chart(
            label(key.removeprefix("validation/")), metrics.series(key), [], _validation_marks(metrics), min_span=0.1
        )
        for key in keys
    ]


def other_charts(metrics: Metrics) -> list[ChartGroup]:
    """All other numeric metrics, grouped by their first name part."""
    groups: dict[str, list[Chart]] = defaultdict(list)
    for key in metrics.numeric_keys():
        word, _, rest = key.partition("/")
        if key in NOT_PLOTTED or word in ("reward", "validation", "gradient"):
            continue
        if word == "control" and metrics.series("reward/" + rest):
            continue
        groups[word.replace("_", " ")].append(line_chart((rest or word).replace("_", " "), metrics.series(key), []))
    return [ChartGroup(title, tuple(charts)) for title, charts in groups.items()]


def ratio_note(metrics: Metrics) -> str:
    """Explains why the probability ratios of a run are 1 in every step, if they are; else nothing."""
    keys = [key for key in metrics.numeric_keys() if key.startswith("ratio/")]
    if not keys or any(abs(value - 1) > 1e-5 for key in keys for _, value in metrics.series(key)):
        return ""
    return (
        "The ratio is 1 and nothing is clipped in every step, as it must be with one update per rollout "
        "(num_minibatches=1): the weights that are trained are still those that sampled. The loss is the plain policy "
        "gradient; with num_minibatches of 2 or more the ratio moves and the clip range matters."
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values inside [low, high], about ``count`` of them."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    points: Points,
    control: Points,
    marks: Marks = (),
    min_span: float = 0.0,
    control_label: str = "the base on the same prompts",
) -> Chart:
    """A series and its control; ``control_label`` names the control in the alternative text."""
    steps = [x for x, _ in points + control]
    x_low, x_high = min(steps), max(steps)
    y_low, y_high = _padded([y for _, y in points + control], min_span)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    window = max(1, len(points) // 12 // 2 * 2 + 1) if len(points) >= 24 else 1
    smooth, smooth_control = _thin(_smoothed(points, window)), _thin(_smoothed(control, window))
    series = [("control", control, smooth_control), ("now", points, smooth)]
    lines = tuple(_line(kind, every, line, place) for kind, every, line in series if every)
    area = ""
    if smooth_control:
        outline = [place(*p) for p in smooth] + [place(*p) for p in reversed(smooth_control)]
        area = _path(outline) + "Z"
    x_ticks = [x for x in nice_ticks(x_low, x_high, 4) if float(x).is_integer()] or [x_low]
    return Chart(
        title=title,
        description=_description(title, smooth, smooth_control, control_label),
        lines=_separate_labels(lines),
        area=area,
        x_ticks=tuple((place(x, y_low)[0], f"{x:,.0f}" if i else f"step {x:,.0f}") for i, x in enumerate(x_ticks)),
        y_ticks=tuple((place(x_low, y)[1], _tick(y)) for y in nice_ticks(y_low, y_high, 6)),
        marks=tuple((place(x, y_low)[0], words) for x, words in marks if x_low <= x <= x_high),
        window=window,
    )


def _line(kind: str, points: Points, smooth: Points, place: Callable[[float, float], tuple[float, float]]) -> Line:
    raw = [place(*p) for p in _thin(points)]
    placed = [place(*p) for p in smooth]
    few = len(points) <= 16
    dots = tuple((*place(x, y), f"step {x:,.0f}: {compact(y)}") for x, y in points) if few else ()
    faint = _path(raw) if raw != placed else ""
    return Line(kind, faint, _path(placed), dots, placed[-1], placed[-1][1], _tick(smooth[-1][1], 3))


def _separate_labels(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    """Moves two overlapping end labels apart."""
    if len(lines) != 2 or abs(lines[0].label_y - lines[1].label_y) >= 13:
        return lines
    middle = (lines[0].label_y + lines[1].label_y) / 2
    middle = min(max(middle, TOP + 7), HEIGHT - BOTTOM - 7)
    sign = 1 if lines[0].label_y >= lines[1].label_y else -1
    return (replace(lines[0], label_y=middle + 6.5 * sign), replace(lines[1], label_y=middle - 6.5 * sign))


def _padded(values: list[float], min_span: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    span = max(high - low, min_span, 1e-12, abs(high) * 1e-6)
    middle = (low + high) / 2
    padded_low, padded_high = middle - span * 0.56, middle + span * 0.56
    if low >= 0 > padded_low:  # a share or a norm: no empty room below 0
        padded_low = -0.02 * span
    return padded_low, padded_high


def _smoothed(points: Points, window: int) -> Points:
    """Centered mean over ``window`` neighbors, only those that exist at the ends."""
    half = window // 2
    means: Points = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def _thin(points: Points) -> Points:
    """At most ``MAX_POINTS`` points: means of equal bins."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _validation_marks(metrics: Metrics) -> Marks:
    """The steps of rollbacks and stops by validation."""
    acted = [(float(row["step"]), str(row.get("validation/action") or "")) for row in metrics.rows]
    return [(step, action) for step, action in acted if "roll" in action.lower() or "stop" in action.lower()]


def _description(title: str, points: Points, control: Points, control_label: str) -> str:
    (x0, y0), (x1, y1) = points[0], points[-1]
    text = f"{title}: from {compact(y0)} at step {x0:,.0f} to {compact(y1)} at step {x1:,.0f}"
    if control:
        text += f"; {control_label}: from {compact(control[0][1])} to {compact(control[-1][1])}"
    return text


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _tick(value: float, digits: int = 0) -> str:
    """Short enough for an axis: .25, 1.5, 40, 2e-5."""
    if digits and 0.0005 <= abs(value) < 10:
        return score(value, digits if abs(value) < 1 else 2)
    text = compact(value)
    return text.replace("0.", ".", 1) if text.lstrip(MINUS).startswith("0.") else text


EXPERTS = ("all", "understand", "generate", "shared")


@dataclass(frozen=True)
class GradientAudit:
    """The gradient audit as tables of the means, lowest and highest values over the audited steps."""

    steps: int
    """Audited ones."""
    cosines: TextTable
    """Pairs of tasks by expert, together or apart where the cosine keeps its sign at every audited step."""
    layers: TextTable
    """Layers of the experts by pair of tasks."""
    norms: TextTable
    """Tasks by expert."""


def gradient_audit(metrics: Metrics) -> GradientAudit | None:
    """The tables of a run that was audited; None of any other."""
    keys = [key.split("/", 3)[1:] for key in metrics.numeric_keys() if key.startswith("gradient/")]
    pairs = list(dict.fromkeys(who for what, who, _ in keys if what == "cosine"))
    tasks = list(dict.fromkeys(who for what, who, _ in keys if what == "norm"))
    if not tasks:
        return None
    layers = sorted({part for _, _, part in keys if "/layer_" in part}, key=_layer_order)
    experts = [part for part in EXPERTS if part in {part for _, _, part in keys}]

    def cell(what: str, who: str, part: str) -> str:
        values = [value for _, value in metrics.series(f"gradient/{what}/{who}/{part}")]
        if not values:
            return NONE
        mean, low, high = sum(values) / len(values), min(values), max(values)
        if what == "norm":
            return compact(mean)
        spread = f"{score(mean, 2, True)} ({score(low, 2, True)} to {score(high, 2, True)})"
        return Cell(spread, "together" if low > 0 else "apart" if high < 0 else "")

    by_expert = [(_task_names(pair), *(cell("cosine", pair, e) for e in experts)) for pair in pairs]
    by_layer = [
        (part.replace("/layer_", ", layer "), *(cell("cosine", pair, part) for pair in pairs)) for part in layers
    ]
    norms = [(_task_names(task), *(cell("norm", task, e) for e in experts)) for task in tasks]
    return GradientAudit(
        max(len(metrics.series(f"gradient/norm/{task}/all")) for task in tasks),
        TextTable("Pairs of tasks, by expert", ("tasks", *experts), tuple(by_expert)),
        TextTable("Cosines by layer", ("layer", *map(_task_names, pairs)), tuple(by_layer)),
        TextTable("Norms", ("task", *experts), tuple(norms)),
    )


def _task_names(tasks: str) -> str:
    """understand+edit -> Questions and Editing."""
    return " and ".join(TASK_LABELS.get(task, task).partition(",")[0] for task in tasks.split("+"))


def _layer_order(part: str) -> tuple[str, int]:
    expert, _, layer = part.partition("/layer_")
    return expert, int(layer) if layer.isdigit() else 0
