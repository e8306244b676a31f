"""Formats of numbers, times, tasks and changes in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lvrpo.records import Estimate, number

MINUS = "−"
NONE = "–"
"""A cell without a number."""


def score(value: float, digits: int = 3, signed: bool = False) -> str:
    """A share: ``.524``, ``1.000``; with ``signed`` ``+.284`` or ``−.017``."""
    text = f"{abs(value):.{digits}f}"
    if text.startswith("0."):
        text = text[1:]
    is_zero = float(text) == 0
    if value < 0 and not is_zero:
        return MINUS + text
    return ("+" + text) if signed and not is_zero else text


def share(value: object, signed: bool = False) -> str:
    """``.52``, or a dash for what is no finite number."""
    found = number(value)
    return NONE if found is None else score(found, 2, signed)


def interval(found: object, digits: int = 2, signed: bool = False) -> str:
    """``.42 [.38, .46]`` of an interval, an estimate or a result in JSON; a dash for none, ends only where known.

    A difference (``signed``) has a third digit where two would hide a sign; one whose smallest detectable effect is
    known ends in ``≥ .05``.
    """
    value, low, high, detectable = (
        number(found.get(name) if isinstance(found, Mapping) else getattr(found, name, None))  # of three types
        for name in ("score", "low", "high", "detectable")
    )
    if value is None:
        return NONE
    if signed:
        digits = max(digits, decimals(value, low, high))
    ends = "" if low is None or high is None else f" [{score(low, digits, signed)}, {score(high, digits, signed)}]"
    return score(value, digits, signed) + ends + ("" if detectable is None else f" ≥ {score(detectable, digits)}")


def decimals(*values: float | None) -> int:
    """2, or 3 where two digits would show a value that is not 0 as .00."""
    return 3 if any(v is not None and 0 < abs(v) < 0.005 for v in values) else 2


def compact(value: object) -> str:
    """Any number in three significant digits: ``0``, ``0.0312``, ``2.4e-7``, ``1,240``; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if isinstance(value, int) or (size >= 1000 and size < 1e7):
        text = f"{size:,.0f}"
    elif 1e-3 <= size < 1000:
        text = f"{size:.3g}"
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    return MINUS + text if value < 0 else text


def duration(seconds: float) -> str:
    """``45 s``, ``8 min 12 s``, ``3 h 05 min``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


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


def words(name: str) -> str:
    """A name of code as words."""
    return name.replace("_", " ")


def task_name(task: str) -> str:
    """A task, whatever the temperature of its answers."""
    return "Questions" if task == "understand" else label(task)


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
    digits = decimals(estimate.score, estimate.low, estimate.high)
    text = score(estimate.score, digits, signed=True)
    if estimate.low is None or estimate.high is None:
        return f"{text}, no interval"
    signed = estimate.low < 0 < estimate.high or estimate.high <= 0
    low, high = (score(v, digits, signed=signed) for v in (estimate.low, estimate.high))
    return f"{text}, 95\N{NO-BREAK SPACE}% interval {low} to {high}"
