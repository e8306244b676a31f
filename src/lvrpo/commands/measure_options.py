"""The commands that measure models, runs and data: their options and help, without what they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lvrpo.commands.options import (
    Command,
    Parser,
    add_base,
    add_device,
    add_force,
    add_json,
    add_model,
    add_seed,
    add_threads,
    add_timeout,
    guidance,
    names,
    num_steps,
    port,
    positive,
    share,
    whole,
)
from lvrpo.errors import InputError
from lvrpo.evaluation import BENCHMARKS, PUBLISHED


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


BENCHMARK_LIST = Command(
    "list the published benchmarks and what each needs",
    lambda parser: None,
    "lvrpo.commands.benchmarks:list_benchmarks",
    "examples:\n  lvrpo benchmarks\n  lvrpo evaluate MODEL --data DIR --benchmark geneval_vqa    # measure one of them",
)


def evaluate_options(parser: Parser) -> None:
    parser.removed = {"--information": "use lvrpo information MODEL"}
    add_model(parser)
    add_base(parser)
    parser.add_argument(
        "--benchmark",
        type=names,
        metavar="NAME[,NAME]",
        help=f"built-in: {', '.join(BENCHMARKS)}, or scenes for all (default: those that MODEL and BASE can do); "
        f"published: {', '.join(PUBLISHED)}; or a file of rows, FILE.jsonl",
    )
    parser.add_argument("--against", metavar="BASE", help="evaluate this model too, and print the paired difference")
    parser.add_argument(  # torchrun takes a --n for one of its own options
        "--n", "--num-prompts", type=positive, metavar="N", help="prompts per benchmark (default: all that it has)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep all outputs and scores here; repeat the command to resume"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results and the score of every sample here"
    )
    parser.add_argument(
        "--judge", metavar="MODEL", help="model that judges generated images (default: BASE, else MODEL itself)"
    )
    add_timeout(parser)
    add_force(parser)
    add_seed(parser)
    sampling = parser.group("sampling")
    sampling.add_argument(
        "--num-steps",
        type=num_steps,
        metavar="N",
        help="sampling steps per image (default: 8; for published benchmarks and rows MODEL's own)",
    )
    sampling.add_argument(
        "--samples", type=positive, metavar="N", help="samples per prompt for pass@k and best of n (default: 16)"
    )
    sampling.add_argument(
        "--sampled-prompts",
        type=whole,
        metavar="N",
        help="prompts that get --samples samples (default: 280)",
    )
    sampling.add_argument(
        "--tune", type=Path, metavar="FILE", help="choose guidance and temperature on validation prompts, write FILE"
    )
    sampling.add_argument("--tuned", type=Path, metavar="FILE", help="use the guidance and temperature of FILE")
    rows = parser.group("rows of your own (--benchmark FILE.jsonl)")
    rows.add_argument(
        "--rewards",
        metavar="CONFIG",
        help="configuration whose rewards score rows without an answer (default: that of the run)",
    )
    rows.add_argument("--root", type=Path, metavar="DIR", help="the folder of the images (default: that of FILE.jsonl)")
    published_options(parser)
    lmms_options(parser)
    add_threads(parser)


EVALUATE = Command(
    "measure a model: scores with 95 % intervals, pass@k, best of n, balanced accuracy",
    evaluate_options,
    "lvrpo.commands.evaluate:evaluate",
    "examples:\n"
    "  lvrpo evaluate tiny --benchmark understand,edit --n 100\n"
    "  lvrpo evaluate runs/quickstart --against tiny --out results           # before and after\n"
    "  lvrpo evaluate tiny --tune best.json && lvrpo evaluate tiny --tuned best.json\n"
    "  lvrpo evaluate MODEL --data DIR --benchmark geneval_vqa               # see lvrpo benchmarks",
)


def watch_options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run directory, or a folder of several")
    parser.add_argument(
        "--port", type=port, default=8008, metavar="N", help="port on 127.0.0.1 (default: 8008; 0: any free port)"
    )
    parser.add_argument(
        "--every", type=positive, default=15, metavar="S", help="refresh interval in seconds (default: 15)"
    )


def compare_options(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--over-seeds", action="store_true", help="treat the runs as seeds of one recipe: one row per task"
    )


REPORT = Command(
    "write the HTML report of a run",
    lambda parser: parser.add_argument("run", metavar="RUN", type=Path, help="a run directory"),
    "lvrpo.commands.report:report",
    "examples:\n  lvrpo report runs/quickstart",
)
WATCH = Command(
    "show the report of a run in the browser while it trains, or an overview of several runs",
    watch_options,
    "lvrpo.commands.report:watch",
    "examples:\n  lvrpo watch runs\n\nFor runs on another machine: ssh -L 8008:127.0.0.1:8008 MACHINE",
)
COMPARE = Command(
    "compare runs in one table",
    compare_options,
    "lvrpo.commands.report:compare",
    "examples:\n  lvrpo compare runs/quickstart runs/own\n  lvrpo compare runs/seed0 runs/seed1 --over-seeds",
)


def seeds(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [whole(each.strip()) for each in text.split(",")]


def reproduce_options(parser: Parser) -> None:
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="scenes, tiny-token, tiny-masked, or a YAML file of the same form"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run directories (default: runs/reproduce/EXPERIMENT)"
    )
    parser.add_argument("--rows", type=names, metavar="NAME[,NAME]", help="rows of the table to run (default: all)")
    parser.add_argument("--seeds", type=seeds, metavar="N[,N]", help="seeds to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="smoke test of scenes: some rows, one seed, few steps")
    parser.add_argument("--table", action="store_true", help="only write the results page from the existing summaries")
    parser.add_argument("--list", action="store_true", help="only list the remaining jobs")
    parser.add_argument(
        "--summaries",
        type=Path,
        metavar="DIR",
        help="folder for one summary file per run, with the page DIR.md beside it (default: docs/results/EXPERIMENT in "
        "a checkout)",
    )
    add_device(parser)


REPRODUCE = Command(
    "rerun a published experiment job by job, and write its table",
    reproduce_options,
    "lvrpo.commands.reproduce:run",
    "examples:\n"
    "  lvrpo reproduce scenes --quick                          # a smoke test, about 20 minutes\n"
    "  lvrpo reproduce scenes                                  # a day or more; repeat the command to resume\n"
    "  lvrpo reproduce scenes --rows lvrpo,best_of --seeds 0,1",
)


def leakage_options(parser: Parser) -> None:
    """The options of the audit of data; None where not given."""
    group = parser.group("compare the splits of the data, instead of a run")
    group.add_argument(
        "--data",
        nargs="*",
        metavar="CONFIG|FILE",
        help="the splits of a configuration (default: quickstart), or train.jsonl [validation.jsonl] test.jsonl",
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="training steps to compare (default: all of the run)"
    )
    group.add_argument(
        "--wording", action="append", metavar="TEXT", help="ignore this beginning of a prompt, such as 'draw'"
    )


def _preview_options(parser: Parser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("scenes.png"), metavar="FILE", help="where to write it (default: scenes.png)"
    )
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="split to show (default: test)"
    )
    add_seed(parser)
    add_force(parser)


def _benchmark_rows_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="BENCHMARK", help="the benchmark whose format FILE has; see lvrpo benchmarks")
    parser.add_argument("file", type=Path, metavar="FILE", help="prompts in that format")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where to write the rows")
    add_force(parser)


BENCHMARK_ROWS = Command(
    "convert prompts of a published benchmark to training or validation rows",
    _benchmark_rows_options,
    "lvrpo.commands.data:rows",
    "examples:\n"
    "  lvrpo data benchmark geneval evaluation_metadata.jsonl --out rows.jsonl\n\n"
    "The questions of the benchmark become the field facts, which the reward self_vqa asks.",
)
PREVIEW = Command(
    "draw examples of every category of the built-in world into one image",
    _preview_options,
    "lvrpo.commands.data:preview",
    "examples:\n  lvrpo data preview --split train --out world.png",
)
VOCABULARY = Command(
    "list the words of the built-in world",
    lambda parser: None,
    "lvrpo.commands.data:vocabulary",
    "examples:\n  lvrpo data vocabulary > words.txt",
)


def data_check_options(parser: Parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a configuration, a file or glob of rows, a folder of images, or a Hub id OWNER/NAME",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="section.key=value if SOURCE is a configuration, else keys of data.datasets such as preset=llava",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the contact sheet (default: rows.png, with a number if it exists)"
    )
    add_force(parser)


DATA_CHECK = Command(
    "check your own rows: a contact sheet, counts per task, errors, duplicates, overlap of splits",
    data_check_options,
    "lvrpo.commands.data:check",
    "examples:\n"
    "  lvrpo data check own.yaml\n"
    "  lvrpo data check images preset=labels\n"
    "  lvrpo data check 'shards/train-*.tar' preset=captions --out rows.png\n"
    "  lvrpo data check derek-thomas/ScienceQA preset=scienceqa 'train=train[:200]' streaming=true",
)


def audit_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?", help="a run directory, of a run in progress too")
    group = parser.group("audit a judge, instead of a run")
    group.add_argument("--judge", metavar="MODEL", help="test whether this model detects one known error in an output")
    group.add_argument("--samples", metavar="MODEL", help="test it instead on outputs that this model (or run) samples")
    group.add_argument(
        "--also",
        type=_reward_rows,
        metavar="REWARDS",
        help="rewards to test too: NAME,NAME or '[{name: NAME, options: {...}}, NAME]'",
    )
    group.add_argument("--n", type=positive, metavar="N", help="scenes, or prompts, per category (default: 40)")
    group.add_argument("--seed", type=whole, metavar="N", help="random seed of the scenes (default: 0)")
    add_device(parser)
    leakage_options(parser)
    add_json(parser, "all numbers")


def _reward_rows(text: str) -> list[Any]:
    """NAME,NAME, or a list of names and rows in YAML; or a single row. Any: YAML values."""
    from lvrpo.strict_yaml import parse_yaml

    if not text.lstrip().startswith(("[", "{")):
        return list(names(text))
    try:
        found = parse_yaml(text, "--also")
    except InputError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: is not valid YAML: write NAME,NAME or '[{{name: NAME, options: {{...}}}}, NAME]'"
        ) from None
    return found if isinstance(found, list) else [found]


AUDIT = Command(
    "audit the rewards of a run, a judge, or the overlap of train, validation and test",
    audit_options,
    "lvrpo.commands.audit:run",
    "examples:\n"
    "  lvrpo audit runs/quickstart                              # what each reward of a run caused\n"
    "  lvrpo audit --judge tiny                                 # which errors a judge detects\n"
    "  lvrpo audit --data train.jsonl validation.jsonl test.jsonl\n\n"
    "docs/concepts/reward_audit.md explains every number; lvrpo report RUN draws the curves.",
)


def information_options(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument(
        "--pairs", type=positive, default=1024, metavar="N", help="held-out image-caption pairs (default: 1024)"
    )
    parser.add_argument(
        "--negatives",
        type=positive,
        default=128,
        metavar="N",
        help="negatives per pair; the bound is at most log N nats (default: 128)",
    )
    add_seed(parser)
    add_json(parser)


INFORMATION = Command(
    "estimate the mutual information of the understanding and generation experts (InfoNCE)",
    information_options,
    "lvrpo.commands.information:print_information",
    "examples:\n  lvrpo information runs/quickstart --json information.json",
)
