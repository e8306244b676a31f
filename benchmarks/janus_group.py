"""A group of images of a Janus, by lvrpo and otherwise, for ``peers.py``; 8 x 8 pixels are a token."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lvrpo.policies.base import Sampling
from lvrpo.policies.janus.create import JanusSizes, create_janus
from lvrpo.types import Prompt

TEXT = "a red circle above a blue square"
PROMPT = Prompt("p", "generate", (TEXT,), ("image",))
GUIDANCE = 5.0
"""The default of both programs."""
Calls = tuple[Callable[[], object], Callable[[], object]]
"""Of lvrpo, and of the other side."""


def draw_group(side: int, size: int, calls: int) -> Calls:
    """Images of the Janus of ``lvrpo init janus-tiny``, by ``generate`` of transformers in so many calls."""
    import transformers

    policy = create_janus(JanusSizes(image_size=side), [TEXT])
    with tempfile.TemporaryDirectory() as name:
        policy.save(Path(name))
        model = transformers.JanusForConditionalGeneration.from_pretrained(name).eval()
        processor: Any = transformers.AutoProcessor.from_pretrained(name)
    chat = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
    asked: dict[str, Any] = {"do_sample": True, "num_return_sequences": size // calls, "guidance_scale": GUIDANCE}

    @torch.no_grad()
    def generate() -> None:
        for _ in range(calls):
            codes = model.generate(**inputs, generation_mode="image", **asked)
            pixels = model.decode_image_tokens(codes).permute(0, 3, 1, 2)
            processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")

    sampling = Sampling(group_size=size, guidance_scale=GUIDANCE)
    return lambda: policy.sample([PROMPT], sampling, [0]), generate


def update_group(side: int, size: int) -> Calls:
    """Log-probs of a group with their gradient and a step of AdamW, for all images at once, and one after another."""
    policy = create_janus(JanusSizes(image_size=side), [TEXT])
    (group,) = policy.sample([PROMPT], Sampling(group_size=size, guidance_scale=GUIDANCE), [0])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    A = torch.linspace(-1, 1, size)

    def update(count: int) -> None:
        for first in range(0, size, count):
            some = group.trajectories[first : first + count]
            logprobs = torch.stack([row.logprobs for (row,) in policy.logprobs(some)])
            before = torch.stack([trajectory.segments[0].behavior_logprobs for trajectory in some])
            weighted = A[first : first + count, None] * (logprobs - before).exp()
            (-weighted.mean(dim=1).sum() / size).backward()
        optimizer.step()
        optimizer.zero_grad()

    return partial(update, size), partial(update, 1)
