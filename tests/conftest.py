"""What every test starts from: one thread, known seeds and an empty working directory.

The shapes written in the signatures of the equations are enforced while the tests run.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib
import inspect
import itertools
import os
import pkgutil
import random
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONUNBUFFERED", None)  # commands are tested as they run without it: their output is buffered

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings

import lvrpo.algorithms
import lvrpo.sampling
from lvrpo.registry import isolated_permissions

torch.set_num_threads(1)
settings.register_profile(
    "lvrpo", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lvrpo")


def kind_of(value: Any) -> Any:
    """What the shapes of a result depend on: equal for arguments of equal types, shapes and whole numbers."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(kind_of, value)
    return type(value), value if isinstance(value, int | str) else None


def once_per_kind(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """Checks calls until one with arguments of the same kinds has passed: a run makes thousands of them."""
    passed: set[Any] = set()

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        kinds = kind_of(args), tuple((name, kind_of(value)) for name, value in options.items())
        if kinds in passed:
            return function(*args, **options)
        result = checked(*args, **options)
        passed.add(kinds)
        return result

    return call


def enforce_shapes(package: ModuleType) -> None:
    """Replaces every public function by one that checks its annotations, wherever its modules or tables name it."""
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    for module in modules:  # imported for type checking only
        vars(module).update({name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int")}, Tensor=torch.Tensor)
    names = {name for module in modules for name in vars(module)["__all__"]}
    functions = {name: vars(package)[name] for name in names if inspect.isfunction(vars(package).get(name))}
    checked = {
        function: once_per_kind(function, jaxtyping.jaxtyped(function, typechecker=check))
        for function in functions.values()
    }
    for holder in (package, *modules):
        for name, value in list(vars(holder).items()):
            if inspect.isfunction(value) and value in checked:
                setattr(holder, name, checked[value])
            elif isinstance(value, dict) and name in names:  # a table of functions
                value.update({key: checked[entry] for key, entry in value.items() if entry in checked})


enforce_shapes(lvrpo.algorithms)
enforce_shapes(lvrpo.sampling)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is imported stays for good: the garbage collector need not look at it, now or during the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def _working_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """New paths. ``mktemp`` would list all earlier directories for each."""
    folder = tmp_path_factory.mktemp("cwd")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _known_start(_working_directories: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, and a working directory of its own: a test that forgets a path writes nothing into the checkout."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    folder = next(_working_directories)
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(autouse=True)
def _nothing_allowed() -> Iterator[None]:
    """What a test allows to run as code ends with it."""
    with isolated_permissions():
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Only a loss of power tells a file that fsync has brought to the disk from another, and each costs 10 ms.

    The call must still be right: a descriptor that is none raises. Processes that a test starts or kills do wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.fstat(handle) and None)
        yield


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _held_out_prompts_once() -> Iterator[None]:
    """Every run compares its splits: the prompts of the built-in world, which are the same again, are made once."""
    splits = sys.modules.get("lvrpo.training.leakage")
    if splits is None:
        yield
        return
    make, made = splits._held_out_prompts, dict[Any, Any]()

    def held_out_prompts(config: Any, split: str) -> Any:
        if config.data.source != "scenes":
            return make(config, split)
        key = config.data.model_dump_json(), split
        if key not in made:
            made[key] = make(config, split)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_held_out_prompts", held_out_prompts)
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Call it with a name and a function: a folder that the first worker to ask for it makes, and all read."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        with (place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / name).exists():
                make(place / f"{name}.part")
                (place / f"{name}.part").rename(place / name)
        return place / name

    return folder


@pytest.fixture(scope="session")
def small_base(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The folder of a policy of small sizes, trained for a moment: it answers something, and draws blurs."""
    from lvrpo.config import load_config
    from lvrpo.data.scenes import web_corpus
    from lvrpo.training.pretrain import PretrainConfig, SupervisedState, initial_policy

    sizes = "policy={tower_width: 64, transformer: {width: 64, depth: 2, heads: 2, key_heads: 2, mlp_width: 128}}"
    rows = "batch={generate: 8, caption: 4, question: 32, edit: 4, reason: 8}"
    corpus = "corpus={scenes: 100, edits: 40, reasons: 40}"
    config = load_config(PretrainConfig, None, [sizes, rows, corpus, "steps=150", "device=cpu"])

    def make(folder: Path) -> None:
        trainer = SupervisedState(config, initial_policy(config), web_corpus(config.corpus))
        for _ in range(config.steps):
            trainer.train_step()
        trainer.average.save(folder)

    return made_once("small", make)
