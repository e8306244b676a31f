"""``lvrpo audit``: what the rewards of a run really did, what a judge can tell, or whether splits are apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lvrpo.commands import judge, leakage
from lvrpo.commands.audit_tables import FEW, plain_table, share, signed_share, trait_name
from lvrpo.commands.options import Command, Options, Parser, add_force, refuse_existing
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from lvrpo.audit_records import Change, Correlation, RewardAudit


def options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?", help="a run directory, finished or going on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, with the curves")
    judge.add_options(parser)
    leakage.add_options(parser)
    add_force(parser)


def run(options: Options) -> None:
    from dataclasses import asdict

    from lvrpo.commands.files import write_file
    from lvrpo.commands.tables import wide_console
    from lvrpo.commands.validity import run_tables
    from lvrpo.evaluation.recorded_groups import read_record
    from lvrpo.evaluation.reward_audit import audit_rewards
    from lvrpo.training.run_directory import json_text

    if options.data is not None:
        leakage.run(options)
        return
    leakage.refuse_options(options)
    if options.judge is not None:
        judge.run(options)
        return
    if options.run is None:
        raise InputError("RUN is missing: give a run directory, or --judge MODEL, or --data")
    judge.refuse_options(options)
    if options.json is not None:
        refuse_existing([options.json], options.force)
    audit = audit_rewards(read_record(options.run))
    console = wide_console()
    console.print(f"{options.run}: {recorded(audit)}; advantages: {audit.formula}", markup=False, soft_wrap=True)
    for table in (reward_table(audit), course_table(audit), *run_tables(audit), *correlation_tables(audit)):
        console.print()
        console.print(table)
    console.print()
    for line, style in alarm_lines(audit):
        console.print(line, style=style, markup=False, soft_wrap=True)
    if options.json is not None:
        write_file(options.json, json_text({"run": str(options.run), **asdict(audit)}).encode(), options.force)


def recorded(audit: RewardAudit) -> str:
    """How much of the run is on record."""
    steps = f"steps {audit.steps.first} to {audit.steps.last}"
    every = audit.steps.last - audit.steps.first + 1
    return f"{steps}, {audit.recorded} of {every} on record" if audit.recorded < every else f"{steps}, all on record"


def reward_table(audit: RewardAudit) -> Table:
    """Who caused the advantages, and where nothing could be learned."""
    names = ["task", "scorer", "weight", "share", "asked for", f"if {audit.other_formula}"]
    names += ["constant", "all best", "all worst", "missing"]
    table = plain_table("share of the variance of the advantages; shares of groups without a difference", names, 2)
    for task, found in audit.tasks.items():
        signal = f"{found.groups} groups, {share(found.with_signal)} with signal"
        table.add_row(f"[bold]{task}[/bold]", f"[dim]{signal}[/dim]")
        for scorer in found.scorers:
            weight = "held out" if not scorer.weight else f"{scorer.weight:g}"
            caused = [share(x) for x in (scorer.share, scorer.configured_share, scorer.other_share)]
            groups = [share(x) for x in (scorer.constant, scorer.all_best, scorer.all_worst, scorer.missing)]
            table.add_row("", trait_name(scorer.name), weight, *caused, *groups)
        if found.rest >= 0.005:
            table.add_row("", "[dim]from none of these[/dim]", "", share(found.rest))
    return table


def course_table(audit: RewardAudit) -> Table:
    """Means at the beginning and at the end."""
    first, last = audit.windows[0], audit.windows[-1]
    spans = [f"steps {w.first} to {w.last}" for w in (first, last)]
    table = plain_table("over the run", ["task", "mean of", *spans, "change [95 %]", "base, there"], 2)
    for task, found in audit.tasks.items():
        table.add_row(f"[bold]{task}[/bold]")
        for scorer in found.scorers:
            table.add_row("", trait_name(scorer.name), *change_cells(scorer.mean, "green", "red"))
        for name, change in found.drift.items():
            table.add_row("", f"[dim]{trait_name(name)}[/dim]", *change_cells(change, "bold", "bold"))
    return table


def correlation_tables(audit: RewardAudit) -> Iterator[Table]:
    """One per task whose scorers can be compared with anything."""
    for task, found in audit.tasks.items():
        names = [scorer.name for scorer in found.scorers]
        columns = list(dict.fromkeys([*names, *(name for s in found.scorers for name in s.correlations)]))
        if not any(scorer.correlations for scorer in found.scorers):
            continue
        table = plain_table(f"correlation inside groups: {task}", ["", *map(trait_name, columns)], 1)
        for scorer in found.scorers:
            table.add_row(trait_name(scorer.name), *(correlation(scorer.correlations.get(name)) for name in columns))
        yield table


def alarm_lines(audit: RewardAudit) -> Iterator[tuple[str, str]]:
    """(line, style): the alarms, or that there are none."""
    for missing in audit.alarms.missing:
        yield f"alarm: {missing.words}: metrics.jsonl says why (reward_failed_why)", "bold red"
    for alarm in audit.alarms.found:
        yield f"alarm: {alarm.words}: look at samples/ before you trust this reward", "bold red"
    for task, reward, scorer in audit.alarms.same:
        yield f"{task}: {reward} scores every output as {scorer} does, so that they cannot part", "dim"
    compared = audit.alarms.comparisons
    if not compared:
        yield "alarm: no comparison: the run is too short, or nothing held out was scored", "dim"
    elif not audit.alarms.found:
        yield f"no alarm: no trained reward rose while a held-out score fell ({compared} comparisons)", "green"


def change_cells(change: Change, up: str, down: str) -> list[str]:
    """first, last, change with its interval in the style of its direction, base."""
    from lvrpo.report.numbers import compact

    d = change.difference
    cells = ["–" if x != x else compact(x) for x in (change.first, change.last)]
    style = up if d.low > 0 else down if d.high < 0 else "dim"
    moved = f"{signed(d.score)} \\[{signed(d.low)}, {signed(d.high)}]" if d.low == d.low else "–"
    return [*cells, f"[{style}]{moved}[/{style}]", "–" if change.control != change.control else compact(change.control)]


def correlation(found: Correlation | None) -> str:
    """+.52; a dash where too few groups stand behind it."""
    return "–" if found is None or found.groups < FEW else signed_share(found.value)


def signed(value: float) -> str:
    """+.052, or +12.3 where it is large."""
    from lvrpo.report.numbers import score

    return score(value, 3 if abs(value) < 1 else 1, signed=True)


AUDIT = Command(
    "what the rewards of a run really did: shares, correlations, drift, an alarm; what a judge can tell; or whether "
    "train, validation and test are apart",
    options,
    run,
    "docs/concepts/reward_audit.md explains every number. The curves are in the report: lvrpo report RUN\n"
    "example: lvrpo audit --data train.jsonl validation.jsonl test.jsonl",
)
