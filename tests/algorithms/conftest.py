"""Enforces the shapes written in the signatures of lvrpo.algorithms while these tests run."""

from __future__ import annotations

import inspect
from types import ModuleType

import jaxtyping
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings

import lvrpo.algorithms
from lvrpo.algorithms import advantages, audit, kl, nft, objectives

settings.register_profile("equations", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("equations")

SHAPES = {name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int")}


def enforce_shapes(package: ModuleType, modules: list[ModuleType]) -> None:
    """Replaces every public function by one that checks its annotations, wherever its module or package names it."""
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))
    for module in modules:
        vars(module).update(SHAPES, Tensor=torch.Tensor)  # imported for type checking only
    for module in modules:
        for name in vars(module)["__all__"]:
            function = vars(module)[name]
            if inspect.isfunction(function):
                checked = jaxtyping.jaxtyped(function, typechecker=check)
                for holder in (package, *modules):
                    if vars(holder).get(name) is function:
                        setattr(holder, name, checked)


enforce_shapes(lvrpo.algorithms, [advantages, audit, kl, nft, objectives])
