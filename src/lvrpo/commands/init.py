"""``lvrpo init``: a fresh random model to pretrain."""

from __future__ import annotations

from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser
from lvrpo.errors import InputError

KINDS = ("bagel-tiny",)


def init_options(parser: Parser) -> None:
    parser.add_argument("kind", metavar="KIND", help=f"what to make: {', '.join(KINDS)}")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new, or empty")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="sizes, such as width=256 depth=6 seed=1")


def init(options: Options) -> None:
    from lvrpo.config import load_config
    from lvrpo.data.scenes import VOCABULARY
    from lvrpo.policies.bagel.create import BagelSizes, create_bagel
    from lvrpo.training.checkpoint import disk_errors

    if options.kind not in KINDS:
        raise InputError(f"kind {options.kind!r}: unknown: use {', '.join(KINDS)}")
    folder: Path = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already: choose another name")
    sizes = load_config(BagelSizes, None, options.overrides)
    policy = create_bagel(sizes, [" ".join(VOCABULARY)])
    with disk_errors(folder):
        policy.save(folder)
    count = sum(parameter.numel() for parameter in policy.parameters())
    print(f"{folder}: a random BAGEL of {count / 1e6:.1f} million parameters")


INIT = Command(
    "make a random model to pretrain",
    init_options,
    init,
    "example: lvrpo init bagel-tiny models/bagel width=256 depth=6 image_size=64",
)
