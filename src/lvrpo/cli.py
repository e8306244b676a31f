"""The command line: finds the command, parses its options, maps errors to one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

from lvrpo import __version__
from lvrpo.commands import COMMANDS, HEADINGS
from lvrpo.commands.options import Command, Options, Parser
from lvrpo.errors import ContractError, InputError, UnhealthyRunError, nearest
from lvrpo.reading import read_error_message
from lvrpo.registry import ANY, allow_code, isolated_permissions, resolve

DISTRIBUTED_COMMANDS = ("train", "evaluate")
"""The commands that ``torchrun`` may start in several processes."""

PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)
"""Errors of the operating system that mean wrong input: the user named an unusable path."""

MAX_LINE, MAX_WORD = 1000, 240
"""Maximum characters of an error message, and of a word in it."""

DONE, FAILED, WRONG_INPUT, NOT_WELL, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes; NOT_WELL: done, but the run is not healthy."""


def run() -> NoReturn:
    """The process of ``lvrpo`` and ``python -m lvrpo``: ``main``, then the end of the process.

    Under torchrun the interpreter is not torn down: gloo's threads may still be releasing the tensors of the last
    collective, and a thread that needs the interpreter then aborts the process of a run that succeeded.
    """
    code = main()
    if several_processes():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, one of those above."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with sigterm_as_interrupt(), one_line_warnings(), isolated_permissions():
            found = parse_command(apply_global_options(argv))
            if found is not None:
                command, options = found
                if not several_processes():  # these check the same, and stop together
                    command.check(options)
                with joined_process_group(options):
                    command.load()(options)
            sys.stdout.flush()
            return DONE
    except BrokenPipeError:  # a closed pipe, as of head, is no error
        _discard_unwritable_output()
        return DONE
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # a module of the user may call sys.exit
        if "--debug" in argv:
            traceback.print_exc()
        code, line = explain(error)
        if should_report(error):
            print(printable(line), file=sys.stderr)
        _discard_unwritable_output()
        return code


def _discard_unwritable_output() -> None:
    """Keeps the interpreter from writing again, at its end, what could not be written: it would exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def joined_process_group(options: Options) -> Iterator[None]:
    """Under ``torchrun``, joins the process group for the time of a command."""
    if not several_processes():
        yield
        return
    from lvrpo.distributed import process_group

    with process_group(options.timeout_min):
        yield


def several_processes() -> bool:
    """Whether ``torchrun`` started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "TORCHELASTIC_RUN_ID" in os.environ


def should_report(error: object) -> bool:
    """Whether this process, one of possibly several, prints an error or a warning."""
    if not several_processes():
        return True
    from lvrpo.distributed import should_print

    return should_print(error)


def printable(line: str) -> str:
    """One line of bounded length, with control characters escaped."""
    line = " ".join(word if len(word) <= MAX_WORD else f"{word[:120]}...{word[-40:]}" for word in line.split())
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE - 200]} ... {line[-200:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


def apply_global_options(argv: Sequence[str]) -> list[str]:
    """Applies ``--allow-code``; returns the arguments without the options that every command takes."""
    end = argv.index("--") if "--" in argv else len(argv)
    rest: list[str] = []
    for argument in argv[:end]:
        name, equals, value = argument.partition("=")
        if name == "--allow-code":
            allow_code(value.split(",") if equals else [ANY])
        elif argument != "--debug":
            rest.append(argument)
    return [*rest, *argv[end:]]


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that a user sees."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, InputError):
        return WRONG_INPUT, f"error: {error}"
    if isinstance(error, UnhealthyRunError):
        return NOT_WELL, f"not healthy: {error}"
    if isinstance(error, ContractError):
        return FAILED, f"error: {error}"
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # raised by rich
        return FAILED, "error: the program that reads the output has ended, so the command stopped, too"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return FAILED, "error: the output cannot be written: no space is left on its device: free some"
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        return WRONG_INPUT, f"error: {read_error_message(path, error, 'name another path')}"
    return FAILED, f"error: {type(error).__name__}: {error} (unexpected: --debug shows where)"


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that files are closed and child processes terminated."""

    def interrupt(number: int, frame: object) -> None:
        if several_processes():  # torchrun terminates the others once one has failed
            from lvrpo.distributed import lost_process

            if (lost := lost_process()) is not None:
                raise lost
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
def one_line_warnings() -> Iterator[None]:
    """Prints lvrpo's own warnings in one line; warnings of Python and of libraries are unchanged."""
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
            if should_report(message):
                print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def parse_command(argv: Sequence[str]) -> tuple[Command, Options] | None:
    """The command and its options; None after printing help or the version."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return None
    if argv[0] == "--version":
        print(f"lvrpo {__version__}")
        return None
    if group_help(argv):
        print(usage(f"{argv[0]} "))
        return None
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    if name not in COMMANDS:
        raise InputError(unknown_command_message(argv))
    if name not in DISTRIBUTED_COMMANDS and several_processes():
        processes = os.environ["WORLD_SIZE"]
        raise InputError(f"--nproc-per-node {processes}: lvrpo {name} is one process: start it without torchrun")
    command: Command = resolve("command", name, COMMANDS)
    parser = Parser(prog=f"lvrpo {name}", description=command.summary, epilog=command.details)
    command.options(parser)
    try:
        return command, parser.parse(argv[len(name.split()) :])
    except SystemExit:  # --help has printed
        return None


def group_help(argv: Sequence[str]) -> bool:
    """Whether the arguments are the name of a command group alone, or ask for its help."""
    is_group = argv[0] not in COMMANDS and any(name.startswith(f"{argv[0]} ") for name in COMMANDS)
    return is_group and (len(argv) == 1 or argv[1] in ("-h", "--help", "help"))


def usage(group: str = "") -> str:
    """The text of ``lvrpo --help``, or of ``lvrpo GROUP --help``."""
    chosen = [name for name in COMMANDS if name.startswith(group)]
    width = max(map(len, chosen)) + 2
    summaries = {name: resolve("command", name, COMMANDS).summary for name in chosen}
    lines = []
    for name, summary in summaries.items():
        if name in HEADINGS and not group:
            lines += ["", f"{HEADINGS[name]}:"]
        lines.append(f"  {name.ljust(width)}{summary}")
    if group:
        return "\n".join(
            [
                f"usage: lvrpo {group}COMMAND [options]",
                "",
                f"lvrpo {group}COMMAND --help describes a command.",
                "",
                *lines,
            ]
        )
    return "\n".join(
        [
            "usage: lvrpo COMMAND [options]",
            "",
            "RL post-training of models that both understand and generate images.",
            *lines,
            "",
            "Every command:",
            "  --help             describe the command",
            "  --debug            print the traceback of an error",
            "  --allow-code[=PACKAGE[,PACKAGE]]",
            "                     let a configuration, or with PACKAGE a model folder, run Python code that it names",
            "                     as my_package.module:Class (SECURITY.md)",
            "",
            "lvrpo --version prints the version.",
            "",
            "examples:",
            "  lvrpo quickstart --quick                       # start here",
            '  lvrpo generate tiny --prompt "two red circles" --out drawings',
            "  lvrpo train quickstart seed=1 --out runs/seed1",
            "  lvrpo report runs/seed1",
            "",
            "Exit codes: 0 done, 1 failed, 2 wrong input, 3 done but the run is not healthy, 130 interrupted.",
        ]
    )


def unknown_command_message(argv: Sequence[str]) -> str:
    """The message for a command that does not exist."""
    first = argv[0]
    if first.startswith("-"):
        near = nearest(first, ["--help", "--version", "--debug"])
        return f"option {first}: unknown: {f'did you mean {near}?' if near else 'options come after the command'}"
    inside = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if inside:
        near = nearest(" ".join(argv[:2]), inside)
        hint = f"did you mean {near}?" if near else f"use {' or '.join(f'lvrpo {name}' for name in inside)}"
        return f"command {' '.join(argv[:2])!r}: unknown: {hint}"
    near = nearest(first, COMMANDS)
    return f"command {first!r}: unknown: {f'did you mean {near}?' if near else 'lvrpo --help lists the commands'}"
