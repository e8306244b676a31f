"""``lvrpo audit``: the rewards of a run, a judge on minimal pairs, or leakage between splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lvrpo.commands.data import audit_data
from lvrpo.commands.inputs import write_json
from lvrpo.commands.options import Options, refuse_existing, refuse_given
from lvrpo.commands.progress import print_tables, wide_console
from lvrpo.config import parse_section
from lvrpo.errors import InputError
from lvrpo.evaluation import judge_audit, sample_audit
from lvrpo.evaluation.recorded_groups import read_recorded_run
from lvrpo.evaluation.reward_audit import audit_rewards
from lvrpo.evaluation.sample_audit import VERIFIER_REWARD, audit_samples, sample_groups
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.report import audit as tables
from lvrpo.report.audit import JUDGED, sample_tables, sensitivity_table
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import build_rewards

DEFAULT_SIDE = 256
"""Side of the images, in pixels, for a model that reads any size."""
JUDGE_OPTIONS = ("samples", "also", "n", "seed")
ROW_KEYS = ("name", "label", "options", "judge")
"""Keys of a row of ``--also``; the others belong to training."""


def run(options: Options) -> None:
    if options.data is None:
        refuse_given(options, ("steps", "wording"), "belongs to --data: leave it out, or add --data")
    if options.json is not None:
        refuse_existing([options.json], options.force)
    if options.data is not None:
        audit_data(options)
    elif options.judge is not None:
        audit_judge(options)
    elif options.run is None:
        raise InputError("RUN is missing: give a run directory, or --judge MODEL, or --data")
    else:
        refuse_given(options, JUDGE_OPTIONS, "belongs to --judge MODEL: leave it out, or name a model")
        audit_run(options)


def audit_run(options: Options) -> None:
    """Prints the tables and alarms of a run."""
    audit = audit_rewards(read_recorded_run(options.run))
    console = wide_console()
    head = f"{options.run}: {tables.recorded_steps(audit)}; advantages: {audit.formula}"
    console.print(f"{head}\n", markup=False, soft_wrap=True)
    parts = (tables.share_tables, tables.mean_tables, tables.ranking_tables, tables.correlation_tables)
    print_tables([table for part in parts for table in part(audit)], console)
    console.print()
    for line, style in tables.alarm_lines(audit):
        console.print(line, style=style, markup=False, soft_wrap=True)
    write_json(options, {"run": str(options.run), **asdict(audit)})


def audit_judge(options: Options) -> None:
    """Audits the judge on minimal pairs, or on samples of a model, and prints the tables."""
    if options.run is not None:
        raise InputError(f"{options.run}: a run and --judge {options.judge}: give one of the two")
    torch.set_num_threads(1)
    if options.samples is not None:
        _rank_samples(options)
        return
    sources = _build_sources(judge_audit.REWARDS, options.also or [])
    judge = load_policy(options.judge, options.device)
    console = wide_console()
    cases = judge_audit.minimal_pairs(options.n or 40, seed=options.seed or 0, size=judge.image_size or DEFAULT_SIDE)
    audit = judge_audit.audit_judge(
        judge, cases, sources, progress=lambda name, pairs: console.print(f"{name}: {pairs} pairs", style="dim")
    )
    print_tables([sensitivity_table(audit, output) for output in JUDGED], console)
    costs = (f"{name} {ms:.1f} ms" for name, ms in audit.milliseconds.items())
    console.print(f"\nper output: {', '.join(costs)}", style="dim", highlight=False)
    write_json(options, {"model": options.judge, **asdict(audit)})


def _rank_samples(options: Options) -> None:
    """Samples a model, scores its outputs by every reward, prints the rankings against ground truth."""
    sources = _build_sources((VERIFIER_REWARD, *sample_audit.REWARDS), options.also or [])
    judge, model = (load_policy(name, options.device) for name in (options.judge, options.samples))
    size, n, seed = _image_side(judge, model, options), options.n or 40, options.seed or 0
    console = wide_console()
    groups = sample_groups(
        model,
        n,
        seed,
        size=size,
        progress=lambda task, prompts: console.print(f"{task}: {prompts} groups", style="dim"),
    )
    audit = audit_samples(judge, model, groups, sources)
    console.print(f"\noutputs of {audit.model}, judged by {audit.judge}\n", highlight=False)
    print_tables(sample_tables(audit), console)
    named = {"model": options.samples, "judge": options.judge, "n": n, "seed": seed}
    found = {**named, "identities": {"model": audit.model, "judge": audit.judge}, "tasks": asdict(audit)["tasks"]}
    write_json(options, found)


def _image_side(judge: Policy, model: Policy, options: Options) -> int:
    """The image side that both models support; raises InputError where there is none."""
    sizes = {size for size in (judge.image_size, model.image_size) if size is not None}
    if len(sizes) > 1:
        raise InputError(
            f"--samples {options.samples}: draws {model.image_size} x {model.image_size}, which {options.judge} "
            f"cannot read: name a judge of that size"
        )
    return next(iter(sizes), DEFAULT_SIDE)


def _build_sources(defaults: Sequence[RewardConfig], also: list[Any]) -> list[ConfiguredReward]:
    """The default rewards and those of ``--also``, which replace defaults of the same title. Any: YAML values."""
    own = []
    for i, row in enumerate(also):
        tree = {"name": row} if isinstance(row, str) else row
        own.append(parse_section(RewardConfig, tree, f"--also[{i}]"))
        other = sorted(set(tree) - set(ROW_KEYS))
        if other:
            raise InputError(f"--also[{i}].{other[0]}: belongs to training: a row here has {', '.join(ROW_KEYS)}")
    return build_rewards([row for row in defaults if row.title not in {other.title for other in own}] + own)
