"""Every number of a configuration and of the command line has an upper end, found before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig

Settings = type[TrainConfig] | type[PretrainConfig] | type[BagelSizes]
TOO_MUCH = [
    ("rollout.num_steps=10000000000", "rollout.num_steps=10000000000: must be <= 1000"),
    ("rollout.group_size=1000000", "rollout.group_size=1000000: must be <= 4096"),
    ("rollout.max_new_tokens=1000000000", "rollout.max_new_tokens=1000000000: must be <= 100000"),
    ("rollout.temperature=1e308", "rollout.temperature=1e+308: must be <= 100"),
    ("rollout.temperature=101", "rollout.temperature=101: must be <= 100"),
    ("rollout.guidance_scale=1001", "rollout.guidance_scale=1001: must be <= 1000"),
    ("rollout.image_size=[99999, 32]", "rollout.image_size.0=99999: must be <= 8192"),
    ("rollout.image_size=[0, 32]", "rollout.image_size.0=0: must be >= 1"),
    ("data.prompts_per_step={generate: 9999999999}", "data.prompts_per_step.generate=9999999999: must be <= 100000"),
    ("validation.prompts={generate: 9999999999}", "validation.prompts.generate=9999999999: must be <= 100000"),
    ("steps=9999999999999999999999", "steps=9999999999999999999999: must be <= 10000000"),
    ("steps=999999999", "steps=999999999: must be <= 10000000"),
    ("adapter={rank: 1000000}", "adapter.rank=1000000: must be <= 4096"),
    ("threads=1000000000", "threads=1000000000: must be <= 1024"),
    ("optimizer.betas=[1, 2]", "optimizer.betas.0=1: must be < 1"),
    ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas.0=-0.1: must be >= 0"),
    ("seed=9999999999999999999999", "seed=9999999999999999999999: numbers must lie between -9.22e+18 and 9.22e+18"),
    ("task_weights={generate: 1e300}", "task_weights: generate=1e+300: numbers must lie between"),
    ("flow.timesteps_per_sample=1000000", "flow.timesteps_per_sample=1000000: must be <= 1000"),
]


@pytest.mark.parametrize(("override", "message"), TOO_MUCH)
def test_too_much_is_one_line(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(TrainConfig, None, [override])
    assert str(caught.value).startswith(message)


def numbers(tree: Any, path: str = "") -> Iterator[str]:
    """Where numbers stand in a resolved configuration."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path


@pytest.mark.parametrize("cls", [TrainConfig, PretrainConfig, BagelSizes])
@pytest.mark.parametrize("number", ["1" + "0" * 30, "-1" + "0" * 30, "1e300", ".inf", ".nan"])
def test_no_number_is_without_an_end(cls: Settings, number: str) -> None:
    found = list(numbers(load_config(cls).model_dump(mode="json")))
    assert len(found) > 10
    for path in found:
        with pytest.raises(InputError) as caught:
            load_config(cls, None, [f"{path}={number}"])
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guidance", "1e308"), "--guidance: 1e308: must be a number from 1 to 1000"),
        (("--guidance", "nan"), "must be a number from 1 to 1000"),
        (("--num-steps", "10000000000"), "--num-steps: 10000000000: must be <= 1000"),
        (("--threads", "1000000000"), "--threads: 1000000000: must be <= 1024"),
        (("--count", "1000000000"), "--count: 1000000000: must be <= 10000"),
        (("--max-new-tokens", "1000000000"), "must be <= 100000"),
        (("--size", "100000x100000"), "sides must be <= 8192"),
        (("--seed", "9" * 30), "must be >= 0 and < 2^63"),
        (("--seed", "9" * 5000), "must be a whole number"),
    ],
)
def test_options_of_the_command_line(
    arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "tiny", "--prompt", "a red circle", "--out", "new", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert list(Path().iterdir()) == []
