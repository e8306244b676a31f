"""Writes src/lvrpo/assets/keys.json, by which the command line checks keys before torch is imported.

python docs/make_keys.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BeforeValidator

from lvrpo.commands.keys import KEYS as PAGE
from lvrpo.config import KIND, Config
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.policies.diffusers_flow.create import PipelineSizes
from lvrpo.policies.emu3.create import Emu3Sizes
from lvrpo.policies.janus.create import JanusSizes
from lvrpo.policies.mmada.create import MmadaSizes
from lvrpo.policies.showo.create import ShowoSizes
from lvrpo.policies.showo2.create import RandomShowo2
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig


def main() -> None:
    """Writes the file."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The file as text, one class a line."""
    found: dict[str, dict[str, Any]] = {}
    for cls in (
        TrainConfig,
        PretrainConfig,
        BagelSizes,
        Emu3Sizes,
        JanusSizes,
        MmadaSizes,
        PipelineSizes,
        ShowoSizes,
        RandomShowo2,
    ):
        describe(cls, found)
    lines = [f"{json.dumps(name)}: {json.dumps(described)}" for name, described in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def describe(cls: type[Config], found: dict[str, dict[str, Any]]) -> None:
    """Adds a class and those of its sections. Any: JSON."""
    if cls.__name__ in found:
        return
    fields: dict[str, Any] = {}
    found[cls.__name__] = {"hints": dict(cls.hints), "fields": fields}
    for name, field in cls.model_fields.items():
        parts = [*field.metadata, *parts_of(field.annotation)]
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, Config)]
        fields[name] = list(get_args(field.annotation)) if name == KIND else None
        if sections:
            fields[name] = {"sections": [each.__name__ for each in sections]}
            if get_origin(field.annotation) is tuple:
                fields[name]["many"] = True
            for part in parts:
                if isinstance(part, BeforeValidator):  # of lvrpo.config.default_kind
                    fields[name]["default"] = part.func({})[KIND]
        for each in sections:
            describe(each, found)


def parts_of(annotation: Any) -> Iterator[Any]:
    """The types and the metadata in an annotation. Any: types."""
    yield annotation
    for part in get_args(annotation):
        yield from parts_of(part)


if __name__ == "__main__":
    main()
