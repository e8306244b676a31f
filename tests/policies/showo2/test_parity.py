"""Against the published code (showlab/Show-o, 45a5a2d) on the same random weights: ``vectors/expected.safetensors``.

Text ids: 1 start, 2 begin of image, 4 end of image; weights are a function of their names (``value``).
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvrpo.policies.showo2.model import Rows, Showo2Model, Showo2Sizes, place_rows, to_latents, to_tokens

transformers = pytest.importorskip("transformers")
EXPECTED = load_file(Path(__file__).parent / "vectors" / "expected.safetensors")


def value(name: str, shape: torch.Size) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 0.15 * x if len(shape) > 1 else float(name.endswith("weight")) + 0.1 * x


@pytest.fixture(scope="module")
def model() -> Showo2Model:
    llm = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    vision._attn_implementation = "sdpa"
    found = Showo2Model(Showo2Sizes(64, 32, 24, 2, 4, (4, 4), 2, 128, 96), llm, vision).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(value(name, parameter.shape))
    return found.requires_grad_(False)


def embedded(model: Showo2Model, *ids: int) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))


def velocity(model: Showo2Model, latents: torch.Tensor, texts: list[list[int]], t: torch.Tensor) -> torch.Tensor:
    images = model.embed_images(latents, t)
    rows = place_rows([embedded(model, 1, *ids, 2) for ids in texts], list(images), [embedded(model)] * len(texts))
    return to_latents(model.velocity(rows, t), (latents.shape[2], latents.shape[3]), latents.shape[1])


def test_velocities_of_rows_of_different_lengths_in_one_batch(model: Showo2Model) -> None:
    v = velocity(model, EXPECTED["latents"], [[7, 8, 9], [10]], EXPECTED["t"])
    torch.testing.assert_close(v, EXPECTED["v"], rtol=2e-5, atol=2e-5)


def test_a_image_of_another_grid_has_interpolated_positions(model: Showo2Model) -> None:
    v = velocity(model, EXPECTED["wide"], [[7, 8]], torch.tensor([0.5]))
    torch.testing.assert_close(v, EXPECTED["wide_v"], rtol=2e-5, atol=2e-5)


def test_guided_steps_of_euler_end_at_the_same_latents(model: Showo2Model) -> None:
    points, z = torch.linspace(0, 1, 5), EXPECTED["z"]
    points = points / (points + 3 - 3 * points)
    for t, t_next in pairwise(points):
        v, v_no_text = velocity(model, torch.cat([z, z]), [[7, 8, 9], []], t.expand(2)).chunk(2)
        z = z + (t_next - t) * (v_no_text + 5 * (v - v_no_text))
    scale = float(EXPECTED["drawn"].abs().max())
    torch.testing.assert_close(z / scale, EXPECTED["drawn"] / scale, rtol=0, atol=2e-5)


def question(model: Showo2Model, *answer: int) -> Rows:
    (image,) = model.embed_images(EXPECTED["latents"][:1], torch.ones(1))
    return place_rows([embedded(model, 1, 11, 12, 2)], [image], [embedded(model, 4, 13, 14, 15, *answer)])


def test_logits_and_the_greedy_answer_about_a_image(model: Showo2Model) -> None:
    logits = model.showo.lm_head(model.states(question(model)))[0, -4:]
    torch.testing.assert_close(logits, EXPECTED["logits"], rtol=2e-5, atol=2e-5)
    answer: list[int] = []
    for _ in EXPECTED["answer"]:
        answer.append(int(model.showo.lm_head(model.states(question(model, *answer)))[0, -1].argmax()))
    assert answer == EXPECTED["answer"].tolist()


def test_tokens_hold_runs_of_values_and_come_back(model: Showo2Model) -> None:
    latents = EXPECTED["wide"]
    tokens = to_tokens(latents, 2)
    assert tokens.shape == (1, 18, 16)
    assert torch.equal(tokens[0, 0].view(4, 4), latents[0, :, 0, :4].T)
    assert torch.equal(to_latents(tokens, (6, 12), 4), latents)
