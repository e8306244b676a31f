"""The commands of training: their options and help, without what they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lvrpo.commands.options import (
    Command,
    Options,
    Parser,
    add_base,
    add_config,
    add_overrides,
    add_timeout,
    gibibytes,
    names,
    positive,
    whole,
)
from lvrpo.errors import InputError


def train_options(parser: Parser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--benchmark",
        type=names,
        default=[],
        metavar="NAME[,NAME]",
        help="what to measure before and after (default: scenes, or data.jsonl.test)",
    )
    parser.add_argument("--no-evaluate", action="store_true", help="train only, measure nothing")
    add_timeout(parser)
    add_base(parser)


def _run_options(parser: Parser, cls: str = "lvrpo.training.config:TrainConfig") -> None:
    add_config(parser, cls)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (default: runs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue a run; CONFIG is then optional")


def check_keys(cls: str = "TrainConfig") -> Callable[[Options], None]:
    """The check of CONFIG and its keys, which a resumed run may leave out."""

    def check(options: Options) -> None:
        from lvrpo.commands.keys import known_config

        if getattr(options, "resume", None) is None:  # lvrpo check has no such option
            known_config(cls, options.config, options.overrides)

    return check


def refuse_out(options: Options) -> None:
    if options.out is not None:
        raise InputError(f"--out {options.out}: a resumed run stays where it is: leave --out away")


TRAIN = Command(
    "train a policy with group-relative RL",
    train_options,
    "lvrpo.commands.train:train",
    "examples:\n"
    "  lvrpo train quickstart seed=1 steps=80 --out runs/short\n"
    "  lvrpo train --resume runs/short                  # continues an interrupted run\n"
    "  lvrpo train --resume runs/short steps=160        # makes a finished run longer\n"
    "  lvrpo train quickstart --config-help kl_coef     # what a setting does\n"
    "  torchrun --nproc-per-node 8 -m lvrpo train quickstart    # eight GPUs",
    check_keys(),
)
PRETRAIN = Command(
    "train a policy with supervised losses",
    lambda parser: _run_options(parser, "lvrpo.training.pretrain:PretrainConfig"),
    "lvrpo.commands.train:pretrain",
    "examples:\n"
    "  lvrpo pretrain pretrain name=my-base steps=2000    # how the tiny base was made\n"
    "  lvrpo pretrain continued --out runs/baseline       # the baseline of the quickstart",
    check_keys("PretrainConfig"),
)


def check_options(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--card",
        type=gibibytes,
        metavar="GIB",
        help="only estimate whether the run fits a GPU with GIB GiB free; needs neither the GPU nor the weights",
    )


CHECK = Command(
    "check a configuration: load data and model, run the step-0 checks, estimate time and memory",
    check_options,
    "lvrpo.commands.train:check",
    "examples:\n"
    "  lvrpo check quickstart rollout.group_size=4\n"
    "  lvrpo check bagel_lvrpo_lora policy=FOLDER --card 78\n\n"
    "To fetch only what --card needs: hf download ID --include '*.json' '*.txt' '*.jinja' --local-dir FOLDER",
    check_keys(),
)


QUICK = (
    "data.prompts_per_step={generate: 4, understand: 8, edit: 2, reason: 4}",
    "validation.prompts={generate: 7, understand: 12, edit: 5, reason: 6}",
    "validation.every=2",
    "samples_every=2",
    "reference_eval_every=2",
    "checkpoint_every=2",
)
QUICK_STEPS = 4


def quickstart_options(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="the training configuration (default: quickstart, or that for MODEL's family)",
    )
    parser.add_argument("--seed", type=whole, metavar="N", help="random seed (default: that of CONFIG)")
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps; the baseline scales with them")
    parser.add_argument(
        "--policy", metavar="MODEL", help="the model to train: tiny, tiny-token, tiny-masked, a folder or a run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run directory (default: the next free one in runs/)"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted quickstart")
    parser.add_argument("--no-baseline", action="store_true", help="skip the supervised baseline")
    parser.add_argument("--quick", action="store_true", help="smoke test: a few small steps; its numbers mean nothing")
    add_overrides(parser)


def check_quickstart_keys(options: Options) -> None:
    from lvrpo.commands.keys import known_config

    for override in options.overrides:
        if override.startswith("policy="):
            raise InputError(f"{override}: write --policy MODEL, which also takes the recipe of its family")
    if options.resume is None:
        known_config("TrainConfig", options.config or "quickstart", train_overrides(options))


def train_overrides(options: Options) -> list[str]:
    """Overrides of the training configuration that follow from the options."""
    overrides = [*QUICK, f"steps={QUICK_STEPS}"] if options.quick else []
    for name in ("seed", "steps", "policy"):
        value = getattr(options, name)  # the options of these names
        if value is not None:
            overrides.append(f"{name}={value}")
    return [*overrides, *options.overrides]


QUICKSTART = Command(
    "evaluate a built-in tiny model, train it, evaluate it again, write a report",
    quickstart_options,
    "lvrpo.commands.quickstart:run",
    "examples:\n"
    "  lvrpo quickstart --quick                      # half a minute, to see that everything works\n"
    "  lvrpo quickstart --seed 1 --out runs/seed1    # minutes on two cores\n"
    "  lvrpo quickstart flow.kl_coef=0.5             # other settings\n"
    "  lvrpo quickstart --policy tiny-token          # a small Janus, which generates image tokens\n"
    "  lvrpo quickstart --policy tiny-masked         # a small Show-o, which unmasks image tokens",
    check_quickstart_keys,
)


class RandomModel(NamedTuple):
    """A random model that ``lvrpo init`` makes."""

    name: str
    """Name in messages."""
    sizes: str
    """The class of its sizes, whose keys ``docs/make_keys.py`` describes."""
    package: str = ""
    """Package of ``lvrpo.policies`` whose module ``create`` has that class; empty: ``commands.models`` makes it."""
    create: str = ""
    """The function there that makes the policy."""


KINDS = {
    "bagel-tiny": RandomModel("BAGEL", "BagelSizes"),
    "janus-tiny": RandomModel("Janus", "JanusSizes", "janus", "create_janus"),
    "emu3-tiny": RandomModel("Emu3", "Emu3Sizes", "emu3", "create_emu3"),
    "showo-tiny": RandomModel("Show-o", "ShowoSizes", "showo", "create_showo"),
    "mmada-tiny": RandomModel("MMaDA", "MmadaSizes", "mmada", "create_mmada"),
    "showo2-tiny": RandomModel("Show-o2", "RandomShowo2", "showo2", "create_showo2"),
    "sd3-tiny": RandomModel("Stable Diffusion 3", "PipelineSizes"),
    "flux-tiny": RandomModel("FLUX", "PipelineSizes"),
    "kontext-tiny": RandomModel("FLUX Kontext", "PipelineSizes"),
    "qwen-image-tiny": RandomModel("Qwen-Image", "PipelineSizes"),
    "qwen-image-edit-tiny": RandomModel("Qwen-Image-Edit", "PipelineSizes"),
    "z-image-tiny": RandomModel("Z-Image", "PipelineSizes"),
}
"""Models by the name that ``lvrpo init`` takes."""
TILED = ("janus-tiny", "showo-tiny", "mmada-tiny")
"""Models that take a tile codebook."""


def init_options(parser: Parser) -> None:
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="sizes, such as width=256 depth=6 seed=1")
    parser.add_argument(
        "--train-autoencoder",
        type=int,
        default=0,
        metavar="STEPS",
        help="train the autoencoder on built-in images for STEPS steps (default: 0: it stays random)",
    )
    parser.add_argument(
        "--autoencoder-batch",
        type=int,
        default=8,
        metavar="N",
        help="images per step of --train-autoencoder (default: 8)",
    )
    parser.add_argument(
        "--tile-codebook",
        action="store_true",
        help=f"{', '.join(TILED)} only: use tiles of the built-in images as image tokens, without an autoencoder",
    )
    parser.add_argument(
        "--device", default="auto", help="where to train the autoencoder: auto, cpu or cuda (default: auto)"
    )


def check_sizes(options: Options) -> None:
    from lvrpo.commands.keys import key_class
    from lvrpo.config import require_known_keys

    if options.kind in KINDS:
        require_known_keys(key_class(KINDS[options.kind].sizes), None, options.overrides)


INIT = Command(
    "create a randomly initialized model of a known architecture",
    init_options,
    "lvrpo.commands.models:init",
    "examples:\n"
    "  lvrpo init janus-tiny models/janus width=64 depth=2 image_size=32\n"
    "  lvrpo init bagel-tiny models/bagel width=256 depth=6 image_size=64 --train-autoencoder 400",
    check_sizes,
)
