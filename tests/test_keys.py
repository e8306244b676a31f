"""Keys are checked without torch, and as the configuration classes check them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lvrpo.commands.keys import key_class
from lvrpo.commands.train_options import KINDS
from lvrpo.config import Config, load_config, require_known_keys, shipped_configs
from lvrpo.errors import InputError
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig

RUNS: tuple[tuple[type[Config], str], ...] = ((TrainConfig, "lvrpo"), (PretrainConfig, "pretrain"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "quickstart", "stepz=3"],
        ["check", "quickstart", "stepz=3"],
        ["pretrain", "pretrain", "stepz=3"],
        ["train", "nope"],
        ["train", "pretrain"],
        ["train", "quickstart", "--stepz"],
        ["quickstart", "--config", "pretrain"],
        *(["init", kind, "folder", "widht=3"] for kind in KINDS),
    ],
)
def test_a_typing_error_is_answered_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from lvrpo.cli import main; print(main(sys.argv[1:]), sorted({'torch', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert done.stderr.startswith("error: ")


def unknown_keys(cls: type[Config], prefix: str = "") -> list[str]:
    """Misspelled keys of every section, those of another kind, and renamed ones."""
    found = [f"{prefix}{hint}" for hint in cls.hints if "=" not in hint]
    for name, field in cls.model_fields.items():
        found.append(f"{prefix}{name}x")
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Config):
                found += unknown_keys(part, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize(("cls", "config"), RUNS)
def test_unknown_keys_are_refused_in_the_words_of_the_class(cls: type[Config], config: str) -> None:
    path, keys = shipped_configs()[config], key_class(cls.__name__)
    require_known_keys(keys, path, [])
    names = unknown_keys(cls)
    assert len(names) > 50
    for name in names:
        with pytest.raises(InputError) as expected:
            load_config(cls, path, [f"{name}=1"])
        if (
            "unknown key" in str(expected.value)
            or ", not of " in str(expected.value)
            or "called" in str(expected.value)
        ):
            with pytest.raises(InputError) as found:
                require_known_keys(keys, path, [f"{name}=1"])
            assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "override", ["rewards=[{nam: 1}]", "flow={kind: dpo, bet: 1}", "steps={a: 1}", "text.kind=nope"]
)
def test_values_are_left_to_the_class(override: str) -> None:
    path = shipped_configs()["quickstart"]
    with pytest.raises(InputError) as expected:
        load_config(TrainConfig, path, [override])
    if "unknown key" not in str(expected.value):
        require_known_keys(key_class("TrainConfig"), path, [override])
        return
    with pytest.raises(InputError) as found:
        require_known_keys(key_class("TrainConfig"), path, [override])
    assert str(found.value) == str(expected.value)
