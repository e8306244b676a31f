"""``lvrpo new reward``: a reward function with its test, to be filled in; ``lvrpo completion``: for a shell."""

from __future__ import annotations

import argparse
import importlib.metadata
import keyword
import sys
from pathlib import Path
from typing import Any

from lvrpo.commands.options import Command, Options, Parser, add_force, refuse_existing
from lvrpo.errors import InputError, optional_package

OUTPUTS = ("image", "text")
REWARD = '''"""The reward {name}: which {what} are good, and why."""

from __future__ import annotations
{imports}
def {name}({output}: {type}, target: float = {target}) -> float | None:
    """0 for {what} with {quantity} ``target``, less for any other; more is better, None masks the output.

    {output}: {meaning}. ``target`` is an option of the configuration.
    Parameters named prompt, answer or trajectory would be handed over as well.
    """
    return -abs({value} - target)
'''
TEST = '''"""{name} prefers what it should."""

from __future__ import annotations
{imports}from {name} import {name}


def test_more_of_the_target_scores_more() -> None:
    near, far = {name}({near}), {name}({far})
    assert near is not None
    assert far is not None
    assert near > far
'''
KINDS: dict[str, dict[str, str]] = {
    "image": {
        "imports": "\nimport torch\n\n",
        "what": "images",
        "type": "torch.Tensor",
        "target": "0.7",
        "quantity": "the mean brightness",
        "meaning": "float32 (3, height, width), values in [0, 1]",
        "value": "float(image.mean())",
        "near": "torch.full((3, 8, 8), 0.7)",
        "far": "torch.zeros(3, 8, 8)",
    },
    "text": {
        "imports": "\n",
        "what": "answers",
        "type": "str",
        "target": "8",
        "quantity": "a number of words of",
        "meaning": "the generated text",
        "value": "len(text.split())",
        "near": '"one two three four five six seven eight"',
        "far": '"one"',
    },
}


def _new_reward_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the function and of its file")
    parser.add_argument("--output", choices=OUTPUTS, default="image", help="what the reward scores (default: image)")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder of the files (default: the current one)"
    )
    add_force(parser)


def _new_reward(options: Options) -> None:
    from lvrpo.commands.inputs import write_file

    name: str = options.name
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise InputError(f"{name!r}: is no name of a Python function: use letters, digits and _, and no keyword")
    if name in sys.stdlib_module_names or name in importlib.metadata.packages_distributions():
        raise InputError(f"{name!r}: is the name of a module that {name}.py would hide: choose another")
    kind = KINDS[options.output]
    code, test = options.out / f"{name}.py", options.out / f"test_{name}.py"
    refuse_existing([code, test], options.force)
    write_file(code, REWARD.format(name=name, output=options.output, **kind).encode(), options.force)
    write_file(test, TEST.format(name=name, **kind).encode(), options.force)
    print(f"{code}: the reward; {test}: its test. In the configuration beside them:")
    print(f'  allow_code: [./{name}.py]\n  rewards: [{{name: "./{name}.py:{name}"}}]')


NEW_REWARD = Command(
    "write a template of a reward function, with its test",
    _new_reward_options,
    "lvrpo.commands.new:_new_reward",
    "examples:\n"
    "  lvrpo new reward brightness && python -m pytest test_brightness.py\n"
    "  lvrpo new reward politeness --output text",
)
"""``lvrpo new reward``."""


def completion(options: Options) -> None:
    from lvrpo.commands import COMMANDS
    from lvrpo.registry import resolve

    shtab = optional_package("shtab", "completion needs shtab", "completion")
    parser = argparse.ArgumentParser(prog="lvrpo")
    level: Any = parser.add_subparsers()  # the class of argparse is private
    groups: dict[str, Any] = {}
    for name in COMMANDS:
        command = resolve("command", name, COMMANDS)
        group, _, rest = name.partition(" ")
        if rest and group not in groups:
            groups[group] = level.add_parser(group, help=f"lvrpo {group} --help").add_subparsers()
        made = (groups[group] if rest else level).add_parser(rest or group, help=command.summary)
        command.options(_Completed(made))
    print(shtab.complete(parser, options.shell))


class _Completed(Parser):
    """Passes the options of a command on to a subparser of argparse."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog, "")
        self.add_argument = parser.add_argument  # type: ignore[method-assign]

    def group(self, title: str) -> argparse._ActionsContainer:
        """Completion has no headings."""
        return self


COMPLETION = Command(
    "print a completion script for your shell",
    lambda parser: parser.add_argument(
        "shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh"
    ),
    "lvrpo.commands.new:completion",
    'examples:\n  eval "$(lvrpo completion bash)"',
)
"""``lvrpo completion``."""
