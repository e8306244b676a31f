"""The exceptions of lvrpo, and what their messages share."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class LvrpoError(Exception):
    """Base of every error that lvrpo raises on purpose."""


class InputError(LvrpoError):
    """The user's input is wrong. The message is one line: value, rule, remedy. The command line exits with 2."""


class ContractError(LvrpoError):
    """An invariant is violated (replay law, step-0 contract, a reward of the wrong shape). Exits with 1."""


class RefusedRunError(ContractError):
    """The step-0 contract is violated: the run does not begin, and leaves no folder."""


class UnhealthyRunError(LvrpoError):
    """A run finished, but its health check failed. The message is one line with the reason. Exits with 3."""


class LostProcessError(ContractError):
    """Another process of the run has died or is unreachable."""


def optional_package(name: str, needed_by: str, extra: str) -> Any:
    """A package of an extra; raises InputError with the command that installs it. Any: it may have no types.

    ``needed_by``: begins the message, such as "an adapter needs peft".
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{needed_by}: pip install 'lvrpo[{extra}]'") from None


def describe_error(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like a misspelled one, if any is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
