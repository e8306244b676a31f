"""``lvrpo evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from lvrpo.commands.benchmarks import (
    evaluate_lmms,
    open_lmms,
    refuse_geneval_layout,
    refuse_lmms_options,
    require_all,
    resumable,
    write_geneval_layout,
)
from lvrpo.commands.inputs import read_config, require_used, write_file
from lvrpo.commands.options import Options, refuse_existing, refuse_given
from lvrpo.commands.progress import print_tables, text_table, wide_console
from lvrpo.config import read_yaml
from lvrpo.distributed import is_main, world_size
from lvrpo.errors import InputError
from lvrpo.evaluation import BENCHMARKS, suite, tuning
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs
from lvrpo.evaluation.experiment import scene_benchmarks
from lvrpo.evaluation.items import ItemStore
from lvrpo.evaluation.suite import Benchmark, Evaluation, EvaluationOptions, sample_counts, with_sampling
from lvrpo.evaluation.tuning import TunedSampling
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import START, load_policy, stored_image_size
from lvrpo.report.formatting import share
from lvrpo.report.tables import measure_tables, scores_table, summary_table
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer
from lvrpo.training.components import task_scorer
from lvrpo.training.config import TrainConfig
from lvrpo.training.leakage import require_unseen_by
from lvrpo.training.run_directory import CONFIG, RunDirectory, json_text
from lvrpo.types import TaskKind


def require_divisible(options: Options) -> None:
    """Raises InputError for what several processes (``torchrun``) cannot share."""
    if world_size() > 1:
        refuse_given(options, ("tune", "lmms_eval"), "works in one process only: start it without torchrun")
        if options.out is None:
            raise InputError("torchrun: several processes write their parts into a folder: add --out DIR")


def refuse_unused(options: Options) -> None:
    """Raises InputError for options of rows of a file, or of published benchmarks, where none is measured."""
    rows = [name for name in options.benchmark or () if name.endswith(".jsonl")]
    others = {*(options.benchmark or ())} - {*rows, *BENCHMARKS, "scenes"}
    if not rows:
        refuse_given(options, ("rewards", "root"), "is for rows: add --benchmark FILE.jsonl, or leave it out")
    if not others:
        why = "is for published benchmarks: add --benchmark NAME, or leave it out"
        refuse_given(options, ("data", "detector", "color_classifier", "thresholds", "vlm"), why)
        if not rows and options.lmms_eval is None:
            refuse_given(options, ("guidance",), why)


def refuse_unsampled(options: Options, benchmarks: Sequence[Benchmark], settings: EvaluationOptions) -> None:
    """Raises InputError for options of further samples where no prompt gets any; ``--judge`` also scores rewards."""

    def resampled(settings: EvaluationOptions) -> bool:
        greedy = replace(suite.SAMPLING, temperature=0.0)  # as the own defaults of models are
        for benchmark in benchmarks:
            prompts = benchmark.prompts(options.n or benchmark.n)
            sampling: dict[TaskKind, Sampling] = {
                prompt.task: benchmark.sampling(greedy, prompt.task, settings.tuned) for prompt in prompts
            }
            if any(count > benchmark.samples for count in sample_counts(benchmark, prompts, sampling, settings)):
                return True
        return False

    if options.samples is not None and not resampled(replace(settings, num_samples=sys.maxsize)):
        none = "--sampled-prompts is 0" if settings.sampled_prompts == 0 else "no prompt here is sampled more than once"
        raise InputError(f"--samples {options.samples}: {none}: leave it out")
    asked = [f"--sampled-prompts {options.sampled_prompts}"] if options.sampled_prompts else []
    if options.judge is not None and not any(b.reward and getattr(b.reward, "sides", suite.SIDES) for b in benchmarks):
        asked.append(f"--judge {options.judge}")
    if asked and not resampled(settings):
        raise InputError(f"{asked[0]}: no prompt here is sampled more than once: leave it out")


def evaluate(options: Options) -> None:
    refuse_lmms_options(options)
    refuse_unused(options)
    refuse_geneval_layout(options)
    require_divisible(options)
    refuse_existing([path for path in (options.json, options.tune) if path is not None], options.force)
    with resumable(options.out):
        if options.lmms_eval is None:
            evaluate_by_us(options)
        else:
            evaluate_by_lmms(options)


def evaluate_by_us(options: Options) -> None:
    """Our own benchmarks, and published ones with scorers of ours."""
    if options.benchmark is None:
        options.benchmark = list(scene_benchmarks(*filter(None, (options.model, options.against))))
        if not options.benchmark:
            raise InputError(f"--against {options.against}: does none of the tasks of {options.model}: name another")
    if options.tune is not None:
        tune(options)
        return
    console = wide_console(quiet=not is_main())
    head, result, before = measured(options, console)
    if is_main():
        report(options, head, result, before, console)


def measured(options: Options, console: Console) -> tuple[dict[str, Any], Evaluation, Evaluation | None]:
    """What results.json begins with, the records of MODEL, and of ``--against`` before. Any: JSON values."""
    require_unseen_by(options.model, options.benchmark)
    scorer, judged_by = held_out_scorer(options)
    inputs = BenchmarkInputs(
        *(options.data, options.detector, options.color_classifier, options.thresholds, options.vlm), options.device
    )
    found = suite.find_benchmarks(options.benchmark, scorer, input_side(options), options.root, inputs)
    benchmarks = suite.with_guidance_scales(sampled_as_run(options, found), options.guidance or (), options.num_steps)
    tuned = None if options.tuned is None else TunedSampling.read(options.tuned)
    many = EvaluationOptions.sampled_prompts if options.sampled_prompts is None else options.sampled_prompts
    settings = EvaluationOptions(many, options.samples, tuned=tuned, scorer=scorer)
    refuse_unsampled(options, benchmarks, settings)
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    if tuned is not None:
        tuned.require_model(judge_fingerprint(policy))
    against = None if options.against is None else load_policy(options.against, options.device, options.dtype)
    if options.num_steps is not None:
        require_used("--num-steps", "num_steps", [policy] if against is None else [policy, against])
    judge = None if against is None else against.make_reference()
    if options.judge is not None:
        judge = load_policy(options.judge, options.device, options.dtype).make_reference()
    rewarded = any(benchmark.metric == "reward" and benchmark.reward is None for benchmark in benchmarks)
    reward_judge = (
        load_policy(judged_by, options.device).make_reference() if rewarded and judged_by is not None else None
    )
    settings = replace(settings, judge=judge, reward_judge=reward_judge)
    before = None if against is None else evaluated(options, against, benchmarks, settings, console, "before")
    result = evaluated(options, policy, benchmarks, settings, console, "" if against is None else "after")
    head = {"model": options.model, "seed": options.seed, "judge": options.judge or options.against or options.model}
    if tuned is not None:
        head["tuned"] = {"settings": tuned.settings, "prompts": len(tuned.prompts)}
    return head, result, before


def evaluate_by_lmms(options: Options) -> None:
    """The tasks of ``--lmms-eval`` and the benchmarks beside them, in one file and one table."""
    console = wide_console()
    tasks, harness = open_lmms(options)
    head: dict[str, Any] = {"model": options.model, "seed": options.seed}
    own: list[Evaluation | None] = [None, None]
    if options.benchmark is not None:
        head, *own = measured(options, console)
    result, before = evaluate_lmms(options, tasks, harness, console)
    if own[0] is not None:
        result = replace(result, scored=own[0].scored, seconds=result.seconds + own[0].seconds)
    if before is not None and own[1] is not None:
        before = replace(before, scored=own[1].scored, seconds=before.seconds + own[1].seconds)
    report(options, head, result, before, console)
    require_all(before, result)


def report(
    options: Options,
    head: dict[str, Any],
    result: Evaluation,
    before: Evaluation | None,
    console: Console,
) -> None:
    """Writes and prints what was measured. Any: JSON values."""
    write_results(options, head, result, before)
    print_results(options, result, before, console)
    if options.geneval_layout is not None:
        phases = ("",) if before is None else ("before", "after")
        names = list(result.results())
        for folder in write_geneval_layout(options, dict.fromkeys(phases, names)):
            console.print(f"GenEval's layout: {folder}", style="dim", markup=False)


def write_results(
    options: Options,
    head: dict[str, Any],
    result: Evaluation,
    before: Evaluation | None,
) -> None:
    """Writes ``--json`` and results.json of ``--out``. Any: JSON values."""
    if before is not None:
        head |= {"against": options.against, "before": before.as_dict(), "difference": before.difference(result)}
    content = json_text({**head, **result.as_dict()}).encode()
    for file in (options.json, options.out and options.out / "results.json"):
        if file is not None:
            write_file(file, content, options.force or file != options.json)


def evaluated(
    options: Options,
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    settings: EvaluationOptions,
    console: Console,
    phase: Literal["", "before", "after"],
) -> Evaluation:
    """The records of a policy; ``phase``: the folder of its items below ``--out``."""
    title = f"{phase}: " if phase else ""
    return suite.evaluate(
        policy,
        benchmarks,
        options.seed,
        {b.name: options.n for b in benchmarks} if options.n else {},
        replace(suite.SAMPLING, num_steps=options.num_steps or suite.SAMPLING.num_steps),
        progress=lambda name, n: console.print(f"{title}{name}: {n} prompts", style="dim"),
        options=replace(settings, store=None if options.out is None else ItemStore(options.out / phase)),
    )


def print_results(
    options: Options,
    result: Evaluation,
    before: Evaluation | None,
    console: Console,
) -> None:
    """The tables of an evaluation, or of two with their difference, and why prompts are masked."""
    results = result.results()
    if not results:
        return
    if before is None:
        console.print(text_table(scores_table(results, f"{options.model}, {result.seconds:.0f} s")))
    else:
        earlier = before.results()
        console.print(f"before: {options.against}, after: {options.model}", style="dim", markup=False)
        difference = before.difference(result)
        both = {name: each for name, each in earlier.items() if name in difference}
        console.print(text_table(summary_table({"before": both, "after": results, "difference": difference})))
        results = {f"before: {name}": each for name, each in earlier.items()} | results
    for name, each in results.items():
        masked = each.get("masked")
        if masked:
            reason, count = next(iter(masked["reasons"].items()))
            line = f"{name}: {masked['prompts']} of {masked['of']} prompts have no score, {count} of them: {reason}"
            console.print(line, style="yellow", markup=False)
    if before is None and (measures := measure_tables({"": results})):
        console.print()
        print_tables(measures, console)


def input_side(options: Options) -> int | None:
    """The side of the images that MODEL reads, where rows of a file are put to it."""
    return stored_image_size(options.model) if any(name.endswith(".jsonl") for name in options.benchmark) else None


def held_out_scorer(options: Options) -> tuple[HeldOutScorer, str | None]:
    """What scores rows, and the MODEL that judges for its rewards; answers and facts alone where none is named.

    A run is scored as it scored itself: by its success and its rewards, judged by the weights that it began with.
    """
    if options.rewards is None and not any(name.endswith(".jsonl") for name in options.benchmark):
        return SUCCESS_ONLY, None
    run = Path(options.rewards or options.model)
    if (trained := run_config(run)) is not None:
        config, judge = trained, str(run / START)
    elif options.rewards is not None:
        config = read_config(TrainConfig, options.rewards, [])
        judge = config.policy
    else:
        return SUCCESS_ONLY, None
    return task_scorer(config), judge


def sampled_as_run(options: Options, benchmarks: list[Benchmark]) -> list[Benchmark]:
    """The benchmarks; where MODEL is a run, rows of a file are sampled as in its validation."""
    trained = run_config(Path(options.model)) if any(b.tunable for b in benchmarks) else None
    return benchmarks if trained is None else with_sampling(benchmarks, trained.rollout.held_out_sampling())


def run_config(run: Path) -> TrainConfig | None:
    """The configuration of a run of ``lvrpo train``; None for other folders, and for a run of ``lvrpo pretrain``."""
    is_run = (run / START).is_dir() and (run / CONFIG).is_file() and "init" not in read_yaml(run / CONFIG)
    return RunDirectory.read(run).config(TrainConfig) if is_run else None


def tune(options: Options) -> None:
    """Chooses guidance and temperature on validation prompts, prints the grid, writes the choice."""
    of_evaluations = ("json", "tuned", "judge", "samples", "sampled_prompts", "rewards", "out", "against")
    refuse_given(options, of_evaluations, "belongs to an evaluation: leave it out, or --tune")
    if held_out_scorer(options)[0].rule:
        raise InputError("--tune: counts right answers and facts, and MODEL has its own success: leave --tune out")
    found = suite.find_benchmarks(options.benchmark, side=input_side(options), root=options.root)
    found = suite.with_guidance_scales(sampled_as_run(options, found), (), options.num_steps)
    benchmarks = [tuning.as_validation(benchmark) for benchmark in found]
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    console = wide_console()
    tuned = tuning.tune(
        policy,
        benchmarks,
        options.n,
        options.seed,
        replace(suite.SAMPLING, num_steps=options.num_steps or suite.SAMPLING.num_steps),
        lambda task, name, value, score: console.print(f"{task}: {name} {value:g}: {share(score)}", style="dim"),
    )
    for task, settings in tuned.settings.items():
        console.print(f"{task}: {', '.join(f'{name} {value:g}' for name, value in settings.items())}")
    write_file(options.tune, json_text(tuned.as_dict()).encode(), options.force)
