"""Who judged: a name of a policy's weights that stands in every row of rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

SAMPLED = 4096
"""Values taken of each tensor."""

_stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)


@contextmanager
def standing_in(identity: str) -> Iterator[None]:
    """Every policy passes for the named judge: to ask what the trained weights would have scored in its place.

    Questions that the judge wrote (``rewards.questions``) are then asked of the trained weights too.
    """
    token = _stand_in.set(identity)
    try:
        yield
    finally:
        _stand_in.reset(token)


def judged_by(*sources: object) -> str:
    """Who judges for these, each an identity or something with a ``judged_by``; "" where the policy alone does."""
    found = [source if isinstance(source, str) else getattr(source, "judged_by", "") for source in sources]
    return "; ".join(dict.fromkeys(name for name in found if name))


def judge_identity(judge: object) -> str:
    """``TinyPolicy:3f2a91c0d4e7``: the class and a hash of names, shapes and evenly spaced values of the weights.

    Two judges of one name are the same weights, for all that an update, an average or another checkpoint can do: those
    move whole tensors. A judge that is not a module (an endpoint, a double in a test) is told by its ``identity``, or
    by its class alone.
    """
    if (named := _stand_in.get()) is not None:
        return named
    if not isinstance(judge, nn.Module) and (of_weights := getattr(type(judge), "judge_identity", None)) is not None:
        return of_weights(judge)  # one of several sets of weights
    # a class whose weights are divided among ranks is derived from its own
    name = next(cls.__name__ for cls in type(judge).__mro__ if not issubclass(cls, FSDPModule))
    if not isinstance(judge, nn.Module):
        own = getattr(judge, "identity", None)  # anybody's judge: the attribute is optional
        return f"{name}:{own}" if own else name
    digest = hashlib.blake2b(digest_size=6)
    values = []
    for key, tensor in judge.state_dict().items():
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        values.append(flat[:: max(1, flat.numel() // SAMPLED)].float())
    if values:
        digest.update(torch.cat(values).cpu().numpy().tobytes())
    return f"{name}:{digest.hexdigest()}"
