from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import lvrpo.algorithms
import lvrpo.sampling


@pytest.mark.parametrize("package", [lvrpo.algorithms, lvrpo.sampling])
def test_a_package_offers_every_public_name_of_its_modules_once(package: ModuleType) -> None:
    names = []
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        names += module.__all__
        for name in module.__all__:
            assert getattr(package, name) is getattr(module, name)
            assert getattr(module, name).__doc__
    assert sorted(names) == sorted(package.__all__)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("package", [lvrpo.algorithms, lvrpo.sampling])
def test_every_function_says_what_it_takes_what_it_raises_and_how_it_differs(package: ModuleType) -> None:
    for name in package.__all__:
        if inspect.isfunction(getattr(package, name)):
            text = getattr(package, name).__doc__
            assert "Raises:" in text, name
            assert "Differs from the paper:" in text, name
            assert "Shapes:" in text or "Range:" in text or name == "check_window", name
