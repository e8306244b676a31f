"""Every tensor of the reference vectors, within 2e-5 of its largest value; integers exactly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.policies.bagel.config import BagelSettings
from lvrpo.policies.bagel.encoders import ResizeRule
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.flow import Guidance
from lvrpo.policies.mot import flow_sampler

EXCERPT = Path(__file__).parent / "vectors" / "excerpt.xz"
RULES = {
    "vae_1024_512_16": (ResizeRule(max_side=1024, min_side=512, stride=16), 1),
    "vit_980_224_14": (ResizeRule(max_side=980, min_side=224, stride=14), 1),
    "vit_980_378_14_maxpix2007040": (ResizeRule(max_side=980, min_side=378, stride=14, max_pixels=2_007_040), 1),
    "vit_980_378_14_maxpix2007040_imgnum8": (
        ResizeRule(max_side=980, min_side=378, stride=14, max_pixels=2_007_040),
        8,
    ),
}


@pytest.mark.parametrize("section", ["images", "text", "understanding", "velocities", "trajectories", "autoencoder"])
def test_section(section: str, parity: Any, report: Callable[..., None]) -> None:
    report(section, getattr(parity, section)())


@pytest.mark.parametrize("shift", [1, 4])
def test_training_step(shift: int, parity: Any, report: Callable[..., None]) -> None:
    if not parity.whole and shift != 1:
        pytest.skip("the excerpt has shift 1 alone: name the whole set in LVRPO_BAGEL_VECTORS")
    report(f"training, shift {shift}", parity.training(shift))


@torch.no_grad()
def test_bfloat16(parity: Any, vectors: Path, settings: BagelSettings) -> None:
    """Relative L2 distance to the float32 reference: what the published precision measures, and not zero."""
    device = parity.policy.device
    parity.policy = BagelPolicy.load(vectors / "checkpoint", device, torch.bfloat16, settings=settings)
    ref, runner = parity.vectors("a_text"), parity.policy.runner
    hidden = runner.run([runner.row((parity.meta["a_text"]["prompt"],), False)], runner.transformer.empty_cache(1))
    logits = parity.policy.encoders.text_logits(hidden.understanding)
    assert logits.dtype == torch.bfloat16
    if "prefill_logits" in ref:
        assert 1e-4 < distance(logits, ref["prefill_logits"]) < 1e-2
    assert parity.whole == ("prefill_logits" in ref)
    ref = parity.vectors("c_flow")
    for tag in sorted(name.removesuffix("_x_t") for name in ref if name.endswith("_x_t")):
        scenario, time = tag.split("_t", 1)
        grid, caches = parity.scenario(scenario)
        x_t, t = ref[f"{tag}_x_t"][None], torch.tensor(float(time), device=device)
        v = flow_sampler.velocity(runner, caches.full, x_t, t[None], grid)[0]
        assert v.dtype == torch.float32
        assert 1e-4 < distance(v, ref[f"{tag}_v_cond"]) < 2e-2
        guidance = Guidance(4.0, 2.0, "text_channel")
        guided = flow_sampler.guided_velocity(runner, caches, x_t, t, guidance, grid)[0]
        assert distance(guided, ref[f"{tag}_cfg_text4_img2_text_channel"]) < 6e-2
    ref = parity.vectors("d_traj")
    for name in parity.meta["d_traj"]:
        sampling, grid, caches = parity.trajectory(name)
        drawn = flow_sampler.integrate(runner, caches, sampling, ref[f"{name}_noise"][None], None, grid)
        assert drawn.latents.dtype == torch.float32
        seen = parity.policy.encoders.decode_latents(drawn.latents, grid)[0]
        reference = ref[f"{name}_decoded_uint8"].permute(2, 0, 1) / 255
        assert 1e-4 < distance(seen, reference) < 3e-2


def distance(got: torch.Tensor, ref: torch.Tensor) -> float:
    got, ref = got.float().cpu(), ref.cpu()
    print(float((got - ref).norm() / ref.norm()))
    return float((got - ref).norm() / ref.norm())


def test_rule_for_sizes(parity: Any) -> None:
    rules = RULES | {"vae_set": (parity.policy.config.settings.latent_resize, 1)}
    for row in parity.meta["resize_table"]:
        for name, (rule, images) in rules.items():
            if row[name] is not None:
                assert list(rule.size(*row["in_wh"], images)) == row[name], (name, row)


def test_tokens(parity: Any) -> None:
    words, special = parity.policy.tokenizer, parity.meta["special_token_ids"]
    for row in parity.meta["tokenizer"]:
        assert words.encode(row["text"]) == row["ids"]
        assert words.decode(row["ids"]) == row["text"]
    assert words.bos_id == special["bos_token_id"]
    assert words.eos_id == special["eos_token_id"]
    assert words.image_start_id == special["start_of_image"]
    assert words.image_end_id == special["end_of_image"]


def test_dropped_conditions(parity: Any) -> None:
    parity.dropped_conditions()


def test_the_excerpt_is_small_and_of_the_whole_set(parity: Any) -> None:
    assert EXCERPT.stat().st_size < 3_000_000
    if parity.whole:
        if not parity.known:
            pytest.skip(f"{parity.folder} is another set than the excerpt was cut from")
        command = [sys.executable, str(EXCERPT.with_name("pack.py")), str(parity.folder), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "tensors, all as in" in done.stdout
