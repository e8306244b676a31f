from __future__ import annotations

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.sampling import guidance, guide

V = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
NO_TEXT = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
NO_IMAGE = torch.ones(1, 2, 2)


@pytest.mark.parametrize(
    ("renorm", "image_scale", "expected"),
    [
        ("none", 1.0, [[6.0, 8.0], [0.0, 0.0]]),
        ("none", 2.0, [[11.0, 15.0], [-1.0, -1.0]]),
        ("global", 1.0, [[3.059412, 4.079216], [0.0, 0.0]]),  # times sqrt(26) / 10
        ("global", 2.0, [[3.006698, 4.100043], [-0.273336, -0.273336]]),  # times sqrt(26 / 348)
        ("channel", 1.0, [[3.0, 4.0], [0.0, 0.0]]),
        ("channel", 2.0, [[2.956812, 4.032016], [-0.707107, -0.707107]]),  # times 5 / sqrt(346) and 1 / sqrt(2)
        ("text_channel", 1.0, [[3.0, 4.0], [0.0, 0.0]]),
        ("text_channel", 2.0, [[5.0, 7.0], [-1.0, -1.0]]),  # not renormed again
    ],
)
def test_guide_by_hand(renorm, image_scale: float, expected: list) -> None:
    out = guide(V, NO_TEXT, NO_IMAGE, 2.0, image_scale, renorm)
    torch.testing.assert_close(out, torch.tensor([expected]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_text_guidance_the_image_scale_is_ignored(scale: float) -> None:
    assert torch.equal(guide(V, None, None, scale, 3.0, "global"), V)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_renorm_min(renorm) -> None:
    torch.testing.assert_close(guide(V, NO_TEXT, None, 2.0, 1.0, renorm, 1.0), torch.tensor([[[6.0, 8.0], [0.0, 0.0]]]))
    half = guide(V, torch.zeros_like(V), None, 4.0, 1.0, renorm, 0.5)  # 1 / 4 without the bound
    torch.testing.assert_close(half, 2 * V)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_renorm_only_shrinks(renorm) -> None:
    small = guide(V, V * 1.5, None, 2.0, 1.0, renorm)  # 1.5 V + 2 (V - 1.5 V) = V / 2
    torch.testing.assert_close(small, V / 2)


@pytest.mark.parametrize("renorm", ["none", "global", "channel", "text_channel"])
def test_a_sample_does_not_depend_on_its_neighbors(renorm) -> None:
    v, u, m = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    whole = guide(v, u, m, 3.0, 1.5, renorm)
    for row in range(4):
        part = guide(v[row : row + 1], u[row : row + 1], m[row : row + 1], 3.0, 1.5, renorm)
        torch.testing.assert_close(whole[row : row + 1], part)


def test_guide_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="needs the velocity without text"):
        guide(V, None, NO_IMAGE, 2.0)
    with pytest.raises(InputError, match="needs the velocity without images"):
        guide(V, NO_TEXT, None, 2.0, 2.0)
    with pytest.raises(InputError, match="use none, global, channel or text_channel"):
        guidance.guide.__wrapped__(V, NO_TEXT, None, 2.0, 1.0, "local")
