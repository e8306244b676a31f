"""Tables of the audits for the terminal: rewards of a run, rankings, judges, overlaps of splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from lvrpo.audit_records import Change, Correlation, JudgeAudit, Ranking, RewardAudit, RewardRanking, SampleAudit
from lvrpo.commands.tables import number
from lvrpo.data.leakage import Index, Overlap
from lvrpo.report.formatting import compact, score
from lvrpo.statistics import Interval
from lvrpo.types import OutputKind

FEW = 10
"""A correlation over fewer groups is not shown."""
TRAITS = {
    "tokens": "tokens written",
    "cut_off": "texts cut off",
    "text_diversity": "texts of a group that differ",
    "picture_diversity": "difference of a group's pictures",
}
"""Display names of traits."""


def plain_table(title: str, names: list[str], left: int) -> Table:
    """A table without a frame; all but the first ``left`` columns are right-aligned."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def share(value: float | None) -> str:
    """.52; a dash for none."""
    return "–" if value is None or value != value else score(value, 2)


def _signed_share(value: float) -> str:
    """+.52"""
    return score(value, 2, signed=True)


def _trait_name(name: str) -> str:
    """A scorer or trait in words, for a cell."""
    return escape(TRAITS.get(name, name))


TITLES: dict[OutputKind, str] = {
    "image": "pictures with one fact corrupted: area under the curve [95 %]; .5 is chance",
    "text": "texts with one fact corrupted",
}


def recorded_steps(audit: RewardAudit) -> str:
    """The number of recorded steps of the run."""
    steps = f"steps {audit.steps.first} to {audit.steps.last}"
    every = audit.steps.last - audit.steps.first + 1
    return f"{steps}, {audit.recorded} of {every} on record" if audit.recorded < every else f"{steps}, all on record"


def reward_table(audit: RewardAudit) -> Table:
    """The variance shares of the advantages, and the groups without a learning signal."""
    names = ["task", "scorer", "weight", "share", "configured", f"if {audit.other_formula}"]
    names += ["constant", "all best", "all worst", "missing"]
    table = plain_table("share of the variance of the advantages; shares of groups without a difference", names, 2)
    for task, found in audit.tasks.items():
        signal = f"{found.groups} groups, {share(found.with_signal)} with signal"
        table.add_row(f"[bold]{task}[/bold]", f"[dim]{signal}[/dim]")
        for scorer in found.scorers:
            weight = "held out" if not scorer.weight else f"{scorer.weight:g}"
            caused = [share(x) for x in (scorer.share, scorer.configured_share, scorer.other_share)]
            groups = [share(x) for x in (scorer.constant, scorer.all_best, scorer.all_worst, scorer.missing)]
            table.add_row("", _trait_name(scorer.name), weight, *caused, *groups)
        if found.rest >= 0.005:
            table.add_row("", "[dim]from none of these[/dim]", "", share(found.rest))
    return table


def means_table(audit: RewardAudit) -> Table:
    """Means in the first and in the last window."""
    first, last = audit.windows[0], audit.windows[-1]
    spans = [f"steps {w.first} to {w.last}" for w in (first, last)]
    table = plain_table("over the run", ["task", "mean of", *spans, "change [95 %]", "base, there"], 2)
    for task, found in audit.tasks.items():
        table.add_row(f"[bold]{task}[/bold]")
        for scorer in found.scorers:
            table.add_row("", _trait_name(scorer.name), *_change_cells(scorer.mean, "green", "red"))
        for name, change in found.drift.items():
            table.add_row("", f"[dim]{_trait_name(name)}[/dim]", *_change_cells(change, "bold", "bold"))
    return table


def correlation_tables(audit: RewardAudit) -> Iterator[Table]:
    """One per task whose scorers can be compared with anything."""
    for task, found in audit.tasks.items():
        names = [scorer.name for scorer in found.scorers]
        columns = list(dict.fromkeys([*names, *(name for s in found.scorers for name in s.correlations)]))
        if not any(scorer.correlations for scorer in found.scorers):
            continue
        table = plain_table(f"correlation inside groups: {task}", ["", *map(_trait_name, columns)], 1)
        for scorer in found.scorers:
            table.add_row(_trait_name(scorer.name), *(correlation(scorer.correlations.get(name)) for name in columns))
        yield table


def alarm_lines(audit: RewardAudit) -> Iterator[tuple[str, str]]:
    """(line, style): the alarms, or that there are none."""
    for missing in audit.alarms.missing:
        yield f"alarm: {missing.words}: metrics.jsonl says why (reward_failed_why)", "bold red"
    for alarm in audit.alarms.found:
        yield f"alarm: {alarm.words}: look at samples/ before you trust this reward", "bold red"
    for task, reward, scorer in audit.alarms.same:
        yield f"{task}: {reward} scores every output as {scorer} does, so the two are not compared", "dim"
    compared = audit.alarms.comparisons
    if not compared:
        yield "alarm: no comparison: the run is too short, or nothing held out was scored", "dim"
    elif not audit.alarms.found:
        yield f"no alarm: no trained reward rose while a held-out score fell ({compared} comparisons)", "green"


def _change_cells(change: Change, up: str, down: str) -> list[str]:
    """first, last, change with its interval in the style of its direction, base."""
    d = change.difference
    cells = ["–" if x != x else compact(x) for x in (change.first, change.last)]
    style = up if d.low > 0 else down if d.high < 0 else "dim"
    moved = f"{signed(d.score)} \\[{signed(d.low)}, {signed(d.high)}]" if d.low == d.low else "–"
    return [*cells, f"[{style}]{moved}[/{style}]", "–" if change.control != change.control else compact(change.control)]


def correlation(found: Correlation | None) -> str:
    """+.52; a dash for fewer than ``FEW`` groups."""
    return "–" if found is None or found.groups < FEW else _signed_share(found.value)


def signed(value: float) -> str:
    """+.052, or +12.3 where it is large."""
    return score(value, 3 if abs(value) < 1 else 1, signed=True)


def sensitivity_table(audit: JudgeAudit, output: OutputKind) -> Table:
    """AUC by kind of fact and, below each, by error."""
    rows = [row for row in audit.rows if row.output == output]
    rewards = list(dict.fromkeys(row.reward for row in rows))
    table = Table(title=TITLES[output], title_justify="left", box=None, header_style="dim", padding=(0, 1))
    table.add_column("kind")
    for reward in rewards:
        table.add_column(reward)
    table.add_column("pairs", justify="right")
    for kind in dict.fromkeys(row.kind for row in rows):
        errors = sorted({row.error for row in rows if row.kind == kind})
        for error in errors if len(errors) > 2 else errors[:1]:
            cells, pairs = [], 0
            for reward in rewards:
                row = audit.find(reward, output, kind, error)
                if row is None or not row.auc.n:
                    cells.append("")
                    continue
                pairs = max(pairs, row.auc.n)
                cells.append(f"{number(row.auc.score)} \\[{number(row.auc.low)}, {number(row.auc.high)}]")
            if pairs:
                table.add_row(f"  {error}" if error else kind, *cells, str(pairs), style="dim" if error else "")
    return table


def overlap_table(title: str, index: Index, overlaps: Sequence[Overlap]) -> Table:
    """Leaks as counts, overlaps of texts and pictures as shares."""
    names = ["task", "prompts", "same prompt", "same content", "looks alike", "picture", "text", "normalized"]
    names += ["one 5-gram", "all 5-grams"]
    table = plain_table(f"{title} ({index.size} prompts)", names, 1)
    for each in overlaps:
        leaking = [f"[red]{n}[/red]" if n else "0" for n in (each.same, each.content)]
        common = (each.picture, each.verbatim, each.normalized, each.some_ngrams, each.all_ngrams)
        table.add_row(each.task, str(each.prompts), *leaking, str(each.look), *cells(common, each.prompts))
    return table


def cells(counts: Sequence[int], of: int) -> Iterator[str]:
    """Shares."""
    return (share(count / of) for count in counts)


TITLE = "validity inside groups: rank correlation with ground truth; area under the curve, right against wrong outputs"
RANKING = ["rank [95 %]", "groups", "silent", "alike", "AUC [95 %]", "groups"]

Rewards = Sequence[RewardRanking]


def ranking_tables(audit: RewardAudit) -> Iterator[Table]:
    """The rankings of the rewards of a run; none where every reward equals success."""
    rewards = {task: found.validity for task, found in audit.tasks.items()}
    if all(reward.is_success for row in rewards.values() for reward in row):
        return
    spans = [f"AUC, {w.first} to {w.last}" for w in (audit.windows[0], audit.windows[-1])]
    table = plain_table(TITLE, ["task", "reward", *RANKING, *spans, "change [95 %]"], 2)
    for task, row in rewards.items():
        _add(table, task, "", row, {reward.name: _auc_change(reward) for reward in row})
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
        table.add_row(f"[bold]{task}[/bold]", f"[dim]{words}truth: {_trait_name(rewards[0].verifier)}[/dim]")
    for reward in rewards:
        if reward.is_success:
            table.add_row("", _trait_name(reward.name), "[dim]scores as success does[/dim]")
        else:
            table.add_row("", _trait_name(reward.name), *_cells(reward.whole), *more[reward.name])


def _category_tables(tasks: Mapping[str, Rewards]) -> Iterator[Table]:
    """One per task with several categories."""
    for task, rewards in tasks.items():
        rows = [reward for reward in rewards if not reward.is_success]
        categories = list(dict.fromkeys(name for reward in rows for name in reward.categories))
        if len(categories) < 2:
            continue
        names = ["", *(_trait_name(name.replace("_", " ")) for name in categories)]
        table = plain_table(f"by category (AUC, rank): {task}", names, 1)
        for reward in rows:
            found = [reward.categories.get(name) for name in categories]
            table.add_row(_trait_name(reward.name), *("" if r is None else _pair(r) for r in found))
        if any(max(r.auc.n, r.rank.n) >= FEW for reward in rows for r in reward.categories.values()):
            yield table


def _cells(ranking: Ranking) -> list[str]:
    counts = [str(n) for n in (ranking.rank.n, ranking.silent, ranking.alike)]
    return [_interval(ranking.rank, True), *counts, _interval(ranking.auc), str(ranking.auc.n)]


def _auc_change(reward: RewardRanking) -> list[str]:
    """AUC in the first and the last window, and the change."""
    along = reward.along
    if along is None:
        return ["–"] * 3
    ends = [_known(found.auc, share) for found in (along.first, along.last)]
    return [*ends, "–" if "–" in ends else _interval(along.auc_change, True)]


def _pair(ranking: Ranking) -> str:
    """.87 +.61"""
    return f"{_known(ranking.auc, share)} {_known(ranking.rank, _signed_share)}"


def _known(found: Interval, write: Callable[[float], str]) -> str:
    """A dash for fewer than ``FEW`` groups."""
    return "–" if found.n < FEW else write(found.score)


def _interval(found: Interval, signed: bool = False) -> str:
    """.87 [.84, .90], or +.61 [+.58, +.64]; a dash for fewer than ``FEW`` groups."""
    write = _signed_share if signed else share
    if found.n < FEW:
        return "–"
    return f"{write(found.score)} \\[{write(found.low)}, {write(found.high)}]"
