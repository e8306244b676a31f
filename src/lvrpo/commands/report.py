"""``lvrpo report``, ``lvrpo watch`` and ``lvrpo compare``: what runs wrote, as pages and tables."""

from __future__ import annotations

from contextlib import suppress

from lvrpo.commands.options import Options
from lvrpo.commands.progress import print_tables
from lvrpo.errors import InputError
from lvrpo.report import build_report
from lvrpo.report.run import load_run
from lvrpo.report.tables import compare_runs, seeds_table
from lvrpo.report.watch import serve


def report(options: Options) -> None:
    from lvrpo.evaluation.reward_audit import write_audit  # twice the modules of the other two commands
    from lvrpo.training.rollout_log import has_records

    load_run(options.run)  # raises before the audit is written
    if has_records(options.run):
        write_audit(options.run)
    print(build_report(options.run))


def watch(options: Options) -> None:
    if not options.folder.is_dir():
        raise InputError(f"{options.folder}: no such folder: give a run, or the folder that holds some")
    with serve(options.folder, options.port, options.every) as server:
        print(f"http://{server.server_address[0]}:{server.server_port}  (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def compare(options: Options) -> None:
    table = (seeds_table if options.over_seeds else compare_runs)(options.runs)
    if options.markdown:
        print(table.markdown(), end="")
    else:
        print_tables([table])
