"""Supervised losses of a Mixture-of-Transformers: words after words, flow after contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lvrpo.policies.base import FeatureLoss
from lvrpo.policies.mot import drawing, writing
from lvrpo.policies.mot.batching import alike
from lvrpo.policies.mot.context import Contexts, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.policies.mot.writing import Written
from lvrpo.sampling import flow_time
from lvrpo.types import Example, Image


@dataclass(frozen=True)
class FlowTimes:
    """At which times the flow loss is taken, and what each counts."""

    shift: float
    min_time: float
    """Below it the loss is damped."""


def supervised_losses(
    contexts: Contexts,
    rows: Sequence[Row],
    examples: Sequence[Example],
    generator: torch.Generator,
    times: FlowTimes,
    represent: FeatureLoss | None,
) -> Mapping[str, torch.Tensor]:
    """ "text": cross-entropy per token; "image": flow loss at logit-normal times, of examples after their contexts
    ``rows``; with ``represent``, "representation": its loss. Means over what is there."""
    text_losses: list[torch.Tensor] = []
    image_losses: list[torch.Tensor] = []
    feature_losses: list[torch.Tensor] = []
    for indices in alike([example.prompt.output for example in examples], len(examples)):
        batch = [examples[i] for i in indices]
        cache, owner = contexts.prefill_shared([rows[i] for i in indices])
        for s, kind in enumerate(batch[0].prompt.output):
            outputs = [example.outputs[s] for example in batch]
            if kind == "text":
                texts = [Written((*contexts.words.encode(str(o)), contexts.words.eos_id), True) for o in outputs]
                closed = s + 1 < len(batch[0].prompt.output)
                scores = writing.score(contexts, cache, owner, texts, 1.0, closed)
                text_losses += [-logprobs for logprobs in scores.logprobs]
                if closed:
                    cache, owner = scores.cache, list(range(len(batch)))
            else:
                images = [o for o in outputs if isinstance(o, torch.Tensor)]
                loss, features = _flow_loss(contexts, cache.select(owner), images, generator, times, represent)
                image_losses.append(loss)
                if represent is not None and features is not None:
                    feature_losses.append(represent(features, images))
    losses = {"text": text_losses, "image": image_losses, "representation": feature_losses}
    return {name: torch.cat(terms).mean() for name, terms in losses.items() if terms}


def _flow_loss(
    contexts: Contexts,
    cache: Cache,
    images: Sequence[Image],
    generator: torch.Generator,
    times: FlowTimes,
    represent: FeatureLoss | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The flow loss (B,) of pictures, and the states (B, N, D) that ``represent`` wants."""
    x_0 = contexts.towers.encode_latents(images)
    noise = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = flow_time(torch.randn(len(x_0), generator=generator), times.shift).to(x_0)
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    features, grid = None, contexts.towers.latent_grid(images[0])
    if represent is None:
        v = drawing.velocity(contexts, cache, x_t, t, grid)
    else:
        v, features = drawing.velocity_and_features(contexts, cache, x_t, t, grid, represent.layer)
    weight = (t / t.clamp(min=times.min_time)).square()
    return weight * (v - (noise - x_0)).square().mean(dim=(1, 2)), features
