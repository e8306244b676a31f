"""Bad values that nobody wrote down: derived from the types and bounds of every field of every section, option and row.

A field that is added is covered by itself. Each case ends with exit code 2, one line that names the field, and a
directory as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel
from refusals import complaint, require_none
from wrong_values import Wrong, accepts, finite, placed, sections, subclasses, thinned, wrong_fields, yaml_text

from lvrpo.commands.keys import key_class
from lvrpo.config import Config
from lvrpo.data.rows import Row
from lvrpo.evaluation.reproduce.plan import Experiment
from lvrpo.policies.bagel.config import BagelConfig, BagelSettings
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.policies.bagel.encoders import ResizeRule, VitConfig
from lvrpo.policies.diffusers_flow.create import PipelineSizes
from lvrpo.policies.emu3.create import Emu3Sizes
from lvrpo.policies.janus.create import JanusSizes
from lvrpo.policies.janus.processor import ImageSettings
from lvrpo.policies.magvit.autoencoder import MagvitConfig
from lvrpo.policies.mmada.checkpoint import MmadaConfig
from lvrpo.policies.mmada.create import MmadaSizes
from lvrpo.policies.showo.checkpoint import ShowoConfig
from lvrpo.policies.showo.create import ShowoSizes
from lvrpo.policies.showo2.create import RandomShowo2
from lvrpo.policies.tiny import TinyConfig
from lvrpo.registry import resolve
from lvrpo.rewards import REWARDS
from lvrpo.rewards.endpoint import EndpointConfig
from lvrpo.rewards.questions import QuestionConfig
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig

EVERY = 7
"""Of the values that most types refuse, each field gets one of so many."""
Tree = dict[str, Any]
"""Any: what YAML or JSON may hold."""
Model = type[BaseModel]


@dataclass(frozen=True)
class Root:
    """A model, and the command that reads it from a file."""

    model: Model
    command: tuple[str, ...]
    file: str = "case.yaml"
    base: Tree = field(default_factory=dict)
    """What else the file holds. What comes after it cannot be done, so that what is accepted ends there."""
    around: Callable[[Tree], Tree] = lambda tree: tree
    """The whole file."""

    def can_hold(self, wrong: Wrong) -> bool:
        """Whether the value is still wrong in the file: JSON writes every key as a text."""
        if self.file == "case.yaml":
            return True
        read = json.loads(json.dumps(wrong.value))
        return read == wrong.value or not accepts(wrong.kind, read)

    def refuses(self, wrong: Wrong) -> str | None:
        """None, or how the command takes the case."""
        tree = self.around(placed(wrong, self.base))
        written = json.dumps(tree) if self.file.endswith(("json", "jsonl")) else yaml_text(tree)
        Path(self.file).write_text(written, encoding="utf-8")
        # JSON knows no nan, and a line of it is not read any further
        return complaint(self.command, wrong.names if finite(tree) or self.file == "case.yaml" else [self.file])


def in_reward(name: str, option: str | None = None) -> Callable[[Tree], Tree]:
    """The tree as the options of a reward, or as one of them."""
    return lambda tree: {
        "policy": "nowhere",
        "rewards": [{"name": name, "options": tree if option is None else {option: tree}}],
    }


TRAIN = ("train", "case.yaml", "--out", "new")
ASKED = {"task": "understand", "prompt": "what color is the circle ?", "images": ["red.png"], "answer": "red"}
ROOTS = {
    "train": Root(TrainConfig, TRAIN, base={"policy": "nowhere"}),
    "pretrain": Root(PretrainConfig, ("pretrain", "case.yaml", "--out", "new"), base={"init": "nowhere"}),
    "reproduce": Root(Experiment, ("reproduce", "case.yaml", "--list")),
    "split": Root(QuestionConfig, TRAIN, around=in_reward("self_vqa", "questions")),
    "endpoint": Root(EndpointConfig, TRAIN, around=in_reward("vlm_endpoint", "endpoint")),
    "rows": Root(Row, ("evaluate", "small", "--benchmark", "case.jsonl"), "case.jsonl", ASKED),
    "questions": Root(Row, ("ask", "small", "--questions", "case.jsonl"), "case.jsonl", ASKED),
    "prompts": Root(
        Row,
        ("generate", "small", "--prompts", "case.jsonl", "--out", "new"),
        "case.jsonl",
        {"task": "generate", "prompt": "a circle"},
    ),
    "model": Root(
        TinyConfig,
        ("ask", "model", "--image", "red.png", "what color is the circle ?"),
        "model/config.json",
        {"model_type": "lvrpo_tiny"},
    ),
}
BY_OVERRIDES: dict[str, tuple[Model, tuple[str, ...]]] = {
    "train": (TrainConfig, ("train", "seed.yaml", "policy=nowhere", "--out", "new")),
    "pretrain": (PretrainConfig, ("pretrain", "seed.yaml", "init=nowhere", "--out", "new")),
    "init": (BagelSizes, ("init", "bagel-tiny", "new")),
    "init janus": (JanusSizes, ("init", "janus-tiny", "new")),
    "init emu3": (Emu3Sizes, ("init", "emu3-tiny", "new")),
    "init showo": (ShowoSizes, ("init", "showo-tiny", "new")),
    "init mmada": (MmadaSizes, ("init", "mmada-tiny", "new")),
    "init sd3": (PipelineSizes, ("init", "sd3-tiny", "new")),
    "init showo2": (RandomShowo2, ("init", "showo2-tiny", "new")),
}
READ_OTHERWISE = {
    BagelConfig,
    BagelSettings,
    ImageSettings,
    MagvitConfig,
    MmadaConfig,
    ResizeRule,
    ShowoConfig,
    VitConfig,
}
"""Made of the files of a model, whose keys are not these fields (tests of their mistakes stand there)."""


@pytest.fixture(scope="module")
def folder(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name."""
    folder = tmp_path_factory.mktemp("generated")
    for name in ("small", "model"):
        shutil.copytree(small_base, folder / name)
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "seed.yaml").write_text("seed: 0\n")
    return folder


def require_refusals(cases: list[Wrong], refuses: Callable[[Wrong], str | None], model: Model) -> None:
    """Fails where a case is not refused, and where a field has none."""
    require_none({f"{'.'.join(case.path)}={case.value!r:.60}": refuses(case) for case in cases})
    fields = {f"{section.__name__}.{name}" for section in sections(model) for name in section.model_fields}
    assert {case.owner for case in cases} >= fields


@pytest.mark.parametrize("name", ROOTS)
def test_every_field_of_a_file_refuses_what_is_outside_of_its_type(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    root = ROOTS[name]
    cases = [case for case in thinned(wrong_fields(root.model), EVERY) if root.can_hold(case)]
    require_refusals(cases, root.refuses, root.model)


@pytest.mark.parametrize("name", REWARDS)
def test_every_option_of_a_reward_refuses_what_is_outside_of_its_type(name: str) -> None:
    base = {"endpoint": {"base_url": "http://host/v1", "model": "m"}} if name == "vlm_endpoint" else {}
    root = Root(resolve("reward", name, REWARDS), TRAIN, base=base, around=in_reward(name))
    require_refusals(thinned(wrong_fields(root.model), EVERY), root.refuses, root.model)


@pytest.mark.parametrize("name", BY_OVERRIDES)
def test_every_override_refuses_what_is_outside_of_its_type(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    model, command = BY_OVERRIDES[name]

    def refused(wrong: Wrong) -> str | None:
        assigned = (*wrong.beside.items(), (wrong.path, wrong.value))
        return complaint([*command, *(f"{'.'.join(path)}={yaml_text(v)}" for path, v in assigned)], wrong.names)

    cases = [case for case in thinned(wrong_fields(model), 2 * EVERY) if not becomes_text(case)]
    require_none({f"{'.'.join(case.path)}={case.value!r:.60}": refused(case) for case in cases})


def becomes_text(case: Wrong) -> bool:
    """Whether the command line takes a value for a text, as a name may be 2024."""
    return not isinstance(case.value, str) and accepts(case.kind, "word")


def test_every_section_is_in_a_file_of_some_command() -> None:
    reached = {section for root in ROOTS.values() for section in sections(root.model)}
    reached |= {section for model, _ in BY_OVERRIDES.values() for section in sections(model)}
    reached |= {section for name in REWARDS for section in sections(resolve("reward", name, REWARDS))}
    known = {
        cls
        for cls in subclasses(Config)
        if cls.model_fields and not cls.__subclasses__() and cls.__module__.startswith("lvrpo.")
        if cls.__module__ != key_class.__module__  # the names of keys alone
    }
    assert known - reached == READ_OTHERWISE
    cases = sum(len(thinned(wrong_fields(root.model), EVERY)) for root in ROOTS.values())
    assert cases > 3000
