"""Sampling and replay: the pipeline's own images without noise, the replay law with it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replays import members

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.adapter import AdapterConfig, add_adapter
from lvrpo.policies.base import FlowPolicy, RolloutPolicy, Sampling, SavedPolicy
from lvrpo.policies.diffusers_flow import pipelines
from lvrpo.policies.diffusers_flow.pipelines import pack, unpack
from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
from lvrpo.policies.loading import load_policy, possible_tasks
from lvrpo.sampling import derive_seed, guide, normal_noise, shift_time
from lvrpo.training.memory_estimate import LiveBytes, fake_weights
from lvrpo.types import FlowSegment, Prompt, Trajectory

ODE = Sampling(group_size=2, num_steps=5, solver="euler", image_size=(32, 32))
SDE = replace(ODE, group_size=4, sampler="flow_sde", window=(0, 1, 3))
DRAWINGS = {
    "plain": SDE,
    "guided": replace(SDE, guidance_scale=4.0),
    "guided-one-gradient": replace(SDE, guidance_scale=4.0, guided_logprobs="detach_uncond"),
    "guided-in-part": replace(SDE, guidance_scale=4.0, guidance_interval=(0.9, 1.0), guidance_renorm="global"),
    "dance": replace(SDE, sampler="dance_sde", noise_level=0.3, logprob_reduction="sum", shared_noise=True),
    "cps": replace(SDE, sampler="cps", guidance_scale=2.0, solver="dpm_solver", timestep_shift=2.0),
    "flash": replace(SDE, window=(0, 1), steps_after_window=2),
}


def segment(trajectory: Trajectory) -> FlowSegment:
    found = trajectory.segments[-1]
    assert isinstance(found, FlowSegment)
    return found


def of_the_pipeline(policy: DiffusersPolicy, trajectories: list[Trajectory], guidance: float) -> dict[str, Any]:
    """The arguments with which the pipeline draws as ``ODE`` does."""
    kind = type(policy.pipeline).__name__
    grid = policy.pipeline.grid((32, 32))
    shape = grid[0] * grid[1], policy.pipeline.channels
    noise = normal_noise([derive_seed(t.seed, "noise") for t in trajectories], shape)
    scale = {
        "QwenImage": {"true_cfg_scale": guidance, "negative_prompt": " "},
        "ZImage": {"guidance_scale": guidance - 1},
    }.get(kind, {"guidance_scale": guidance})
    area = {"max_area": 32 * 32} if kind == "FluxKontext" else {}
    latents = noise if is_packed(policy) else unpack(noise, grid, policy.pipeline.patch)
    return {"latents": latents, "num_inference_steps": 5, "height": 32, "width": 32, **scale, **area}


def is_packed(policy: DiffusersPolicy) -> bool:
    """Whether the latents of the pipeline are patches."""
    return type(policy.pipeline).__name__ in ("Flux", "FluxKontext", "QwenImage")


def ode(policy: DiffusersPolicy, guidance: float) -> Sampling:
    """The pipeline's own way to guide."""
    return replace(ODE, guidance_scale=guidance, guidance_renorm=policy.pipeline.defaults.guidance_renorm)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_without_noise_the_image_is_that_of_the_pipeline(
    kind: str,
    guidance: float,
    policy: DiffusersPolicy,
    folders: Callable[[str], Path],
    pipeline: Callable[[Path], Any],
    prompts: list[Prompt],
) -> None:
    pipe = pipeline(folders(kind))
    groups = policy.sample(prompts[:2], ode(policy, guidance), [3, 4])
    for group in groups:
        given = of_the_pipeline(policy, list(group.trajectories), guidance) | {"num_images_per_prompt": 2}
        (text,) = group.prompt.parts
        latents = pipe(prompt=text, output_type="latent", **given)[0]
        images = pipe(prompt=text, output_type="pt", **given)[0]
        own = torch.stack([segment(t).latent for t in group.trajectories])
        assert (own - (latents if is_packed(policy) else pack(latents, 2))).abs().max() < 2e-5
        assert (torch.stack([segment(t).image for t in group.trajectories]) - images).abs().max() < 2e-5
    one, other = (segment(group.trajectories[0]).latent for group in groups)
    assert not torch.equal(one, other)


def test_the_policy_keeps_the_contract(policy: DiffusersPolicy, folders: Callable[[str], Path], kind: str) -> None:
    assert isinstance(policy, RolloutPolicy)
    assert isinstance(policy, FlowPolicy)
    assert isinstance(policy, SavedPolicy)
    assert possible_tasks(folders(kind)) == policy.tasks == ("generate",)
    assert isinstance(load_policy(folders(kind)), DiffusersPolicy)
    assert not policy.training
    assert not policy.train().training


@pytest.mark.parametrize("name", DRAWINGS)
def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(
    name: str, kind: str, policy: DiffusersPolicy, prompts: list[Prompt]
) -> None:
    if policy.pipeline.guidance == "embedded" and name not in ("plain", "flash"):
        pytest.skip("its call is the same with any of these")
    trajectories = members(policy.sample(prompts[:2], DRAWINGS[name], [1, 2]))
    assert len(segment(trajectories[0]).timesteps) == (5 if name == "flash" else 6)
    shuffled = [trajectories[i] for i in (5, 0, 3, 6, 1, 7, 4, 2)]
    with torch.no_grad():
        for order in (trajectories, shuffled, trajectories[2:3], trajectories[::-3]):
            limit = 0.0 if order is trajectories else 1e-6
            for trajectory, (row,) in zip(order, policy.logprobs(order), strict=True):
                sampled = segment(trajectory).behavior_logprobs
                scale = sampled.abs().clamp(min=1)
                assert ((row.logprobs - sampled).abs() / scale).max() <= limit
                recorded = segment(trajectory).means
                assert row.means is not None
                assert recorded is not None
                assert (row.means - recorded).abs().max() <= 10 * limit
    assert policy.logprobs(trajectories, ["text"]) == [[]] * len(trajectories)


def test_the_empty_prompt_has_no_gradient_where_it_is_detached(
    policies: Callable[[str], DiffusersPolicy], prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policies("sd3-tiny")
    weight = next(policy.transformer.parameters())

    def gradient(sampling: Sampling) -> torch.Tensor:
        (row,) = policy.logprobs(members(policy.sample(prompts[:1], replace(sampling, group_size=1), [1])))
        return torch.autograd.grad(row[0].logprobs.sum(), weight)[0]

    detached, joint = gradient(DRAWINGS["guided-one-gradient"]), gradient(DRAWINGS["guided"])
    monkeypatch.setattr(
        "lvrpo.policies.flow_policy.guide", lambda v, unguided, *rest: guide(v, unguided.detach(), *rest)
    )
    by_hand = gradient(DRAWINGS["guided"])
    assert (detached - by_hand).norm() <= 1e-4 * by_hand.norm()
    assert (detached - joint).norm() > 0.01 * by_hand.norm()


def test_groups_do_not_depend_on_the_batch(policy: DiffusersPolicy, prompts: list[Prompt]) -> None:
    whole = policy.sample(prompts, DRAWINGS["plain"], [1, 2, 3])
    (alone,) = policy.sample(prompts[1:2], DRAWINGS["plain"], [2])
    policy.limit_tokens(600)  # two or so at once
    try:
        cut = policy.sample(prompts, DRAWINGS["plain"], [1, 2, 3])
        replayed = policy.logprobs(members(cut))
    finally:
        policy.limit_tokens(None)
    for one, other in zip([*members(whole), *whole[1].trajectories], [*members(cut), *alone.trajectories], strict=True):
        assert one.seed == other.seed
        torch.testing.assert_close(segment(one).latent, segment(other).latent, rtol=1e-5, atol=1e-5)
    for trajectory, (row,) in zip(members(cut), replayed, strict=True):
        assert torch.equal(row.logprobs, segment(trajectory).behavior_logprobs)


def test_velocities_mix_the_branches_of_guidance(policy: DiffusersPolicy, prompts: list[Prompt], kind: str) -> None:
    trajectories = members(policy.sample(prompts, ODE, [1, 2, 3]))
    x_t, t = torch.stack([segment(one).latent for one in trajectories]), torch.linspace(0.2, 0.9, 6)
    v, unguided, guided = (policy.velocity(trajectories, x_t, t, scale) for scale in (1.0, 0.0, 3.0))
    assert (v - unguided).abs().max() > 1e-4
    if policy.pipeline.guidance == "embedded":
        assert (guided - v).abs().max() > 1e-4
    else:
        torch.testing.assert_close(guided, unguided + 3 * (v - unguided), rtol=1e-4, atol=1e-5)
    alone = policy.velocity(trajectories[4:5], x_t[4:5], t[4:5], 3.0)
    torch.testing.assert_close(alone, guided[4:5], rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_transformer_alone_and_are_the_same_when_computed_again(
    kind: str, folders: Callable[[str], Path], prompts: list[Prompt]
) -> None:
    policy = DiffusersPolicy.load(folders(kind))
    trajectories = members(policy.sample(prompts[:1], replace(SDE, guidance_scale=3.0), [1]))

    def gradients() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        torch.stack([rows[0].logprobs.sum() for rows in policy.logprobs(trajectories)]).sum().backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    kept = gradients()
    policy.checkpoint_gradients(True)
    again = gradients()
    policy.checkpoint_gradients(False)
    assert {name.partition(".")[0] for name in kept} == {"transformer"}
    assert sum(bool(g.any()) for g in kept.values()) > len(kept) / 2
    assert kept.keys() == again.keys()
    assert all(torch.allclose(kept[name], again[name], rtol=1e-5, atol=1e-7) for name in kept)
    frozen = [getattr(policy.pipeline.pipe, name) for name in ("vae", "text_encoder")]
    assert not any(p.requires_grad for part in frozen for p in part.parameters())
    groups = policy.parameter_groups()
    assert len(groups["generate"]) == len(list(policy.parameters()))


def test_a_prompt_is_encoded_once_for_all_who_use_it(
    folders: Callable[[str], Path], prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = DiffusersPolicy.load(folders("sd3-tiny"))
    encoded: list[str] = []
    right = policy.pipeline.encode_prompt
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda text: encoded.append(text) or right(text))
    trajectories = members(policy.sample(prompts, DRAWINGS["guided"], [1, 2, 3]))
    reference = policy.make_reference()
    assert reference.pipeline is policy.pipeline
    assert reference.transformer is not policy.transformer
    assert not any(p.requires_grad for p in reference.parameters())
    reference.logprobs(trajectories)
    assert sorted(encoded) == sorted(["", *(str(prompt.parts[0]) for prompt in prompts)])
    monkeypatch.setattr(pipelines, "ENCODED_PROMPTS", 2)
    policy.sample(prompts, DRAWINGS["plain"], [1, 2, 3])
    assert len(policy.pipeline._encoded) == 2
    again = policy.sample(prompts, DRAWINGS["guided"], [1, 2, 3])
    assert torch.equal(segment(members(again)[0]).latent, segment(trajectories[0]).latent)


def test_images_are_decoded_a_few_at_a_time(
    policy: DiffusersPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.stack([segment(one).latent for one in members(policy.sample(prompts, ODE, [1, 2, 3]))])
    sizes: list[int] = []
    vae, grid = policy.pipeline.pipe.vae, policy.pipeline.grid((32, 32))
    right = vae.decode
    monkeypatch.setattr(vae, "decode", lambda x, **named: sizes.append(len(x)) or right(x, **named))
    whole = policy.pipeline.decode(latents, grid)
    monkeypatch.setattr(pipelines, "DECODED_PIXELS", 2 * 32 * 32)
    parts = policy.pipeline.decode(latents, grid)
    assert sizes == [6, 2, 2, 2]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, parts, strict=True))
    assert all(image.min() >= 0 and image.max() <= 1 and image.shape == (3, 32, 32) for image in whole)


def test_times_are_those_of_the_scheduler(policies: Callable[[str], DiffusersPolicy]) -> None:
    sd3, flux = policies("sd3-tiny"), policies("flux-tiny")
    assert sd3.timestep_shift() == 3.0
    times = sd3.pipeline.timesteps(ODE, (4, 4))
    assert times[0] == 1
    assert times[-1] == 0
    tau = torch.linspace(1, 0.003 / 1.002, 5)  # the shifted time of step 1000 of 1000, as diffusers has it
    torch.testing.assert_close(times[:-1], shift_time(tau, 3.0))
    assert torch.equal(times, sd3.pipeline.timesteps(replace(ODE, timestep_shift=3.0), (4, 4)))
    # mu is linear in the number of patches: .5 at 256, 1.15 at 4096
    mu = 0.5 + (16 - 256) * 0.65 / 3840
    assert flux.timestep_shift() != flux.pipeline.shift((4, 4))
    assert flux.pipeline.shift((4, 4)) == pytest.approx(torch.tensor(mu).exp())
    times = flux.pipeline.timesteps(ODE, (4, 4))
    torch.testing.assert_close(times, shift_time(torch.linspace(1, 0, 6), flux.pipeline.shift((4, 4))))
    plain = flux.pipeline.timesteps(replace(ODE, timestep_shift=1.0), (4, 4))
    torch.testing.assert_close(plain, torch.linspace(1, 0, 6))
    # after the window: equal in unshifted time
    fewer = sd3.pipeline.timesteps(DRAWINGS["flash"], (4, 4))
    assert torch.equal(fewer[:3], sd3.pipeline.timesteps(SDE, (4, 4))[:3])
    rest = shift_time(fewer[2:], 1 / 3)
    torch.testing.assert_close(rest, rest[0] * torch.tensor([1.0, 0.5, 0.0]))


def test_a_saved_pipeline_is_one_of_diffusers(
    kind: str, folders: Callable[[str], Path], pipeline: Callable[[Path], Any], prompts: list[Prompt]
) -> None:
    policy = DiffusersPolicy.load(folders(kind))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01
    policy.save(Path("saved"))
    policy.save(Path("saved"))
    again = load_policy("saved")
    (one,), (other,) = (p.sample(prompts[:1], ODE, [1]) for p in (policy, again))
    assert torch.equal(segment(one.trajectories[0]).image, segment(other.trajectories[0]).image)
    assert isinstance(again, DiffusersPolicy)
    again.save(Path("saved"))  # over the files that it was read from
    assert "saved" not in (Path("saved") / "transformer/config.json").read_text()
    given = of_the_pipeline(policy, [one.trajectories[0]], 1.0)
    images = pipeline(Path("saved"))(prompt="a red circle", output_type="pt", **given)[0]
    assert (images[0] - segment(one.trajectories[0]).image).abs().max() < 2e-5


def test_a_pipeline_without_weights_draws_without_values(
    folders: Callable[[str], Path], kind: str, prompts: list[Prompt]
) -> None:
    shutil.copytree(folders(kind), "described", ignore=shutil.ignore_patterns("*.safetensors"))
    policy = DiffusersPolicy.from_config(Path("described"))
    fake_weights([policy, *policy.frozen_parts])
    with LiveBytes(()) as live, torch.no_grad():
        (group,) = policy.sample(prompts[:1], ODE, [1])
    assert segment(group.trajectories[0]).image.shape == (3, 32, 32)
    assert live.peak > 0


ADAPTED = {"z-image-tiny": {"to_q", "0", "w1", "w2", "w3"}}
"""Names of adapted layers where they are others."""


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of peft
def test_an_adapter_is_read_by_peft_into_the_pipeline(
    kind: str, folders: Callable[[str], Path], pipeline: Callable[[Path], Any], prompts: list[Prompt]
) -> None:
    peft = pytest.importorskip("peft")
    policy = DiffusersPolicy.load(folders(kind))
    (before,) = policy.sample(prompts[:1], ODE, [1])
    add_adapter(policy, AdapterConfig(rank=2, modules=("attention", "mlp")), str(folders(kind)))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert ADAPTED.get(kind, {"to_q", "to_add_out", "2"}) <= {
        name.split(".lora_")[0].rpartition(".")[2] for name in trained
    }
    (same,) = policy.sample(prompts[:1], ODE, [1])
    assert torch.equal(segment(same.trajectories[0]).latent, segment(before.trajectories[0]).latent)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    (moved,) = policy.sample(prompts[:1], ODE, [1])
    assert not torch.equal(segment(moved.trajectories[0]).latent, segment(before.trajectories[0]).latent)
    reference = policy.make_reference()
    (base,) = reference.sample(prompts[:1], ODE, [1])
    assert torch.equal(segment(base.trajectories[0]).latent, segment(before.trajectories[0]).latent)

    policy.save(Path("adapter"))
    assert possible_tasks("adapter") == policy.tasks
    again = load_policy("adapter")
    (loaded,) = again.sample(prompts[:1], ODE, [1])
    assert torch.equal(segment(loaded.trajectories[0]).latent, segment(moved.trajectories[0]).latent)
    given = of_the_pipeline(policy, [moved.trajectories[0]], 1.0)
    pipe = pipeline(folders(kind))
    pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, "adapter")
    image = pipe(prompt="a red circle", output_type="pt", **given)[0][0]
    assert (image - segment(moved.trajectories[0]).image).abs().max() < 2e-5


def test_an_edit_is_that_of_the_pipeline_beside_prompts_without_a_source(
    policies: Callable[[str], DiffusersPolicy],
    folders: Callable[[str], Path],
    pipeline: Callable[[Path], Any],
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.pipelines.flux import pipeline_flux_kontext

    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(32, 32)])
    policy, pipe = policies("kontext-tiny"), pipeline(folders("kontext-tiny"))
    assert possible_tasks(folders("kontext-tiny")) == policy.tasks == ("generate", "edit")
    generator = torch.Generator().manual_seed(1)
    sources = [torch.rand(3, *size, generator=generator) for size in ((32, 32), (20, 30))]
    edits = [Prompt(f"e{i}", "edit", (source, "make it red"), ("image",)) for i, source in enumerate(sources)]
    mixed = [edits[0], prompts[0], edits[1]]
    groups = policy.sample(mixed, replace(ODE, guidance_scale=2.5), [3, 4, 3])
    for group, source in zip(groups, (sources[0], None, sources[1]), strict=True):
        given = of_the_pipeline(policy, list(group.trajectories), 2.5) | {"num_images_per_prompt": 2}
        image = None if source is None else to_pil(source)
        images = pipe(image=image, prompt=group.prompt.parts[-1], output_type="pt", **given)[0]
        assert (torch.stack([segment(t).image for t in group.trajectories]) - images).abs().max() < 2e-5
    one, _, other = (segment(group.trajectories[0]).latent for group in groups)
    assert (one - other).abs().max() > 1e-3  # of one seed and text
    # the replay, and velocities of a batch with both kinds
    trajectories = members(policy.sample(mixed, SDE, [1, 2, 3]))
    with torch.no_grad():
        for order, limit in ((trajectories, 0.0), (trajectories[::-2], 1e-6)):
            for trajectory, (row,) in zip(order, policy.logprobs(order), strict=True):
                sampled = segment(trajectory).behavior_logprobs
                assert ((row.logprobs - sampled).abs() / sampled.abs().clamp(min=1)).max() <= limit
        x_t, t = torch.stack([segment(one).latent for one in trajectories]), torch.linspace(0.1, 0.9, len(trajectories))
        together = policy.velocity(trajectories, x_t, t, 2.5)
        for i in (0, 5, 11):
            alone = policy.velocity(trajectories[i : i + 1], x_t[i : i + 1], t[i : i + 1], 2.5)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    with_source, without = (policy.count_tokens(trajectories[i]).image for i in (0, 4))
    assert with_source - without == 16
    with pytest.raises(InputError, match="prompt 'e': has 2 images: this model edits one: leave the others out"):
        policy.sample([Prompt("e", "edit", (*sources, "join them"), ("image",))], ODE, [1])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("u", "understand", ("what is it",), ("text",)), "draws and writes nothing"),
        (
            Prompt("e", "generate", (torch.zeros(3, 32, 32), "redder"), ("image",)),
            "from text alone, not from an image",
        ),
        (Prompt("l", "generate", ("letters " * 100,), ("image",)), r"prompt 'l': a prompt of \d+ tokens: .* limit is"),
        (Prompt("l", "generate", ("a" * 1_000_000,), ("image",)), r"prompt 'l': a prompt of \d+ tokens: 'aaaa"),
    ],
)
def test_what_it_cannot_be_asked_is_one_line(prompt: Prompt, words: str, policy: DiffusersPolicy) -> None:
    with pytest.raises(InputError, match=words) as caught:
        policy.sample([prompt], ODE, [0])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"image_size": (33, 32)}, r"image_size=\[33, 32\]: must be multiples of 8: use \[32, 32\]"),
        ({"image_size": (32, 256)}, "this model draws sides of up to 128"),
        ({"image_guidance_scale": 2.0}, "image_guidance_scale=2.0: this model guides by text alone: use 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    setting: dict[str, Any], words: str, policies: Callable[[str], DiffusersPolicy]
) -> None:
    with pytest.raises(InputError, match=words):
        policies("sd3-tiny").check_sampling(replace(ODE, **setting))


def test_guidance_that_is_an_input_has_one_branch(policies: Callable[[str], DiffusersPolicy]) -> None:
    policy = policies("flux-tiny")
    policy.check_sampling(replace(ODE, guidance_scale=3.0, image_size=(48, 32)))
    assert policy.default_sampling("generate").guidance_scale == 3.5
    with pytest.raises(InputError, match="guidance_renorm=global: this model has a guidance scale as an input"):
        policy.check_sampling(replace(ODE, guidance_renorm="global"))
    schnell = copy.copy(policy.pipeline)
    schnell.config = SimpleNamespace(guidance_embeds=False)
    unguided = DiffusersPolicy(policy.transformer, schnell)
    assert unguided.default_sampling("generate").guidance_scale == 1
    with pytest.raises(InputError, match=r"this model has no guidance: use 1\.0"):
        unguided.check_sampling(replace(ODE, guidance_scale=2.0))
