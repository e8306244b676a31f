"""Replay, guidance, questions, files and refusals of a small random Show-o2."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy, model_type
from lvrpo.policies.showo2.policy import Showo2Policy
from lvrpo.types import FlowSegment, Group, LogitGuidance, Prompt

SAMPLING = Sampling(
    group_size=3, num_steps=4, max_new_tokens=6, guidance_scale=4.0, sampler="flow_sde", window=(1, 2), solver="euler"
)


def differences(policy: Showo2Policy, groups: list[Group], together: bool) -> float:
    trajectories = [t for group in groups for t in group.trajectories]
    rows = policy.logprobs(trajectories) if together else [policy.logprobs([t])[0] for t in trajectories]
    pairs = zip(trajectories, rows, strict=True)
    return max(float((own[0].logprobs.detach() - t.segments[0].behavior_logprobs).abs().max()) for t, own in pairs)


@pytest.mark.parametrize(("scale", "gradient"), [(1.0, "joint"), (4.0, "joint"), (4.0, "detach_uncond")])
def test_a_replay_has_the_bits_of_its_rollout(
    showo2: Showo2Policy, prompts: list[Prompt], scale: float, gradient: LogitGuidance
) -> None:
    groups = showo2.sample(prompts, replace(SAMPLING, guidance_scale=scale, guided_logprobs=gradient), [1, 2, 3, 4, 5])
    assert differences(showo2, groups, together=True) == 0
    assert differences(showo2, groups, together=False) < 1e-5
    kinds = [[type(s).__name__ for s in group.trajectories[0].segments] for group in groups]
    assert kinds == [["FlowSegment"]] * 2 + [["TextSegment"]] * 3


def test_a_batch_cut_in_pieces_gives_the_same_outputs(showo2: Showo2Policy, prompts: list[Prompt]) -> None:
    whole = showo2.sample(prompts, SAMPLING, [1, 2, 3, 4, 5])
    try:
        showo2.limit_tokens(80)
        parts = showo2.sample(prompts, SAMPLING, [1, 2, 3, 4, 5])
    finally:
        showo2.limit_tokens(None)
    for one, other in zip(whole, parts, strict=True):
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            assert a.text == b.text
            if a.image is not None:
                torch.testing.assert_close(a.image, b.image, rtol=0, atol=1e-4)


def test_without_noise_the_flow_is_integrated_as_published(showo2: Showo2Policy, prompts: list[Prompt]) -> None:
    """In Show-o2's own time and sign, by the network alone; its parity is tested against the published code."""
    from lvrpo.policies.showo2.model import to_latents

    ((trajectory,),) = (g.trajectories for g in showo2.sample(
        prompts[:1], replace(SAMPLING, group_size=1, sampler="ode", window=()), [7]))  # fmt: skip
    segment = trajectory.segments[0]
    assert isinstance(segment, FlowSegment)
    points = torch.linspace(0, 1, 5)
    points = points / (points + 3 - 3 * points)
    torch.testing.assert_close(segment.timesteps, 1 - points)
    from lvrpo.policies.flow import draw_noise
    from lvrpo.sampling import derive_seed

    z, _ = draw_noise(SAMPLING, [derive_seed(derive_seed(7, 0), "noise")], [0], (4, 16))
    rows = [showo2._drawn("a red circle above a blue square"), showo2._drawn("")]
    with torch.no_grad():
        for t, t_next in pairwise(points):
            images = showo2.model.embed_images(to_latents(z, (4, 4), 4), t.expand(1)).repeat(2, 1, 1)
            placed = showo2._placed(rows, list(images), [(), ()])
            v, v_no_text = showo2.model.velocity(placed, t.expand(2)).chunk(2)
            z = z + (t_next - t) * (v_no_text + 4 * (v - v_no_text))
    torch.testing.assert_close(segment.latent, z[0], rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_weight(folder: Path, prompts: list[Prompt]) -> None:
    policy = Showo2Policy.load(folder)
    groups = policy.sample(prompts, SAMPLING, [1, 2, 3, 4, 5])
    rows = policy.logprobs([t for group in groups for t in group.trajectories])
    sum(row[0].logprobs.sum() for row in rows).backward()  # type: ignore[union-attr]  # a tensor
    assert not [name for name, p in policy.model.named_parameters() if p.grad is None]
    assert not any(p.requires_grad for p in policy.vae.parameters())
    grouped = [p for group in policy.parameter_groups().values() for p in group]
    assert len(grouped) == len(list(policy.model.parameters()))


def test_the_velocity_mixes_its_branches(showo2: Showo2Policy, prompts: list[Prompt]) -> None:
    (group,) = showo2.sample(prompts[:1], replace(SAMPLING, group_size=2), [3])
    x, t = torch.randn(2, 4, 16), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        v, none, both = (showo2.velocity(group.trajectories, x, t, scale) for scale in (1.0, 0.0, 3.0))
    torch.testing.assert_close(both, none + 3 * (v - none), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(v, none)


def test_the_likelihood_of_an_answer_is_that_of_its_replay(showo2: Showo2Policy, prompts: list[Prompt]) -> None:
    (group,) = showo2.sample(prompts[2:3], replace(SAMPLING, group_size=4, max_new_tokens=3), [3])
    other = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2))
    image, question = prompts[2].parts
    one, changed = showo2.text_logprob([(image, question), (other, question)], ["yes", "yes"])
    assert one < 0
    assert one != changed
    tokens = torch.tensor([*showo2._encode("yes"), showo2.parts.ids["<|im_end|>"]])
    segment = replace(group.trajectories[0].segments[0], tokens=tokens)  # type: ignore[arg-type]  # a TextSegment
    (row,) = showo2.logprobs([replace(group.trajectories[0], segments=(segment,))])
    torch.testing.assert_close(row[0].logprobs.mean().detach(), one)


@pytest.mark.parametrize("layer", [0, 2])
def test_states_of_parts_are_those_at_the_start_of_a_row(showo2: Showo2Policy, layer: int) -> None:
    """A longer text has the same first states, as places see only what is before them."""
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(7))
    short, long, read = showo2.hidden_states(["a red", "a red circle above", image], layer)
    assert 0 < len(short) < len(long)
    assert torch.allclose(short, long[: len(short)], atol=1e-5)
    rows, columns = showo2.model.sizes.grid
    assert read.shape == (rows * columns, short.shape[1])
    assert float((read - showo2.hidden_states([image.flip(-1)], layer)[0]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="layer=9: the policy has 2 layers"):
        showo2.hidden_states(["a"], 9)


def test_latents_of_a_image_are_computed_once(showo2: Showo2Policy, prompts: list[Prompt]) -> None:
    source = prompts[2].parts[0]
    assert isinstance(source, torch.Tensor)
    one, other = showo2.encode_images([source]), showo2.encode_images([source, source])
    assert torch.equal(one[0], other[1])
    assert not copy.deepcopy(showo2._latents).found  # a copy would know images by the places of others
    tokens = torch.randn(1, 4, 16)
    (image,) = showo2.decode_latents(tokens, (2, 2))
    assert image.shape == (3, 32, 32)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_a_saved_folder_is_the_same_model(showo2: Showo2Policy, folder: Path, tmp_path: Path) -> None:
    showo2.save(tmp_path / "again")
    again = load_policy(tmp_path / "again")
    assert isinstance(again, Showo2Policy)
    for (name, one), (_, other) in zip(showo2.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert model_type(folder) == "showo2"
    assert "showo.lm_head.weight" not in {n for n, _ in again.model.named_parameters()}


REFUSED = {
    "draws from text alone": ("generate", ("image",), 1),
    "answers or draws, not text and image": ("reason", ("text", "image"), 0),
    "2 images: a Show-o2 reads one": ("understand", ("text",), 2),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_cannot_do_is_refused(showo2: Showo2Policy, words: str) -> None:
    task, output, images = REFUSED[words]
    prompt = Prompt("p", task, (*[torch.zeros(3, 32, 32)] * images, "a star"), output)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        showo2.sample([prompt], SAMPLING, [0])
    with pytest.raises(InputError, match="multiples of 16"):
        showo2.sample([Prompt("p", "generate", ("a star",), ("image",))], replace(SAMPLING, image_size=(40, 40)), [0])
    with pytest.raises(InputError, match="a marker of the model"):
        showo2.sample([Prompt("p", "generate", ("a <|im_end|>",), ("image",))], SAMPLING, [0])


def test_a_judged_context_has_one_image(showo2: Showo2Policy) -> None:
    """Of several, the others were left out."""
    with pytest.raises(InputError, match="'what is it': 2 images: a Show-o2 reads one: give one"):
        showo2.text_logprob([(torch.zeros(3, 32, 32), torch.ones(3, 32, 32), "what is it")], ["red"])


DAMAGED = {
    "llm/tokenizer.json": (b"{", "truncated or damaged"),
    "llm/config.json": (b"[]", "config.json"),
    "vision/config.json": (None, "vision/config.json"),
    "model.safetensors": (b"12", "model.safetensors"),
    "vae/diffusion_pytorch_model.safetensors": (None, "diffusion_pytorch_model.safetensors"),
    "config.json": (b'{"_class_name": "Showo2Qwen2_5", "hidden_size": 8}', "clip_latent_dim"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    content, words = DAMAGED[name]
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as found:
        load_policy(broken)
    assert "\n" not in str(found.value)


def test_weights_of_another_size_are_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "clip_latent_dim": 16}))
    with pytest.raises(InputError, match="has shape"):
        load_policy(other)
