from __future__ import annotations

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.sampling import guidance, guide, guide_logits, sample_tokens, token_logprobs

V = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
NO_TEXT = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
NO_IMAGE = torch.ones(1, 2, 2)


@pytest.mark.parametrize(
    ("renorm", "image_scale", "expected"),
    [
        ("none", 0.5, [[6.0, 8.0], [0.0, 0.0]]),
        ("none", 1.0, [[6.0, 8.0], [0.0, 0.0]]),
        ("none", 2.0, [[11.0, 15.0], [-1.0, -1.0]]),
        ("global", 1.0, [[3.059412, 4.079216], [0.0, 0.0]]),  # times sqrt(26) / 10
        ("global", 2.0, [[3.006698, 4.100043], [-0.273336, -0.273336]]),  # times sqrt(26 / 348)
        ("channel", 1.0, [[3.0, 4.0], [0.0, 0.0]]),
        ("channel", 2.0, [[2.956812, 4.032016], [-0.707107, -0.707107]]),  # times 5 / sqrt(346) and 1 / sqrt(2)
        ("channel_match", 1.0, [[3.0, 4.0], [0.0, 0.0]]),
        ("channel_match", 2.0, [[2.956812, 4.032016], [-0.707107, -0.707107]]),
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
    torch.testing.assert_close(guide(V, V * 1.5, None, 2.0, 1.0, "channel_match", 1.0), V)  # also grows


@pytest.mark.parametrize("renorm", ["none", "global", "channel", "channel_match", "text_channel"])
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
    with pytest.raises(InputError, match="use none, global, channel, channel_match, text_channel"):
        guidance.guide.__wrapped__(V, NO_TEXT, None, 2.0, 1.0, "local")


# guide_logits

LOGITS, UNGUIDED = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def test_guide_logits_by_hand() -> None:
    assert guide_logits(LOGITS, UNGUIDED, 3.0).tolist() == [[3.0, -2.0]]
    assert guide_logits(LOGITS, UNGUIDED, 3.0, "detach_uncond").tolist() == [[3.0, -2.0]]
    assert guide_logits(LOGITS, UNGUIDED, 3.0, "none").tolist() == [[1.0, 0.0]]
    assert guide_logits(LOGITS, None, 1.0).tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(  # softmax(3, -2)
        token_logprobs(guide_logits(LOGITS, UNGUIDED, 3.0), torch.tensor([1])), torch.tensor([-5.0067153])
    )


@pytest.mark.parametrize(
    ("mode", "to_logits", "to_unguided"),
    [("joint", [[3.0, 3.0]], [[-2.0, -2.0]]), ("detach_uncond", [[3.0, 3.0]], None), ("none", [[1.0, 1.0]], None)],
)
def test_the_mode_says_which_branch_learns(mode, to_logits, to_unguided) -> None:
    logits, unguided = LOGITS.clone().requires_grad_(), UNGUIDED.clone().requires_grad_()
    guide_logits(logits, unguided, 3.0, mode).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == to_logits
    assert (None if unguided.grad is None else unguided.grad.tolist()) == to_unguided


def test_the_density_of_replay_is_that_of_sampling() -> None:
    """Tokens drawn under guidance have the frequencies that joint and detach_uncond score, and none does not."""
    logits, unguided = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([0.0, 0.3, 0.0])
    uniforms = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(guide_logits(logits, unguided, 2.0).expand(30_000, 3), uniforms, 0.8)
    shares = torch.bincount(drawn, minlength=3) / 30_000
    tokens = torch.arange(3)
    for mode in ("joint", "detach_uncond"):
        scored = token_logprobs(guide_logits(logits, unguided, 2.0, mode).expand(3, 3), tokens, 0.8).exp()
        torch.testing.assert_close(shares, scored, rtol=0, atol=0.01)
    alone = token_logprobs(guide_logits(logits, unguided, 2.0, "none").expand(3, 3), tokens, 0.8).exp()
    assert (shares - alone).abs().max() > 0.1


def test_guide_logits_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match=r"guidance_scale=3.0 needs the logits without text"):
        guide_logits(LOGITS, None, 3.0)
    with pytest.raises(InputError, match="use joint, detach_uncond or none"):
        guidance.guide_logits.__wrapped__(LOGITS, UNGUIDED, 3.0, "half")
