"""The policy computes what MMaDA's own code computes.

vectors/mmada.safetensors holds inputs and outputs of the public code (Gen-Verse/MMaDA at 3cdb870, on a CPU, float32) on
a small checkpoint whose weights are ``named_weight`` of their published names; tokenizer.json is that of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from named_weights import named_weight
from safetensors.torch import load_file, save_file

from lvrpo.policies.base import Sampling
from lvrpo.policies.magvit.autoencoder import Magvit, MagvitConfig
from lvrpo.policies.magvit.checkpoint import read_settings, save_autoencoder
from lvrpo.policies.mmada.checkpoint import MmadaConfig, empty_transformer, stored_names
from lvrpo.policies.mmada.policy import MmadaPolicy
from lvrpo.types import MaskedSegment, MaskedTextSegment, Prompt, Trajectory

pytest.importorskip("transformers")

VECTORS = Path(__file__).parent / "vectors"
ABSOLUTE = 2e-5
IMAGE = torch.zeros(3, 32, 32)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return json.loads((VECTORS / "mmada.json").read_text())


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(VECTORS / "mmada.safetensors")


@pytest.fixture(scope="module")
def policy(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> MmadaPolicy:
    """Loaded from a folder in the published layout, whose tensors have the names of the public code."""
    folder, stored = tmp_path_factory.mktemp("published"), settings["mmada"]
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "tokenizer.json").write_bytes((VECTORS / "tokenizer.json").read_bytes())
    shapes = empty_transformer(read_settings(MmadaConfig, stored, folder), folder)
    names = stored_names(shapes)
    assert sorted(names.values()) == sorted(settings["names"])
    own = {theirs: named_weight(theirs, shapes.state_dict()[name].shape, 1) for name, theirs in names.items()}
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    once = (1, 1, 1, 1)
    sizes = MagvitConfig(
        ch=32,
        z_channels=6,
        encoder_ch_mult=once,
        encoder_num_res_blocks=once,
        decoder_ch_mult=once,
        decoder_num_res_blocks=once,
    )
    save_autoencoder(Magvit(sizes), folder)
    return MmadaPolicy.load(folder)


def drawn(text: str) -> Prompt:
    return Prompt("g", "generate", (text,), ("image",))


@torch.no_grad()
def test_rows_and_logits_of_drawings_are_theirs(
    policy: MmadaPolicy, settings: dict[str, Any], vectors: dict[str, torch.Tensor]
) -> None:
    """Both branches of two prompts, whose rows they pad on the left."""
    layout, theirs = policy.layout, vectors["t2i_ids"]
    image = theirs[:2, -17:-1]
    codes = torch.where(image == layout.mask, -1, image - layout.first_code)
    contexts = [policy.segment_context(drawn(text), (), "masked") for text in settings["prompts"]]
    captions = [*contexts, layout.caption([]), layout.caption([])]
    rows = [layout.drawing(own, c) for own, c in zip(captions, codes.tolist() * 2, strict=True)]
    assert rows == [row[mask == 1].tolist() for row, mask in zip(theirs, vectors["t2i_mask"], strict=True)]
    expected = vectors["t2i_logits"]
    assert torch.allclose(policy._code_logits(captions, codes.tolist() * 2), expected, atol=ABSOLUTE, rtol=0)
    given, free = expected.chunk(2)
    guided = policy.image_logits(contexts, codes, True, 1 + settings["guidance_scale"], "joint")
    assert torch.allclose(guided, 3 * given - 2 * free, atol=ABSOLUTE, rtol=0)


@torch.no_grad()
def test_log_probs_of_their_own_drawings_are_theirs(
    policy: MmadaPolicy, settings: dict[str, Any], vectors: dict[str, torch.Tensor]
) -> None:
    """Two images that their sampler made, with the step at which it fixed each token."""
    trajectories, one = [], torch.ones(1, 16, dtype=torch.bool)
    for b, text in enumerate(settings["prompts"]):
        tokens, steps = vectors["path_tokens"][b], vectors["path_steps"][b]
        scale = 1 + settings["guidance_scale"]
        segment = MaskedSegment(tokens, steps, one, torch.zeros(1, 16), "path", 1.0, scale, IMAGE)
        trajectories.append(Trajectory(drawn(text), 0, (segment,), 0))
    found = torch.cat([rows[0].logprobs for rows in policy.logprobs(trajectories)])
    assert torch.allclose(found, vectors["path_logprobs"], atol=ABSOLUTE, rtol=0)


@pytest.mark.parametrize(("name", "length", "block", "tokens"), [("mmu", 16, 8, 2), ("lm", 12, 6, 1)])
@torch.no_grad()
def test_questions_and_greedy_answers_are_theirs(
    policy: MmadaPolicy,
    settings: dict[str, Any],
    vectors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    length: int,
    block: int,
    tokens: int,
) -> None:
    """With an image and without one. Their sampler also writes image tokens, which a random model does."""
    monkeypatch.setattr(policy, "encode_image", lambda image: vectors["codes"])
    monkeypatch.setattr(policy, "text_tokens", torch.ones_like(policy.text_tokens))
    parts = (*([IMAGE] if name == "mmu" else []), settings["question"])
    row = policy.context_ids(parts)
    assert row == vectors[f"{name}_ids"].tolist()
    sampling = Sampling(
        group_size=1, max_new_tokens=length, temperature=0.0, block_length=block, tokens_per_step=tokens
    )
    (segment,) = policy._sample_text([row], [0], sampling)
    assert isinstance(segment, MaskedTextSegment)
    assert segment.decoded.tolist() == vectors[f"{name}_answer"].tolist()
    assert segment.reveal_steps.tolist() == vectors[f"{name}_steps"].tolist()
    (found,) = policy._score([row], [segment])
    assert torch.allclose(found.logprobs, vectors[f"{name}_logprobs"], atol=ABSOLUTE, rtol=0)
