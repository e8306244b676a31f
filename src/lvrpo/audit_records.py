"""The audits as types: what the rewards of a run did (``audit.json``), and what a judge can tell.

They are written with ``dataclasses.asdict`` and read back with ``records.from_json``. docs/audit.md explains every
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lvrpo.statistics import Interval
from lvrpo.types import OutputKind, Task

MIN_GROUPS = 10
"""A number over fewer groups is not shown."""

Series = dict[str, list[tuple[float, float]]]
"""(step, value) by name."""


# --- rewards against the truth ---


@dataclass(frozen=True)
class Ranking:
    """A reward against the truth, inside some groups."""

    rank: Interval
    """Mean over groups of Spearman's correlation with the verifier, where both tell members apart."""
    auc: Interval
    """Mean over groups of the chance that a right member scores above a wrong one, a tie counting one half, where
    there are both."""
    silent: int
    """Groups in which the verifier tells members apart and the reward does not: left out of ``rank``."""
    alike: int
    """Groups in which the verifier finds all members alike: left out of ``rank`` too."""


@dataclass(frozen=True)
class RankingChange:
    """The same over the first and the last part of a run."""

    first: Ranking
    last: Ranking
    rank_change: Interval
    """Welch's 95 % interval, groups as units."""
    auc_change: Interval


@dataclass(frozen=True)
class RewardRanking:
    """One reward in one task."""

    name: str
    verifier: str
    """The scorer that ``Ranking.rank`` compares with."""
    is_success: bool
    """Whether it scores every output as success does, so that there is nothing to compare."""
    whole: Ranking
    categories: Mapping[str, Ranking]
    """By category of prompts, for those that are known."""
    along: RankingChange | None
    """None without steps, or with only one part of the run."""


# --- rewards of a run ---


@dataclass(frozen=True)
class Window:
    """A part of the run; both ends belong to it."""

    first: int
    last: int


@dataclass(frozen=True)
class Change:
    """A mean at the beginning and at the end of the run."""

    first: float
    """Over the first part of the run."""
    last: float
    difference: Interval
    """Welch's 95 % interval, groups as units."""
    control: float
    """Of the reference on the prompts of the last part; nan where it was not sampled."""


@dataclass(frozen=True)
class Correlation:
    """Inside groups, pooled."""

    value: float
    groups: int
    """In which both spread."""


@dataclass(frozen=True)
class ScorerAudit:
    """What one scorer did in one task."""

    name: str
    weight: float | None
    """None for success; 0 for a reward that is only logged."""
    mean: Change
    share: float | None
    """Of the variance of the advantages, that it caused; None for a scorer that is not trained."""
    configured_share: float | None
    """What its weight asks for: w^2 / sum w^2 over the trained rewards of the task."""
    other_share: float | None
    """What it would have caused under the other formula (``RewardAudit.other_formula``) on the same scores."""
    missing: float
    """Share of the outputs it applies to whose score failed."""
    constant: float
    """Share of the groups in which it spreads by no more than ``advantages.std_floor``."""
    all_best: float
    """Share of the groups that are constant at the top of its range: nothing left to gain."""
    all_worst: float
    """Share of the groups that are constant at the bottom."""
    correlations: Mapping[str, Correlation]
    """With the other scorers and with traits of the output."""


@dataclass(frozen=True, kw_only=True)
class TaskAudit:
    """One task."""

    groups: int
    with_signal: float
    """Share of the groups whose advantages differ."""
    rest: float
    """Share of the variance of the advantages that no sum of these rewards explains: a clamp, or a reward joined from
    another task."""
    scorers: tuple[ScorerAudit, ...]
    validity: tuple[RewardRanking, ...] = ()
    """Of every reward but the verifier; empty where the right output is not known, and in files of older versions."""
    drift: Mapping[str, Change]
    """Of traits of the output."""
    series: Series
    control_series: Series


@dataclass(frozen=True)
class Overoptimization:
    """A reward rose while a held-out scorer fell, each by more than chance explains."""

    task: str
    reward: str
    scorer: str
    before: Window
    after: Window
    """Always the last part of the run."""
    reward_change: Interval
    """Above 0 with its whole interval, at the confidence of all comparisons together."""
    scorer_change: Interval
    """Below 0 with its whole interval."""
    words: str
    """All of it in one sentence."""


@dataclass(frozen=True)
class MissingScores:
    """More scores of a reward failed than may: over the whole run, or in its last part."""

    task: str
    reward: str
    share: float
    words: str


@dataclass(frozen=True)
class Alarms:
    """What is wrong with the rewards of a run."""

    found: tuple[Overoptimization, ...]
    """One per pair of reward and scorer: where the scorer fell most."""
    comparisons: int
    """0: the run is too short to tell."""
    confidence: float
    """Of each interval, so that all comparisons together err in at most ``ERROR`` of all runs."""
    same: tuple[tuple[str, str, str], ...]
    """(task, reward, scorer) with equal scores for every output: these cannot part and are not compared."""
    missing: tuple[MissingScores, ...] = ()
    """Rewards whose scores failed too often."""


@dataclass(frozen=True)
class RewardAudit:
    """``audit.json``: the audit of a run."""

    formula: str
    """How the run made advantages: ``advantages.kind``."""
    other_formula: str
    """What ``other_share`` compares with."""
    steps: Window
    recorded: int
    """Training steps on record; a long run keeps some of them, evenly spaced."""
    windows: tuple[Window, ...]
    tasks: Mapping[str, TaskAudit]
    alarms: Alarms

    def __post_init__(self) -> None:
        if not self.windows:
            raise ValueError("windows is empty")


# --- judges ---


@dataclass(frozen=True)
class JudgeScore:
    """One reward on one kind of error."""

    reward: str
    output: OutputKind
    kind: str
    error: str
    """One way to err, or "" for all of the kind."""
    auc: Interval
    """Share of the pairs ranked right, a tie counting one half; scenes are resampled."""
    failed: int
    """Pairs without two scores."""


@dataclass(frozen=True)
class JudgeAudit:
    """Every reward of a judge on every kind of error."""

    judge: str
    rows: tuple[JudgeScore, ...]
    milliseconds: Mapping[str, float]
    """Per output scored, by reward."""

    def find(self, reward: str, output: OutputKind, kind: str, error: str = "") -> JudgeScore | None:
        """The row, if there is one."""
        rows = (r for r in self.rows if (r.reward, r.output, r.kind, r.error) == (reward, output, kind, error))
        return next(rows, None)


@dataclass(frozen=True)
class TaskSamples:
    """One task of a model's own samples."""

    groups: int
    right: float
    """Share of the outputs that are right."""
    missing: Mapping[str, float]
    """By reward: share of the outputs it applies to that it gave no score."""
    validity: tuple[RewardRanking, ...]


@dataclass(frozen=True)
class SampleAudit:
    """Rewards of one judge on the outputs of one model."""

    judge: str
    """``judge_fingerprint``; so is ``model``."""
    model: str
    tasks: Mapping[Task, TaskSamples]
