"""Health check of a finished run: failed scores, validation actions, answer collapse and non-finite gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from lvrpo.config import Config
from lvrpo.metrics import answer_entropy
from lvrpo.types import Prompt

Rows = Sequence[Mapping[str, Any]]
"""``metrics.jsonl``. Any: JSON values."""

ENTROPY = "answer_entropy/"
"""Metric prefix: entropy in bits of the answers to one form of questions among the held-out prompts."""
INITIAL_ENTROPY, COLLAPSED_ENTROPY = 0.5, 0.1
"""Answers have collapsed if their entropy was above the first value before the run and is below the second after."""
MIN_QUESTIONS = 4
"""Minimum number of held-out questions of a form."""


class HealthConfig(Config):
    """The health check of a finished run; if it fails, the exit code is 3."""

    max_failed: float = Field(default=0.1, ge=0, le=1)
    """Maximum share of failed scores of a reward over the run, unless the reward sets its own ``max_failed``."""


@dataclass(frozen=True)
class Finding:
    """One failed check."""

    kind: str
    """failed scores, validation, answers or gradients."""
    words: str
    """The message."""


@dataclass(frozen=True)
class Health:
    """The result of the health check."""

    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON, for ``summary.json``."""
        return {"well": not self.findings, "findings": [asdict(finding) for finding in self.findings]}


def assess(rows: Rows, max_failed: Mapping[str, float]) -> Health:
    """The health of a run from its metrics; ``max_failed``: by reward, the maximum share of failed scores."""
    findings = [*_failed(rows, max_failed), *_actions(rows), *_collapsed(rows), *_gradients(rows)]
    return Health(tuple(findings))


def answer_entropies(prompts: Sequence[Prompt], texts: Sequence[str | None]) -> dict[str, float]:
    """Per task/category, the entropy in bits of the answers to its questions, if their right answers differ.

    H = -sum p log2 p over the distinct answers, one per prompt (None: no answer), normalized by case and outer spaces.
    """
    answers: dict[str, list[str]] = {}
    right: dict[str, set[str]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        if text is not None and prompt.answer is not None:
            form = f"{prompt.task}/{prompt.category or 'all'}"
            answers.setdefault(form, []).append(text.strip().lower())
            right.setdefault(form, set()).add(prompt.answer)
    return {
        form: answer_entropy(row) for form, row in answers.items() if len(row) >= MIN_QUESTIONS and len(right[form]) > 1
    }


def _failed(rows: Rows, max_failed: Mapping[str, float]) -> Iterator[Finding]:
    """Rewards with too many failed scores, over all steps in which they applied."""
    shares: dict[str, list[float]] = {}
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        failed = {k.removeprefix("reward_failed/"): v for k, v in row.items() if k.startswith("reward_failed/")}
        scored = [k.removeprefix("reward/") for k in row if k.startswith("reward/")]
        for name in dict.fromkeys((*scored, *failed)):
            shares.setdefault(name, []).append(float(failed.get(name) or 0.0))
            if why := row.get(f"reward_failed_why/{name}"):
                reasons.setdefault(name, Counter())[str(why)] += 1
    for name, found in shares.items():
        task, _, reward = name.partition("/")
        share, limit = sum(found) / len(found), max_failed.get(reward, 1.0)
        if share > limit:
            why = reasons.get(name, Counter({"unknown": 1})).most_common(1)[0][0]
            yield Finding(
                "failed scores",
                f"{share:.0%} of the scores of {reward} ({task}) failed, {limit:.0%} may; most often: {why}",
            )


def _actions(rows: Rows) -> Iterator[Finding]:
    """Rollbacks, early stops and warnings of validation."""
    for row in rows:
        for name in ("validation", "overoptimization"):
            action = str(row.get(f"{name}/action") or "")
            if action.startswith(("rolled back", "stopped", "warned")):
                yield Finding("validation", f"validation, step {row['step']}: {action}")


def _collapsed(rows: Rows) -> Iterator[Finding]:
    """Forms of questions whose held-out answers collapsed to one."""
    forms = dict.fromkeys(key for row in rows for key in row if key.startswith(ENTROPY))
    for form in forms:
        values = [float(row[form]) for row in rows if row.get(form) is not None]
        if values and values[0] > INITIAL_ENTROPY and values[-1] < COLLAPSED_ENTROPY:
            yield Finding(
                "answers",
                f"the answers to {form.removeprefix(ENTROPY)} collapsed to one: their entropy fell from "
                f"{values[0]:.2f} to {values[-1]:.2f} bits on held-out questions",
            )


def _gradients(rows: Rows) -> Iterator[Finding]:
    """Steps with non-finite gradient norms, which are null in the file."""
    bad = [row["step"] for row in rows if any(k.startswith("grad_norm/") and v is None for k, v in row.items())]
    if bad:
        steps = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        yield Finding("gradients", f"gradients were not finite, so nothing was learned, at step {steps}")
