"""``lvrpo report``, ``lvrpo watch`` and ``lvrpo compare``: what runs wrote, as pages and tables."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, port, positive
from lvrpo.errors import InputError


def report_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")


def report(options: Options) -> None:
    from lvrpo.evaluation.reward_audit import write_audit
    from lvrpo.report import build_report
    from lvrpo.report.run import load_run
    from lvrpo.training.rollout_log import has_records

    load_run(options.run)  # raises before the audit is written
    if has_records(options.run):
        write_audit(options.run)
    print(build_report(options.run))


def watch_options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run directory, or a folder of several")
    parser.add_argument(
        "--port", type=port, default=8008, metavar="N", help="port on 127.0.0.1 (default: 8008; 0: any free port)"
    )
    parser.add_argument(
        "--every", type=positive, default=15, metavar="S", help="refresh interval in seconds (default: 15)"
    )


def watch(options: Options) -> None:
    from lvrpo.report.page import serve

    if not options.folder.is_dir():
        raise InputError(f"{options.folder}: no such folder: give a run, or the folder that holds some")
    with serve(options.folder, options.port, options.every) as server:
        print(f"http://{server.server_address[0]}:{server.server_port}  (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def compare_options(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--over-seeds", action="store_true", help="treat the runs as seeds of one recipe: one row per task"
    )


def compare(options: Options) -> None:
    from lvrpo.commands.progress import print_tables
    from lvrpo.report.tables import compare_runs, seeds_table

    table = (seeds_table if options.over_seeds else compare_runs)(options.runs)
    if options.markdown:
        print(table.markdown(), end="")
    else:
        print_tables([table])


REPORT = Command("write the HTML report of a run", report_options, report, "examples:\n  lvrpo report runs/quickstart")
WATCH = Command(
    "show the report of a run in the browser while it trains, or an overview of several runs",
    watch_options,
    watch,
    "examples:\n  lvrpo watch runs\n\nFor runs on another machine: ssh -L 8008:127.0.0.1:8008 MACHINE",
)
COMPARE = Command(
    "compare runs in one table",
    compare_options,
    compare,
    "examples:\n  lvrpo compare runs/quickstart runs/own\n  lvrpo compare runs/seed0 runs/seed1 --over-seeds",
)
