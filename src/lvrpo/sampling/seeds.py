"""Seeds derived from run seed, step, prompt id, member and purpose, never from batch order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["derive_seed", "normal_noise", "uniform_noise"]


def derive_seed(*parts: int | str) -> int:
    """A seed that is the same on every machine and for every batch split, and unrelated to that of any other parts.

    The first 63 bits of BLAKE2b over the parts' types, lengths and values: ("a", "bc") and ("ab", "c") differ, and so
    do 1 and "1".

    Range: 0 .. 2^63 - 1.
    Raises: TypeError for a part that is neither int nor str, since its text might differ between versions.
    Differs from the paper: no paper given.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if type(part) not in (int, str):
            raise TypeError(f"seed part {part!r} is a {type(part).__name__}: use int or str")
        value = str(part).encode()
        digest.update(f"{type(part).__name__}:{len(value)}:".encode() + value)
    return int.from_bytes(digest.digest(), "big") >> 1


def normal_noise(seeds: Sequence[int], shape: Sequence[int]) -> Float[Tensor, " B *shape"]:
    """Standard normal noise, each row from its own seed.

    Philox keyed with the seed: all of its 63 bits count (``torch.Generator`` on the CPU would use only 32 of them).

    Shapes: B seeds to float32 (B, *shape), on the CPU, so that the noise is the same whatever device it is moved to.
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    rows = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in enumerate(seeds):
        rows[row] = _generator(seed).standard_normal(rows.shape[1:], dtype=np.float32)
    return torch.from_numpy(rows)


def uniform_noise(seeds: Sequence[int], shape: Sequence[int]) -> Float[Tensor, " B *shape"]:
    """Uniform noise, each row from its own seed, as ``normal_noise``.

    Shapes: B seeds to float32 (B, *shape), on the CPU. Range: [0, 1).
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    rows = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in enumerate(seeds):
        rows[row] = _generator(seed).random(rows.shape[1:], dtype=np.float32)
    return torch.from_numpy(rows)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))
