"""One self-contained HTML page from a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml

from lvrpo.atomic_io import write_atomic
from lvrpo.errors import InputError
from lvrpo.records import number
from lvrpo.report import formatting
from lvrpo.report.audit import audit_section, read_audit
from lvrpo.report.charts import (
    gradient_audit,
    headline_charts,
    other_charts,
    ratio_note,
    reward_charts,
    validation_charts,
)
from lvrpo.report.formatting import label
from lvrpo.report.run import RunRecord, load_run
from lvrpo.report.samples import EmbeddedImage, ImageStore, sample_sections, task_label
from lvrpo.report.scores import score_table, verdict
from lvrpo.report.tables import TextTable, collapses, measure_tables, summary_phases

HERE = Path(__file__).parent
GRID_SIDE = 1400


def build_report(run: Path) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    Works for a run that is still going on. Raises ``InputError`` where the folder is no run directory, its summary is
    unreadable, or the page cannot be written; what was there before then stays.
    """
    target = Path(run) / "report.html"
    try:
        write_atomic(target, render(load_run(Path(run))).encode())
    except OSError as error:
        why = f"{error.strerror or error} ({error.filename or target})"
        raise InputError(f"no report of {run}: {why}: free the disk or the permission and report again") from error
    return target


def render(run: RunRecord) -> str:
    """The page as a string."""
    store = ImageStore(run.path)
    validation_keys = [key for key in run.metrics.numeric_keys() if key.startswith("validation/")]
    raw = run.summary.raw if run.summary else {}
    problems = list(run.problems)
    audit = read_audit(run.path / "audit.json", problems)
    found = (*audit.alarms.missing, *audit.alarms.found) if audit else ()
    alarms = [f"Alarm of the reward audit: {alarm.words}." for alarm in found]
    alarms += [f"Answers have collapsed: {words}." for words in collapses(raw.get("difference"))]
    context: dict[str, Any] = {
        "run": run,
        "style": markupsafe.Markup((HERE / "style.css").read_text(encoding="utf-8")),
        "verdict": verdict(run),
        "facts": _run_facts(run),
        "command": _command(run.manifest),
        "scores": score_table(run.summary) if run.summary and (run.summary.before or run.summary.after) else None,
        "measures": measure_tables(summary_phases(raw), raw.get("difference"), full=True),
        "rewards": reward_charts(run.metrics),
        "strip": headline_charts(run.metrics),
        "others": other_charts(run.metrics),
        "ratio_note": ratio_note(run.metrics),
        "gradients": gradient_audit(run.metrics),
        "validation_charts": validation_charts(run.metrics),
        "validation_history": _validation_history(run, validation_keys),
        "validation_summary": raw.get("validation"),
        "judge": raw.get("judge"),
        "audit": audit and audit_section(audit),
        "notices": [*health_findings(raw.get("health")), *alarms, *problems, *_notes(raw.get("notes"))],
        "samples": sample_sections(run, store),
        "grids": _selected_grids(run, store),
    }
    return environment().get_template("page.html").render(context)


def health_findings(health: object) -> list[str]:
    """The reasons why a finished run is not healthy."""
    findings = health.get("findings") if isinstance(health, Mapping) else None
    rows = findings if isinstance(findings, list) else []
    return [f"Not healthy: {row['words']}." for row in rows if isinstance(row, Mapping) and row.get("words")]


def _validation_history(run: RunRecord, keys: list[str]) -> TextTable:
    """A row per step on which validation ran."""
    heads = ("step", *(label(key.removeprefix("validation/")) for key in keys), "what it did")
    ran = [row for row in run.metrics.rows if any(key.startswith("validation/") for key in row)]
    rows = []
    for row in ran:
        scores = (formatting.NONE if number(row.get(k)) is None else formatting.score(row[k]) for k in keys)
        rows.append((str(int(row["step"])), *scores, str(row.get("validation/action") or formatting.NONE)))
    return TextTable("", heads, tuple(rows))


def _run_facts(run: RunRecord) -> list[tuple[str, str]]:
    """(term, value) pairs for the head of the page, as far as they were recorded."""
    raw = run.summary.raw if run.summary else {}
    last = run.metrics.rows[-1] if run.metrics.rows else {}
    seconds = number(raw.get("seconds"))
    so_far = number(last.get("seconds"))
    memory = number(raw.get("peak_memory_gib"))
    policy = _find(run.manifest, ("policy", "model")) or _find(config_of(run), ("policy", "model"))
    facts = [
        ("Policy", policy if isinstance(policy, str) else ""),
        ("Seed", _flat(raw.get("seed", _find(run.manifest, ("seed", "seeds"))))),
        ("Steps", f"{run.metrics.last_step:,}" if run.metrics.last_step else ""),
        ("Time", formatting.duration(seconds) if seconds is not None else ""),
        ("Peak memory", f"{memory:.2f} GiB" if memory is not None else ""),
        ("Hardware", _flat(_find(run.manifest, ("hardware", "device")))),
    ]
    if seconds is None and so_far is not None:
        facts[3] = ("Time so far", formatting.duration(so_far))
    return [(term, value) for term, value in facts if value]


def config_of(run: RunRecord) -> object:
    """The values of config.yaml; None while it is being written."""
    try:
        return yaml.safe_load(run.config)
    except yaml.YAMLError:
        return None  # half written; the text itself is on the page


def _command(manifest: Mapping[str, Any]) -> str:
    command = _find(manifest, ("command", "argv"))
    return " ".join(map(str, command)) if isinstance(command, list) else _flat(command)


def _find(tree: object, names: tuple[str, ...]) -> Any:
    """The value of the first of these names, the upper levels before the lower ones."""
    level = [tree]
    while level:
        for name in names:
            for node in level:
                if isinstance(node, Mapping) and node.get(name) not in (None, "", {}, []):
                    return node[name]
        level = [child for node in level if isinstance(node, Mapping) for child in node.values()]
    return None


def _flat(value: object) -> str:
    """A nested value in one line."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        parts = [(str(k).replace("_", " "), _flat(v)) for k, v in value.items()]
        return " · ".join(
            f"{k.removesuffix(' gib')} {v} GiB" if k.endswith(" gib") else f"{k} {v}" for k, v in parts if v
        )
    if isinstance(value, list):
        return ", ".join(_flat(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(notes: object) -> list[str]:
    if not notes:
        return []
    return [_flat(note) for note in notes] if isinstance(notes, list) else [_flat(notes)]


def _selected_grids(run: RunRecord, store: ImageStore) -> list[tuple[int, EmbeddedImage]]:
    """The first, the middle and the last image of sampled groups."""
    last = len(run.grids) - 1
    chosen = dict.fromkeys((0, last // 2, last)) if run.grids else {}
    read = [(step, store.image(path.resolve(), GRID_SIDE)) for step, path in (run.grids[i] for i in chosen)]
    return [(step, image) for step, image in read if image is not None]


def environment() -> jinja2.Environment:
    """The templates of this folder, with their filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        score=formatting.score,
        compact=formatting.compact,
        words=lambda text: formatting.words(str(text)),
        tone=lambda cell: getattr(cell, "tone", ""),  # only a Cell has one
    )
    environment.globals.update(task_label=task_label)
    environment.tests["table"] = lambda value: isinstance(value, Mapping)
    environment.tests["listing"] = lambda value: isinstance(value, list | tuple)
    return environment
