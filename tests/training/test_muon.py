"""Muon in float32: torch's steps up to bfloat16's rounding, singular values near 1, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from lvrpo.training.optimizer import Muon, orthogonalize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    result = orthogonalize(matrix[None])[0]
    assert result.dtype == torch.float32
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ v.T
    diagonal = inner.diagonal()
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert (inner - torch.diag(diagonal)).abs().max() < 1e-3


def test_one_iteration_by_hand() -> None:
    # of diag(3, 4) / 5 every entry s becomes a s + b s^3 + c s^5, five times
    expected = []
    for s in (0.6, 0.8):
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected.append(s)
    found = orthogonalize(torch.diag(torch.tensor([3.0, 4.0]))[None])[0]
    assert torch.allclose(found, torch.diag(torch.tensor(expected)), atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_steps_are_torchs_up_to_the_rounding_of_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(random(*shape)) for _ in range(2))
    optimizers = [kind([p], lr=0.1, weight_decay=0.01) for kind, p in ((Muon, ours), (torch.optim.Muon, theirs))]
    for step in range(4):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = random(*shape, seed=step + 1)
            optimizer.step()
    moved = (theirs - random(*shape)).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    ours_state, theirs_state = (optimizer.state[p] for p, optimizer in zip((ours, theirs), optimizers, strict=True))
    assert ours_state.keys() == theirs_state.keys()
    assert torch.allclose(ours_state["momentum_buffer"], theirs_state["momentum_buffer"])


def test_matrices_of_one_shape_are_computed_in_their_own_dtype() -> None:
    def stepped(*dtypes: torch.dtype) -> list[torch.nn.Parameter]:
        parameters = [torch.nn.Parameter(random(8, 8).to(dtype)) for dtype in dtypes]
        for p in parameters:
            p.grad = random(8, 8, seed=1).to(p.dtype)
        Muon(parameters, lr=0.1).step()
        return parameters

    low, high = stepped(torch.bfloat16, torch.float32)
    assert torch.equal(low, *stepped(torch.bfloat16))
    assert torch.equal(high, *stepped(torch.float32))


def test_parameters_without_a_gradient_stay_and_a_closure_is_called() -> None:
    still, moved = (torch.nn.Parameter(random(8, 8)) for _ in range(2))
    optimizer = Muon([still, moved], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = moved.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    assert loss.item() == pytest.approx(random(8, 8).square().sum().item())
    assert torch.equal(still, random(8, 8))
    assert not torch.equal(moved, random(8, 8))
