"""A small BAGEL learns on scenes: its autoencoder, and the model by the supervised trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.data.scenes import ScenePrompts, ScenesConfig, web_corpus
from lvrpo.errors import InputError
from lvrpo.policies.bagel import create
from lvrpo.policies.bagel.create import IMAGES, BagelSizes, collages, create_bagel, stacked, train_autoencoder
from lvrpo.policies.bagel.encoders import VaeConfig
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.training.pretrain import PretrainConfig, SupervisedState, initial_policy
from lvrpo.types import Image

SIZES = BagelSizes(
    width=32,
    depth=1,
    heads=2,
    key_heads=1,
    mlp_width=32,
    vocabulary_size=512,
    vit_width=16,
    vit_depth=1,
    vit_heads=1,
    patch_size=8,
    read_side=4,
    latent_side=4,
    vae=VaeConfig(width=32, multipliers=(1, 1, 1), res_blocks=1, channels=8),
    image_size=32,
)
SUPERVISED = [
    "batch={generate: 6, caption: 2, question: 8, edit: 4, reason: 4}",
    "corpus={scenes: 40, edits: 20, reasons: 20}",
    "device=cpu",
    "held_out_every=0",
]


def scenes(first: int, count: int) -> list[Image]:
    source = ScenePrompts(ScenesConfig(questions_per_picture=1), "train", 0)
    prompts = [source.prompt("understand", i) for i in range(first, first + count)]
    return [part for prompt in prompts for part in prompt.parts if isinstance(part, torch.Tensor)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pretrain") / "base"
    create_bagel(SIZES, ["red circle blue square what color is it"]).save(where)
    return where


def test_the_autoencoder_learns_and_its_latents_have_deviation_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "WARMUP", 4)
    policy = create_bagel(SIZES)
    before = {n: p.clone() for n, p in policy.named_parameters() if "latent_vae" not in n}
    losses: list[float] = []
    found = train_autoencoder(policy, scenes, 25, lambda step, loss: losses.append(loss))
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert 2 < found.psnr < 40
    assert 0 < found.largest <= 1
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)
    assert not any(p.requires_grad for p in policy.encoders.latent_vae.parameters())
    pixels = stacked(policy, scenes(IMAGES, 64))
    latents = policy.encoders.latent_vae.encode(pixels, torch.zeros(64, 8, 8, 8))
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert float(latents.std()) == pytest.approx(1, abs=1e-4)
    policy.save(tmp_path / "trained")
    again = BagelPolicy.load(tmp_path / "trained").encoders.latent_vae
    assert torch.equal(again.encode(pixels, torch.zeros(64, 8, 8, 8)), latents)


def test_collages_are_made_of_lively_tiles() -> None:
    pixels = torch.full((2, 3, 16, 16), 0.25)
    pixels[0, :, 8:, :8] = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = collages(pixels, 8, 6, torch.Generator().manual_seed(1))
    assert made.shape == (6, 3, 16, 16)
    tiles = made.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    lively = [bool(torch.equal(tile, pixels[0, :, 8:, :8])) for tile in tiles]
    assert len(lively) == 24
    assert sum(lively) >= 20


def test_supervised_training_of_bagel(folder: Path) -> None:
    fast = "optimizer={muon_lr: 0.02, adamw_lr: 0.005, warmup_steps: 2}"
    config = load_config(PretrainConfig, None, [*SUPERVISED, f"init={folder}", "steps=40", fast])
    trainer = SupervisedState(config, initial_policy(config), web_corpus(config.corpus))
    assert isinstance(trainer.policy, BagelPolicy)
    rows = trainer.batch(0)
    assert all(example.prompt.parts for example in rows)  # what is left out, BAGEL leaves out by itself
    losses = [trainer.train_step() for _ in range(12)]
    assert {name for name in losses[0] if name.startswith("loss/")} == {"loss/text", "loss/image"}
    assert losses[-1]["loss/text"] < 0.9 * losses[0]["loss/text"]
    assert losses[-1]["loss/image"] < losses[0]["loss/image"]


def test_latents_of_a_batch_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = BagelPolicy.load(folder)
    corpus = web_corpus(load_config(PretrainConfig, None, SUPERVISED).corpus)
    seen: list[int] = []
    encode = policy.encoders.encode_latents
    monkeypatch.setattr(policy.encoders, "encode_latents", lambda images: seen.append(len(images)) or encode(images))
    policy.supervised_losses([*corpus.generate[:5], *corpus.edit[:3], corpus.edit[0]], torch.Generator().manual_seed(0))
    assert seen == [5 + 2 * 3]


def test_bad_input_of_supervised_training(folder: Path) -> None:
    config = load_config(PretrainConfig, None, [*SUPERVISED, f"init={folder}", "corpus.size=40"])
    with pytest.raises(InputError, match=r"corpus\.size=40: this policy draws 32 x 32: set"):
        SupervisedState(config, initial_policy(config), web_corpus(config.corpus))
    config = load_config(PretrainConfig, None, [*SUPERVISED, f"init={folder}", "representation.weight=0.5"])
    with pytest.raises(InputError, match="BagelPolicy keeps no states for it"):
        initial_policy(config)


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["steps=2", "checkpoint_every=1", "held_out_every=2", "held_out={generate: 2, reason: 2, edit: 2}"]
    few = [*SUPERVISED[:3], f"init={folder}", *few]
    assert main(["pretrain", "bagel_tiny_pretrain", *few, "--out", str(tmp_path / "run")]) == 0
    assert isinstance(BagelPolicy.load(tmp_path / "run" / "checkpoints" / "step_000002"), BagelPolicy)
    capsys.readouterr()
    sizes = ["width=32", "depth=1", "heads=2", "key_heads=1", "mlp_width=32", "image_size=36"]
    made = ["init", "bagel-tiny", str(tmp_path / "made"), *sizes, "--train-autoencoder"]
    assert main([*made, "2"]) == 2
    assert "image_size=36: scenes have multiples of 8" in capsys.readouterr().err
    assert main([*made, "-1"]) == 2
    assert not (tmp_path / "made").exists()


def test_images_are_as_loud_as_their_places() -> None:
    encoders = create_bagel(SIZES.model_copy(update={"vit_width": 64})).encoders
    pixels = torch.stack([encoders.read_pixels(image) for image in scenes(0, 24)])
    with torch.no_grad():
        embedded = encoders.read_embed(pixels)
    assert 0.5 < float(embedded.std(dim=0).mean()) < 1.5  # torch's defaults give 0.08


def test_larger_batches_of_the_autoencoder_use_more_images() -> None:
    asked: list[tuple[int, int]] = []

    def images(first: int, count: int) -> list[Image]:
        asked.append((first, count))
        return [torch.full((3, 32, 32), 0.5)] * count

    found = train_autoencoder(create_bagel(SIZES), images, 2, batch=24)
    assert asked == [(0, 48), (48, 48), (IMAGES, 64)]
    assert found.before.shape == found.after.shape == (64, 3, 32, 32)


def test_a_size_of_the_autoencoder_that_is_given_leaves_the_others_small() -> None:
    default = BagelSizes.model_validate({}).vae
    assert BagelSizes.model_validate({"vae": {"channels": 8}}).vae == default.model_copy(update={"channels": 8})
