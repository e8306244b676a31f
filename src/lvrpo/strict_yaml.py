"""YAML for configurations: plain values, no duplicate keys, a limited number of nodes, scalars of YAML 1.2.

``1e-4`` is a number and ``off`` is text; PyYAML, which implements YAML 1.1, parses both the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from lvrpo.errors import InputError

_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, (_pattern, _starts) in _SCALARS.items():
    for _start in _starts:
        _RESOLVERS.setdefault(_start.strip("\0"), []).append((_tag, re.compile(rf"(?:{_pattern})\Z")))


MAX_NODES = 100_000
"""Limit of keys and values in a file, with aliases expanded."""
_TAG_ERRORS = (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError, OverflowError)
"""Exceptions of PyYAML for an invalid value after a tag such as !!timestamp."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _require_nodes(node, {}, set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key '{key.value}' stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _require_nodes(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """The number of nodes below a node with aliases expanded; raises ValueError above ``MAX_NODES``."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="holds itself, by an alias", problem_mark=node.start_mark)
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        total = 1 + sum(_require_nodes(part, known, above | {id(node)}) for part in parts)
        if total > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES} values")
        known[id(node)] = total
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    """A text, in double quotes where a separator of YAML 1.1 would be read as a newline and folded to a space."""
    quoted = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _text)


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML text, refusing duplicate keys; raises InputError with one line that begins with ``where``."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader with stricter scalars
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # only MarkedYAMLError has it
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML ({problem}): correct this line") from None
    except _TAG_ERRORS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{where}: not valid YAML ({reason}): correct the file") from None


def dump_yaml(tree: Any) -> str:
    """YAML text of plain values, keys in order; ``parse_yaml`` restores an equal tree. Any: JSON values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
