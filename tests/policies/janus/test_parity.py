"""The policy computes what the library's own model, processor and ``generate`` compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from lvrpo.policies.base import Sampling
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.types import Image, ImageTokenSegment, Part, Prompt, TextSegment

transformers = pytest.importorskip("transformers")

GREEDY = Sampling(group_size=2, max_new_tokens=12, temperature=0.0, image_temperature=0.0, guidance_scale=3.0)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.JanusForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(folder)


def pil(image: Image) -> PilImage.Image:
    return PilImage.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def inputs_of(processor: Any, parts: tuple[Part, ...], **kwargs: Any) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [pil(part) for part in parts if not isinstance(part, str)]
    return processor(text=[text], images=images or None, return_tensors="pt", **kwargs)


def test_prompts_and_images_are_prepared_as_by_the_processor(
    janus: JanusPolicy, processor: Any, prompts: list[Prompt]
) -> None:
    image_token = janus.processor.ids["image_token"]
    for prompt in prompts[:3]:
        theirs = inputs_of(processor, prompt.parts)
        ours = [image_token if i < 0 else i for i in janus.processor.prompt(prompt.parts, draws=False)]
        assert ours == theirs.input_ids[0].tolist()
        pixels = janus.processor.image_settings.pixels([part for part in prompt.parts if not isinstance(part, str)])
        levels = (pixels - theirs.pixel_values).abs() * 255 / 2
        assert float(levels.max()) < (1e-3 if "u2" not in prompt.id else 1.01)  # resized in 8 bits
        assert float(levels.mean()) < 0.1
    drawn = inputs_of(processor, prompts[4].parts, generation_mode="image").input_ids[0].tolist()
    assert [*janus.processor.prompt(prompts[4].parts, draws=True), janus.processor.ids["boi_token"]] == drawn


@torch.no_grad()
def test_greedy_answers_and_their_log_probs_are_the_library_s(
    janus: JanusPolicy, model: Any, processor: Any, prompts: list[Prompt]
) -> None:
    for prompt, group in zip(prompts[:2], janus.sample(prompts[:2], GREEDY, [0, 1]), strict=True):
        (segment,) = group.trajectories[1].segments
        assert isinstance(segment, TextSegment)
        theirs = inputs_of(processor, prompt.parts)
        length = theirs.input_ids.shape[1]
        written = model.generate(**theirs, do_sample=False, max_new_tokens=12)[0]
        assert segment.tokens.tolist() == written[length:].tolist()
        assert segment.text == processor.decode(written[length:], skip_special_tokens=True).strip()
        whole = {**theirs, "input_ids": written[None], "attention_mask": torch.ones_like(written[None])}
        logits = model(**whole).logits[0, length - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1).gather(1, segment.tokens[:, None])[:, 0]
        assert torch.allclose(segment.behavior_logprobs, expected, atol=1e-5)


@torch.no_grad()
def test_greedy_drawings_and_their_guided_log_probs_are_the_library_s(
    janus: JanusPolicy, model: Any, processor: Any, prompts: list[Prompt]
) -> None:
    """Two prompts in one batch, the shorter one padded."""
    groups = janus.sample(prompts[3:5], GREEDY, [0, 1])
    chats = [[{"role": "user", "content": [{"type": "text", "text": p.parts[0]}]}] for p in prompts[3:5]]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    codes = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=3.0)
    pixels = model.decode_image_tokens(codes).permute(0, 3, 1, 2)
    images = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
    for group, own, image in zip(groups, codes, images, strict=True):
        for trajectory in group.trajectories:
            (segment,) = trajectory.segments
            assert isinstance(segment, ImageTokenSegment)
            assert segment.tokens.tolist() == own.tolist()
            levels = segment.image.permute(1, 2, 0) * 255 - torch.from_numpy(np.asarray(image).astype(np.float32))
            assert float(levels.min()) + 1e-3 >= 0
            assert float(levels.max()) <= 1.001  # theirs are cut to whole levels

    for prompt, group, own in zip(prompts[3:5], groups, codes, strict=True):
        ids = inputs_of(processor, prompt.parts, generation_mode="image").input_ids
        kept = (ids == janus.processor.ids["bos_token"]) | (ids == janus.processor.ids["boi_token"])
        both = torch.cat([ids, ids.masked_fill(~kept, janus.processor.ids["pad_token"])])
        embedded = model.get_input_embeddings()(both)
        drawn = model.prepare_embeddings_for_image_generation(own[None, :-1]).expand(2, -1, -1)
        states = model.model.language_model(inputs_embeds=torch.cat([embedded, drawn], dim=1)).last_hidden_state
        given, free = model.model.generation_head(states[:, ids.shape[1] - 1 :])
        logprobs = torch.log_softmax(free + 3 * (given - free), dim=-1).gather(1, own[:, None])[:, 0]
        (segment,) = group.trajectories[0].segments
        assert torch.allclose(segment.behavior_logprobs, logprobs, atol=1e-5)
        plain = torch.log_softmax(given, dim=-1).gather(1, own[:, None])[:, 0]
        assert float((plain - logprobs).abs().max()) > 0.05  # so that guidance is seen


@torch.no_grad()
def test_images_are_quantized_as_by_the_library(janus: JanusPolicy, model: Any, prompts: list[Prompt]) -> None:
    images = [part for part in prompts[2].parts if not isinstance(part, str)]
    codes = torch.stack([janus.encode_image(image) for image in images])
    pixels = janus.processor.image_settings.pixels(images)
    assert codes.flatten().tolist() == model.model.vqmodel.encode(pixels).image_tokens.flatten().tolist()
    assert len(codes.unique()) > 1


def test_the_library_reads_what_is_saved(folder: Path, janus: JanusPolicy, model: Any) -> None:
    own = janus.model.state_dict()
    theirs = model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert model.generation_config.generation_kwargs == {"boi_token_id": janus.processor.ids["boi_token"]}
    assert model.generation_config.guidance_scale == 5
    assert model.config.to_dict() == janus.model.config.to_dict()
