"""The reference vectors: a small checkpoint in the published layout with inputs and outputs of the published model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bagel_parity import DEVICE, GATE, Errors, Parity, pack_script
from small_bagel import SMALL

from lvrpo.policies.bagel.config import BagelSettings
from lvrpo.policies.bagel.create import create_bagel
from lvrpo.policies.bagel.encoders import ResizeRule
from lvrpo.policies.bagel.policy import BagelPolicy

ROOT = Path(__file__).resolve().parents[3]
VECTORS = Path(os.environ.get("LVRPO_BAGEL_VECTORS", ROOT.parent / "shared" / "vectors" / "bagel"))


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole set where it is at hand, else the excerpt that lies in ``vectors/``."""
    if (VECTORS / "io" / "meta.json").is_file():
        return VECTORS
    if "LVRPO_BAGEL_VECTORS" in os.environ:
        pytest.fail(f"LVRPO_BAGEL_VECTORS={VECTORS}: holds no io/meta.json: name the folder of the reference vectors")
    return pack_script.unpack(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="session")
def settings(vectors: Path) -> BagelSettings:
    meta = json.loads((vectors / "io" / "meta.json").read_text())

    def rule(name: str) -> ResizeRule:
        longest, shortest, stride = meta[name]
        return ResizeRule(max_side=longest, min_side=shortest, stride=stride)

    return BagelSettings(latent_resize=rule("vae_transform"), read_resize=rule("vit_transform"))


@pytest.fixture
def parity(vectors: Path, settings: BagelSettings, monkeypatch: pytest.MonkeyPatch) -> Parity:
    # a card's convolutions round float32 to 10 bits unless told not to, which is above the gate
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    policy = BagelPolicy.load(vectors / "checkpoint", DEVICE, torch.float32, settings=settings)
    return Parity(vectors, policy, whole=vectors == VECTORS)


@pytest.fixture
def report() -> Callable[[str, Errors], None]:
    """Asserts the gate and prints the worst tensor (pytest -rP shows it)."""

    def check(section: str, errors: Errors) -> None:
        beyond = {name: value for name, value in errors.items() if not value <= GATE}  # nan is beyond
        worst = max(errors, key=lambda name: errors[name])
        print(f"{section}: {len(errors)} tensors, worst {errors[worst]:.1e} ({worst})")
        assert not beyond

    return check


@pytest.fixture(scope="session")
def small() -> BagelPolicy:
    """A random BAGEL without layers at zero, made here; shared by many tests: never change it."""
    policy = create_bagel(SMALL, ["a red circle and two blue squares, what color is it?"] * 9)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        for name, parameter in policy.named_parameters():
            if ".generation." in name:  # the experts start alike
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return policy


@pytest.fixture(scope="session")
def saved(small: BagelPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``small``; never change it."""
    folder = tmp_path_factory.mktemp("bagel") / "small"
    small.save(folder)
    return folder
