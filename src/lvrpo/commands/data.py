"""``lvrpo data preview``, ``lvrpo data vocabulary`` and ``lvrpo data pairs``."""

from __future__ import annotations

from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, add_force, names, positive, refuse_existing, whole
from lvrpo.errors import InputError


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


def pairs_options(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("pairs"), metavar="DIR", help="default: pairs")
    parser.add_argument("--n", type=positive, default=40, help="scenes per category (40)")
    parser.add_argument(
        "--of", type=names, default=["drawings"], metavar="NAME[,NAME]", help="drawings (default), edits, answers"
    )
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--seed", type=whole, default=0)


def pairs(options: Options) -> None:
    from lvrpo.evaluation.scene_pairs import OF, json_line, scene_pairs
    from lvrpo.training.checkpoint import atomic_folder

    unknown = [name for name in options.of if name not in OF]
    if unknown:
        raise InputError(f"--of {unknown[0]}: unknown: use {', '.join(OF)}")
    with atomic_folder(options.out) as folder:
        (folder / "pictures").mkdir()
        lines = []
        for row, files in scene_pairs(options.n, options.of, options.split, options.seed):
            lines.append(json_line(row))
            for name, content in files.items():
                (folder / name).write_bytes(content)
        (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} pairs: {options.out / 'pairs.jsonl'}")


PREVIEW = Command("one picture with examples of every category of the built-in world", preview_options, preview)
VOCABULARY = Command("the words of the built-in world, one a line", vocabulary_options, vocabulary)
PAIRS = Command(
    "right outputs and corrupted ones as pairs, to try lvrpo fit-preference on",
    pairs_options,
    pairs,
    "example: lvrpo data pairs --of drawings,answers --out pairs",
)
