"""Resolves names to objects: an entry of a plain table, or user code that has been allowed.

A name outside the table, ``my_package.module:Name``, imports and runs user code. This happens only here, and only for
packages that the user has allowed: on the command line, in the CONFIG file of the command, or by ``allow_code`` from
Python. Downloaded files (a run, a model) cannot allow code.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from lvrpo.errors import InputError, LvrpoError, describe_error, nearest

ANY = "*"
"""Allows every package for names of a configuration; names in a model's folder need their package allowed by name."""

_allowed: set[str] = set()


def allow_code(packages: Iterable[str]) -> None:
    """Allows names of these packages, modules or ``.py`` files outside the tables; ``ANY``: all packages.

    ``my_package`` allows its modules, ``my_package.module`` that module and its submodules. Raises InputError for an
    invalid package name.
    """
    for package in packages:
        if package.endswith(".py"):
            _allowed.add(os.path.abspath(package))
            continue
        if package != ANY and not _is_dotted_name(package):
            raise InputError(
                f"allow_code={package!r}: must be the name of a package, such as my_package, or a file, such as "
                "./my_rewards.py"
            )
        _allowed.add(package)


def allowed_code() -> frozenset[str]:
    """The allowed packages and files, to pass to ``allow_code`` in a subprocess."""
    return frozenset(_allowed)


@contextmanager
def isolated_permissions() -> Iterator[None]:
    """Starts with nothing allowed and restores the previous permissions on exit."""
    before = set(_allowed)
    _allowed.clear()
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)


def resolve(
    kind: str,
    name: str,
    table: Mapping[str, Any],
    methods: Sequence[str] = (),
    from_model: bool = False,
    adapt: Callable[[Any], Any] = lambda found: found,
) -> Any:
    """The object called ``name``: an entry of ``table``, or an allowed ``my_package.module:Name`` or ``FILE.py:Name``.

    A table entry is the object or a string ``package.module:Attribute``, imported lazily. ``kind``: the noun for error
    messages ("reward", "policy"). An object outside the table must be a class with these ``methods``, or a function
    whose attribute ``makes`` is such a class; it is not called here. ``from_model``: the name is from a model's folder,
    so its package must be allowed by name. ``adapt``: converts the imported object before its methods are checked.
    Raises InputError for an unknown name, with suggestions, and for code that is not allowed. Any: the table decides.
    """
    if name in table:
        entry = table[name]
        return _import(kind, entry) if isinstance(entry, str) else entry
    if is_file(name) and not from_model:
        _require_file_allowed(kind, name)
        found = adapt(_attribute(kind, name, _load_file(kind, name)))
        _require_methods(kind, name, found, methods)
        return found
    if ":" in name:
        _require_allowed(kind, name, from_model)
        found = adapt(_import(kind, name))
        _require_methods(kind, name, found, methods)
        return found
    near = f"{name}:NAME" if name.endswith(".py") else nearest(name, table, 0.5)
    hint = f"did you mean {near}? " if near else ""
    raise InputError(
        f"{kind} {name!r}: unknown: {hint}there are {', '.join(sorted(table)) or 'none'}; "
        "your own is given as my_package.module:Name"
    )


def is_file(name: str) -> bool:
    """Whether a name is ``FILE.py:Name``."""
    return name.rpartition(":")[0].endswith(".py")


def _require_file_allowed(kind: str, name: str) -> None:
    file = name.rpartition(":")[0]
    if not _allowed & {ANY, os.path.abspath(file)}:
        raise InputError(
            f"{kind} {name!r}: is code of a file, not of lvrpo: if you trust it, add --allow-code, or allow_code: "
            f"[./{os.path.basename(file)}] to the file that you name as CONFIG (in a run or in a file that is extended "
            "it does not count)"
        )


def _load_file(kind: str, name: str) -> ModuleType:
    """The module of a file, executed once per process."""
    path = os.path.abspath(name.rpartition(":")[0])
    title = f"lvrpo_file_{hashlib.blake2b(path.encode(), digest_size=8).hexdigest()}"
    if title in sys.modules:
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise InputError(f"{kind} {name!r}: no file {path}: a name that begins with ./ is relative to the YAML file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[title]
        if isinstance(error, Exception):
            where = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else path
            raise InputError(f"{kind} {name!r}: {where}: {type(error).__name__}: {error}: correct the file") from error
        raise
    return module


def _require_allowed(kind: str, name: str, from_model: bool) -> None:
    module = name.partition(":")[0]
    if not _is_dotted_name(module):
        raise InputError(f"{kind} {name!r}: write it as my_package.module:Name")
    parts = module.split(".")
    package = parts[0]
    if package in sys.stdlib_module_names:
        raise InputError(f"{kind} {name!r}: {package} is part of Python and holds no {kind}: name a module of your own")
    covering = {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)} | (set() if from_model else {ANY})
    if not _allowed & covering:
        if from_model:
            raise InputError(
                f"{kind} {name!r}: is code of {package}, not of lvrpo, and a model's folder cannot allow it: if you "
                f"trust {package}, add --allow-code={package}"
            )
        raise InputError(
            f"{kind} {name!r}: is code of {package}, not of lvrpo: if you trust it, add --allow-code, or "
            f"allow_code: [{package}] to the file that you name as CONFIG (in a run or in a file that is extended it "
            "does not count)"
        )


def _require_methods(kind: str, name: str, found: Any, methods: Sequence[str]) -> None:
    if not methods:
        return
    cls = found if isinstance(found, type) else getattr(found, "makes", None)  # set by lvrpo.rewards.function
    if not isinstance(cls, type):
        raise InputError(f"{kind} {name!r}: is a {type(found).__name__}, not a class: name a class of a {kind}")
    for method in methods:
        defined = any(method in vars(base) for base in cls.__mro__)  # hasattr would find __call__ of the metaclass
        if not defined or not callable(getattr(cls, method)):
            raise InputError(
                f"{kind} {name!r}: has no method {method!r}: a {kind} has {' and '.join(map(repr, methods))}"
            )


def _is_dotted_name(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _import(kind: str, target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    if not (_is_dotted_name(module_name) and _is_dotted_name(attribute)):
        raise InputError(f"{kind} {target!r}: write it as my_package.module:Name")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            beside = f"./{module_name}.py:{attribute}" if os.path.isfile(f"{module_name}.py") else ""
            remedy = f"write {beside}" if beside else "install it or put its folder on PYTHONPATH"
            raise InputError(f"{kind} {target!r}: no module {missing!r}: {remedy}") from None
        raise InputError(
            f"{kind} {target!r}: needs the package {missing!r}: install it with pip install {missing.partition('.')[0]}"
        ) from None
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        message = describe_error(error)
        raise InputError(f"{kind} {target!r}: {module_name} cannot be imported: {message}: correct it") from error
    return _attribute(kind, target, found)


def _attribute(kind: str, target: str, found: Any) -> Any:
    module_name, _, attribute = target.rpartition(":")
    for part in attribute.split("."):
        try:
            found = getattr(found, part)  # user-specified attribute
        except AttributeError:
            near = nearest(part, dir(found))
            hint = f"did you mean {near}?" if near else f"name something that {module_name} defines"
            raise InputError(f"{kind} {target!r}: {module_name} has no {part!r}: {hint}") from None
    return found
