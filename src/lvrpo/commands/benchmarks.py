"""``lvrpo benchmarks``, and the options of ``lvrpo evaluate`` that published benchmarks need."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, guidance, names, share
from lvrpo.errors import InputError
from lvrpo.evaluation import BENCHMARKS, PUBLISHED
from lvrpo.reading import path_exists


def published_options(parser: Parser) -> None:
    """Adds the options that published benchmarks need."""
    group = parser.group("published benchmarks")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR|hub|ID",
        help="folder with a subfolder per benchmark; hub: the benchmark's data set on the Hub; or a Hub id",
    )
    group.add_argument("--detector", metavar="FOLDER", help="object detector of geneval, a transformers model")
    group.add_argument("--color-classifier", metavar="FOLDER", help="CLIP or SigLIP model of geneval")
    group.add_argument(
        "--thresholds",
        type=two_shares,
        metavar="OBJECT,COUNTING",
        help="minimum detector scores (default: .3,.9, the official values, meant for Mask2Former)",
    )
    group.add_argument(
        "--vlm",
        type=Path,
        metavar="FOLDER|FILE.yaml",
        help="VLM judge of geneval2, dpg, wise and t2i_compbench: a transformers model, or the YAML of an endpoint",
    )
    group.add_argument(
        "--geneval-layout",
        type=Path,
        metavar="DIR",
        help="also write the images in the layout of the official GenEval code (needs --out)",
    )
    group.add_argument(
        "--guidance", type=guidances, metavar="X[,Y]", help="guidance scales, each measured (default: MODEL's own)"
    )


def guidances(text: str) -> list[float]:
    """Guidance scales, each once."""
    found = [guidance(name) for name in names(text)]
    if len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: a scale stands twice")
    return found


def two_shares(text: str) -> tuple[float, float]:
    """Two numbers from 0 to 1."""
    found = [share(name) for name in names(text)]
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: write OBJECT,COUNTING, such as .3,.9")
    return found[0], found[1]


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """An interrupt inside says how to go on, where outputs are kept in a folder."""
    try:
        yield
    except KeyboardInterrupt:
        if out is None:
            raise
        raise KeyboardInterrupt(f"interrupted: repeat the command to continue from {out}") from None


SECONDS_PER_PICTURE = 11.7
"""docs/results/bagel_gpu.md."""
GENEVAL_FAMILY = ("geneval", "geneval_vqa")


def refuse_geneval_layout(options: Options) -> None:
    """Raises InputError where ``--geneval-layout`` cannot be written."""
    if options.geneval_layout is None:
        return
    if options.out is None or not {*GENEVAL_FAMILY} & {*(options.benchmark or ())}:
        raise InputError(
            "--geneval-layout: takes the pictures of geneval or geneval_vqa: add --benchmark and --out DIR"
        )
    if path_exists(options.geneval_layout) and not options.force:
        raise InputError(f"{options.geneval_layout}: exists already: choose another name, or add --force")


def write_geneval_layout(options: Options, evaluated: Mapping[str, Sequence[str]]) -> list[Path]:
    """The folders written: ``--geneval-layout`` itself, or one for each phase and row of the table where several are.

    ``evaluated``: names of the benchmarks by phase, the folder below ``--out``. Raises InputError where prompts have
    no pictures.
    """
    from lvrpo.data.geneval import METADATA, read_metadata
    from lvrpo.evaluation.benchmarks.geneval import SAMPLES, write_layout
    from lvrpo.evaluation.items import ItemFolder, ItemStore

    names = [(phase, name) for phase, each in evaluated.items() for name in each]
    chosen = [(phase, name) for phase, name in names if name.partition("@")[0] in GENEVAL_FAMILY]
    places = (options.data / "geneval" / METADATA, options.data / METADATA)
    rows = read_metadata(next(path for path in places if path_exists(path)))
    written = []
    for phase, name in chosen:
        folder = ItemFolder(ItemStore(options.out / phase).folder_of(name))
        pictures = {row.prompt.id: folder.pictures(row.prompt, SAMPLES) for row in rows if folder.holds(row.prompt)}
        written.append(options.geneval_layout / phase / name if len(chosen) > 1 else options.geneval_layout)
        write_layout(written[-1], rows, pictures)
    return written


def list_benchmarks(options: Options) -> None:
    """Prints every published benchmark with what it needs."""
    from lvrpo.registry import resolve

    for name in PUBLISHED:
        found = resolve("benchmark", name, PUBLISHED)
        drawn = "a picture" if found.samples == 1 else f"{found.samples} pictures"
        print(f"{name}: {found.prompts} prompts, {drawn} each, license: {found.license}")
        folder = f"DIR/{found.folder or found.name}/"
        rows = {
            "source": found.source,
            "--data DIR": folder + ", ".join(found.files),
            "--data hub": found.hub.id if found.hub else "-",
            "judge": found.needs,
            "time": f"{found.minutes(SECONDS_PER_PICTURE)} minutes, and the judge's",
        }
        for head, text in rows.items():
            print(f"  {head:<11} {text}")
    print(
        f"time: of drawing all on one H100 at {SECONDS_PER_PICTURE} s each, measured with the shape of BAGEL-7B "
        "(1024 x 1024, 49 guided steps); n GPUs take an n-th of it"
    )
    print(f"built in: scenes ({', '.join(BENCHMARKS)}); rows of your own: FILE.jsonl")


BENCHMARK_LIST = Command(
    "list the published benchmarks and what each needs",
    lambda parser: None,
    list_benchmarks,
    "examples:\n  lvrpo benchmarks\n  lvrpo evaluate MODEL --data DIR --benchmark geneval_vqa    # measure one of them",
)
