"""The command line: finds the command, parses its options strictly, turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lvrpo import __version__
from lvrpo.commands.options import Command, Parser, nearest
from lvrpo.errors import ContractError, InputError
from lvrpo.registry import resolve

COMMANDS: Mapping[str, str] = {
    "quickstart": "lvrpo.commands.quickstart:QUICKSTART",
    "train": "lvrpo.commands.train:TRAIN",
    "pretrain": "lvrpo.commands.train:PRETRAIN",
    "init": "lvrpo.commands.init:INIT",
    "check": "lvrpo.commands.check:CHECK",
    "generate": "lvrpo.commands.use:GENERATE",
    "ask": "lvrpo.commands.use:ASK",
    "edit": "lvrpo.commands.use:EDIT",
    "export": "lvrpo.commands.export:EXPORT",
    "evaluate": "lvrpo.commands.results:EVALUATE",
    "report": "lvrpo.commands.results:REPORT",
    "compare": "lvrpo.commands.results:COMPARE",
    "reproduce": "lvrpo.commands.reproduce:REPRODUCE",
    "audit": "lvrpo.commands.audit:AUDIT",
    "information": "lvrpo.commands.information:INFORMATION",
    "fit-preference": "lvrpo.commands.fit_preference:FIT_PREFERENCE",
    "data preview": "lvrpo.commands.data:PREVIEW",
    "data vocabulary": "lvrpo.commands.data:VOCABULARY",
    "data pairs": "lvrpo.commands.data:PAIRS",
}
"""Every command. The modules import nothing heavy until a command runs."""

SEVERAL = "train"
"""The command that ``torchrun`` may start several times over for one run."""

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with terminated_like_interrupted(), warnings_in_one_line():
            return run([argument for argument in given if argument != "--debug"])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a reader that left, such as head, is no error
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exc()
        code, line = explain(error)
        print(" ".join(line.split()), file=sys.stderr)
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that a user sees."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, InputError):
        return WRONG_INPUT, f"error: {error}"
    if isinstance(error, ContractError):
        return FAILED, f"error: {error}"
    return FAILED, f"error: {type(error).__name__}: {error} (unexpected: --debug shows where)"


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is open is closed, processes of our own are ended."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """What we warn of is one line, as an error is; warnings of Python itself and of libraries stay as they are."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def run(given: Sequence[str]) -> int:
    """Finds the command and calls it."""
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if given[0] == "--version":
        print(f"lvrpo {__version__}")
        return DONE
    name = " ".join(given[:2]) if " ".join(given[:2]) in COMMANDS else given[0]
    if name not in COMMANDS:
        raise InputError(unknown(given))
    processes = os.environ.get("WORLD_SIZE", "1")
    if name != SEVERAL and processes != "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(f"--nproc-per-node {processes}: lvrpo {name} is one process: start it without torchrun")
    command: Command = resolve("command", name, COMMANDS)
    parser = Parser(prog=f"lvrpo {name}", description=command.summary, epilog=command.details)
    command.options(parser)
    try:
        options = parser.parse(given[len(name.split()) :])
    except SystemExit:  # --help has printed
        return DONE
    command.run(options)
    sys.stdout.flush()
    return DONE


def usage() -> str:
    """What ``lvrpo --help`` prints."""
    width = max(map(len, COMMANDS)) + 2
    summaries = {name: resolve("command", name, COMMANDS).summary for name in COMMANDS}
    lines = [f"  {name.ljust(width)}{summary}" for name, summary in summaries.items()]
    return "\n".join(
        [
            "lvrpo: align a model that reads pictures and draws them. Start with: lvrpo quickstart",
            "",
            "usage: lvrpo COMMAND [options]; lvrpo COMMAND --help tells more",
            "",
            *lines,
            "",
            "MODEL is a folder, a run, a built-in name (tiny), or a Hub id that lies in the local cache.",
            "--debug shows where an error comes from; --version.",
            "Exit codes: 0 done, 2 wrong input, 1 anything else, 130 interrupted.",
        ]
    )


def unknown(given: Sequence[str]) -> str:
    """The message for a command that does not exist."""
    first = given[0]
    if first.startswith("-"):
        near = nearest(first, ["--help", "--version", "--debug"])
        return f"option {first}: unknown: {f'did you mean {near}?' if near else 'options come after the command'}"
    inside = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if inside:
        return f"command {' '.join(given[:2])!r}: unknown: use {' or '.join(f'lvrpo {name}' for name in inside)}"
    near = nearest(first, COMMANDS)
    return f"command {first!r}: unknown: {f'did you mean {near}?' if near else 'lvrpo --help lists the commands'}"
