"""``lvrpo init`` makes a random model to pretrain; ``lvrpo export`` writes a whole model."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import torch
from pydantic import ValidationError

from lvrpo.commands.inputs import new_model_folder, require_new
from lvrpo.commands.options import Options
from lvrpo.commands.progress import Progress
from lvrpo.commands.train_options import KINDS, TILED, RandomModel
from lvrpo.config import load_config
from lvrpo.data.scenes import VOCABULARY, ScenePrompts, ScenesConfig, crowded
from lvrpo.data.scenes.verifier import Reading, read
from lvrpo.errors import InputError, nearest
from lvrpo.policies.adapter import AdaptablePolicy, merge
from lvrpo.policies.bagel.create import BagelSizes, create_bagel, train_autoencoder
from lvrpo.policies.bagel.policy import THINK_THEN_ANSWER, THINK_THEN_DRAW, BagelPolicy
from lvrpo.policies.diffusers_flow.create import PipelineSizes, create_pipeline
from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.loading import load_policy, pick_device
from lvrpo.policies.magvit.policy import MagvitPolicy
from lvrpo.policies.tile_codebook import TileCodebook
from lvrpo.types import Image

PIPELINES = tuple(kind for kind, made in KINDS.items() if made.sizes == "PipelineSizes")
CROWDED = 2000
"""Images that a tile codebook is learned from."""
MEASURED = 1000
"""Images that it is measured on."""
KEPT_BYTES = 256 << 20
"""Size limit of the cache of rendered images: all of them at 32 x 32; beyond it, images are rendered again."""


def init(options: Options) -> None:
    if options.kind not in KINDS:
        near, known = nearest(options.kind, KINDS), ", ".join(KINDS)
        raise InputError(f"kind {options.kind!r}: unknown: {f'did you mean {near}?' if near else f'use {known}'}")
    if options.train_autoencoder < 0:
        raise InputError(f"--train-autoencoder {options.train_autoencoder}: use 0 or more steps")
    if not 2 <= options.autoencoder_batch <= 1024:
        raise InputError(f"--autoencoder-batch {options.autoencoder_batch}: use 2 to 1024 images")
    if options.tile_codebook and options.kind not in TILED:
        raise InputError(f"--tile-codebook: applies to {', '.join(TILED)}, not to {options.kind}: leave it out")
    device = pick_device(options.device)
    folder: Path = options.folder
    require_new(folder)
    made = KINDS[options.kind]
    with new_model_folder(folder) as part:
        if options.kind in PIPELINES:
            policy = fresh_pipeline(options, part)
        else:
            policy = fresh_policy(made, options) if made.package else fresh_bagel(options, device)
            policy.save(part)
    count = sum(parameter.numel() for parameter in policy.parameters())
    print(f"{folder}: a random {made.name} of {count / 1e6:.1f} million parameters")


def fresh_bagel(options: Options, device: torch.device) -> BagelPolicy:
    """A BAGEL with random weights; its autoencoder is trained if the options ask for it."""
    sizes = load_config(BagelSizes, None, options.overrides)
    policy = create_bagel(sizes, [" ".join(VOCABULARY), THINK_THEN_DRAW, THINK_THEN_ANSWER])
    if options.train_autoencoder:
        policy.to(device)
        train_on_scenes(policy, sizes.image_size, options.train_autoencoder, options.autoencoder_batch)
    return policy


def fresh_policy(made: RandomModel, options: Options) -> AdaptablePolicy:
    """Makes a policy of the table; its autoencoder is random, or replaced by tiles if the options ask for it."""
    refuse_autoencoder(options)
    module = import_module(f"lvrpo.policies.{made.package}.create")
    sizes = load_config(getattr(module, made.sizes), None, options.overrides)  # both names are of the table
    policy = getattr(module, made.create)(sizes, [" ".join(VOCABULARY)])
    if options.tile_codebook:
        give_tiles(policy, sizes.image_size)
    return policy


def fresh_pipeline(options: Options, folder: Path) -> DiffusersPolicy:
    """Written to the folder, and read from there."""
    refuse_autoencoder(options)
    sizes = load_config(PipelineSizes, None, options.overrides)
    create_pipeline(options.kind, sizes, folder)
    return DiffusersPolicy.load(folder)


def refuse_autoencoder(options: Options) -> None:
    """Raises InputError where the options ask for an autoencoder that is trained."""
    if options.train_autoencoder:
        raise InputError(f"--train-autoencoder {options.train_autoencoder}: applies to bagel-tiny only: leave it out")


def train_on_scenes(policy: BagelPolicy, size: int, steps: int, batch: int) -> None:
    """Trains the autoencoder on images of the train split, and prints its reconstruction quality."""
    try:
        source = ScenePrompts(ScenesConfig(size=size, questions_per_picture=1), "train", 0)
    except ValidationError:
        raise InputError(
            f"image_size={size}: scenes have multiples of 8 from 32 to 256: use one, or leave --train-autoencoder out"
        ) from None

    kept: dict[int, Image] = {}

    def image_of(i: int) -> Image:
        if i in kept:
            return kept[i]
        image = source.prompt("understand", i).images[0]
        if (len(kept) + 1) * image.nbytes <= KEPT_BYTES:
            kept[i] = image
        return image

    def images_of(first: int, count: int) -> list[Image]:
        return [image_of(i) for i in range(first, first + count)]

    with Progress(steps) as watch:
        watch.phase("training the autoencoder")
        started = time.monotonic()

        def observe(step: int, loss: float) -> None:
            passed = time.monotonic() - started
            times = {"seconds": passed, "seconds_left": passed / step * (steps - step)}
            watch.step({"step": step, "loss/reconstruction": loss, **times})

        found = train_autoencoder(policy, images_of, steps, observe, batch)
    same = [seen_objects(a) == seen_objects(b) for a, b in zip(read(found.before), read(found.after), strict=True)]
    print(f"reconstruction of new images: {found.psnr:.1f} dB, largest error of a pixel {found.largest:.2f}")
    print(f"the verifier reads the same objects in {sum(same)} of {len(same)}")


def give_tiles(policy: JanusPolicy | MagvitPolicy, size: int) -> None:
    """Gives a policy a tile codebook of crowded images; prints what survives it of the validation split's images.

    Embeddings of a Janus's image tokens start as the principal components of the tiles.
    """
    if size % 8 or not 32 <= size <= 256:
        raise InputError(
            f"image_size={size}: scenes have multiples of 8 from 32 to 256: use one, or leave --tile-codebook out"
        )
    images = [crowded(i, size) for i in range(CROWDED)]
    if isinstance(policy, JanusPolicy):
        embeddings = policy.model.model.generation_embeddings.weight
        tiles = TileCodebook.learn(images, len(embeddings), policy.token_side)
        embeddings.data.copy_(tiles.embeddings(embeddings.shape[1]))
    else:
        tiles = TileCodebook.learn(images, policy.magvit.config.codes, policy.magvit.config.patch_size)
    policy.tiles = tiles
    source = ScenePrompts(ScenesConfig(size=size, questions_per_picture=1), "validation", 0)
    shown = [image for i in range(MEASURED) for image in source.prompt("understand", i).images]
    pairs = list(zip(read(shown), read(tiles.decode(tiles.encode(shown))), strict=True))
    total, kept = sum(len(facts_of(a)) for a, _ in pairs), sum(len(facts_of(a) & facts_of(b)) for a, b in pairs)
    same = sum(seen_objects(a) == seen_objects(b) for a, b in pairs)
    count = len(tiles.tiles)
    print(f"{count} tiles: the verifier reads {kept / total:.1%} of {total} facts again (grounds, shapes, colors),")
    print(f"and the same objects in {same} of {len(pairs)} images")


def facts_of(reading: Reading) -> set[object]:
    """The facts of an image: its ground, and of each object shape and color at its place."""
    objects = {(name, o.row, o.col) for o in reading.objects for name in (f"shape {o.shape}", f"color {o.color}")}
    return {reading.ground, *objects}


def seen_objects(reading: Reading) -> tuple[object, ...]:
    """The objects of an image, without their visibility."""
    return (reading.ground, reading.unreadable, *((o.shape, o.color, o.row, o.col) for o in reading.objects))


def export(options: Options) -> None:
    folder: Path = options.folder
    require_new(folder)
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    merged = isinstance(policy, AdaptablePolicy) and policy.adapter is not None
    if isinstance(policy, AdaptablePolicy):
        merge(policy)
    with new_model_folder(folder) as part:
        policy.save(part)
    print(f"{folder}: {options.model}{', its adapter merged' if merged else ''}")
