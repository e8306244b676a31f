from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import repa_loss

NAN = float("nan")


def test_repa_by_hand() -> None:
    projected = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    features = torch.tensor([[[4.0, 3.0], [0.0, 5.0]], [[0.0, -1.0], [1.0, 1.0]]])
    # cosines 24 / 25 and 0; -1 and, of a token of length 0, 0
    torch.testing.assert_close(repa_loss(projected, features), torch.tensor([-0.48, 0.5]))
    mask = torch.tensor([[True, False], [False, False]])
    torch.testing.assert_close(repa_loss(projected, features, mask), torch.tensor([-0.96, 0.0]))


def test_masked_tokens_are_ignored_and_features_get_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 3, 4, generator=generator).requires_grad_()
    features = torch.randn(2, 3, 4, generator=generator).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    clean = repa_loss(projected, features, mask)
    dirty = repa_loss(torch.where(mask[..., None], projected, NAN), torch.where(mask[..., None], features, NAN), mask)
    torch.testing.assert_close(clean, dirty)
    clean.sum().backward()
    assert features.grad is None
    assert projected.grad is not None
    assert not projected.grad[~mask].any()
    assert projected.grad[mask].abs().min() > 0


@given(st.integers(0, 2**30), st.floats(0.125, 8), st.floats(0.125, 8))
def test_repa_ignores_lengths(seed: int, one: float, other: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    projected, features = torch.randn(2, 2, 3, 4, generator=generator)
    loss = repa_loss(projected, features)
    torch.testing.assert_close(repa_loss(one * projected, other * features), loss, rtol=1e-4, atol=1e-5)
    assert loss.abs().max() <= 1
    torch.testing.assert_close(repa_loss(projected, 3 * projected), torch.full((2,), -1.0))
