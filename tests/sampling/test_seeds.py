from __future__ import annotations

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lvrpo.sampling
from lvrpo.sampling import derive_seed, normal_noise, uniform_noise
from lvrpo.sampling.flow_sde import ode_step

parts = st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4).map(tuple)


def test_derive_seed_never_changes() -> None:
    assert derive_seed(0, 3, "prompt-7", 1, "noise") == 3967849085906183464
    assert derive_seed() == 8238016292129134938


@given(parts, parts)
def test_seeds_differ_exactly_where_their_parts_do(first, second) -> None:
    assert 0 <= derive_seed(*first) < 2**63
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@pytest.mark.parametrize("pair", [(("a", "bc"), ("ab", "c")), ((1,), ("1",)), ((1, 2), (2, 1)), (("",), ())])
def test_seeds_of_near_misses_differ(pair) -> None:
    assert derive_seed(*pair[0]) != derive_seed(*pair[1])


@pytest.mark.parametrize("part", [1.0, True, None])
def test_parts_without_a_stable_text_are_refused(part) -> None:
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        derive_seed(part)
    with pytest.raises(TypeError, match="use int or str"):
        lvrpo.sampling.seeds.derive_seed.__wrapped__(part)


@pytest.mark.parametrize("noise", [normal_noise, uniform_noise])
def test_a_row_depends_on_its_seed_alone(noise) -> None:
    seeds = [derive_seed(0, member) for member in range(5)]
    rows = noise(seeds, (4, 3))
    assert rows.shape == (5, 4, 3)
    assert rows.dtype == torch.float32
    assert torch.equal(noise(seeds[::-1], (4, 3)), rows.flip(0))
    assert torch.equal(noise(seeds[2:3], (4, 3)), rows[2:3])
    assert len(rows.flatten().unique()) == 60
    assert noise([], (2,)).shape == (0, 2)
    assert noise([1, 2], ()).shape == (2,)


def test_all_bits_of_a_seed_count() -> None:
    assert not torch.equal(normal_noise([5], (8,)), normal_noise([5 + 2**32], (8,)))


def test_noise_has_the_moments_of_its_distribution() -> None:
    seeds = [derive_seed("moments", row) for row in range(50)]
    normal = normal_noise(seeds, (2000,))
    torch.testing.assert_close(normal.mean(), torch.tensor(0.0), rtol=0, atol=0.015)
    torch.testing.assert_close(normal.var(), torch.tensor(1.0), rtol=0, atol=0.02)
    uniform = uniform_noise(seeds, (2000,))
    torch.testing.assert_close(uniform.mean(), torch.tensor(0.5), rtol=0, atol=0.005)
    torch.testing.assert_close(uniform.var(), torch.tensor(1 / 12), rtol=0, atol=0.002)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    across = normal_noise([derive_seed("across", row) for row in range(2000)], (1,))
    torch.testing.assert_close(across.var(), torch.tensor(1.0), rtol=0, atol=0.15)


def test_shapes_are_enforced() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        ode_step(torch.zeros(2, 3), torch.zeros(2, 4), 1.0, 0.5)


def test_every_public_name_exists() -> None:
    assert len(set(lvrpo.sampling.__all__)) == len(lvrpo.sampling.__all__)
    assert all(hasattr(lvrpo.sampling, name) for name in lvrpo.sampling.__all__)
