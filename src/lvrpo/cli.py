"""The command line: finds the command, parses its options strictly, turns errors into one line and an exit code."""

from __future__ import annotations

import errno
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
from lvrpo.commands.options import Command, Options, Parser, nearest
from lvrpo.errors import ContractError, InputError, UnhealthyRunError
from lvrpo.reading import read_error_message
from lvrpo.registry import ANY, allow_code, isolated_permissions, resolve

COMMANDS: Mapping[str, str] = {
    "quickstart": "lvrpo.commands.quickstart:QUICKSTART",
    "train": "lvrpo.commands.train:TRAIN",
    "pretrain": "lvrpo.commands.train:PRETRAIN",
    "launch ray": "lvrpo.commands.launch:RAY",
    "init": "lvrpo.commands.models:INIT",
    "check": "lvrpo.commands.train:CHECK",
    "generate": "lvrpo.commands.infer:GENERATE",
    "ask": "lvrpo.commands.infer:ASK",
    "edit": "lvrpo.commands.infer:EDIT",
    "export": "lvrpo.commands.models:EXPORT",
    "evaluate": "lvrpo.commands.evaluate:EVALUATE",
    "report": "lvrpo.commands.evaluate:REPORT",
    "compare": "lvrpo.commands.evaluate:COMPARE",
    "reproduce": "lvrpo.commands.reproduce:REPRODUCE",
    "audit": "lvrpo.commands.audit:AUDIT",
    "information": "lvrpo.commands.evaluate:INFORMATION",
    "data preview": "lvrpo.commands.data:PREVIEW",
    "data vocabulary": "lvrpo.commands.data:VOCABULARY",
}
"""Every command. The modules import nothing heavy until a command runs."""

SEVERAL = "train"
"""The command that ``torchrun`` may start several times over for one run."""

NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)
"""What the system says of a path that the user named and that cannot be what it is named for."""

LONGEST_LINE, LONGEST_WORD = 1000, 240
"""Characters of an error."""

DONE, FAILED, WRONG_INPUT, NOT_WELL, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 wrong input, 3 done, not well, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with terminated_like_interrupted(), warnings_in_one_line(), isolated_permissions():
            found = parsed(without_global_options(given))
            if found is not None:
                command, options = found
                with other_processes(options):
                    command.run(options)
                sys.stdout.flush()
            return DONE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a reader that left, such as head, is no error
        return DONE
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # anybody's module may call sys.exit
        if "--debug" in given:
            traceback.print_exc()
        code, line = explain(error)
        if reported_here(error):
            print(printable(line), file=sys.stderr)
        return code


@contextmanager
def other_processes(options: Options) -> Iterator[None]:
    """Where ``torchrun`` started several processes, they meet before a command and leave together after it."""
    if not several_processes():
        yield
        return
    from lvrpo.distributed import process_group

    with process_group(options.timeout_min):
        yield


def several_processes() -> bool:
    """Whether ``torchrun`` started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "TORCHELASTIC_RUN_ID" in os.environ


def reported_here(error: object) -> bool:
    """Whether this process, which may be one of several, prints an error or a warning."""
    if not several_processes():
        return True
    from lvrpo.distributed import should_print

    return should_print(error)


def printable(line: str) -> str:
    """One line of bounded length without what would steer a terminal."""
    line = " ".join(word if len(word) <= LONGEST_WORD else f"{word[:120]}...{word[-40:]}" for word in line.split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE - 200]} ... {line[-200:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


def without_global_options(given: Sequence[str]) -> list[str]:
    """The arguments without those that every command takes; what ``--allow-code`` allows is allowed from now on."""
    end = given.index("--") if "--" in given else len(given)
    rest: list[str] = []
    for argument in given[:end]:
        name, equals, value = argument.partition("=")
        if name == "--allow-code":
            allow_code(value.split(",") if equals else [ANY])
        elif argument != "--debug":
            rest.append(argument)
    return [*rest, *given[end:]]


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that a user sees."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted"
    if isinstance(error, InputError):
        return WRONG_INPUT, f"error: {error}"
    if isinstance(error, UnhealthyRunError):
        return NOT_WELL, f"not well: {error}"
    if isinstance(error, ContractError):
        return FAILED, f"error: {error}"
    if isinstance(error, OSError) and error.errno in NO_PATH and error.filename is not None:
        return (
            WRONG_INPUT,
            f"error: {read_error_message(Path(os.fsdecode(error.filename)), error, 'name another path')}",
        )
    return FAILED, f"error: {type(error).__name__}: {error} (unexpected: --debug shows where)"


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is open is closed, processes of our own are ended."""

    def interrupt(number: int, frame: object) -> None:
        if several_processes():  # torchrun ends the others as soon as one is gone
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
            if reported_here(message):
                print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def parsed(given: Sequence[str]) -> tuple[Command, Options] | None:
    """The command and its options; None where help or the version was asked for, which is then printed."""
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return None
    if given[0] == "--version":
        print(f"lvrpo {__version__}")
        return None
    if group_help(given):
        print(usage(f"{given[0]} "))
        return None
    name = " ".join(given[:2]) if " ".join(given[:2]) in COMMANDS else given[0]
    if name not in COMMANDS:
        raise InputError(unknown(given))
    if name != SEVERAL and several_processes():
        processes = os.environ["WORLD_SIZE"]
        raise InputError(f"--nproc-per-node {processes}: lvrpo {name} is one process: start it without torchrun")
    command: Command = resolve("command", name, COMMANDS)
    parser = Parser(prog=f"lvrpo {name}", description=command.summary, epilog=command.details)
    command.options(parser)
    try:
        return command, parser.parse(given[len(name.split()) :])
    except SystemExit:  # --help has printed
        return None


def group_help(given: Sequence[str]) -> bool:
    """Whether nothing but the name of a group of commands is given, or its help is asked for."""
    is_group = given[0] not in COMMANDS and any(name.startswith(f"{given[0]} ") for name in COMMANDS)
    return is_group and (len(given) == 1 or given[1] in ("-h", "--help", "help"))


def usage(group: str = "") -> str:
    """What ``lvrpo --help`` prints, or ``lvrpo GROUP --help``."""
    chosen = [name for name in COMMANDS if name.startswith(group)]
    width = max(map(len, chosen)) + 2
    summaries = {name: resolve("command", name, COMMANDS).summary for name in chosen}
    lines = [f"  {name.ljust(width)}{summary}" for name, summary in summaries.items()]
    if group:
        return "\n".join([f"usage: lvrpo {group}COMMAND [options]; lvrpo {group}COMMAND --help tells more", "", *lines])
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
            "--allow-code lets names such as my_package.module:Class in a configuration run code (SECURITY.md);",
            "--allow-code=my_package,other lets those packages, also where the folder of a model names them.",
            "Exit codes: 0 done, 2 wrong input, 3 done but not well, 1 anything else, 130 interrupted.",
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
