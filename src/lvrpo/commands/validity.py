"""Whether rewards rank outputs as the truth does, in tables: those of a run, or of a model's own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lvrpo.commands.audit_tables import FEW, plain_table, share, signed_share, trait_name

if TYPE_CHECKING:
    from rich.table import Table

    from lvrpo.audit_records import Ranking, RewardAudit, RewardRanking, SampleAudit
    from lvrpo.statistics import Interval

TITLE = "validity inside groups: rank correlation with the truth; area under the curve, right against wrong outputs"
RANKING = ["rank [95 %]", "groups", "silent", "alike", "AUC [95 %]", "groups"]

Rewards = Sequence["RewardRanking"]


def run_tables(audit: RewardAudit) -> Iterator[Table]:
    """Every reward of a run, at the beginning and at the end too; none where there is nothing to tell."""
    rewards = {task: found.validity for task, found in audit.tasks.items()}
    if all(reward.is_success for row in rewards.values() for reward in row):
        return
    spans = [f"AUC, {w.first} to {w.last}" for w in (audit.windows[0], audit.windows[-1])]
    table = plain_table(TITLE, ["task", "reward", *RANKING, *spans, "change [95 %]"], 2)
    for task, row in rewards.items():
        _add(table, task, "", row, {reward.name: _course(reward) for reward in row})
    yield table
    yield from _category_tables(rewards)


def sample_tables(audit: SampleAudit) -> Iterator[Table]:
    """Every reward of a judge on a model's outputs."""
    table = plain_table(TITLE, ["task", "reward", *RANKING, "missing"], 2)
    for task, found in audit.tasks.items():
        missing = {name: [share(value)] for name, value in found.missing.items()}
        _add(table, task, f"{found.groups} groups, {share(found.right)} right; ", found.validity, missing)
    yield table
    yield from _category_tables({task: found.validity for task, found in audit.tasks.items()})


def _add(table: Table, task: str, words: str, rewards: Rewards, more: Mapping[str, Sequence[str]]) -> None:
    if rewards:
        table.add_row(f"[bold]{task}[/bold]", f"[dim]{words}truth: {trait_name(rewards[0].verifier)}[/dim]")
    for reward in rewards:
        if reward.is_success:
            table.add_row("", trait_name(reward.name), "[dim]scores as success does[/dim]")
        else:
            table.add_row("", trait_name(reward.name), *_cells(reward.whole), *more[reward.name])


def _category_tables(tasks: Mapping[str, Rewards]) -> Iterator[Table]:
    """One per task with several categories."""
    for task, rewards in tasks.items():
        rows = [reward for reward in rewards if not reward.is_success]
        categories = list(dict.fromkeys(name for reward in rows for name in reward.categories))
        if len(categories) < 2:
            continue
        names = ["", *(trait_name(name.replace("_", " ")) for name in categories)]
        table = plain_table(f"by category (AUC, rank): {task}", names, 1)
        for reward in rows:
            found = [reward.categories.get(name) for name in categories]
            table.add_row(trait_name(reward.name), *("" if r is None else _pair(r) for r in found))
        if any(max(r.auc.n, r.rank.n) >= FEW for reward in rows for r in reward.categories.values()):
            yield table


def _cells(ranking: Ranking) -> list[str]:
    counts = [str(n) for n in (ranking.rank.n, ranking.silent, ranking.alike)]
    return [_interval(ranking.rank, True), *counts, _interval(ranking.auc), str(ranking.auc.n)]


def _course(reward: RewardRanking) -> list[str]:
    """AUC at the beginning, at the end, and the change."""
    along = reward.along
    if along is None:
        return ["–"] * 3
    ends = [_known(found.auc, share) for found in (along.first, along.last)]
    return [*ends, "–" if "–" in ends else _interval(along.auc_change, True)]


def _pair(ranking: Ranking) -> str:
    """.87 +.61"""
    return f"{_known(ranking.auc, share)} {_known(ranking.rank, signed_share)}"


def _known(found: Interval, write: Callable[[float], str]) -> str:
    """A dash where too few groups stand behind it."""
    return "–" if found.n < FEW else write(found.score)


def _interval(found: Interval, signed: bool = False) -> str:
    """.87 [.84, .90], or +.61 [+.58, +.64]; a dash where too few groups stand behind it."""
    write = signed_share if signed else share
    if found.n < FEW:
        return "–"
    return f"{write(found.score)} \\[{write(found.low)}, {write(found.high)}]"
