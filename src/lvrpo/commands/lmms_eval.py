"""``lvrpo evaluate MODEL --lmms-eval TASKS``: tasks of lmms-eval, run in an environment of its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lvrpo.commands.options import Options, Parser, names, refuse_given
from lvrpo.errors import ContractError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lvrpo.evaluation.benchmarks.lmms_process import Harness, HarnessTask
    from lvrpo.evaluation.benchmarks.lmms_results import HarnessEvaluation

OF_OWN_BENCHMARKS = (
    "tuned",
    "judge",
    "samples",
    "rewards",
    "root",
    "data",
    "vlm",
    "detector",
    "geneval_layout",
)
"""Options that mean nothing to lmms-eval."""


def lmms_options(parser: Parser) -> None:
    """Adds the options of lmms-eval."""
    group = parser.group("lmms-eval")
    group.add_argument(
        "--lmms-eval",
        type=names,
        metavar="TASK[,TASK]",
        help="tasks of lmms-eval by name or FILE.yaml, alone or beside --benchmark",
    )
    group.add_argument(
        "--lmms-env",
        type=Path,
        metavar="DIR|PYTHON",
        help="the environment of lmms-eval, or its Python (default: in the user's cache)",
    )
    group.add_argument(
        "--lmms-install", action="store_true", help="create that environment first (downloads several GB)"
    )
    group.add_argument(
        "--lmms-args",
        type=arguments,
        default={},
        metavar="KEY=VALUE[,..]",
        help="arguments of the model, such as mode=generate,think=True,batch_size=8,max_new_tokens=512",
    )


def arguments(text: str) -> dict[str, str]:
    """KEY=VALUE pairs."""
    found: dict[str, str] = {}
    for pair in names(text):
        key, equals, value = pair.partition("=")
        if not (key and equals and value) or key in found:
            raise argparse.ArgumentTypeError(f"{text!r}: write KEY=VALUE,KEY=VALUE, each key once")
        found[key] = value
    return found


def refuse_lmms_options(options: Options) -> None:
    """Raises InputError for options that do not fit together, with and without ``--lmms-eval``."""
    if options.lmms_eval is None:
        own = ("lmms_env", "lmms_install", "lmms_args")
        refuse_given(options, own, "belongs to --lmms-eval: add it, or leave this out")
        return
    refuse_given(options, ("tune",), "chooses sampling for lvrpo's own benchmarks: leave it out, or --lmms-eval")
    if not options.benchmark:
        rule = "applies to lvrpo's own benchmarks only: leave it out, or add --benchmark"
        refuse_given(options, OF_OWN_BENCHMARKS, rule)
    if options.out is None:
        raise InputError("--lmms-eval: keeps what it writes: add --out DIR")
    if options.guidance is not None and len(options.guidance) > 1 and "guidance_scale" not in options.lmms_args:
        raise InputError(
            f"--guidance {','.join(map(str, options.guidance))}: lmms-eval takes one scale: give one, or add "
            "--lmms-args guidance_scale=X"
        )


def open_lmms(options: Options) -> tuple[list[HarnessTask], Harness]:
    """The tasks and the interpreter that runs them; raises InputError where a model, a task or a package is missing."""
    from lvrpo.evaluation.benchmarks import lmms_process as process
    from lvrpo.policies.loading import policy_folder

    for model in filter(None, (options.model, options.base, options.against)):
        policy_folder(model)
    tasks = [process.HarnessTask.read(text) for text in options.lmms_eval]
    doubled = [task.name for place, task in enumerate(tasks) if task.name in [t.name for t in tasks[:place]]]
    if doubled:
        raise InputError(f"task {doubled[0]!r}: named twice: name each once")
    where = options.lmms_env or process.default_environment()
    if options.lmms_install:
        process.install(where)
    python = process.find_interpreter(where)
    return tasks, _harness_of(options, python, process.check_environment(python, tasks))


def evaluate_lmms(
    options: Options, tasks: Sequence[HarnessTask], harness: Harness, console: Console
) -> tuple[HarnessEvaluation, HarnessEvaluation | None]:
    """The scores of MODEL, and of ``--against`` before."""
    before = None
    if options.against is not None:
        before = scores_of(options, tasks, harness, options.against, None, "before", console)
    result = scores_of(options, tasks, harness, options.model, options.base, "" if before is None else "after", console)
    return result, before


def _harness_of(options: Options, python: Path, version: str) -> Harness:
    from lvrpo.evaluation.benchmarks.lmms_process import Harness

    given = {
        "seed": options.seed,
        "dtype": options.dtype,
        "device": None if options.device == "auto" else options.device,
        "num_steps": options.num_steps,
        "guidance_scale": options.guidance and options.guidance[0],
    }
    found = {key: str(value) for key, value in given.items() if value is not None} | options.lmms_args
    batch_size = found.pop("batch_size", "1")
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise InputError(f"--lmms-args batch_size={batch_size}: must be a whole number >= 1")
    return Harness(python, version, found, int(batch_size), options.n)


def scores_of(
    options: Options,
    tasks: Sequence[HarnessTask],
    harness: Harness,
    model: str,
    base: str | None,
    phase: str,
    console: Console,
) -> HarnessEvaluation:
    """The scores of one model; a task that fails is named and does not stop the others."""
    import time

    from lvrpo.evaluation.benchmarks.lmms_results import HarnessEvaluation, read_scores

    started, scored, failed = time.perf_counter(), {}, {}
    for task in tasks:
        title = f"{phase}: {task.name}" if phase else task.name
        console.print(f"{title}: lmms-eval {harness.version}", style="dim", markup=False)
        try:
            output = harness.run(task, model, base, options.out / phase / "lmms-eval")
            scored |= read_scores(output, task.name)
        except ContractError as error:
            failed[task.name] = str(error)
            console.print(str(error), style="red", markup=False, soft_wrap=True)
    return HarnessEvaluation(scored, time.perf_counter() - started, failed)


def require_all(*evaluations: HarnessEvaluation | None) -> None:
    """Raises ContractError where a task failed, after the others were scored."""
    failed = [reason for each in evaluations if each is not None for reason in each.failed.values()]
    if failed:
        more = f" ({len(failed)} tasks failed)" if len(failed) > 1 else ""
        raise ContractError(f"{failed[0]}{more}: the same command tries again what failed")
