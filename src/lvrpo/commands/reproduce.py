"""``lvrpo reproduce``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lvrpo.atomic_io import write_atomic
from lvrpo.commands.keys import find_config
from lvrpo.commands.options import Options
from lvrpo.errors import ContractError, InputError, nearest
from lvrpo.evaluation.reproduce.plan import Experiment, Job, Recipes, load_experiment
from lvrpo.evaluation.reproduce.runner import Runner
from lvrpo.report.evidence import Evidence
from lvrpo.report.evidence_page import evidence_page

NOT_EVIDENCE = "a smoke test, not evidence: too few seeds, steps and prompts for a conclusion"


def run(options: Options) -> None:
    experiment = load_experiment(_find_experiment(options.experiment, options.quick))
    out = options.out or Path("runs") / "reproduce" / experiment.name
    summaries = options.summaries or _default_summaries(experiment, out)
    if not experiment.evidence:
        print(f"{experiment.name}: {NOT_EVIDENCE}", flush=True)
    if not options.table:
        recipes = Recipes(experiment, out, find_config, log, options.device)
        runner = Runner(recipes, summaries, log)
        jobs = runner.pending(options.rows, options.seeds)
        if options.list:
            print("\n".join([*(f"{job.kind} {job.name}" for job in jobs), f"{len(jobs)} jobs left"]))
            return
        failed = _run_jobs(runner, jobs)
        write_page(experiment, summaries)
        if failed:
            raise ContractError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}; the others are done")
        return
    write_page(experiment, summaries)


def _run_jobs(runner: Runner, jobs: Sequence[Job]) -> list[str]:
    """Runs the jobs; a failed job and its dependents are reported and skipped. Returns their names."""
    failed: dict[str, Job] = {}
    for number, job in enumerate(jobs, start=1):
        head = f"job {number} of {len(jobs)}: {job.kind} {job.name}"
        cause = next((other for other in failed.values() if job.depends_on(other)), None)
        if cause is not None:
            print(f"{head}: left out, as {cause.name} failed", flush=True)
            failed[job.name] = job
            continue
        print(head, flush=True)
        try:
            runner.run_job(job)
        except ContractError as error:
            print(f"  failed: {' '.join(str(error).split())}", flush=True)
            failed[job.name] = job
    return list(failed)


def write_page(experiment: Experiment, summaries: Path) -> None:
    """Writes the results page beside the summaries, from which alone it is computed."""
    page = summaries.with_suffix(".md")
    text = evidence_page(experiment.table(), Evidence.read(summaries))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, text.encode())
    print(page)
    if not experiment.evidence:
        print(f"\n{text}\n{experiment.name}: {NOT_EVIDENCE}")


def _find_experiment(name: str, quick: bool) -> Path:
    """The YAML file of an experiment: a file, or one that lvrpo ships."""
    shipped = shipped_experiments()
    if Path(name).is_file():
        if quick:
            raise InputError(f"--quick: applies to the built-in experiments only, and {name} is a file: leave it out")
        return Path(name)
    if name not in shipped:
        near = nearest(name, shipped)
        hint = f"did you mean {near}? " if near else ""
        raise InputError(f"experiment {name!r}: no such file: {hint}give a YAML file or one of {', '.join(shipped)}")
    path = shipped[name]
    if not quick:
        return path
    short = path.with_stem(f"{path.stem}_quick")
    if not short.is_file():
        raise InputError(f"--quick: {name} has no smoke test: leave it out, or take scenes")
    return short


def shipped_experiments() -> dict[str, Path]:
    """The built-in experiments, by name."""
    folder = Path(str(resources.files("lvrpo"))) / "configs" / "reproduce"
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if not path.stem.endswith("_quick")}


def _default_summaries(experiment: Experiment, out: Path) -> Path:
    """docs/results/NAME of the current checkout, else inside OUT; smoke tests never write into docs."""
    checkout = Path("pyproject.toml").is_file() and Path("docs/results").is_dir()
    return Path("docs/results") / experiment.name if checkout and experiment.evidence else out / "summaries"


def log(line: str) -> None:
    print(f"  {line}", flush=True)
