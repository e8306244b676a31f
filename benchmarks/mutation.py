"""Mutation testing: small errors are written into the source, and each must fail the tests of its own module.

    pip install cosmic-ray
    python benchmarks/mutation.py                           a sample of every module of TESTS
    python benchmarks/mutation.py --count 400 --seed 1      another, larger one
    python benchmarks/mutation.py algorithms/kl.py --all    every error of one module

cosmic-ray knows what an error is: another operator, number, comparison or boolean, a loop that never runs, a decorator
that is gone. An error is drawn in two steps, a place of the source and then what to put there, so that a place with
many choices counts once. What nothing runs, and what only guards against errors of our own, is left alone.

The working tree is copied first and never changed. Every error has a process of its own, forked from one that has
imported PyTorch; its processor time is limited to several times what the tests take without an error. Prints the
survivors; exits with 1 where fewer than 95 % were noticed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("src/lvrpo")
LOSSES = (
    "training/test_update.py",
    "training/test_gradients.py",
    "training/test_drawn_tokens.py",
    "policies/bagel/test_update.py",
    "training/test_methods.py",
)
TESTS: dict[str, tuple[str, ...]] = {
    "algorithms/advantages.py": ("algorithms/test_advantages.py",),
    "algorithms/audit.py": ("algorithms/test_audit.py",),
    "algorithms/gradients.py": ("algorithms/test_gradients.py",),
    "algorithms/kl.py": ("algorithms/test_kl.py",),
    "algorithms/nft.py": ("algorithms/test_nft.py",),
    "algorithms/objectives.py": ("algorithms/test_objectives.py",),
    "algorithms/preferences.py": ("algorithms/test_preferences.py",),
    "algorithms/representation.py": ("algorithms/test_representation.py",),
    "algorithms/selection.py": ("algorithms/test_selection.py",),
    "sampling/flow_sde.py": ("sampling/test_flow_sde.py",),
    "sampling/guidance.py": ("sampling/test_guidance.py",),
    "sampling/masked.py": ("sampling/test_masked.py",),
    "sampling/seeds.py": ("sampling/test_seeds.py",),
    "sampling/solvers.py": ("sampling/test_solvers.py",),
    "sampling/timesteps.py": ("sampling/test_timesteps.py",),
    "sampling/tokens.py": ("sampling/test_tokens.py",),
    "training/losses/__init__.py": LOSSES,
    "training/losses/awm.py": LOSSES,
    "training/losses/base.py": LOSSES,
    "training/losses/best_of.py": LOSSES,
    "training/losses/dpo.py": LOSSES,
    "training/losses/flow.py": LOSSES,
    "training/losses/flow_grpo.py": LOSSES,
    "training/losses/grpo.py": LOSSES,
    "training/losses/nft.py": LOSSES,
    "training/losses/tokens.py": LOSSES,
    "training/checkpoint.py": ("test_weights.py", "training/test_checkpoint.py"),
    "distributed/checkpoint.py": ("test_distributed.py", "training/test_checkpoint.py"),
}
"""The modules, and the test files that must notice an error in them."""
EQUIVALENT = {
    ("algorithms/objectives.py", ".clamp(min= 0)"): "0 / 0 of a row without tokens is masked, and detached before that",
    ("sampling/tokens.py", "forbidden.ndim > 0:"): "a mask of all rows is expanded to each of them",
    ("sampling/tokens.py", ".cumsum(dim=1)"): "the last dimension of logits (B, V)",
    ("sampling/tokens.py", "OTHER_PART_BYTES = 256 <<"): "the same bits in parts of any size",
}
"""Errors that change nothing, by what stands in the changed line, and why; they are not drawn."""
ENOUGH = 0.95
PATIENCE, AT_LEAST_S = 5, 30
"""An error that makes the tests take so many times as long, and so many seconds, is noticed."""
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
HEAVY = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "scipy.stats", "pydantic")
HEAVY += ("hypothesis", "hypothesis.strategies", "jaxtyping", "beartype", "tokenizers", "safetensors.torch", "yaml")
"""What is imported once, before the forks."""


@dataclass(frozen=True)
class Mutant:
    """One error."""

    module: str
    line: int
    operator: str
    occurrence: int
    code: str
    """The whole module with the error."""

    def __str__(self) -> str:
        old = (ROOT / SOURCE / self.module).read_text(encoding="utf-8").splitlines()
        changed = list(difflib.unified_diff(old, self.code.splitlines(), n=0, lineterm=""))[3:]
        return "\n".join([f"{self.module}:{self.line} {self.operator}", *changed])


def is_spared(node: parso.tree.NodeOrLeaf, operator: str) -> bool:
    """Whether an error would do nothing at run time, or switches off what only guards against errors of our own.

    Annotations and ``if TYPE_CHECKING``; an order between names, of which any two differ; ``assert``, ``strict=`` of a
    zip, ``frozen=`` of a dataclass and decorators of abstract methods.
    """
    around = [node] if isinstance(node, parso.tree.BaseNode) else [node.parent] if node.parent is not None else []
    beside = [part.type for whole in around for part in whole.children]
    if (
        "string" in beside
        and operator.startswith("ReplaceComparison")
        and operator.endswith(("Lt", "LtE", "Gt", "GtE"))
    ):
        return True
    if node.type == "decorator" and node.get_code().strip() in ("@abstractmethod", "@override"):
        return True
    child: parso.tree.NodeOrLeaf | None = node
    while child is not None and (parent := child.parent) is not None:
        if parent.type == "annassign" and child is parent.children[1]:
            return True
        if parent.type == "tfpdef" and child is parent.children[-1]:
            return True
        if parent.type == "funcdef" and child is parent.annotation:
            return True
        if child.type == "argument" and child.children[0].get_code().strip() in ("strict", "frozen"):
            return True
        if child.type == "if_stmt" and child.children[1].get_code().strip() == "TYPE_CHECKING":
            return True
        if child.type == "assert_stmt":
            return True
        child = parent
    return False


def places(module: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """The places of a module where cosmic-ray would put an error, each with (operator, which of its occurrences)."""
    tree = get_ast((ROOT / SOURCE / module).read_text(encoding="utf-8"))
    provider, found = OperatorProvider(), {}
    for name in provider:
        if provider[name].arguments():
            continue
        operator, occurrence = provider[name](), 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                if not is_spared(node, name):
                    found.setdefault(start, []).append((name, occurrence))
                occurrence += 1
    return found


def mutant(module: str, place: tuple[int, int], operator: str, occurrence: int) -> Mutant | None:
    """None where the module does what it did, or Python does not take it."""
    code = (ROOT / SOURCE / module).read_text(encoding="utf-8")
    changed = mutate_code(code, OperatorProvider()[operator](), occurrence)
    if changed in (None, code):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(changed, module, "exec")
    except (SyntaxError, SyntaxWarning):
        return None
    found = Mutant(module, place[0], operator, occurrence, changed)
    return None if any(name == module and part in str(found) for name, part in EQUIVALENT) else found


def drawn(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """A place drawn from all places of all modules, then one of its errors; ``count`` of them."""
    generator, found = random.Random(seed), []
    every = [(module, place, errors) for module in modules for place, errors in sorted(places(module).items())]
    generator.shuffle(every)
    for module, place, errors in every:
        if len(found) < count and (made := mutant(module, place, *generator.choice(errors))) is not None:
            found.append(made)
    return sorted(found, key=lambda m: (m.module, m.line))


def everything(modules: list[str]) -> Iterator[Mutant]:
    """All errors of modules."""
    for module in modules:
        for place, errors in sorted(places(module).items()):
            yield from (made for error in errors if (made := mutant(module, place, *error)) is not None)


def tested(folder: Path, module: str, limit_s: float) -> tuple[bool, float]:
    """Whether the tests of a module pass in a fork of this process, and its processor time."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 1))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.path.insert(0, str(folder / "src"))
            # a compiled file is told by its second and size: one of an error would pass for the next
            sys.dont_write_bytecode = (folder / "compiled").exists()
            paths = [f"tests/{path}" for path in TESTS[module]]
            code = int(pytest.main([*OPTIONS, *paths]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 20 * limit_s  # for tests that wait for each other
    used = 0.0
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            used = usage.ru_utime + usage.ru_stime
            break
        if time.monotonic() > deadline:
            os.killpg(child, 9)
        time.sleep(0.02)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, used


def main() -> int:
    parser = argparse.ArgumentParser(description="mutation testing on a seeded sample")
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE", help="such as algorithms/kl.py")
    parser.add_argument("--count", type=int, default=200, help="errors in the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--all", action="store_true", help="every error instead of a sample")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    for name in HEAVY:
        importlib.import_module(name)
    mutants = list(everything(options.modules)) if options.all else drawn(options.modules, options.count, options.seed)
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("src", "tests", "examples", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        limits: dict[str, float] = {}
        for number, error in enumerate(mutants, 1):
            path = folder / SOURCE / error.module
            original = path.read_bytes()
            if error.module not in limits:
                passes, seconds = tested(folder, error.module, 600)
                assert passes, f"{error.module}: its tests fail without an error: {(folder / 'output').read_text()}"
                limits[error.module] = max(AT_LEAST_S, PATIENCE * seconds)
            path.write_text(error.code, encoding="utf-8")
            survived, seconds = tested(folder, error.module, limits[error.module])
            path.write_bytes(original)
            print(
                f"{number}/{len(mutants)} {'SURVIVED' if survived else 'noticed'} {seconds:.1f} s {error}", flush=True
            )
            survivors += [error] if survived else []
    noticed = 1 - len(survivors) / max(1, len(mutants))
    print(f"\n{len(mutants)} errors, {noticed:.1%} noticed; survivors:", *survivors, sep="\n")
    return int(noticed < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
