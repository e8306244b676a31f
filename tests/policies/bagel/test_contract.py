"""BAGEL keeps the contract of policies: replay, company, sizes, judging, supervised losses, command line."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as PilImage
from replays import members, worst

from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.policies import latent_cache
from lvrpo.policies.bagel import encoders
from lvrpo.policies.bagel.policy import THINK_THEN_ANSWER, THINK_THEN_DRAW, BagelPolicy
from lvrpo.policies.base import Policy, Sampling
from lvrpo.types import Example, FlowSegment, Image, Prompt, TextSegment, Trajectory

BASE = Sampling(group_size=3, max_new_tokens=5, num_steps=4, solver="euler")
DRAWINGS = {
    "plain": replace(BASE, sampler="flow_sde", window=(0, 2)),
    "guided": replace(
        BASE, sampler="cps", noise_level=0.8, window=(0, 1), guidance_scale=3.0, guidance_renorm="global"
    ),
    "guided-thrice": replace(
        BASE,
        sampler="flow_sde",
        window=(0, 2, 3),
        guidance_scale=4.0,
        image_guidance_scale=2.0,
        guidance_renorm="text_channel",
        guidance_interval=(0.6, 1.0),
        guidance_renorm_min=0.1,
    ),
}
TOLERANCE = 2e-6
"""Of a replay in float32 in other company, relative to log-probs above 1."""


def image(seed: int, height: int = 16, width: int = 16) -> Image:
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255


def prompts() -> list[Prompt]:
    """All tasks, with images of three sizes; two questions about one image."""
    shared = image(1)
    return [
        Prompt("u0", "understand", (shared, "what color is it"), ("text",)),
        Prompt("u1", "understand", (shared, "is it a red circle"), ("text",)),
        Prompt("u2", "understand", (image(2, 9, 16), "is it blue"), ("text",)),
        Prompt("g0", "generate", ("a red circle",), ("image",)),
        Prompt("g1", "generate", ("two blue squares and more",), ("image",)),
        Prompt("e0", "edit", (image(3), "make it red"), ("image",)),
        Prompt("e1", "edit", (image(4, 8, 16), "make it blue"), ("image",)),
        Prompt("e2", "edit", (image(5, 16, 16), image(4, 8, 16), "mix them"), ("image",)),
        Prompt("r0", "reason", ("draw one",), ("text", "image")),
        Prompt("r1", "reason", (image(6), "what is the sum"), ("text",)),
    ]


def rollout(policy: Policy, asked: Sequence[Prompt], sampling: Sampling) -> list[Trajectory]:
    groups = policy.sample(asked, sampling, [100 + int(p.id[1:]) + ord(p.id[0]) for p in asked])
    return members(groups)


@pytest.mark.parametrize("name", DRAWINGS)
def test_replay_law(name: str, small: BagelPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectories = rollout(small, prompts(), DRAWINGS[name])
    assert worst(small, trajectories) == 0
    others = [worst(small, trajectories[::-1]), worst(small, trajectories[1::2]), worst(small, trajectories[4:5])]
    monkeypatch.setattr(small, "max_tokens", 200)
    others.append(worst(small, trajectories))
    print(f"{name}: replayed in other company {max(others):.1e}")
    assert max(others) <= TOLERANCE


def test_company_does_not_matter(small: BagelPolicy) -> None:
    sampling = DRAWINGS["guided-thrice"]
    asked = prompts()
    together = small.sample(asked, sampling, list(range(len(asked))))
    for i, prompt in enumerate(asked):
        (alone,) = small.sample([prompt], sampling, [i])
        for one, other in zip(alone.trajectories, together[i].trajectories, strict=True):
            for a, b in zip(one.segments, other.segments, strict=True):
                if isinstance(a, TextSegment):
                    assert isinstance(b, TextSegment)
                    assert torch.equal(a.tokens, b.tokens)
                else:
                    assert isinstance(a, FlowSegment)
                    assert isinstance(b, FlowSegment)
                    assert float((a.latent - b.latent).abs().max()) < 2e-5


def test_sizes_of_drawings(small: BagelPolicy) -> None:
    groups = small.sample(prompts(), replace(BASE, image_size=(8, 12)), list(range(10)))
    sizes = {
        g.prompt.id: tuple(g.trajectories[0].image.shape[1:]) for g in groups if g.trajectories[0].image is not None
    }
    assert sizes == {"g0": (8, 12), "g1": (8, 12), "e0": (16, 16), "e1": (8, 16), "e2": (8, 16), "r0": (8, 12)}
    for group in groups:
        image = group.trajectories[0].image
        if image is not None:
            assert torch.equal((image * 255).round() / 255, image)
    (own,) = small.sample(prompts()[3:4], BASE, [0])
    assert own.trajectories[0].image is not None
    assert own.trajectories[0].image.shape == (3, 16, 16)


def test_a_drawing_smaller_than_any_source_is_replayed(small: BagelPolicy) -> None:
    trajectories = rollout(small, prompts()[3:5], replace(DRAWINGS["plain"], image_size=(4, 4)))
    assert worst(small, trajectories) == 0
    x_t = torch.stack([t.segments[-1].latent for t in trajectories if isinstance(t.segments[-1], FlowSegment)])
    assert small.velocity(trajectories, x_t, torch.full((len(x_t),), 0.5)).shape == x_t.shape


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (Prompt("g0", "generate", ("a",), ("image",)), replace(BASE, image_size=(10, 16)), "use multiples of 4"),
        (Prompt("g0", "generate", ("a",), ("image",)), replace(BASE, image_size=(0, 16)), "use multiples of 4"),
        (
            Prompt("g0", "generate", ("a",), ("image",)),
            replace(BASE, image_size=(28, 16)),
            "28 pixels: this model can draw up to 24 x 24: shrink it",
        ),
        (Prompt("e0", "edit", ("make it red",), ("image",)), BASE, "task 'edit' needs an image"),
        (Prompt("u0", "understand", ("what is it",), ("text",)), BASE, "task 'understand' needs an image"),
        (Prompt("g0", "generate", ("a " * 40_000,), ("image",)), BASE, "the limit is 32768: shorten it"),
    ],
)
def test_bad_prompts(prompt: Prompt, sampling: Sampling, message: str, small: BagelPolicy) -> None:
    with pytest.raises(InputError, match=message) as caught:
        small.sample([prompt], sampling, [0])
    assert "\n" not in str(caught.value)


def test_what_is_written_and_drawn_counts(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "short"))
    path = folder / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    policy = BagelPolicy.load(folder)
    assert policy.default_sampling("understand").max_new_tokens == 32
    asked = Prompt("u", "understand", (image(1), "what is it"), ("text",))
    room = 64 - 2 - policy.count_tokens(Trajectory(asked, 0, (), 0)).context
    policy.sample([asked], replace(BASE, max_new_tokens=room), [0])
    with pytest.raises(InputError, match=rf"prompt 'u': .* shorten it, or write less: max_new_tokens <= {room}$"):
        policy.sample([asked], replace(BASE, max_new_tokens=room + 1), [0])
    drawn = Prompt("g", "generate", ("a",), ("image",))
    policy.sample([drawn], BASE, [0])
    with pytest.raises(InputError, match=r"prompt 'g': \d+ tokens and 38 after them, the limit is 64: shorten it$"):
        policy.sample([replace(drawn, parts=("a" * 40,))], replace(BASE, image_size=(24, 24)), [0])
    for judge in (
        lambda: policy.text_logprob([(image(1), "q")], ["a b " * 40]),
        lambda: policy.image_logprob([("a b " * 40,)], [image(1)], draws=1, seeds=[0]),
    ):
        with pytest.raises(InputError, match=r"to judge: \d+ tokens and \d+ after them, the limit is 64"):
            judge()
    with pytest.raises(InputError, match=r"example 'u': \d+ tokens, the limit is 64"):
        policy.supervised_losses([Example(asked, ("a b " * 40,))], torch.Generator().manual_seed(0))
    PilImage.new("RGB", (16, 16)).save(tmp_path / "black.png")
    ask = ["ask", str(folder), "--image", str(tmp_path / "black.png"), "q", "--device", "cpu"]
    assert main([*ask, "--max-new-tokens", "100"]) == 2
    assert "or write less: max_new_tokens <= " in capsys.readouterr().err


def test_thinking_begins_with_the_published_instruction(small: BagelPolicy) -> None:
    words = small.tokenizer
    draw, answer = (small._row(prompt) for prompt in prompts()[8:])
    assert words.decode(draw[0].ids) == THINK_THEN_DRAW
    assert words.decode(answer[0].ids) == THINK_THEN_ANSWER
    assert [piece.span.kind for piece in answer] == ["text", "read", "text"]
    assert [piece.span.kind for piece in small._row(prompts()[5])] == ["clean", "read", "text"]


def test_condition_noise_is_a_function_of_the_image(small: BagelPolicy) -> None:
    one, other = image(1), image(1)
    assert torch.equal(small.encoders.encode_latents([one]), small.encoders.encode_latents([other]))
    both = small.encoders.encode_latents([image(2), one])
    assert float((both[1] - small.encoders.encode_latents([one])[0]).abs().max()) < 1e-5


def test_judges(small: BagelPolicy) -> None:
    contexts = [(image(1), "what is it"), ("two circles",), (image(2, 9, 16),)]
    texts = ["red", "a blue square", "one"]
    together = small.text_logprob(contexts, texts)
    alone = torch.cat([small.text_logprob([c], [t]) for c, t in zip(contexts, texts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    images = [image(3), image(4, 8, 16), image(5)]
    drawn = [("a",), ("b c",), (image(1), "d")]
    together = small.image_logprob(drawn, images, draws=2, seeds=[3, 4, 3])
    alone = torch.cat([small.image_logprob([drawn[i]], [images[i]], draws=2, seeds=[3 + i]) for i in range(2)])
    torch.testing.assert_close(together[:2], alone, rtol=1e-5, atol=1e-4)


def examples() -> list[Example]:
    asked = prompts()
    outputs = ("red", "no", "yes", image(11), image(12), image(13), image(14, 8, 16), image(15, 8, 16))
    rows = [Example(prompt, (output,)) for prompt, output in zip(asked, outputs, strict=False)]
    return [*rows, Example(asked[8], ("one", image(16))), Example(asked[9], ("seven",))]


def test_supervised_text_is_the_judge_of_text(small: BagelPolicy) -> None:
    example = examples()[0]
    loss = small.supervised_losses([example], torch.Generator().manual_seed(0))["text"]
    judged = small.text_logprob([example.prompt.parts], ["red"])
    assert float(loss.detach()) == pytest.approx(-float(judged), rel=1e-5)


def test_conditions_may_be_left_out_by_whoever_makes_the_rows(small: BagelPolicy) -> None:
    bare = [Example(Prompt("e0", "edit", parts, ("image",)), (image(1),)) for parts in ((), ("make it red",))]
    losses = small.supervised_losses(bare, torch.Generator().manual_seed(0))
    assert set(losses) == {"image"}


def test_supervised_losses_do_not_depend_on_the_packing(small: BagelPolicy) -> None:
    together = small.supervised_losses(examples(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    alone = [small.supervised_losses([example], generator) for example in examples()]
    numbers = [float(found["image"].detach()) for found in alone if "image" in found]
    sizes = [4 * 4, 4 * 4, 4 * 4, 2 * 4, 2 * 4, 4 * 4]
    mean = sum(n * s for n, s in zip(numbers, sizes, strict=True)) / sum(sizes)
    assert float(together["image"].detach()) == pytest.approx(mean, rel=1e-5)


def test_both_experts_learn(saved: Path) -> None:
    policy = BagelPolicy.load(saved)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    seen = []
    for _ in range(25):
        losses = policy.supervised_losses(examples(), torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        (losses["text"] + losses["image"]).backward()
        optimizer.step()
        seen.append((float(losses["text"].detach()), float(losses["image"].detach())))
    unused = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    assert seen[-1][0] < 0.5 * seen[0][0]
    assert seen[-1][1] < 0.9 * seen[0][1]


def test_frozen_stays_and_saved_is_the_same_policy(saved: Path, tmp_path: Path) -> None:
    policy = BagelPolicy.load(saved)
    frozen = policy.make_reference()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01
    assert not any(p.requires_grad for p in frozen.parameters())
    before, after = (rollout(p, prompts()[3:4], BASE)[0].segments[0] for p in (frozen, policy))
    assert isinstance(before, FlowSegment)
    assert isinstance(after, FlowSegment)
    assert not torch.equal(before.latent, after.latent)
    policy.save(tmp_path / "saved")
    again = rollout(BagelPolicy.load(tmp_path / "saved"), prompts()[3:4], BASE)[0].segments[0]
    assert isinstance(again, FlowSegment)
    assert torch.equal(again.latent, after.latent)


def test_bfloat16_is_near(saved: Path, small: BagelPolicy) -> None:
    narrow = BagelPolicy.load(saved, dtype=torch.bfloat16)
    trajectories = rollout(small, prompts(), DRAWINGS["plain"])
    drawn = [t for t in trajectories if t.prompt.id in ("g0", "g1")]
    x_t = torch.stack([t.segments[-1].latent for t in drawn if isinstance(t.segments[-1], FlowSegment)])
    t = torch.full((len(x_t),), 0.7)
    with torch.no_grad():
        v, v_narrow = small.velocity(drawn, x_t, t), narrow.velocity(drawn, x_t, t)
    assert v_narrow.dtype == torch.float32
    assert float((v - v_narrow).norm() / v.norm()) < 5e-2
    own = rollout(narrow, prompts(), DRAWINGS["plain"])
    assert worst(narrow, own) == 0


def test_command_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.png"
    pixels = (image(7, 8, 16) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    PilImage.fromarray(pixels).save(source)
    model, device = str(saved), ["--device", "cpu"]
    few = [*device, "--max-new-tokens", "4"]
    assert main(["ask", model, "--image", str(source), "what is it", *few]) == 0
    assert main(["ask", model, "--image", str(source), "what is it", "--dtype", "bfloat16", *few]) == 0
    assert main(["ask", model, "--image", str(source), "what is it", "--think", *few]) == 0
    generation = ["--num-steps", "2", *device]
    out = tmp_path / "out"
    assert main(["generate", model, "--prompt", "a red circle", "--out", str(out), "--size", "12x8", *generation]) == 0
    with PilImage.open(out / "00000.png") as drawn:
        assert drawn.size == (12, 8)
    thought = tmp_path / "thought"
    think = ["--think", "--max-new-tokens", "4"]
    assert main(["generate", model, "--prompt", "a red circle", "--out", str(thought), *think, *generation]) == 0
    assert "thought" in json.loads((thought / "index.jsonl").read_text())
    edited = tmp_path / "edited.png"
    edit = ["edit", model, "--image", str(source), "make it red", "--out"]
    assert main([*edit, str(edited), *generation]) == 0
    with PilImage.open(edited) as drawn:
        assert drawn.size == (16, 8)
    assert capsys.readouterr().err == ""
    for name, chosen in {
        "default": [],
        "renorm": ["--renorm", "none"],
        "least": ["--renorm-min", "0.9"],
        "interval": ["--guidance-interval", "0", "0.1"],
    }.items():
        assert main([*edit, str(tmp_path / f"{name}.png"), *generation, *chosen]) == 0
    drawings = {(tmp_path / f"{name}.png").read_bytes() for name in ("default", "renorm", "least", "interval")}
    assert len(drawings) == 4
    capsys.readouterr()
    for chosen, message in {
        ("--renorm", "local"): "invalid choice: 'local'",
        ("--renorm-min", "2"): "2: must be a number from 0 to 1",
        ("--guidance-interval", "0.5", "0.5"): "--guidance-interval 0.5 0.5: guides no step",
        ("--guidance-interval", "0", "nan"): "nan: must be a number from 0 to 1",
    }.items():
        assert main([*edit, str(tmp_path / "bad.png"), *generation, *chosen]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    odd = ["generate", model, "--prompt", "a", "--out", str(tmp_path / "odd"), "--size", "10x14", *generation]
    assert main(odd) == 2
    assert capsys.readouterr().err == "error: an image of 10 x 14 pixels: use multiples of 4, such as 8 x 16\n"


def test_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fresh"
    small = {"width": 32, "depth": 1, "heads": 2, "key_heads": 1, "mlp_width": 32, "image_size": 32}
    tower = {"vit_width": 16, "vit_depth": 1, "vit_heads": 1}
    sizes = [f"{name}={value}" for name, value in (small | tower).items()]
    assert main(["init", "bagel-tiny", str(folder), *sizes]) == 0
    policy = BagelPolicy.load(folder)
    assert policy.config.transformer.width == 32
    assert policy.encoders.default_grid(None) == (2, 2)
    for text in ("two red circles", "Ünïcode 猫 42\nnewline"):
        assert policy.tokenizer.decode(policy.tokenizer.encode(text)) == text
    assert len(policy.tokenizer.encode("two red circles")) <= 5
    assert {path.name for path in folder.iterdir()} >= {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert main(["init", "bagel-tiny", str(folder)]) == 2
    assert main(["init", "bagel-tiny", str(tmp_path / "other"), "width=30"]) == 2
    assert main(["init", "bagel-big", str(tmp_path / "other")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "exists already" in lines[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("vit_heads=3", "vit_width=128, vit_heads=3: the width must be a multiple of the heads"),
        ("vit_width=8 vit_heads=16", "vit_width=8, vit_heads=16: the width must be a multiple of the heads"),
        ("key_heads=3", "key_heads=3: must divide heads=8"),
        ("width=20 heads=4", "width=20, heads=4: the width must be heads times an even number"),
        ("read_side=2", "read_side=2: an image of image_size=64 has 4 x 4 places: use read_side >= 4"),
        ("latent_side=2", "latent_side=2: an image of image_size=64 has 4 x 4 places: use latent_side >= 4"),
        ("vae={multipliers:[]}", "vae.multipliers=[]: must have at least 1 entries"),
        ("vae={multipliers:[0,1]}", "vae.multipliers.0=0: must be >= 1"),
        ("vae={scale:0}", "vae.scale=0: must be > 0"),
        ("image_size=16 patch_size=32", "image_size=16: a patch that is read has 32 x 32 pixels: use a larger one"),
        ("image_size=20 vae={multipliers:[1,1,1,1,1]}", "image_size=20: a token of an image has 32 x 32 pixels"),
        ("seed=9223372036854775808", "seed=9223372036854775808: must be < 9223372036854775808"),
    ],
)
def test_sizes_that_do_not_fit(sizes: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["init", "bagel-tiny", str(tmp_path / "made"), *(size.replace(":", ": ") for size in sizes.split())]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_states_of_texts_and_of_images_of_any_size(small: BagelPolicy) -> None:
    parts = [image(1), "a red circle", image(2, 8, 16), "blue"]
    for layer in (0, 2):
        states = small.hidden_states(parts, layer)
        grids = [small.encoders.vision_grid(part) for part in parts if isinstance(part, torch.Tensor)]
        words = [len(small.tokenizer.encode(part)) for part in parts if isinstance(part, str)]
        assert [len(s) for s in states] == [grids[0][0] * grids[0][1], words[0], grids[1][0] * grids[1][1], words[1]]
        assert grids[0] != grids[1]
        for part, state in zip(parts, states, strict=True):
            assert torch.allclose(small.hidden_states([part], layer)[0], state, atol=1e-5)


def test_images_pass_the_autoencoder_in_parts(small: BagelPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small.encoders.config.vae
    pixels, side = torch.rand(3, 3, 32, 32), 32 // vae.downsample
    noise = torch.randn(3, vae.channels, side, side)
    batches: list[int] = []
    for coder in (small.encoders.latent_vae.encoder, small.encoders.latent_vae.decoder):
        forward = coder.forward
        monkeypatch.setattr(coder, "forward", lambda x, forward=forward: batches.append(len(x)) or forward(x))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = small.encoders.encode_pixels(pixels, noise)
        side = math.isqrt(tokens.shape[1])
        return tokens, small.encoders.decode_pixels(tokens, (side, side))

    together = both()
    monkeypatch.setattr(encoders, "VAE_BYTES_CPU", 2 * vae.width * 32 * 32 * 4)
    for part, whole in zip(both(), together, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    assert batches == [3, 3, 2, 1, 2, 1]


def test_an_image_is_encoded_once_until_the_autoencoder_changes(
    small: BagelPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, encoded = copy.deepcopy(small), []
    encode = policy.encoders.encode_pixels
    monkeypatch.setattr(policy.encoders, "encode_pixels", lambda *args: encoded.append(1) or encode(*args))
    one, other = image(1), image(2)
    first = policy.encoders.encode_latents([one, other, one])
    assert torch.equal(first, small.encoders.encode_latents([one, other, one]))
    assert torch.equal(policy.encoders.encode_latents([other]), first[1:2])
    assert len(encoded) == 2
    assert policy.encoders.encode_latents([one.clone()]).equal(first[:1])
    assert len(encoded) == 3
    with torch.no_grad():
        policy.encoders.latent_vae.encoder.conv_in.weight.mul_(2)
    assert not torch.equal(policy.encoders.encode_latents([one]), first[:1])
    assert copy.deepcopy(policy).encoders._latents.found == {}
    monkeypatch.setattr(latent_cache, "LATENT_CACHE_BYTES", 1)
    policy.encoders.encode_latents([one, other])
    assert [id(kept) for kept in policy.encoders._latents.found] == [id(other)]
