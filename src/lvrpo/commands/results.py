"""``lvrpo evaluate``, ``lvrpo report`` and ``lvrpo compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lvrpo.commands.options import (
    Command,
    Options,
    Parser,
    add_base,
    add_force,
    add_model,
    names,
    num_steps,
    positive,
    refuse_existing,
    threads,
    whole,
)
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from lvrpo.rewards.held_out import HeldOutScorer


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
    parser.add_argument(
        "--rewards",
        metavar="CONFIG",
        help="whose rewards score the rows of FILE.jsonl that have no answer (default: the run's own, of a run)",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="another folder of the pictures of FILE.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and scores per prompt")
    parser.add_argument("--n", type=positive, help="prompts per benchmark (default: the benchmark's own)")
    parser.add_argument("--num-steps", type=num_steps, default=8, help="model evaluations per picture (default: 8)")
    parser.add_argument("--seed", type=whole, default=0, help="of noise and sampling (default: 0)")
    parser.add_argument("--threads", type=threads, default=1, help="on the CPU (default: 1)")
    add_force(parser)


def evaluate(options: Options) -> None:
    from dataclasses import replace

    import torch

    from lvrpo.commands.files import write_file
    from lvrpo.commands.tables import scores_table, wide_console
    from lvrpo.evaluation import suite
    from lvrpo.policies.loading import load_policy, picture_side
    from lvrpo.training.run_directory import json_text

    if options.json is not None:
        refuse_existing([options.json], options.force)
    scorer, judged_by = held_out_scorer(options)
    files = any(name.endswith(".jsonl") for name in options.benchmark)
    side = picture_side(options.model) if files else None
    benchmarks = suite.find_benchmarks(options.benchmark, scorer, side, options.root)
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    rewarded = any(benchmark.metric == "reward" for benchmark in benchmarks)
    judge = load_policy(judged_by, options.device).frozen() if rewarded and judged_by is not None else None
    console = wide_console()
    result = suite.evaluate(
        policy,
        benchmarks,
        options.seed,
        {b.name: options.n for b in benchmarks} if options.n else {},
        replace(suite.SAMPLING, num_steps=options.num_steps),
        progress=lambda name, n: console.print(f"{name}: {n} prompts", style="dim"),
        scorer=scorer,
        judge=judge,
    )
    console.print(scores_table(result.results(), f"{options.model}, {result.seconds:.0f} s"))
    if options.json is not None:
        head = {"model": options.model, "seed": options.seed}
        write_file(options.json, json_text({**head, **result.as_dict()}).encode(), options.force)


def held_out_scorer(options: Options) -> tuple[HeldOutScorer, str | None]:
    """What scores rows without an answer, and the MODEL that judges for its rewards; nothing where none is named.

    A run is scored as it scored itself: by its rewards, judged by the weights that it began with.
    """
    from lvrpo.commands.settings import read_config
    from lvrpo.rewards.held_out import SUCCESS_ONLY, HeldOutScorer
    from lvrpo.rewards.table import build_rewards
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.run import START
    from lvrpo.training.run_directory import CONFIG, RunDirectory

    if options.rewards is None and not any(name.endswith(".jsonl") for name in options.benchmark):
        return SUCCESS_ONLY, None
    run = Path(options.rewards or options.model)
    if (run / START).is_dir() and (run / CONFIG).is_file():
        config, judge = RunDirectory.read(run).config(TrainConfig), str(run / START)
    elif options.rewards is not None:
        config = read_config(TrainConfig, options.rewards, [])
        judge = config.policy
    else:
        return SUCCESS_ONLY, None
    return HeldOutScorer(tuple(build_rewards(config.rewards))), judge


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
        raise InputError(
            f"{options.runs[0]}: no run has results: wait until one has finished, or train with held-out rows "
            "(data.jsonl.test)"
        )
    if options.markdown:
        print(comparison.markdown(), end="")
    else:
        wide_console().print(comparison.table())


EVALUATE = Command("scores per category with 95 % intervals", evaluate_options, evaluate)
REPORT = Command("write the HTML report of a run", report_options, report)
COMPARE = Command("several runs in one table", compare_options, compare)
