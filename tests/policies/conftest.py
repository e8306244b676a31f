"""Small random policies without zero-initialised layers, and the core run on a whole row at once, without any cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES

from lvrpo.policies.mot.attention import Span, pack
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.types import Image, Prompt

WORDS = ("what", "color", "is", "it", "draw", "make", "a", "red", "blue", "circle", "square", "one", "two", "three")
SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "key_heads": 2, "mlp_width": 48}  # Any: keyword arguments


def make_policy(seed: int = 0, **transformer: Any) -> TinyPolicy:
    """A small policy; layers that start at zero are drawn at random, so that every output depends on every input."""
    config = TinyConfig(image_size=16, tower_width=24, transformer=MoTConfig(**SMALL | transformer))
    policy = TinyPolicy.from_vocabulary(config, WORDS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return policy


def make_image(seed: int) -> Image:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))


def make_prompts() -> list[Prompt]:
    """Eight prompts of all four tasks, of different lengths; two of them ask about one image."""
    shared = make_image(1)
    return [
        Prompt("u0", "understand", (shared, "what color is it"), ("text",)),
        Prompt("u1", "understand", (shared, "is it a red circle"), ("text",)),
        Prompt("u2", "understand", (make_image(2), "is it blue"), ("text",)),
        Prompt("g0", "generate", ("a red circle",), ("image",)),
        Prompt("g1", "generate", ("draw two blue square",), ("image",)),
        Prompt("e0", "edit", (make_image(3), "make it red"), ("image",)),
        Prompt("r0", "reason", ("draw one",), ("text", "image")),
        Prompt("r1", "reason", (make_image(4), "draw what it is"), ("text", "image")),
    ]


Item = str | tuple[str, Any]
"""A text, or ("read" | "clean", image), or ("noise", (x_t (N, C), t))."""


@dataclass(frozen=True)
class WholeRow:
    logits: torch.Tensor
    """(tokens of the understanding expert, V) in row order, forbidden tokens included."""
    velocity: torch.Tensor | None


@torch.no_grad()
def run_whole_row(policy: TinyPolicy, items: Sequence[Item]) -> WholeRow:
    """One pass over one row from nothing, embedded by hand."""
    encoders, words = policy.encoders, policy.tokenizer
    start, end = (encoders.embed_tokens(torch.tensor([i])) for i in (words.image_start_id, words.image_end_id))
    spans, reading, drawing, noisy = [], [], [], None
    for item in items:
        if isinstance(item, str):
            ids = [words.bos_id, *words.encode(item), words.eos_id]
            spans.append(Span("text", len(ids)))
            reading.append(encoders.embed_tokens(torch.tensor(ids)))
            continue
        kind, content = item
        n = policy.config.image_tokens
        spans.append(Span(kind, n + 2))  # type: ignore[arg-type]  # the kind is one of the three
        if kind == "read":
            reading += [start, encoders.encode_images([content])[0], end]
            continue
        reading += [start, end]
        x_t, t = (encoders.encode_latents([content])[0], 0.0) if kind == "clean" else content
        drawing.append(encoders.embed_latents(x_t[None], torch.tensor([t]))[0])
        if kind == "noise":
            noisy = x_t, t, sum(len(part) for part in drawing[:-1])
    width = reading[0].shape[1]
    blocks = torch.cat(reading), torch.cat(drawing) if drawing else torch.zeros(0, width)
    hidden = policy.transformer(*blocks, pack([tuple(spans)], torch.device("cpu")), policy.transformer.empty_cache(1))
    velocity = None
    if noisy is not None:
        x_t, t, offset = noisy
        velocity = encoders.velocity(hidden.generation[offset : offset + len(x_t)][None], x_t[None], torch.tensor([t]))[
            0
        ]
    return WholeRow(encoders.text_logits(hidden.understanding), velocity)


@pytest.fixture(scope="session")
def family_folder(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """The folder of a small random model of a family, which many tests read: never change it.

    Skips the test where an optional package is missing.
    """

    def folder(name: str) -> Path:
        for package in FAMILIES[name].needs:
            pytest.importorskip(package)
        return made_once(f"family_{name}", FAMILIES[name].make)

    return folder


@pytest.fixture(scope="session")
def policy() -> TinyPolicy:
    """Shared by many tests: never change it."""
    return make_policy()


@pytest.fixture
def new_policy() -> Callable[..., TinyPolicy]:
    return make_policy


@pytest.fixture
def image() -> Callable[[int], Image]:
    return make_image


@pytest.fixture
def prompts() -> list[Prompt]:
    return make_prompts()


@pytest.fixture
def whole_row() -> Callable[[TinyPolicy, Sequence[Item]], WholeRow]:
    return run_whole_row
