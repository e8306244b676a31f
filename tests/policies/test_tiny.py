from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from lvrpo.data.scenes import VOCABULARY
from lvrpo.errors import InputError
from lvrpo.policies import tiny
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.patches import patchify, unpatchify
from lvrpo.policies.tiny import TinyConfig, TinyPolicy, TinyTokenizer
from lvrpo.types import Prompt


def test_patches_are_row_major_and_channel_last() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    tokens = patchify(pixels, 2)
    assert tokens.shape == (2, 4, 12)
    assert tokens[0, 1].tolist() == [pixels[0, c, r, k] for r in (0, 1) for k in (2, 3) for c in range(3)]
    assert torch.equal(unpatchify(tokens, 2, *(side // 2 for side in pixels.shape[2:])), pixels)


def test_images_survive_the_latents(policy: TinyPolicy, image: Callable[[int], torch.Tensor]) -> None:
    images = [image(1), image(2)]
    latents = policy.encoders.encode_latents(images)
    assert latents.shape == (2, policy.config.image_tokens, policy.config.channels)
    assert latents.min() >= -1
    torch.testing.assert_close(policy.encoders.decode_latents(latents), torch.stack(images))
    assert policy.encoders.decode_latents(latents * 9).max() == 1


def test_words() -> None:
    words = TinyTokenizer.from_vocabulary(["red", "circle", ",", "?"])
    assert words.encode("Red circle, red?") == [6, 7, 8, 6, 9]
    assert words.encode("") == []
    assert words.decode([1, 6, 7, 2]) == "red circle"
    assert len(words) == 10
    with pytest.raises(InputError, match=r"'Circel' in 'a? ?Circel'.*did you mean 'circle'"):
        words.encode("Circel")
    with pytest.raises(InputError, match="lvrpo data vocabulary"):
        words.encode("xyzzy")
    with pytest.raises(InputError):
        words.encode("[eos]")


def test_a_tokenizer_does_not_remember_the_texts_of_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "MAX_ENCODED", 10)
    words = TinyTokenizer.from_vocabulary(["red", "circle"])
    first = words.encode("red circle")
    for n in range(1, 50):
        assert words.encode("red " * n) == first[:1] * n
    assert len(words._encoded) <= 10
    assert words.encode("red circle") == first


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": 32, "patch_size": 5},
        {"image_size": 30},
        {"transformer": {"width": 126}},
        {"transformer": {"heads": 3}},
        {"transformer": {"key_heads": 3}},
        {"transformer": {"depth": 0}},
        {"unknown": 1},
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TinyConfig.model_validate(sizes)


def test_the_default_has_about_1_8_million_parameters() -> None:
    policy = TinyPolicy.from_vocabulary(TinyConfig(), VOCABULARY)
    assert 1.7e6 < sum(p.numel() for p in policy.parameters()) < 1.9e6


def test_a_seed_makes_one_policy_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    config = TinyConfig(image_size=16, transformer=MoTConfig(width=16, depth=1))
    one, two, other = (TinyPolicy.from_vocabulary(config, ["a"], seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.encoders.patch_in.weight, other.encoders.patch_in.weight)


def outputs(policy: TinyPolicy, image: Callable[[int], torch.Tensor]) -> torch.Tensor:
    scored = policy.text_logprob([(image(1), "what is it")], ["a red circle"])
    drawn = policy.image_logprob([("a red circle",)], [image(2)], 2, [0])
    return torch.cat([scored, drawn[0]])


def test_saved_and_loaded_bit_for_bit(policy: TinyPolicy, image: Callable[[int], torch.Tensor], tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    twin = TinyPolicy.load(tmp_path / "model", dtype=torch.float32)
    with pytest.raises(InputError, match=r"dtype=bfloat16: .* computes in float32: leave it out"):
        TinyPolicy.load(tmp_path / "model", dtype=torch.bfloat16)
    assert twin.config == policy.config
    assert twin.tokenizer.vocabulary == policy.tokenizer.vocabulary
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), twin.parameters(), strict=True))
    assert torch.equal(outputs(policy, image), outputs(twin, image))
    twin.save(tmp_path / "again")
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def damage_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def truncate(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def change_weights(folder: Path, rename: bool) -> None:
    state = load_file(folder / "model.safetensors")
    tensor = state.pop("encoders.lm_head.weight")
    state["encoders.lm_head.bias" if rename else "encoders.lm_head.weight"] = tensor if rename else tensor[:-1]
    save_file(state, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "config truncated": (truncate("config.json", 40), "not JSON"),
    "config binary": (write("config.json", b"\xff\xfe\x00"), "config.json: byte 0 is not UTF-8"),
    "config a list": (write("config.json", b"[1]"), "config.json: holds list, not an object: restore the file"),
    "another model": (damage_config(model_type="bagel"), "of type 'bagel', not 'lvrpo_tiny'"),
    "unknown field": (damage_config(depth=3), "config.json: depth: "),
    "field of the wrong kind": (damage_config(image_size="big"), "config.json: image_size=big: must be a whole number"),
    "sizes that clash": (damage_config(patch_size=5), "must divide"),
    "another size": (damage_config(tower_width=32), "weights do not fit config.json at encoders.patch_in.bias"),
    "weights truncated": (truncate("model.safetensors", 5000), "truncated or damaged"),
    "weights empty": (truncate("model.safetensors", 0), "truncated or damaged"),
    "header alone": (truncate("model.safetensors", 4), "truncated or damaged"),
    "a shape": (lambda f: change_weights(f, rename=False), "do not fit config.json at encoders.lm_head.weight"),
    "a name": (lambda f: change_weights(f, rename=True), "do not fit config.json at encoders.lm_head.bias"),
    "tokenizer truncated": (truncate("tokenizer.json", 100), "tokenizer.json: truncated or damaged"),
    "tokenizer of another model": (
        lambda f: TinyTokenizer.from_vocabulary(["one", "word"]).save(f),
        "weights do not fit config.json at encoders.embed_tokens_table.weight",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_one_line(
    damage: Callable[[Path], object], message: str, policy: TinyPolicy, tmp_path: Path
) -> None:
    policy.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        TinyPolicy.load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        TinyPolicy.load(tmp_path / "nowhere")


def test_frozen_shares_nothing(new_policy: Callable[..., TinyPolicy], image: Callable[[int], torch.Tensor]) -> None:
    policy = new_policy()
    twin = policy.make_reference()
    assert type(twin) is type(policy)
    before = outputs(twin, image)
    assert torch.equal(before, outputs(policy, image))
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert twin.parameter_groups() == {"understand": [], "generate": [], "shared": []}
    mine = {t.data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    assert not mine & {t.data_ptr() for t in (*twin.parameters(), *twin.buffers())}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert torch.equal(before, outputs(twin, image))
    assert not torch.equal(before, outputs(policy, image))


def test_the_parts_of_the_experts(policy: TinyPolicy) -> None:
    names = {id(p): name for name, p in policy.named_parameters()}
    found = {expert: {names[id(p)] for p in ps} for expert, ps in policy.parameter_groups().items()}
    assert found["shared"] == {"encoders.embed_tokens_table.weight"}
    assert {"encoders.lm_head.weight", "encoders.patch_position", "transformer.understanding_norm.weight"} <= found[
        "understand"
    ]
    assert {"encoders.latent_out.weight", "encoders.time_in.bias", "encoders.latent_position"} <= found["generate"]
    twins = {name.replace(".understanding.", ".generation.") for name in found["understand"] if ".layers." in name}
    assert twins == {name for name in found["generate"] if ".layers." in name}


def test_a_group_is_sampled_without_a_graph(policy: TinyPolicy) -> None:
    (group,) = policy.sample([Prompt("g", "generate", ("a",), ("image",))], Sampling(2, num_steps=2), [0])
    assert all(t.image is not None and not t.image.requires_grad for t in group.trajectories)
