"""Qwen-Image-Edit, whose text encoder reads the source image: the pipeline's edits, the replay law, refusals."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_vlm import change_json, without_videos

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies import latent_cache
from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.policy import DiffusersEditOnlyPolicy, DiffusersPolicy
from lvrpo.policies.diffusers_flow.qwen_image import QwenImageEditPlus
from lvrpo.policies.loading import load_policy, possible_tasks
from lvrpo.sampling import derive_seed, normal_noise
from lvrpo.training.memory_estimate import LiveBytes, fake_weights
from lvrpo.types import FlowSegment, Prompt, Trajectory

ODE = Sampling(
    group_size=2, num_steps=4, solver="euler", image_size=(32, 32), guidance_scale=4.0, guidance_renorm="channel_match"
)
SDE = replace(ODE, sampler="flow_sde", window=(0, 1))
KIND = "qwen-image-edit-tiny"


@pytest.fixture(scope="module")
def sources() -> list[torch.Tensor]:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return list((pixels * 255).round() / 255)


@pytest.fixture(scope="module")
def prompts(sources: list[torch.Tensor]) -> list[Prompt]:
    texts = ("make it red", "put a star beside the circle")
    return [
        Prompt(f"e{i}", "edit", (source, text), ("image",))
        for i, (source, text) in enumerate(zip(sources, texts, strict=True))
    ]


@pytest.fixture
def policy(policies: Callable[[str], DiffusersPolicy]) -> DiffusersPolicy:
    return policies(KIND)


@pytest.fixture
def at_48_by_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines edit at 48 x 32 instead of a megapixel; the text encoder's size of the Plus pipeline is its own."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    plus = pipeline_qwenimage_edit_plus
    right, edited = plus.calculate_dimensions, plus.VAE_IMAGE_SIZE
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (48, 32, None))
    monkeypatch.setattr(
        plus, "calculate_dimensions", lambda area, ratio: (48, 32) if area == edited else right(area, ratio)
    )


@pytest.fixture
def reference(pipeline: Callable[[Path], Any]) -> Iterator[Callable[[Path], Any]]:
    """The pipeline of diffusers, with the positions of image tokens that it leaves out (diffusers issue 14194)."""

    def load(folder: Path) -> Any:
        pipe = pipeline(folder)

        def add(encoder: Any, args: Any, given: dict[str, Any]) -> Any:
            given["mm_token_type_ids"] = (given["input_ids"] == encoder.config.image_token_id).int()
            return args, given

        pipe.text_encoder.register_forward_pre_hook(add, with_kwargs=True)
        return pipe

    with without_videos():
        yield load


def segment(trajectory: Trajectory) -> FlowSegment:
    found = trajectory.segments[-1]
    assert isinstance(found, FlowSegment)
    return found


@pytest.mark.usefixtures("at_48_by_32")
@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_an_edit_is_that_of_the_pipeline(
    name: str, folders: Callable[[str], Path], reference: Callable[[Path], Any]
) -> None:
    folder = Path(shutil.copytree(folders(KIND), "edits"))  # both pipelines have the same parts
    change_json(folder / "model_index.json", _class_name=name)
    change_json(folder / "transformer/config.json", zero_cond_t="Plus" in name)  # as in Qwen-Image-Edit-2511
    policy, pipe = load_policy(folder), reference(folder)
    assert isinstance(policy, DiffusersEditOnlyPolicy)
    assert type(pipe).__name__ == name
    shape, generator = (24, policy.pipeline.channels), torch.Generator().manual_seed(2)
    sources = [torch.rand(3, *size, generator=generator) for size in ((20, 30), (64, 96))]  # neither is the image's
    prompts = [Prompt(f"e{i}", "edit", (source, "make it red"), ("image",)) for i, source in enumerate(sources)]
    for guidance in (1.0, 4.0):
        groups = policy.sample(prompts, replace(ODE, image_size=(32, 48), guidance_scale=guidance), [3, 3])
        for group in groups:
            source, text = group.prompt.parts
            assert isinstance(source, torch.Tensor)
            noise = normal_noise([derive_seed(t.seed, "noise") for t in group.trajectories], shape)
            given = {"num_images_per_prompt": 2, "num_inference_steps": 4, "height": 32, "width": 48, "latents": noise}
            given |= {"true_cfg_scale": guidance, **({"negative_prompt": " "} if guidance > 1 else {})}
            for kind in ("latent", "pt"):
                found = pipe(image=to_pil(source), prompt=text, output_type=kind, **given)[0]
                own = [segment(t).latent if kind == "latent" else segment(t).image for t in group.trajectories]
                assert (torch.stack(own) - found).abs().max() < 2e-5
        one, other = (segment(group.trajectories[0]).latent for group in groups)
        assert (one - other).abs().max() > 1e-3  # of one seed


def test_the_text_encoder_reads_the_image_at_its_place(policy: DiffusersPolicy, sources: list[torch.Tensor]) -> None:
    pipeline = policy.pipeline
    one, other = (pipeline.encode_edit("make it red", source, (4, 4))["embeds"] for source in sources)
    assert one.shape == other.shape
    assert (one - other).abs().max() > 1e-4
    assert len(one) <= pipeline.prompt_tokens((4, 4))
    wide = pipeline.encode_edit("make it red", sources[0], (4, 8))["embeds"]
    assert len(wide) - len(one) == pipeline.prompt_tokens((4, 8)) - pipeline.prompt_tokens((4, 4)) == 4
    flat = pipeline.pipe.encode_prompt("make it red", to_pil(sources[0]), "cpu")[0][0]
    assert flat.shape == one.shape
    assert (flat - one).abs().max() > 1e-5  # as diffusers 0.42 encodes it


def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(
    policy: DiffusersPolicy, prompts: list[Prompt]
) -> None:
    for sampling in (SDE, replace(SDE, guided_logprobs="detach_uncond"), replace(SDE, guidance_scale=1.0)):
        trajectories = [t for group in policy.sample(prompts, sampling, [1, 2]) for t in group.trajectories]
        with torch.no_grad():
            for order, limit in ((trajectories, 0.0), (trajectories[::-1], 1e-6), (trajectories[2:3], 1e-6)):
                for trajectory, (row,) in zip(order, policy.logprobs(order), strict=True):
                    sampled = segment(trajectory).behavior_logprobs
                    assert ((row.logprobs - sampled).abs() / sampled.abs().clamp(min=1)).max() <= limit
    assert len(policy.pipeline._encoded) == 4  # each edit with its text, and without


def test_large_sources_are_encoded_once_and_not_kept(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[weakref.ref[torch.Tensor]] = []
    right = policy.pipeline._encode_source

    def encode(image: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        encoded.append(weakref.ref(image))
        return right(image, grid)

    def edit() -> int:
        encoded.clear()
        sources = [torch.rand(3, 64, 96) for _ in range(2)]
        policy.sample([Prompt("e", "edit", (s, "make it red"), ("image",)) for s in sources], ODE, [1, 2])
        return len(encoded)

    monkeypatch.setattr(policy.pipeline, "_encode_source", encode)
    # both latents, which are less than one source
    monkeypatch.setattr(latent_cache, "LATENT_CACHE_BYTES", 2 * 4 * 16 * policy.pipeline.channels)
    assert edit() == 2
    assert [image() for image in encoded] == [None, None]
    monkeypatch.setattr(latent_cache, "LATENT_CACHE_BYTES", 1)
    assert edit() == 2 * ODE.num_steps  # each once in a pass of two branches and two members


def test_a_saved_folder_has_its_processor(policy: DiffusersPolicy, prompts: list[Prompt]) -> None:
    policy.save(Path("saved"))
    assert possible_tasks("saved") == policy.tasks == ("edit",)
    again = load_policy("saved")
    (one,), (other,) = (p.sample(prompts[:1], ODE, [1]) for p in (policy, again))
    assert torch.equal(segment(one.trajectories[0]).image, segment(other.trajectories[0]).image)


def test_without_weights_it_edits_without_values(folders: Callable[[str], Path], prompts: list[Prompt]) -> None:
    shutil.copytree(folders(KIND), "described", ignore=shutil.ignore_patterns("*.safetensors"))
    policy = DiffusersEditOnlyPolicy.from_config(Path("described"))
    fake_weights([policy, *policy.frozen_parts])
    with LiveBytes(()) as live, torch.no_grad():
        (group,) = policy.sample(prompts[:1], ODE, [1])
    assert segment(group.trajectories[0]).image.shape == (3, 32, 32)
    assert live.peak > 0


def test_what_it_cannot_be_asked_is_one_line(policy: DiffusersPolicy, sources: list[torch.Tensor]) -> None:
    for parts, words in (
        (("a red circle",), "prompt 'p': this model edits an image and draws none from text alone: give it one"),
        ((*sources, "join them"), "prompt 'p': has 2 images: this model edits one: leave the others out"),
        ((sources[0], "a <|image_pad|>"), r"prompt 'p': 'a <\|image_pad\|>': holds <\|image_pad\|>, a marker"),
        ((sources[0], "letters " * 100), r"prompt 'p': a prompt of \d+ tokens: 'letters .* the limit is \d+"),
    ):
        with pytest.raises(InputError, match=words):
            policy.sample([Prompt("p", "edit", parts, ("image",))], ODE, [0])
    words = r"image_size=\[16, 4096\]: the text encoder reads images of sides up to 200 : 1: use a size that is less"
    with pytest.raises(InputError, match=words):
        policy.check_sampling(replace(ODE, image_size=(16, 4096)))
    plus = QwenImageEditPlus(policy.pipeline.pipe, policy.pipeline.folder)
    with pytest.raises(InputError, match=r"image_size=\[8192, 8\]: the text encoder reads"):
        plus.grid((8192, 8))


def test_a_damaged_processor_is_one_line(folders: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(folders(KIND), "edits"))
    file = folder / "processor/preprocessor_config.json"
    change_json(file, merge_size=1)
    with pytest.raises(InputError, match=r"edits/processor: its processor has merge_size=1, config\.json says 2"):
        load_policy(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("AutoProcessor", "Qwen2Tokenizer"):
        change_json(folder / "model_index.json", processor=["transformers", name])
        with pytest.raises(InputError, match=r"edits/processor: a \w+ reads no images: use the model's own processor"):
            load_policy(folder)
    change_json(folder / "model_index.json", **index)
    file.write_text("{")
    with pytest.raises(InputError, match=r"edits/processor: cannot be loaded \(.*\): restore the folder"):
        load_policy(folder)
