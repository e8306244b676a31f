"""What came of the run, in plain words: what rose, what fell, and what nobody can tell."""

from __future__ import annotations

from dataclasses import dataclass

from lvrpo.records import Estimate, Summary
from lvrpo.report.numbers import duration, enough_digits, score
from lvrpo.report.run import RunRecord

TASK_LABELS = {
    "generate": "Generation",
    "generate_guided": "Generation, guided",
    "generate_paraphrased": "Generation, other words",
    "understand": "Questions, greedy",
    "understand_sampled": "Questions, sampled",
    "understand_paraphrased": "Questions, other words",
    "edit": "Editing",
    "reason": "Reasoning",
}
IN_SENTENCES = {
    "generate": "generation",
    "generate_guided": "guided generation",
    "generate_paraphrased": "generation in other words",
    "understand": "question answering (greedy)",
    "understand_sampled": "question answering (sampled)",
    "understand_paraphrased": "question answering in other words",
    "edit": "editing",
    "reason": "reasoning",
}
VERBS = {"up": "rose", "down": "fell", "flat": "did not clearly change:", "unsure": "went"}


@dataclass(frozen=True)
class Verdict:
    """The headline and the lines under it."""

    headline: str
    tone: str
    """up, down, flat or open (no final evaluation)."""
    lines: tuple[tuple[str, str], ...] = ()
    """(up | down | flat | note, sentence)."""


def label(task: str) -> str:
    return TASK_LABELS.get(task, task.replace("_", " ").replace("/", ": ").capitalize())


def in_sentence(task: str) -> str:
    return IN_SENTENCES.get(task, task.replace("_", " ").replace("/", ": "))


def task_order(*tables: object) -> list[str]:
    """The tasks of some tables, known ones first in their usual order."""
    present = dict.fromkeys(task for table in tables if isinstance(table, dict) for task in table)
    return [t for t in TASK_LABELS if t in present] + [t for t in present if t not in TASK_LABELS]


def change(estimate: Estimate) -> str:
    """``+.28, 95 % interval .25 to .31``, with a space that does not break."""
    digits = enough_digits(estimate.score, estimate.low, estimate.high)
    text = score(estimate.score, digits, signed=True)
    if estimate.low is None or estimate.high is None:
        return f"{text}, no interval"
    signed = estimate.low < 0 < estimate.high or estimate.high <= 0
    low, high = (score(v, digits, signed=signed) for v in (estimate.low, estimate.high))
    return f"{text}, 95\N{NO-BREAK SPACE}% interval {low} to {high}"


def verdict(run: RunRecord) -> Verdict:
    if run.summary is None or not run.summary.after:
        return _open_verdict(run)
    summary = run.summary
    tasks = task_order(summary.after)
    known = [t for t in tasks if t in summary.difference]
    if not known:
        task = tasks[0]
        value = score(summary.after[task].score, 2)
        return Verdict(f"{_cap(in_sentence(task))} stands at {value}; there is no difference to a base.", "flat")
    lead, rest = known[0], known[1:]
    fallen = [t for t in rest if summary.difference[t].direction == "down"]
    headline = _sentence(summary, lead)
    if fallen:
        named = _listed([in_sentence(t) for t in fallen])
        headline += f", but {named} fell" if summary.difference[lead].direction == "up" else f"; {named} fell too"
    lines = [(_tone(summary, t), _sentence(summary, t) + ".") for t in rest]
    lines.sort(key=lambda line: ("down", "up", "flat").index(line[0]))
    note = _baseline_note(summary, lead)
    return Verdict(headline + ".", "down" if fallen else _tone(summary, lead), (*lines, *note))


def _sentence(summary: Summary, task: str) -> str:
    difference = summary.difference[task]
    before, after = summary.before.get(task), summary.after.get(task)
    if before is None or after is None:
        return f"{_cap(in_sentence(task))} changed by {change(difference)}"
    what = " (mean reward)" if after.metric == "reward" else ""
    values = f"{score(before.score, 2)} to {score(after.score, 2)} ({change(difference)})"
    joint = "" if difference.direction == "flat" else " from"
    return f"{_cap(in_sentence(task))}{what} {VERBS[difference.direction]}{joint} {values}"


def _tone(summary: Summary, task: str) -> str:
    direction = summary.difference[task].direction
    return "flat" if direction == "unsure" else direction


def _baseline_note(summary: Summary, lead: str) -> list[tuple[str, str]]:
    baseline = summary.baseline
    if baseline is None or lead not in baseline.after:
        return []
    reached = f"{_cap(baseline.name)} from the same base reached {score(baseline.after[lead].score, 2)}"
    if lead in baseline.difference:
        reached += f" ({change(baseline.difference[lead])})"
    return [("note", f"{reached} in {in_sentence(lead)}.")]


def _open_verdict(run: RunRecord) -> Verdict:
    """No final evaluation: say so, and where the training stands."""
    headline = "No final evaluation yet: this run is still going on or was stopped."
    if run.finished:
        headline = "Finished; no held-out rows were measured before and after."
    if run.metrics.last_step is None:
        return Verdict(headline, "open", (("note", "No finished step is on record."),))
    row = run.metrics.rows[-1]
    lines = [("note", f"The last step on record is {run.metrics.last_step}.")]
    seconds, left = row.get("seconds"), row.get("seconds_left")
    if isinstance(seconds, int | float) and isinstance(left, int | float) and not run.finished:
        lines = [("note", f"{lines[0][1]} It was written after {duration(seconds)}, with {duration(left)} left.")]
    for key in run.metrics.numeric_keys():
        if not key.startswith("reward/"):
            continue
        rewards = [value for _, value in run.metrics.series(key)][-5:]
        controls = [value for _, value in run.metrics.series("control/" + key.removeprefix("reward/"))][-5:]
        text = f"Reward {key.removeprefix('reward/')}: {score(sum(rewards) / len(rewards))}"
        if controls:
            text += f"; the base on the same prompts: {score(sum(controls) / len(controls))}"
        lines.append(("note", f"{text} (mean of the last {len(rewards)} steps)."))
    return Verdict(headline, "open", tuple(lines))


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
