from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.evaluation.mutual_information import infonce, measure_information
from lvrpo.policies.loading import load_policy


def gaussians(rho: float, d: int = 2, n: int = 6144, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x and y with correlation rho in each of d dimensions, to fit and to measure: I = -d/2 log(1 - rho^2)."""
    noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    x, y = noise[0], rho * noise[0] + (1 - rho**2) ** 0.5 * noise[1]
    half = n * 2 // 3
    return x[:half], y[:half], x[half:], y[half:]


@pytest.mark.parametrize(("rho", "low", "high"), [(0.0, -0.02, 0.02), (0.5, 0.22, 0.32), (0.8, 0.9, 1.09)])
def test_gaussians_of_known_information(rho: float, low: float, high: float) -> None:
    """0, .288 and 1.022 nats; the bound lies below the truth, up to chance."""
    found = infonce(*gaussians(rho), negatives=128)
    assert low < found.bound.score < high
    truth = -math.log(1 - rho**2)
    assert found.bound.low < truth + 0.02
    assert found.ceiling == pytest.approx(math.log(128))
    assert len(found.values) == 2048


def test_the_ceiling_is_never_exceeded() -> None:
    """15.6 nats, of which batches of 16 can show 2.77."""
    found = infonce(*gaussians(0.99, d=8, n=1536), negatives=16)
    assert 2.4 < found.bound.score <= found.ceiling
    assert max(found.values) <= found.ceiling + 1e-6


def test_the_same_seed_gives_the_same_bits_and_a_difference_is_paired() -> None:
    data = gaussians(0.5, n=1536)
    one, two = infonce(*data, negatives=32, seed=1), infonce(*data, negatives=32, seed=1)
    assert one == two
    more = infonce(*gaussians(0.9, n=1536), negatives=32)
    assert one.gain(more).low > 0
    assert one.gain(one).score == 0


def test_shuffled_pairs_share_nothing() -> None:
    x, y, test_x, test_y = gaussians(0.9)
    found = infonce(x, y, test_x, test_y[torch.randperm(len(test_y), generator=torch.Generator().manual_seed(1))])
    assert found.bound.score < 0


def test_too_few_pairs_and_no_states_are_one_line() -> None:
    with pytest.raises(InputError, match="are 3 batches of 16"):
        infonce(*gaussians(0.5, n=144), negatives=16)
    policy = load_policy("tiny")
    with pytest.raises(InputError, match="pairs=20, negatives=16"):
        measure_information(policy, pairs=20, negatives=16)
    with pytest.raises(InputError, match="object gives no hidden states"):
        measure_information(object(), pairs=64, negatives=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["see_and_plan", "name_and_form"])
def test_the_shipped_base_knows_more_than_a_random_one(direction: str) -> None:
    base = load_policy("tiny").make_reference()
    lost = base.make_reference()
    with torch.no_grad():
        for p in lost.parameters():  # type: ignore[attr-defined]  # a module
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    known = measure_information(base, direction, pairs=192, negatives=32)  # type: ignore[arg-type]
    random = measure_information(lost, direction, pairs=192, negatives=32)  # type: ignore[arg-type]
    assert random.gain(known).low > 0
    assert known.bound.score > 0.5


def test_the_command_compares_a_runs_start_with_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    base = load_policy("tiny")
    for folder in ("run/start", "run/checkpoints/step_000001"):
        base.save(Path(folder))
    Path("run/checkpoints/step_000001/checkpoint.json").write_text("{}")
    Path("run/config.yaml").write_text("")
    arguments = ["information", "run", "--pairs", "64", "--negatives", "16", "--json", "out.json"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "difference: +0.000 [+0.000, +0.000]" in printed
    assert "log 16 = 2.773" in printed
    numbers = json.loads(Path("out.json").read_text())["information"]["see_and_plan"]
    assert numbers["before"] == numbers["after"]
    assert numbers["difference"]["score"] == 0
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
