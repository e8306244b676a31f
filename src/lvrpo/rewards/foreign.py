"""Rewards that others wrote are called so that whatever they do stays with them.

A reward may be slow, change what it is given, or reseed the generators of the process: the run goes on as if it had
not. What it raises, ``sys.exit`` included, is the reason of a score that failed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def settings_kept() -> Iterator[None]:
    """Puts back what code can change for the whole process: generators, gradients on or off, dtype, threads."""
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
        if cards:
            torch.cuda.set_rng_state_all(cards)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def described(error: BaseException) -> str:
    """An error of anybody's code in one line: its kind and what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
