"""``lvrpo benchmarks``, and the options of ``lvrpo evaluate`` that published benchmarks need."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lvrpo.commands.options import Options, refuse_given
from lvrpo.data.geneval import METADATA, read_metadata
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import BENCHMARKS, PUBLISHED
from lvrpo.evaluation.benchmarks import lmms_process as process
from lvrpo.evaluation.benchmarks.geneval import SAMPLES, write_layout
from lvrpo.evaluation.benchmarks.lmms_process import Harness, HarnessEvaluation, HarnessTask, read_scores
from lvrpo.evaluation.items import ItemFolder, ItemStore
from lvrpo.policies.loading import policy_folder
from lvrpo.reading import path_exists
from lvrpo.registry import resolve


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """An interrupt inside says how to go on, where outputs are kept in a folder."""
    try:
        yield
    except KeyboardInterrupt:
        if out is None:
            raise
        raise KeyboardInterrupt(f"interrupted: repeat the command to continue from {out}") from None


SECONDS_PER_IMAGE = 11.7
"""docs/results/bagel_gpu.md."""
GENEVAL_FAMILY = ("geneval", "geneval_vqa")


def refuse_geneval_layout(options: Options) -> None:
    """Raises InputError where ``--geneval-layout`` cannot be written."""
    if options.geneval_layout is None:
        return
    if options.out is None or not {*GENEVAL_FAMILY} & {*(options.benchmark or ())}:
        raise InputError("--geneval-layout: takes the images of geneval or geneval_vqa: add --benchmark and --out DIR")
    if path_exists(options.geneval_layout) and not options.force:
        raise InputError(f"{options.geneval_layout}: exists already: choose another name, or add --force")


def write_geneval_layout(options: Options, evaluated: Mapping[str, Sequence[str]]) -> list[Path]:
    """The folders written: ``--geneval-layout`` itself, or one for each phase and row of the table where several are.

    ``evaluated``: names of the benchmarks by phase, the folder below ``--out``. Raises InputError where prompts have
    no images.
    """
    names = [(phase, name) for phase, each in evaluated.items() for name in each]
    chosen = [(phase, name) for phase, name in names if name.partition("@")[0] in GENEVAL_FAMILY]
    places = (options.data / "geneval" / METADATA, options.data / METADATA)
    rows = read_metadata(next(path for path in places if path_exists(path)))
    written = []
    for phase, name in chosen:
        folder = ItemFolder(ItemStore(options.out / phase).folder_of(name))
        images = {row.prompt.id: folder.images(row.prompt, SAMPLES) for row in rows if folder.holds(row.prompt)}
        written.append(options.geneval_layout / phase / name if len(chosen) > 1 else options.geneval_layout)
        write_layout(written[-1], rows, images)
    return written


def list_benchmarks(options: Options) -> None:
    """Prints every published benchmark with what it needs."""
    for name in PUBLISHED:
        found = resolve("benchmark", name, PUBLISHED)
        drawn = "an image" if found.samples == 1 else f"{found.samples} images"
        print(f"{name}: {found.prompts} prompts, {drawn} each, license: {found.license}")
        folder = f"DIR/{found.folder or found.name}/"
        rows = {
            "source": found.source,
            "--data DIR": folder + ", ".join(found.files),
            "--data hub": found.hub.id if found.hub else "-",
            "judge": found.needs,
            "time": f"{found.minutes(SECONDS_PER_IMAGE)} minutes, and the judge's",
        }
        for head, text in rows.items():
            print(f"  {head:<11} {text}")
    print(
        f"time: of drawing all on one H100 at {SECONDS_PER_IMAGE} s each, measured with the shape of BAGEL-7B "
        "(1024 x 1024, 49 guided steps); n GPUs take an n-th of it"
    )
    print(f"built in: scenes ({', '.join(BENCHMARKS)}); rows of your own: FILE.jsonl")


# --- lmms-eval ---

OF_OWN_BENCHMARKS = (
    "tuned",
    "judge",
    "samples",
    "sampled_prompts",
    "rewards",
    "root",
    "data",
    "vlm",
    "detector",
    "geneval_layout",
)
"""Options that mean nothing to lmms-eval."""


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
    return HarnessEvaluation({}, {}, time.perf_counter() - started, scored, failed)


def require_all(*evaluations: HarnessEvaluation | None) -> None:
    """Raises ContractError where a task failed, after the others were scored."""
    failed = [reason for each in evaluations if each is not None for reason in each.failed.values()]
    if failed:
        more = f" ({len(failed)} tasks failed)" if len(failed) > 1 else ""
        raise ContractError(f"{failed[0]}{more}: the same command tries again what failed")
