"""Writes docs/reference/configuration.md from the configuration sections and the docstrings of their fields.

python docs/make_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lvrpo.config import Config
from lvrpo.registry import resolve
from lvrpo.rewards import REWARDS
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.types import Task

PAGE = Path(__file__).resolve().parent / "reference" / "configuration.md"

HEAD = """# Configuration

Every key of `lvrpo train` and `lvrpo pretrain`, with its default. This page is made from the configuration classes by
`make docs`; a test holds the two together. A configuration is a YAML file that may extend another one (`extends`);
`section.key=value` on the command line changes single keys. An unknown key is refused with the nearest one.

A *task* is `understand`, `generate`, `edit` or `reason`. A section with several kinds has the keys of the chosen
`kind` only. [methods.md](../concepts/methods.md) says which kinds there are and how they combine,
[rewards.md](rewards.md) what each reward scores.
"""

NAMES = {str: "text", int: "int", float: "float", bool: "bool", Path: "path", Any: "any", type(None): "null"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def main() -> None:
    """Writes the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page as text."""
    shown: set[type[Config]] = set()
    parts = [HEAD, "## lvrpo train\n", *sections(TrainConfig, "", shown)]
    parts += ["## lvrpo pretrain\n", *sections(PretrainConfig, "", shown)]
    parts.append("## Options of rewards\n\nThe `options` of a row of `rewards`, by its `name`.\n")
    for name in REWARDS:
        cls = resolve("reward", name, REWARDS)
        parts += [f"### {name}\n", *sections(cls, f"{name}.", shown)]
    return "\n".join(parts)


def sections(cls: type[Config], place: str, shown: set[type[Config]], of_kinds: bool = False) -> Iterator[str]:
    """The table of a section, then those below it; ``place``: "" or "rollout."; ``shown``: what has a table already;
    ``of_kinds``: whether it is one of several kinds, which its heading names."""
    shown.add(cls)
    below: list[tuple[str, type[Config]]] = []
    rows = []
    texts = field_texts(cls)
    for name, field in cls.model_fields.items():
        inner = configs_in(field.annotation)
        for each in inner:
            kinds = f", kind: {', '.join(get_args(each.model_fields['kind'].annotation))}" if len(inner) > 1 else ""
            below.append((f"{place}{name}{kinds}", each))
        if name == "kind" and of_kinds:
            continue  # the heading says it
        default = default_text(field, inner)
        text = texts.get(name) or (prose(inspect.getdoc(inner[0])) if len(inner) == 1 else "")
        cells = [
            f"`{name}`",
            type_text(field.annotation, field.metadata),
            default,
            text or ("The kinds are below." if inner else ""),
        ]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if rows:
        yield "\n".join(["| key | type | default | description |", "|---|---|---|---|", *rows, ""])
    for title, each in below:
        if each not in shown:
            yield f"### {title}\n\n{prose(inspect.getdoc(each))}\n"
            yield from sections(each, f"{title.partition(',')[0]}.", shown, ", kind: " in title)


def field_texts(cls: type[Config]) -> dict[str, str]:
    """The strings under the fields of a class and of those that it is derived from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Config):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant):
                    found[field.target.id] = prose(str(text.value))
    return found


def prose(text: str | None) -> str:
    """One paragraph in Markdown, in the terms of YAML, without what is said of Python's types."""
    words = " ".join((text or "").split()).replace("``", "`")
    return re.sub(r"\bNone\b", "null", re.sub(r" ?\bAny: [^.]*\.", "", words))


def configs_in(annotation: Any) -> list[type[Config]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [each for part in get_args(annotation) for each in configs_in(part)]


def default_text(field: FieldInfo, inner: list[type[Config]]) -> str:
    """As YAML has it; ``inner``: the sections that the field may hold."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return f"kind: {value.model_dump()['kind']}" if len(inner) > 1 else "its defaults"
    if inner and value:
        return f"`{json.dumps([each.model_dump(exclude_unset=True) for each in value])}`"
    return f"`{json.dumps(value, default=str)}`"


def type_text(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """In words: int >= 1, `a` or `b`, list of text."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(parts[0], parts[1:])
    if annotation == Task:
        return "task"
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part, metadata) for part in parts))
    if origin is tuple:
        items = [part for part in parts if part is not Ellipsis]
        return f"list of {type_text(items[0])}" if Ellipsis in parts else f"[{', '.join(map(type_text, items))}]"
    if origin is dict:
        return f"{type_text(parts[0])}: {type_text(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section"
    bounds = [
        f"{sign} {getattr(each, name)}" for each in metadata for name, sign in BOUNDS.items() if hasattr(each, name)
    ]
    bounded = annotation in (int, float) and bounds
    return NAMES.get(annotation, str(annotation)) + (f" {', '.join(bounds)}" if bounded else "")


if __name__ == "__main__":
    main()
