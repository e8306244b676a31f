"""The policy computes what Show-o's own code computes.

vectors/showo.safetensors holds inputs and outputs of the public code (showlab/Show-o at 45a5a2d, on a CPU, float32) on
a small checkpoint whose weights ``fill`` writes; tokenizer.json is that of this checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from named_weights import named_weight
from PIL import Image as PilImage
from safetensors.torch import load_file
from torch import nn

from lvrpo.policies.base import Sampling
from lvrpo.policies.magvit.autoencoder import Magvit, MagvitConfig
from lvrpo.policies.magvit.layout import square
from lvrpo.policies.showo.checkpoint import empty_transformer
from lvrpo.policies.showo.layout import ShowoLayout
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.sampling import masked_counts
from lvrpo.types import MaskedSegment, Prompt, TextSegment, Trajectory

transformers = pytest.importorskip("transformers")

VECTORS = Path(__file__).parent / "vectors"
ABSOLUTE = 2e-5


def fill(module: nn.Module, prefix: str = "") -> None:
    """Writes ``named_weight`` into the parameters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            center = float("norm" in name and name.endswith("weight"))
            parameter.copy_(named_weight(prefix + name, parameter.shape, center))


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return json.loads((VECTORS / "showo.json").read_text())


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(VECTORS / "showo.safetensors")


@pytest.fixture(scope="module")
def policy(settings: dict[str, Any]) -> ShowoPolicy:
    stored, magvit = settings["showo"], Magvit(MagvitConfig(**settings["magvit"]))
    shapes = empty_transformer(settings["phi"], stored["vocab_size"], VECTORS)
    model = transformers.PhiForCausalLM(shapes.config)
    fill(magvit)
    fill(model, "showo.")
    files = {"tokenizer.json": (VECTORS / "tokenizer.json").read_bytes()}
    layout = ShowoLayout.from_files(files, VECTORS, stored["llm_vocab_size"], stored["codebook_size"])
    return ShowoPolicy(model, magvit, layout, stored)


def drawn(text: str) -> Prompt:
    return Prompt("g", "generate", (text,), ("image",))


@torch.no_grad()
def test_the_autoencoder_is_theirs(policy: ShowoPolicy, vectors: dict[str, torch.Tensor]) -> None:
    assert torch.allclose(policy.magvit.latents(vectors["pixels"]), vectors["latents"], atol=ABSOLUTE, rtol=0)
    assert torch.equal(policy.magvit.encode(vectors["pixels"]), vectors["codes"])
    assert torch.allclose(policy.magvit.decode(vectors["decoded_codes"]), vectors["decoded"], atol=ABSOLUTE, rtol=0)
    for pixels, codes in zip(vectors["pixels"], vectors["codes"], strict=True):
        assert torch.equal(policy.encode_image(pixels / 2 + 0.5), codes)
    expected = (vectors["decoded"][0] / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(policy.decode_image(vectors["decoded_codes"][0]), expected, atol=ABSOLUTE)


@torch.no_grad()
def test_rows_and_logits_of_drawings_are_theirs(
    policy: ShowoPolicy, settings: dict[str, Any], vectors: dict[str, torch.Tensor]
) -> None:
    """Both branches of two prompts, whose rows they pad on the left to 129 places; whole, and after shared texts."""
    layout, theirs = policy.layout, vectors["t2i_ids"]
    image = theirs[:2, -17:-1]
    codes = torch.where(image == layout.mask, -1, image - layout.first_code)
    contexts = [policy.segment_context(drawn(text), (), "masked") for text in settings["prompts"]]
    captions = [*contexts, layout.caption([]), layout.caption([])]
    rows = [layout.drawing(own, c) for own, c in zip(captions, codes.tolist() * 2, strict=True)]
    assert rows == [[i for i in row if i != layout.marker("[PAD]")] for row in theirs.tolist()]
    batch = layout.padded(rows)
    for row, place in zip(rows, batch.places, strict=True):
        assert place[: len(row)].tolist() == list(range(147 - len(row), 147))
    expected = vectors["t2i_logits"]
    for policy.checkpointed in (True, False):
        assert torch.allclose(policy._code_logits(captions, codes.tolist() * 2), expected, atol=ABSOLUTE, rtol=0)
    given, free = expected.chunk(2)
    guided = policy.image_logits(contexts, codes, True, 1 + settings["guidance_scale"], "joint")
    assert torch.allclose(guided, 3 * given - 2 * free, atol=ABSOLUTE, rtol=0)


@torch.no_grad()
def test_log_probs_of_their_own_drawings_are_theirs(
    policy: ShowoPolicy, settings: dict[str, Any], vectors: dict[str, torch.Tensor]
) -> None:
    """Two images that their sampler made, with the step at which it fixed each token."""
    num_steps, trajectories = settings["num_steps"], []
    counts = torch.tensor([16, *masked_counts(16, num_steps)[:-1]])
    expected = counts - torch.tensor([0, 0, 0, 0, 1, 0])  # 16 cos(pi / 3) is below 8 in their float32
    assert torch.equal(vectors["path_masked"], expected[:, None].expand(-1, 2))
    for b, text in enumerate(settings["prompts"]):
        tokens, steps = vectors["path_tokens"][b], vectors["path_steps"][b]
        one = torch.ones(1, 16, dtype=torch.bool)
        image = policy.decode_image(tokens)
        scale = 1 + settings["guidance_scale"]
        segment = MaskedSegment(tokens, steps, one, torch.zeros(1, 16), "path", 1.0, scale, image)
        trajectories.append(Trajectory(drawn(text), 0, (segment,), 0))
    found = torch.cat([rows[0].logprobs for rows in policy.logprobs(trajectories)])
    assert torch.allclose(found, vectors["path_logprobs"], atol=ABSOLUTE, rtol=0)
    weaker = policy.choice_temperature(Sampling(num_steps=4, choice_temperature=1.0), 1)
    assert weaker == pytest.approx(0.75 * 0.5)


@torch.no_grad()
def test_questions_and_greedy_answers_are_theirs(
    policy: ShowoPolicy, settings: dict[str, Any], vectors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sampler also writes image tokens, which a random model does."""
    prompt = Prompt("u", "understand", (vectors["pixels"][0] / 2 + 0.5, settings["question"]), ("text",))
    row = policy.segment_context(prompt, (), "text")
    assert row == vectors["mmu_ids"][0].tolist()
    (logits,) = policy.next_logits([row])
    assert torch.allclose(logits[-8:], vectors["mmu_logits"], atol=ABSOLUTE, rtol=0)
    monkeypatch.setattr(policy, "text_tokens", torch.ones_like(policy.text_tokens))
    (group,) = policy.sample([prompt], Sampling(group_size=1, max_new_tokens=8, temperature=0.0), [0])
    (segment,) = group.trajectories[0].segments
    assert isinstance(segment, TextSegment)
    assert segment.tokens.tolist() == vectors["mmu_answer"].tolist()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 40), (50, 35), (100, 60)])
def test_images_are_fitted_as_by_pil(height: int, width: int) -> None:
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    image = PilImage.fromarray(levels.permute(1, 2, 0).byte().numpy())
    short = min(height, width)
    image = image.resize((int(32 * width / short), int(32 * height / short)), PilImage.Resampling.BICUBIC)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    expected = torch.from_numpy(np.asarray(image.crop((left, top, left + 32, top + 32))).astype(np.float32))
    found = (square(levels / 255, 32) + 1) * 127.5
    assert float((found.permute(1, 2, 0) - expected).abs().max()) < 1.01
