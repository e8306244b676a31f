"""Bad inputs that nobody wrote down: derived from the types of every field and the kinds of every file.

A field that is added is covered by itself. Each case ends with exit code 2, one line that names the field or the file,
and a directory as it was.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, create_model
from wrong_values import Wrong, accepts, hints, members, placed, thinned, wrong_fields, yaml_text

from lvrpo.cli import main
from lvrpo.config import Config
from lvrpo.evaluation.reproduce.plan import Experiment
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.registry import resolve
from lvrpo.rewards import REWARDS
from lvrpo.rewards.endpoint import EndpointConfig
from lvrpo.rewards.questions import SplitConfig
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig

MOST_SECONDS = 10.0
"""Of one case."""
EVERY = 5
"""Of the values that most types refuse, each field gets one of so many."""
Tree = dict[str, Any]
"""Any: what YAML or JSON may hold."""


def complaint(arguments: Sequence[str], names: Sequence[str], folder: Path) -> str | None:
    """What is wrong with the way in which a command refuses its input; None where nothing is."""
    before, started = listing(folder), time.monotonic()
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
        code = main(arguments)
    seconds, lines = time.monotonic() - started, said.getvalue().splitlines()
    if code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or "(unexpected" in lines[0]:
        return f"exit code {code}: {lines}"
    if not any(name in lines[0] for name in names):
        return f"does not name {' or '.join(names)}: {lines}"
    if seconds > MOST_SECONDS:
        return f"took {seconds:.0f} s: {lines}"
    return None if listing(folder) == before else f"wrote: {listing(folder) ^ before}"


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """Names, sizes and times of everything below, links not followed."""
    found = [(path, path.lstat()) for path in folder.rglob("*")]
    return {(str(path), s.st_size if path.is_file() else 0, s.st_mtime_ns) for path, s in found}


def require_none(complaints: dict[str, str]) -> None:
    some = "\n".join(f"{case}\n    {said}" for case, said in list(complaints.items())[:40])
    assert not complaints, f"{len(complaints)} cases:\n{some}"


# --- configurations ---


@dataclass(frozen=True)
class Root:
    """A model, and the command that reads it from a file."""

    model: type[BaseModel]
    command: tuple[str, ...]
    """"{}" stands for the file."""
    around: Callable[[Tree], Tree] = lambda tree: tree
    """The whole file. What a command comes to after it cannot be done, so that whatever is accepted ends there."""


def in_reward(name: str, option: str | None = None) -> Callable[[Tree], Tree]:
    """The tree as the options of a reward, or as one of them."""
    return lambda tree: {
        "policy": "nowhere",
        "rewards": [{"name": name, "options": tree if option is None else {option: tree}}],
    }


TRAIN = ("train", "{}", "--out", "new")
ROOTS = {
    "train": Root(TrainConfig, TRAIN, lambda tree: {"policy": "nowhere", **tree}),
    "pretrain": Root(PretrainConfig, ("pretrain", "{}", "--out", "new"), lambda tree: {"init": "nowhere", **tree}),
    "reproduce": Root(Experiment, ("reproduce", "{}", "--list")),
    "split": Root(SplitConfig, TRAIN, in_reward("own_vqa", "split")),
    "endpoint": Root(EndpointConfig, TRAIN, in_reward("vlm_endpoint", "endpoint")),
}


def reward_options(name: str) -> type[BaseModel]:
    """The options of a reward as a model, from its signature."""
    made = resolve("reward", name, REWARDS)
    fields: dict[str, Any] = {
        option: (kind, ... if required else None) for option, (kind, required) in hints(made).items()
    }
    return create_model(f"options of {name}", **fields)


def refused_in_file(root: Root, wrong: Wrong) -> str | None:
    Path("case.yaml").write_text(yaml_text(root.around(placed(wrong))), encoding="utf-8")
    return complaint([part.format("case.yaml") for part in root.command], wrong.names, Path())


@pytest.mark.parametrize("name", ROOTS)
def test_every_field_of_a_file_refuses_what_is_outside_of_its_type(name: str) -> None:
    root = ROOTS[name]
    cases = thinned(wrong_fields(root.model), EVERY)
    found = {f"{'.'.join(case.path)}={case.value!r:.60}": refused_in_file(root, case) for case in cases}
    require_none({case: said for case, said in found.items() if said})
    assert {case.owner for case in cases} >= {f"{root.model.__name__}.{field}" for field in root.model.model_fields}


@pytest.mark.parametrize("name", REWARDS)
def test_every_option_of_a_reward_refuses_what_is_outside_of_its_type(name: str) -> None:
    root = Root(reward_options(name), TRAIN, in_reward(name))
    cases = thinned(wrong_fields(root.model), EVERY)
    found = {f"{'.'.join(case.path)}={case.value!r:.60}": refused_in_file(root, case) for case in cases}
    require_none({case: said for case, said in found.items() if said})
    assert {case.owner for case in cases} == {f"{root.model.__name__}.{field}" for field in root.model.model_fields}


def written(case: Wrong) -> list[str]:
    """The case as overrides."""
    return [f"{'.'.join(path)}={yaml_text(value)}" for path, value in (*case.beside.items(), (case.path, case.value))]
