"""A strict argument parser: no abbreviations, nearest names for typing errors, every error an ``InputError``."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lvrpo.errors import InputError, nearest

Options = argparse.Namespace


class StoreOnce(argparse._StoreAction):
    """Stores the value of an option; raises InputError where the option is given a second time."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: Options, values: Any, option_string: str | None = None
    ) -> None:
        """Any: of any type."""
        if option_string is not None:
            given = vars(options).setdefault(GIVEN, set())
            if self.dest in given:
                remedy = "write NAME,NAME" if self.type is names else "leave one out"
                raise InputError(f"option {option_string}: given twice: {remedy}")
            given.add(self.dest)
        super().__call__(parser, options, values, option_string)


GIVEN = "_given"
"""While options are parsed, their attribute with the names of those that were given."""


class Parser(argparse.ArgumentParser):
    """Options may stand before, between and after the positional arguments."""

    unknown_hint = ""
    """The hint for an unknown option that resembles no known one."""
    removed: Mapping[str, str] = {}
    """Options of earlier versions, and what to use now."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog or None,
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        )
        self.register("action", "store", StoreOnce)
        self.register("action", None, StoreOnce)
        self._positionals.title = "arguments"

    def group(self, title: str) -> argparse._ActionsContainer:
        """The options under a heading of their own in ``--help``; made at the first call."""
        groups = [group for group in self._action_groups if group.title == title]
        return groups[0] if groups else self.add_argument_group(title)

    def parse(self, arguments: Sequence[str]) -> Options:
        """The options; raises InputError, with the nearest name for an unknown option."""
        self.usage = self.short_usage()
        _refuse_empty(arguments)
        options, rest = self.parse_known_intermixed_args(list(arguments))
        vars(options).pop(GIVEN, None)
        if rest:
            name = rest[0].partition("=")[0]
            if not name.startswith("-"):
                raise InputError(f"argument {rest[0]!r}: one too many: see {self.prog} --help")
            if name in self.removed:
                raise InputError(f"option {name}: was removed: {self.removed[name]}")
            near = nearest(name, self._option_string_actions)
            hints = [f"did you mean {near}?" if near else "", self.unknown_hint or ""]
            hint = " ".join(filter(None, hints)) or f"see {self.prog} --help"
            raise InputError(f"option {name}: unknown: {hint}")
        return options

    def short_usage(self) -> str:
        """The usage line: the arguments and the required options."""
        formatter = self._get_formatter()
        places = [formatter._format_args(each, str(each.metavar)) for each in self._get_positional_actions()]
        required = [each for each in self._get_optional_actions() if each.required]
        options = [f"{each.option_strings[0]} {each.metavar}" for each in required]
        return " ".join([self.prog, *places, *options, "[options]"])

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required: "):  # argparse names optional positionals too
            optional = {str(each.metavar) for each in self._get_positional_actions() if each.nargs in ("?", "*")}
            names = [name for name in message.partition(": ")[2].split(", ") if name not in optional]
            message = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        raise InputError(f"{message}: see {self.prog} --help")


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raises InputError for an argument without a character: as a path it would be the current folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name = argument[:-1] if argument.startswith("--") and argument.endswith("=") else before
        if not argument or name is not before:
            what = f"option {name}" if name.startswith("--") else "an argument"
            raise InputError(
                f"{what}: is empty: give it a value, or leave it out (is a variable of the shell not set?)"
            )


@dataclass(frozen=True)
class Command:
    """One command."""

    summary: str
    options: Callable[[Parser], object]
    run: str
    """The function that runs it, as module:name; imported when it does."""
    details: str = ""
    check: Callable[[Options], object] = lambda options: None
    """Raises InputError for wrong input that is found without torch and the training code; called before ``load``."""

    def load(self) -> Callable[[Options], object]:
        """The function that runs it."""
        module, _, name = self.run.partition(":")
        return getattr(importlib.import_module(module), name)


def up_to(most: int, least: int = 1) -> Callable[[str], int]:
    """Whole numbers from ``least`` to ``most``."""

    def read(text: str) -> int:
        number = whole(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be {f'<= {most}' if number > most else f'>= {least}'}")
        return number

    return read


positive = up_to(1_000_000)
threads = up_to(1024)
num_steps = up_to(1000)
max_new_tokens = up_to(100_000)
port = up_to(65_535, 0)
"""A port of TCP; 0: a free one."""


def whole(text: str) -> int:
    """A whole number >= 0."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number") from None
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text}: must be >= 0 and < 2^63")
    return number


def number(low: float, high: float, what: str = "a number") -> Callable[[str], float]:
    """Numbers from ``low`` to ``high``."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {what} from {low:g} to {high:g}") from None
        if not low <= found <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {what} from {low:g} to {high:g}")
        return found

    return read


guidance = number(1, 1000)
share = number(0, 1)
gibibytes = number(0.001, 100_000, "a number of GiB, such as 78,")


def image_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels, as (height, width)."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r}: write WIDTHxHEIGHT, such as 1024x768")
    if max(int(width), int(height)) > 8192:
        raise argparse.ArgumentTypeError(f"{text}: sides must be <= 8192")
    return int(height), int(width)


def names(text: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME or NAME,NAME")
    return found


def add_model(parser: Parser) -> None:
    """MODEL and where it runs."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run directory, a Hub id in the local cache, or built in: tiny, tiny-token, tiny-masked",
    )
    parser.group("model").add_argument(
        "--dtype", help="float32 or bfloat16, if the model supports both (default: the model's own)"
    )
    add_device(parser)


def add_base(parser: Parser) -> None:
    """--base."""
    parser.group("model").add_argument(
        "--base",
        metavar="MODEL",
        help="the base model, if the base of an adapter was moved or a fine-tuned BAGEL folder lacks some tensors",
    )


def add_device(parser: Parser) -> None:
    """--device."""
    parser.group("model").add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (default: auto)"
    )


def add_timeout(parser: Parser) -> None:
    """--timeout-min."""
    parser.add_argument(
        "--timeout-min",
        type=positive,
        default=30,
        metavar="MIN",
        help="with torchrun: minutes that a process waits for the others (default: 30)",
    )


def add_threads(parser: Parser) -> None:
    """--threads."""
    parser.group("model").add_argument("--threads", type=threads, default=1, help="CPU threads (default: 1)")


class ConfigHelp(argparse.Action):
    """Prints settings of a configuration class, module:name, and ends the command."""

    def __init__(self, *arguments: Any, cls: str, **options: Any) -> None:  # Any: of argparse
        super().__init__(*arguments, **options)
        self.cls = cls

    def __call__(
        self, parser: argparse.ArgumentParser, options: Options, values: object, option: object = None
    ) -> None:
        """Any: of argparse."""
        from lvrpo.commands.keys import settings_text
        from lvrpo.registry import resolve

        print(settings_text(resolve("configuration", self.cls, {self.cls: self.cls}), str(values)))
        parser.exit()


def add_config(parser: Parser, cls: str = "lvrpo.training.config:TrainConfig") -> None:
    """CONFIG, its overrides, and ``--config-help``; ``cls``: the configuration class as module:name."""
    parser.add_argument(
        "--config-help",
        nargs="?",
        const="",
        default=argparse.SUPPRESS,
        action=partial(ConfigHelp, cls=cls),  # type: ignore[arg-type]  # any callable that makes an action
        metavar="WORD",
        help="print every setting with its type, default and description; with WORD, only those that match",
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML file, or a built-in name such as quickstart"
    )
    add_overrides(parser)


def add_overrides(parser: Parser) -> None:
    """section.key=value."""
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="settings that replace those of CONFIG"
    )
    parser.unknown_hint = "write a setting of the configuration as section.key=value, without dashes"


def add_seed(parser: Parser) -> None:
    """--seed."""
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="random seed (default: 0)")


def add_json(parser: Parser, what: str = "the numbers") -> None:
    """--json and --force."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write {what} here")
    add_force(parser)


def refuse_given(options: Options, names: Iterable[str], why: str) -> None:
    """Raises InputError, which ends in ``why``, for the first of these options that was given."""
    for name in names:
        value = vars(options).get(name)
        if value is not None and value is not False and value != {}:
            raise InputError(f"--{name.replace('_', '-')}: {why}")


def add_force(parser: Parser) -> None:
    """--force."""
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Raises InputError if one of the files exists, unless ``force``, or has a name that no file can have."""
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = "it lies below a file" if error.errno == errno.ENOTDIR else error.strerror
            raise InputError(f"{path}: cannot be written: {reason}: choose another name") from error
        if not force:
            raise InputError(f"{path}: exists already: choose another name, or add --force to write over it")
