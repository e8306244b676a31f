"""Kept evaluation cases, lined up over time: the same prompt before, during and after."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from lvrpo.report.pictures import Picture, PictureStore
from lvrpo.report.records import Case, RunRecord
from lvrpo.report.verdict import label

SHOWN_PICTURES = 12
SHOWN_ANSWERS = 9
SHOWN_WORST = 6
RIGHT = 0.999
"""A score from here on is right; scores are sums of float32."""


@dataclass(frozen=True)
class Frame:
    """What came out of a prompt at one time."""

    phase: str
    case: Case | None
    picture: Picture | None

    @property
    def right(self) -> bool | None:
        return is_right(self.case)

    @property
    def reward(self) -> float | None:
        """What it was scored, where nobody can tell right from wrong."""
        return self.case.reward if self.case else None

    @property
    def fact_count(self) -> str:
        """``2 of 3 hold``; empty where nothing is known."""
        holds = [f.holds for f in self.case.facts if f.holds is not None] if self.case else []
        return f"{sum(holds)} of {len(holds)} hold" if holds else ""


@dataclass(frozen=True)
class CaseView:
    """One prompt over time."""

    id: str
    task: str
    category: str
    text: str
    answer: str
    source: Picture | None
    frames: tuple[Frame, ...]
    facts: tuple[tuple[str, str, tuple[bool | None, ...]], ...]
    """(question, answer, whether it holds in each frame)."""

    @property
    def drawn(self) -> bool:
        return any(f.case is not None and f.case.image for f in self.frames)


@dataclass(frozen=True)
class Selection:
    """Some cases to show, and the rest behind a fold."""

    shown: tuple[CaseView, ...]
    folded: tuple[CaseView, ...]
    total: int


@dataclass(frozen=True)
class CaseSections:
    """All that the page shows of single cases."""

    pictures: Selection
    answers: Selection
    fallen: Selection
    still_wrong: Selection
    judged: int
    """How many cases have a score before and after."""


def is_right(case: Case | None) -> bool | None:
    return None if case is None or case.score is None else case.score >= RIGHT


def case_sections(run: RunRecord, store: PictureStore) -> CaseSections:
    before, after = run.cases("before"), run.cases("after")
    ids = list(dict.fromkeys([*before, *after]))
    phases = _phases(run)
    views = {i: _view(i, phases, store) for i in ids}
    even = _in_turn([views[i] for i in ids])
    both = [i for i in ids if _score(before.get(i)) is not None and _score(after.get(i)) is not None]
    fallen = sorted(
        (i for i in both if is_right(before[i]) and not is_right(after[i])), key=lambda i: _score(after[i]) or 0.0
    )
    wrong = sorted(
        (i for i in both if not is_right(before[i]) and not is_right(after[i])),
        key=lambda i: (_score(after[i]) or 0.0, (_score(after[i]) or 0.0) - (_score(before[i]) or 0.0)),
    )
    return CaseSections(
        pictures=_select([v for v in even if v.drawn], SHOWN_PICTURES),
        answers=_select([v for v in even if not v.drawn], SHOWN_ANSWERS),
        fallen=_drawn_first(_select([views[i] for i in fallen], SHOWN_WORST)),
        still_wrong=_drawn_first(_select([views[i] for i in wrong], SHOWN_WORST)),
        judged=len(both),
    )


def _phases(run: RunRecord) -> list[tuple[str, dict[str, Case]]]:
    """Before and after always; in between at most one, from the middle of the run, that shares prompts with them."""
    known = set(run.cases("before")) | set(run.cases("after"))
    between = [(name, dict(cases)) for name, cases in run.phases if name not in ("before", "after")]
    between = [(name, cases) for name, cases in between if known & set(cases)]
    middle = between[(len(between) - 1) // 2 : (len(between) - 1) // 2 + 1] if between else []
    ends = [("before", dict(run.cases("before")))], [("after", dict(run.cases("after")))]
    return [*ends[0], *middle, *(ends[1] if run.cases("after") else [])]


def _view(case_id: str, phases: list[tuple[str, dict[str, Case]]], store: PictureStore) -> CaseView:
    cases = [cases.get(case_id) for _, cases in phases]
    known = [case for case in cases if case is not None]
    first = known[0]
    frames = tuple(
        Frame(name, case, store.picture(case.image) if case else None)
        for (name, _), case in zip(phases, cases, strict=True)
    )
    questions = dict.fromkeys((f.question, f.answer) for case in known for f in case.facts)
    facts = tuple((q, a, tuple(_holds(case, q, a) for case in cases)) for q, a in questions)
    source = next((case.source_image for case in known if case.source_image), None)
    return CaseView(case_id, first.task, first.category, first.text, first.answer, store.picture(source), frames, facts)


def _holds(case: Case | None, question: str, answer: str) -> bool | None:
    facts = case.facts if case else ()
    return next((f.holds for f in facts if (f.question, f.answer) == (question, answer)), None)


def _score(case: Case | None) -> float | None:
    return case.score if case else None


def _in_turn(views: list[CaseView]) -> list[CaseView]:
    """The first of each task and category, then the second of each, ...: nothing is chosen by how it came out."""
    queues: dict[tuple[str, str], list[CaseView]] = defaultdict(list)
    for view in views:
        queues[view.task, view.category].append(view)
    longest = max((len(q) for q in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]


def _select(views: list[CaseView], most: int) -> Selection:
    return Selection(tuple(views[:most]), tuple(views[most : most * 5]), len(views))


def _drawn_first(selection: Selection) -> Selection:
    """Drawings and answers are cards of two shapes: each shape by itself, the worst of it first."""
    shown, folded = (tuple(sorted(v, key=lambda view: not view.drawn)) for v in (selection.shown, selection.folded))
    return Selection(shown, folded, selection.total)


def task_label(view: CaseView) -> str:
    category = view.category.replace("_", " ")
    name = {"understand": "Question", "generate": "Drawing"}.get(view.task) or label(view.task)
    return f"{name} · {category}" if category else name
