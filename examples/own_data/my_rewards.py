"""Rewards of one's own: functions that return a number. Their parameters say what they are handed."""

from __future__ import annotations

import torch


def brightness(image: torch.Tensor, target: float = 0.7) -> float:
    """0 for an image of the wanted mean brightness, less for any other; ``target`` is an option of the row."""
    return -abs(float(image.mean()) - target)


def calm(image: torch.Tensor) -> float:
    """0 for a plain image, less the more neighboring pixels differ."""
    return -float(image.diff(dim=1).abs().mean() + image.diff(dim=2).abs().mean())


def short(text: str) -> float:
    """1 for an answer of one word, less for a longer one."""
    return 1 / max(1, len(text.split()))
