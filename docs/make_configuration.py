"""Writes docs/reference/configuration.md from the configuration sections and the docstrings of their fields.

python docs/make_configuration.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from lvrpo.commands.keys import configs_in, default_text, field_texts, prose, type_text
from lvrpo.config import Config
from lvrpo.registry import resolve
from lvrpo.rewards import REWARDS
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig

PAGE = Path(__file__).resolve().parent / "reference" / "configuration.md"

HEAD = """# Configuration

Every key of `lvrpo train` and `lvrpo pretrain`, with its default. This page is made from the configuration classes by
`make docs`; a test holds the two together. A configuration is a YAML file that may extend another one (`extends`);
`section.key=value` on the command line changes single keys. An unknown key is refused with the nearest one.

A *task* is `understand`, `generate`, `edit` or `reason`. A section with several kinds has the keys of the chosen
`kind` only. [methods.md](../concepts/methods.md) says which kinds there are and how they combine,
[rewards.md](rewards.md) what each reward scores.
"""


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


if __name__ == "__main__":
    main()
