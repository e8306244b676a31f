"""``lvrpo fit-preference``: a reward from pairs of which people preferred one."""

from __future__ import annotations

import argparse
from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, add_device, positive, refuse_existing, whole
from lvrpo.errors import InputError


def options(parser: Parser) -> None:
    parser.add_argument("data", metavar="DATA", type=Path, help="a .parquet or .jsonl file, or a folder of them")
    parser.add_argument("--model", default="tiny", metavar="MODEL", help="whose reading side is used (default: tiny)")
    parser.add_argument("--out", type=Path, default=Path("preference-head"), metavar="DIR", help="preference-head")
    parser.add_argument(
        "--ties", choices=("half", "drop"), default="half", help="half a win each (default), or left out"
    )
    parser.add_argument("--held-out", type=share, default=0.2, help="share of the prompts it is measured on (.2)")
    parser.add_argument("--max-broken", type=part, default=0.05, help="share of the rows that may be unusable (.05)")
    parser.add_argument("--l2", type=amount, default=0.01, help="weight of half the squared length of w (.01)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N pairs")
    parser.add_argument("--calibrate", action="store_true", help="scale the log-odds on a tenth of the prompts")
    parser.add_argument("--instruction", help="what stands between a drawing and its prompt (describe the picture)")
    parser.add_argument("--seed", type=whole, default=0, help="of the split (0)")
    parser.add_argument("--force", action="store_true", help="write over a folder that exists")
    add_device(parser)


def run(options: Options) -> None:
    """Fits, prints what it is worth, writes the folder."""
    from dataclasses import replace

    import torch

    from lvrpo.commands.tables import wide_console
    from lvrpo.evaluation.preference_fit import FitSettings, fit_preference, readme
    from lvrpo.policies.loading import load_policy
    from lvrpo.rewards.preference_head import Reading
    from lvrpo.training.checkpoint import atomic_folder

    refuse_existing([options.out], options.force)
    if options.out.exists() and not (options.out / "config.json").is_file():
        raise InputError(f"{options.out}: is no folder of a head: choose another name")
    torch.set_num_threads(1)
    reading = Reading() if options.instruction is None else replace(Reading(), instruction=options.instruction)
    settings = FitSettings(
        ties=options.ties,
        held_out=options.held_out,
        max_broken=options.max_broken,
        l2=options.l2,
        limit=options.limit,
        calibrate=options.calibrate,
        seed=options.seed,
        reading=reading,
    )
    judge = load_policy(options.model, options.device).frozen()
    console = wide_console()
    with console.status("reading pairs") as status:
        fit = fit_preference(
            judge, options.data, settings, lambda done, total: status.update(f"{done} of {total} rows read")
        )
    counts, accuracy = fit.counts, fit.accuracy
    lines = [
        f"{counts.rows} rows: {counts.pairs} pairs, {counts.ties} ties ({settings.ties}), {counts.unlabelled} without "
        f"a label, {len(counts.broken)} unusable",
        *(f"  unusable: {reason}" for reason in counts.broken[:3]),
        f"fitted on {fit.prompts[0]} prompts: accuracy {fit.train_accuracy:.3f}",
        f"held-out accuracy {accuracy.score:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] on {accuracy.n} pairs of "
        f"{fit.prompts[1]} other prompts (.5 is chance); log loss {fit.log_loss:.3f}; calibration error "
        f"{fit.calibration_error:.3f}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with atomic_folder(options.out, replace=options.force) as folder:
        fit.head.save(folder)
        (folder / "README.md").write_text(readme(fit, options.model, options.data.name), encoding="utf-8")
    use = f"use it: rewards=[{{name: learned_preference, options: {{head: {options.out}}}}}]"
    console.print(use, markup=False, highlight=False, soft_wrap=True)


def share(text: str) -> float:
    """Above 0 and below 1."""
    found = part(text)
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"{text}: must lie between 0 and 1")
    return found


def part(text: str) -> float:
    """From 0 to 1."""
    found = amount(text)
    if found > 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at most 1")
    return found


def amount(text: str) -> float:
    """A number >= 0."""
    try:
        found = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number") from None
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number >= 0")
    return found


FIT_PREFERENCE = Command(
    "a reward from pairs of which people preferred one: Pick-a-Pic's columns, or prompt, better, worse",
    options,
    run,
    "example: lvrpo data pairs --out pairs && lvrpo fit-preference pairs --out head",
)
