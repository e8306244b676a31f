"""The two kinds of failure that lvrpo tells apart."""


class LvrpoError(Exception):
    """Base of every error that lvrpo raises on purpose."""


class InputError(LvrpoError):
    """The user's input is wrong. The message is one line: value, rule, remedy. The command line exits with 2."""


class ContractError(LvrpoError):
    """A promise between parts was broken (replay law, step-0 contract, a reward of the wrong shape). Exits with 1."""


class NotWellError(LvrpoError):
    """A run came to its end and is not well. The message is one line that says why. The command line exits with 3."""


class LostProcessError(ContractError):
    """Another process of the run cannot be spoken to any more."""


def described(error: BaseException) -> str:
    """An error of anybody's code in one line: its kind and what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
