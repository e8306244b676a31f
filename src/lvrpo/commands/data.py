"""``lvrpo data preview`` and ``lvrpo data vocabulary``."""

from __future__ import annotations

from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, add_force, refuse_existing, whole


def preview_options(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("scenes.png"), metavar="FILE", help="default: scenes.png")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--seed", type=whole, default=0)
    add_force(parser)


def preview(options: Options) -> None:
    from lvrpo.data.scenes.preview import preview as draw_preview
    from lvrpo.training.checkpoint import disk_errors

    file = options.out / "scenes.png" if options.out.is_dir() or not options.out.suffix else options.out
    refuse_existing([file], options.force)
    with disk_errors(file):
        print(draw_preview(file, options.split, options.seed))


def vocabulary_options(parser: Parser) -> None:
    pass


def vocabulary(options: Options) -> None:
    from lvrpo.data.scenes import VOCABULARY

    print("\n".join(VOCABULARY))


PREVIEW = Command("one picture with examples of every category of the built-in world", preview_options, preview)
VOCABULARY = Command("the words of the built-in world, one a line", vocabulary_options, vocabulary)
