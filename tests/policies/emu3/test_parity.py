"""The policy computes what the library's own model, processor and ``generate`` compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvrpo.images import to_pil
from lvrpo.policies.base import Sampling
from lvrpo.policies.emu3.policy import Emu3Policy
from lvrpo.sampling import derive_seed, uniform_noise
from lvrpo.types import ImageTokenSegment, Part, Prompt, TextSegment

transformers = pytest.importorskip("transformers")

GUIDED = Sampling(group_size=2, max_new_tokens=8, temperature=0.0, image_temperature=0.8, guidance_scale=3.0)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.Emu3ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(folder)


def inputs_of(processor: Any, parts: tuple[Part, ...]) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [to_pil(part) for part in parts if not isinstance(part, str)]
    return processor(text=[text], images=images or None, return_tensors="pt")


@torch.no_grad()
def test_greedy_answers_and_their_log_probs_are_the_library_s(
    emu3: Emu3Policy, model: Any, processor: Any, prompts: list[Prompt]
) -> None:
    """The library is told not to write image tokens, as the policy never does."""
    assert emu3.text_tokens is not None
    never = (~emu3.text_tokens).nonzero()[:, 0].tolist()
    assert len(never) == 64 + 2
    asked = [prompts[0], prompts[1], replace(prompts[6], task="understand")]
    for prompt, group in zip(asked, emu3.sample(asked, GUIDED, [0, 1, 2]), strict=True):
        (segment,) = group.trajectories[1].segments
        assert isinstance(segment, TextSegment)
        theirs = inputs_of(processor, prompt.parts)
        length = theirs.input_ids.shape[1]
        written = model.generate(**theirs, do_sample=False, max_new_tokens=8, suppress_tokens=never)[0]
        assert segment.tokens.tolist() == written[length:].tolist()
        assert segment.text == processor.decode(written[length:], skip_special_tokens=True).strip()
        whole = {**theirs, "input_ids": written[None], "attention_mask": torch.ones_like(written[None])}
        logits = model(**whole).logits[0, length - 1 : -1].index_fill(1, torch.tensor(never), -torch.inf)
        expected = torch.log_softmax(logits, dim=-1).gather(1, segment.tokens[:, None])[:, 0]
        assert torch.allclose(segment.behavior_logprobs, expected, atol=1e-5)


def constrained(model: Any, processor: Any, height: int, width: int) -> Callable[[int, torch.Tensor], list[int]]:
    """The layout of an image, for ``generate``: lines of image tokens, then the ends of frame, image and text."""
    tokens, named = processor.tokenizer, model.config.vocabulary_map
    ends = [tokens.eof_token_id, tokens.eoi_token_id, tokens.eos_token_id]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        place = len(ids) - 1 - int((ids == tokens.image_wrapper_token_id).nonzero()[0])
        line, column = divmod(place, width + 1)
        if line >= height:
            return [ends[min(place - height * (width + 1), 2)]]
        return [named["<|extra_200|>"]] if column == width else model.vocabulary_mapping.image_tokens

    return allowed


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_drawings_from_the_same_random_numbers_are_the_library_s(
    emu3: Emu3Policy,
    model: Any,
    processor: Any,
    prompts: list[Prompt],
    guidance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without top-k, of another height than width; the other branch of guidance is an empty prompt."""
    sampling = replace(GUIDED, guidance_scale=guidance, image_size=(32, 24))
    h, w, seeds = 4, 3, [5, 6]
    area = {"ratio": "3:4", "image_area": 32 * 24}
    asked = {"return_for_image_generation": True, "return_tensors": "pt", **area}
    empty = processor(text=[""], **asked)
    for prompt, group, seed in zip(prompts[3:5], emu3.sample(prompts[3:5], sampling, seeds), seeds, strict=True):
        inputs = processor(text=[prompt.parts[0]], **asked)
        assert [int(side) for side in inputs.pop("image_sizes")[0]] == [h, w]
        length = inputs.input_ids.shape[1]
        for m, trajectory in enumerate(group.trajectories):
            (segment,) = trajectory.segments
            assert isinstance(segment, ImageTokenSegment)
            left = uniform_noise([derive_seed(derive_seed(seed, m), "image")], (h * w,))[0].tolist()

            def choose(probabilities: torch.Tensor, num_samples: int, left: list[float] = left) -> torch.Tensor:
                if int((probabilities > 0).sum()) == 1:  # the end of a line
                    return probabilities.argmax(dim=-1, keepdim=True)
                return (probabilities.double().cumsum(dim=-1) <= left.pop(0)).sum(dim=-1, keepdim=True)

            monkeypatch.setattr(torch, "multinomial", choose)
            guided = {"guidance_scale": guidance, "negative_prompt_ids": empty.input_ids} if guidance != 1 else {}
            written = model.generate(
                **inputs,
                **guided,
                do_sample=True,
                temperature=0.8,
                top_k=0,
                max_new_tokens=h * (w + 1) + 3,
                prefix_allowed_tokens_fn=constrained(model, processor, h, w),
            )[:, length:]
            assert not left
            codes = model.vocabulary_mapping.convert_bpe2img(written[:, :-3].view(1, h, w + 1))
            assert segment.tokens.tolist() == codes.flatten().tolist()
            pixels = model.decode_image_tokens(image_tokens=written, height=h, width=w)
            image = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"][0]
            levels = segment.image.permute(1, 2, 0) * 255 - torch.from_numpy(np.asarray(image).astype(np.float32))
            assert segment.image.shape == (3, 32, 24)
            assert float(levels.min()) >= -1e-3
            assert float(levels.max()) <= 1.001  # theirs are cut to whole levels

            given = torch.cat([inputs.input_ids, written[:, :-4]], dim=1)
            free = torch.cat([empty.input_ids, written[:, :-4]], dim=1)
            conditional = model(input_ids=given).logits[0, length - 1 :]
            other = model(input_ids=free).logits[0, empty.input_ids.shape[1] - 1 :]
            logits = (other + guidance * (conditional - other))[:, model.vocabulary_mapping.image_tokens] / 0.8
            places = [line * (w + 1) + column for line in range(h) for column in range(w)]
            expected = torch.log_softmax(logits[places], dim=-1).gather(1, segment.tokens[:, None])[:, 0]
            assert torch.allclose(segment.behavior_logprobs, expected, atol=1e-5)


@torch.no_grad()
def test_images_are_read_as_by_the_library(emu3: Emu3Policy, model: Any, processor: Any) -> None:
    """An image of another size than the model's, in the places of a question."""
    image = torch.rand(3, 20, 40, generator=torch.Generator().manual_seed(2))
    inputs = inputs_of(processor, (image, "yes or no"))
    ids = inputs.input_ids[0]
    expected = ids.masked_scatter(
        ids == processor.image_token_id, model.model.get_image_tokens(inputs.pixel_values, inputs.image_sizes).long()
    )
    row = emu3.context((image, "yes or no"), ("text",))
    assert row.ids == tuple(expected.tolist())
    assert len(emu3.encode_image(image).unique()) > 1


@torch.no_grad()
def test_the_library_reads_what_is_saved(emu3: Emu3Policy, processor: Any, prompts: list[Prompt]) -> None:
    emu3.save(Path("again"))
    model = transformers.Emu3ForConditionalGeneration.from_pretrained("again").eval()
    own, theirs = emu3.model.state_dict(), model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    inputs = inputs_of(transformers.AutoProcessor.from_pretrained("again"), prompts[0].parts)
    assert torch.equal(model(**inputs).logits, emu3.model(**inputs_of(processor, prompts[0].parts)).logits)
    unnamed = {"_name_or_path": ""}
    assert model.config.to_dict() | unnamed == emu3.model.config.to_dict() | unnamed
