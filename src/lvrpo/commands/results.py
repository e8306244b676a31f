"""``lvrpo evaluate``, ``lvrpo report`` and ``lvrpo compare``."""

from __future__ import annotations

from pathlib import Path

from lvrpo.commands.options import (
    Command,
    Options,
    Parser,
    add_base,
    add_force,
    add_model,
    names,
    positive,
    refuse_existing,
    whole,
)
from lvrpo.errors import InputError


def evaluate_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument(
        "--benchmark",
        type=names,
        default=["scenes"],
        metavar="NAME[,NAME]",
        help="generate, generate_guided, understand, understand_sampled, edit, reason; scenes: all; or FILE.jsonl",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and scores per prompt")
    parser.add_argument("--n", type=positive, help="prompts per benchmark (default: the benchmark's own)")
    parser.add_argument("--num-steps", type=positive, default=8, help="model evaluations per picture (default: 8)")
    parser.add_argument("--seed", type=whole, default=0, help="of noise and sampling (default: 0)")
    parser.add_argument("--threads", type=positive, default=1, help="on the CPU (default: 1)")
    add_force(parser)


def evaluate(options: Options) -> None:
    from dataclasses import replace

    import torch

    from lvrpo.commands.files import write_file
    from lvrpo.commands.tables import scores_table, wide_console
    from lvrpo.evaluation import suite
    from lvrpo.policies.loading import load_policy
    from lvrpo.training.run_directory import json_text
    from lvrpo.training.splits import require_unseen_by

    if options.json is not None:
        refuse_existing([options.json], options.force)
    require_unseen_by(options.model, options.benchmark)
    benchmarks = suite.find_benchmarks(options.benchmark)
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    console = wide_console()
    result = suite.evaluate(
        policy,
        benchmarks,
        options.seed,
        {b.name: options.n for b in benchmarks} if options.n else {},
        replace(suite.SAMPLING, num_steps=options.num_steps),
        progress=lambda name, n: console.print(f"{name}: {n} prompts", style="dim"),
    )
    console.print(scores_table(result.results(), f"{options.model}, {result.seconds:.0f} s"))
    if options.json is not None:
        head = {"model": options.model, "seed": options.seed}
        write_file(options.json, json_text({**head, **result.as_dict()}).encode(), options.force)


def report_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")


def report(options: Options) -> None:
    from lvrpo.evaluation.reward_audit import write_audit
    from lvrpo.report import build_report
    from lvrpo.training.score_record import has_records

    if has_records(options.run):
        write_audit(options.run)
    print(build_report(options.run))


def compare_options(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--markdown", action="store_true", help="the table as markdown")


def compare(options: Options) -> None:
    from lvrpo.commands.tables import wide_console
    from lvrpo.report import compare_runs

    comparison = compare_runs(options.runs)
    if not comparison.tasks:
        raise InputError(f"{options.runs[0]}: no run has results yet: wait until one has finished")
    if options.markdown:
        print(comparison.markdown(), end="")
    else:
        wide_console().print(comparison.table())


EVALUATE = Command("scores per category with 95 % intervals", evaluate_options, evaluate)
REPORT = Command("write the HTML report of a run", report_options, report)
COMPARE = Command("several runs in one table", compare_options, compare)
