from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.algorithms import (
    balance_norms,
    balance_weights,
    combine_gradients,
    cosine_matrix,
    gram_matrix,
    project_conflicts,
    projection_weights,
)
from lvrpo.errors import InputError

A = [torch.tensor([1.0]), torch.tensor([[0.0]])]
B = [torch.tensor([-1.0]), torch.tensor([[1.0]])]
NONE = [torch.zeros(1), torch.zeros(1, 1)]


def random_gradients(seed: int, K: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, generator=generator), torch.randn(1, 2, generator=generator)] for _ in range(K)]


def flat(gradient: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in gradient]).double()


def test_gram_and_cosines_by_hand() -> None:
    gram = gram_matrix([A, B, NONE])
    assert gram.tolist() == [[1, -1, 0], [-1, 2, 0], [0, 0, 0]]
    cosines = cosine_matrix(gram)
    torch.testing.assert_close(cosines[:2, :2], torch.tensor([[1, -(0.5**0.5)], [-(0.5**0.5), 1]]).double())
    assert cosines[2].isnan().all()
    assert cosines[:, 2].isnan().all()


def test_gram_adds_over_parameters() -> None:
    gradients = random_gradients(0, 3)
    layers = [gram_matrix([[task[i]] for task in gradients]) for i in range(2)]
    torch.testing.assert_close(layers[0] + layers[1], gram_matrix(gradients))


def test_projection_by_hand() -> None:
    # (1, 0) + (-1, 1) / 2 = (.5, .5) and (-1, 1) + (1, 0) = (0, 1)
    assert projection_weights(gram_matrix([A, B])).tolist() == [2.0, 1.5]
    assert flat(project_conflicts([A, B])).tolist() == [0.5, 1.5]
    assert projection_weights(gram_matrix([A, B, NONE])).tolist() == [2.0, 1.5, 1.0]


@given(st.integers(0, 2**30), st.integers(1, 4), st.integers(0, 9))
def test_projection_is_that_of_the_paper(seed: int, K: int, order: int) -> None:
    """Algorithm 1 on the vectors themselves, in the same orders."""
    gradients = random_gradients(seed, K)
    vectors = [flat(gradient) for gradient in gradients]
    draw = random.Random(order)
    total = torch.zeros(4).double()
    for i in range(K):
        h = vectors[i].clone()
        for j in draw.sample([j for j in range(K) if j != i], K - 1):
            inner = h @ vectors[j]
            if inner < 0:
                h = h - inner / (vectors[j] @ vectors[j]) * vectors[j]
        total += h
    torch.testing.assert_close(flat(project_conflicts(gradients, order)), total, rtol=1e-4, atol=1e-5)
    if K == 2:  # the update hurts neither task
        assert min(total @ vectors[0], total @ vectors[1]) > -1e-6


@given(st.integers(0, 2**30))
def test_without_conflict_projection_is_the_sum(seed: int) -> None:
    gradients = [[tensor.abs() for tensor in task] for task in random_gradients(seed, 3)]
    assert projection_weights(gram_matrix(gradients)).tolist() == [1.0] * 3


def test_balance_by_hand() -> None:
    small, large = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, -15.0])]
    assert balance_weights(gram_matrix([small, large])).tolist() == [2.0, 10 / 15]  # all of norm 10
    torch.testing.assert_close(balance_norms([small, large])[0], torch.tensor([6.0, -2.0]))
    none = [torch.zeros(2)]
    assert balance_weights(gram_matrix([small, none, large])).tolist() == [2.0, 0.0, 10 / 15]
    shares = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(
        balance_weights(gram_matrix([small, large]), shares), torch.tensor([3.0, 1 / 3]).double()
    )
    assert balance_weights(gram_matrix([none, none])).tolist() == [0.0, 0.0]


@given(st.integers(0, 2**30), st.integers(2, 4), st.floats(0.125, 8))
def test_balanced_gradients_have_one_norm_whatever_their_loudness(seed: int, K: int, factor: float) -> None:
    gradients = random_gradients(seed, K)
    norms = gram_matrix(gradients).diagonal().sqrt()
    torch.testing.assert_close(balance_weights(gram_matrix(gradients)) * norms, norms.mean().expand(K))
    quiet = flat(balance_norms(gradients))
    gradients[0] = [factor * tensor for tensor in gradients[0]]
    loud = flat(balance_norms(gradients))
    torch.testing.assert_close(loud / loud.norm(), quiet / quiet.norm(), rtol=1e-3, atol=1e-4)


def test_combine_by_hand() -> None:
    assert flat(combine_gradients([A, B], torch.tensor([2.0, 3.0]))).tolist() == [-1.0, 3.0]
    broken = [torch.full((1,), float("nan")), torch.zeros(1, 1)]
    assert flat(combine_gradients([broken, B], torch.tensor([0.0, 1.0]))).tolist() == [-1.0, 1.0]
    assert flat(combine_gradients([A, B], torch.zeros(2))).tolist() == [0.0, 0.0]
    assert A[0].tolist() == [1.0]  # nothing is changed in place


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram_matrix([]), "0 tasks"),
        (lambda: gram_matrix([A, A[:1]]), "all of one length"),
        (lambda: combine_gradients([A], torch.ones(2)), "2 weights for 1 tasks"),
        (lambda: balance_weights(gram_matrix([A, B]), torch.tensor([-1.0, 2.0])), "use 0 or more"),
        (lambda: balance_weights(gram_matrix([A, NONE]), torch.tensor([0.0, 2.0])), "a positive one for some task"),
    ],
)
def test_impossible_gradients_are_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
