"""Typed records of the audits of rewards (``audit.json``), of judges and of a model's samples.

They are written with ``dataclasses.asdict`` and read back with ``records.from_json``. docs/concepts/reward_audit.md
explains every number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lvrpo.statistics import Interval
from lvrpo.types import OutputKind, TaskKind

MIN_GROUPS = 10
"""A number over fewer groups is not shown."""

Series = dict[str, list[tuple[float, float]]]
"""(step, value) by name."""


# --- rewards against ground truth ---


@dataclass(frozen=True)
class Ranking:
    """How well a reward ranks the members of groups by ground truth."""

    rank: Interval
    """Mean over groups of Spearman's correlation with the verifier, where both vary."""
    auc: Interval
    """Mean over groups with right and wrong members of the AUC: P(right scores above wrong), ties count one half."""
    silent: int
    """Groups in which the verifier varies and the reward does not; left out of ``rank``."""
    alike: int
    """Groups in which the verifier is constant; left out of ``rank``."""


@dataclass(frozen=True)
class RankingChange:
    """The ranking in the first and the last window of a run."""

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
    """Whether its scores equal success everywhere, which leaves nothing to compare."""
    whole: Ranking
    categories: Mapping[str, Ranking]
    """Rankings per category of prompts, where categories are known."""
    along: RankingChange | None
    """None without steps, or with a single window."""


# --- rewards of a run ---


@dataclass(frozen=True)
class Window:
    """A range of training steps, both ends included."""

    first: int
    last: int


@dataclass(frozen=True)
class Change:
    """A mean at the beginning and at the end of the run."""

    first: float
    """Over the first window."""
    last: float
    difference: Interval
    """Welch's 95 % interval, groups as units."""
    control: float
    """Mean of the reference policy on the prompts of the last window; nan where it was not sampled."""


@dataclass(frozen=True)
class Correlation:
    """Inside groups, pooled."""

    value: float
    groups: int
    """Groups in which both vary."""


@dataclass(frozen=True)
class ScorerAudit:
    """One scorer in one task."""

    name: str
    weight: float | None
    """None for success; 0 for a reward that is only logged."""
    mean: Change
    share: float | None
    """The share of the advantages' variance that this reward explains; None for a scorer that is not trained on."""
    configured_share: float | None
    """The share by weight: w^2 / sum w^2 over the trained rewards of the task."""
    other_share: float | None
    """The same share under ``RewardAudit.other_formula``."""
    missing: float
    """Share of the outputs it applies to whose score failed."""
    constant: float
    """Share of the groups in which its std is at most ``advantages.std_floor``."""
    all_best: float
    """Share of the groups that are constant at the maximum of its range."""
    all_worst: float
    """Share of the groups that are constant at the minimum."""
    correlations: Mapping[str, Correlation]
    """Correlations with the other scorers and with properties of the output."""


@dataclass(frozen=True, kw_only=True)
class GroupAudit:
    """The audit of the groups of one task."""

    groups: int
    with_signal: float
    """Share of the groups whose advantages differ."""
    rest: float
    """Share of the variance of the advantages that no sum of these rewards explains: from clamping, or a reward of
    another task."""
    scorers: tuple[ScorerAudit, ...]
    validity: tuple[RewardRanking, ...] = ()
    """Rankings of every reward except the verifier; empty without ground truth, and in files of older versions."""
    drift: Mapping[str, Change]
    """Changes of properties of the output."""
    series: Series
    control_series: Series


@dataclass(frozen=True)
class Overoptimization:
    """A reward rose while a held-out scorer fell, both significantly."""

    task: str
    reward: str
    scorer: str
    before: Window
    after: Window
    """The last window."""
    reward_change: Interval
    """The interval, at ``Alarms.confidence``, lies above 0."""
    scorer_change: Interval
    """The interval lies below 0."""
    words: str
    """The finding as a sentence."""


@dataclass(frozen=True)
class MissingScores:
    """More scores of a reward failed than ``max_failed`` allows, in the whole run or in its last window."""

    task: str
    reward: str
    share: float
    words: str


@dataclass(frozen=True)
class Alarms:
    """Over-optimization and missing scores of a run."""

    found: tuple[Overoptimization, ...]
    """One per pair of reward and scorer: the window with the largest fall."""
    comparisons: int
    """0: the run is too short."""
    confidence: float
    """Confidence level of each interval; the family-wise error rate is at most ``ERROR``."""
    same: tuple[tuple[str, str, str], ...]
    """(task, reward, scorer) with equal scores for every output, which are not compared."""
    missing: tuple[MissingScores, ...] = ()
    """Rewards whose scores failed too often."""


@dataclass(frozen=True)
class RewardAudit:
    """``audit.json``: the audit of a run."""

    formula: str
    """The advantage estimator of the run: ``advantages.kind``."""
    other_formula: str
    """The estimator of ``ScorerAudit.other_share``."""
    steps: Window
    recorded: int
    """Recorded training steps; long runs record some of them, evenly spaced."""
    windows: tuple[Window, ...]
    tasks: Mapping[str, GroupAudit]
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
    """One type of corruption, or "" for all of the kind."""
    auc: Interval
    """Share of the pairs ranked correctly, ties count one half; scenes are resampled."""
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
class SampleQuality:
    """One task of a model's own samples."""

    groups: int
    right: float
    """Share of the outputs that are right."""
    missing: Mapping[str, float]
    """Per reward, the share of applicable outputs that have no score."""
    validity: tuple[RewardRanking, ...]


@dataclass(frozen=True)
class SampleAudit:
    """Rewards of one judge on the outputs of one model."""

    judge: str
    """``judge_fingerprint``; so is ``model``."""
    model: str
    tasks: Mapping[TaskKind, SampleQuality]
