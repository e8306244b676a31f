"""``lvrpo export``: one whole model, an adapter merged into its base, in the layout that its makers publish."""

from __future__ import annotations

from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, add_base, add_model
from lvrpo.errors import InputError


def export_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new, or empty")


def export(options: Options) -> None:
    from lvrpo.policies.loading import load_policy
    from lvrpo.policies.mot.adapter import merge
    from lvrpo.policies.mot.policy import MoTPolicy
    from lvrpo.training.checkpoint import disk_errors

    folder: Path = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already: choose another name")
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    merged = isinstance(policy, MoTPolicy) and policy.adapter is not None
    if isinstance(policy, MoTPolicy):
        merge(policy)
    with disk_errors(folder):
        policy.save(folder)
    print(f"{folder}: {options.model}{', its adapter merged' if merged else ''}")


EXPORT = Command(
    "write a whole model, an adapter merged into its base",
    export_options,
    export,
    "example: lvrpo export runs/bagel_lvrpo_lora models/aligned --dtype bfloat16",
)
"""``lvrpo export``."""
