"""``lvrpo init`` makes a random model to pretrain; ``lvrpo export`` writes a whole model."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lvrpo.commands.options import Command, Options, Parser, add_base, add_model
from lvrpo.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

    from lvrpo.data.scenes.verifier import Reading
    from lvrpo.policies.adapter import AdaptablePolicy
    from lvrpo.policies.bagel.policy import BagelPolicy
    from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
    from lvrpo.policies.janus.policy import JanusPolicy
    from lvrpo.policies.magvit.policy import MagvitPolicy
    from lvrpo.types import Image


class RandomModel(NamedTuple):
    """A random model that ``lvrpo init`` makes."""

    name: str
    """Name in messages."""
    sizes: str
    """The class of its sizes, whose keys ``docs/make_keys.py`` describes."""
    package: str = ""
    """Package of ``lvrpo.policies`` whose module ``create`` has that class; empty: it is made by a function below."""
    create: str = ""
    """Name of the function there that makes the policy."""


KINDS = {
    "bagel-tiny": RandomModel("BAGEL", "BagelSizes"),
    "janus-tiny": RandomModel("Janus", "JanusSizes", "janus", "create_janus"),
    "emu3-tiny": RandomModel("Emu3", "Emu3Sizes", "emu3", "create_emu3"),
    "showo-tiny": RandomModel("Show-o", "ShowoSizes", "showo", "create_showo"),
    "mmada-tiny": RandomModel("MMaDA", "MmadaSizes", "mmada", "create_mmada"),
    "showo2-tiny": RandomModel("Show-o2", "RandomShowo2", "showo2", "create_showo2"),
    "sd3-tiny": RandomModel("Stable Diffusion 3", "PipelineSizes"),
    "flux-tiny": RandomModel("FLUX", "PipelineSizes"),
    "kontext-tiny": RandomModel("FLUX Kontext", "PipelineSizes"),
    "qwen-image-tiny": RandomModel("Qwen-Image", "PipelineSizes"),
    "qwen-image-edit-tiny": RandomModel("Qwen-Image-Edit", "PipelineSizes"),
    "z-image-tiny": RandomModel("Z-Image", "PipelineSizes"),
}
"""Models by the name that ``lvrpo init`` takes."""
PIPELINES = tuple(kind for kind, made in KINDS.items() if made.sizes == "PipelineSizes")
TILED = ("janus-tiny", "showo-tiny", "mmada-tiny")
"""Models that take a tile codebook."""
CROWDED = 2000
"""Pictures that a tile codebook is learned from."""
MEASURED = 1000
"""Pictures that it is measured on."""
KEPT_BYTES = 256 << 20
"""Size limit of the cache of rendered pictures: all of them at 32 x 32; beyond it, pictures are rendered again."""


def init_options(parser: Parser) -> None:
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="sizes, such as width=256 depth=6 seed=1")
    parser.add_argument(
        "--train-autoencoder",
        type=int,
        default=0,
        metavar="STEPS",
        help="train the autoencoder on built-in images for STEPS steps (default: 0: it stays random)",
    )
    parser.add_argument(
        "--autoencoder-batch",
        type=int,
        default=8,
        metavar="N",
        help="images per step of --train-autoencoder (default: 8)",
    )
    parser.add_argument(
        "--tile-codebook",
        action="store_true",
        help=f"{', '.join(TILED)} only: use tiles of the built-in images as image tokens, without an autoencoder",
    )
    parser.add_argument(
        "--device", default="auto", help="where to train the autoencoder: auto, cpu or cuda (default: auto)"
    )


def check_sizes(options: Options) -> None:
    from lvrpo.commands.keys import key_class
    from lvrpo.config import require_known_keys

    if options.kind in KINDS:
        require_known_keys(key_class(KINDS[options.kind].sizes), None, options.overrides)


def init(options: Options) -> None:
    from lvrpo.commands.inputs import new_model_folder, require_new
    from lvrpo.policies.loading import pick_device

    if options.kind not in KINDS:
        near, known = nearest(options.kind, KINDS), ", ".join(KINDS)
        raise InputError(f"kind {options.kind!r}: unknown: {f'did you mean {near}?' if near else f'use {known}'}")
    if options.train_autoencoder < 0:
        raise InputError(f"--train-autoencoder {options.train_autoencoder}: use 0 or more steps")
    if not 2 <= options.autoencoder_batch <= 1024:
        raise InputError(f"--autoencoder-batch {options.autoencoder_batch}: use 2 to 1024 pictures")
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
    from lvrpo.config import load_config
    from lvrpo.data.scenes import VOCABULARY
    from lvrpo.policies.bagel.create import BagelSizes, create_bagel
    from lvrpo.policies.bagel.policy import THINK_THEN_ANSWER, THINK_THEN_DRAW

    sizes = load_config(BagelSizes, None, options.overrides)
    policy = create_bagel(sizes, [" ".join(VOCABULARY), THINK_THEN_DRAW, THINK_THEN_ANSWER])
    if options.train_autoencoder:
        policy.to(device)
        train_on_scenes(policy, sizes.image_size, options.train_autoencoder, options.autoencoder_batch)
    return policy


def fresh_policy(made: RandomModel, options: Options) -> AdaptablePolicy:
    """Makes a policy of the table; its autoencoder is random, or replaced by tiles if the options ask for it."""
    from lvrpo.config import load_config
    from lvrpo.data.scenes import VOCABULARY

    refuse_autoencoder(options)
    module = import_module(f"lvrpo.policies.{made.package}.create")
    sizes = load_config(getattr(module, made.sizes), None, options.overrides)  # both names are of the table
    policy = getattr(module, made.create)(sizes, [" ".join(VOCABULARY)])
    if options.tile_codebook:
        give_tiles(policy, sizes.image_size)
    return policy


def fresh_pipeline(options: Options, folder: Path) -> DiffusersPolicy:
    """Written to the folder, and read from there."""
    from lvrpo.config import load_config
    from lvrpo.policies.diffusers_flow.create import PipelineSizes, create_pipeline
    from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy

    refuse_autoencoder(options)
    sizes = load_config(PipelineSizes, None, options.overrides)
    create_pipeline(options.kind, sizes, folder)
    return DiffusersPolicy.load(folder)


def refuse_autoencoder(options: Options) -> None:
    """Raises InputError where the options ask for an autoencoder that is trained."""
    if options.train_autoencoder:
        raise InputError(f"--train-autoencoder {options.train_autoencoder}: applies to bagel-tiny only: leave it out")


def train_on_scenes(policy: BagelPolicy, size: int, steps: int, batch: int) -> None:
    """Trains the autoencoder on pictures of the train split, and prints its reconstruction quality."""
    from pydantic import ValidationError

    from lvrpo.commands.progress import Progress
    from lvrpo.data.scenes import ScenePrompts, ScenesConfig
    from lvrpo.data.scenes.verifier import read
    from lvrpo.policies.bagel.create import train_autoencoder

    try:
        source = ScenePrompts(ScenesConfig(size=size, questions_per_picture=1), "train", 0)
    except ValidationError:
        raise InputError(
            f"image_size={size}: scenes have multiples of 8 from 32 to 256: use one, or leave --train-autoencoder out"
        ) from None

    kept: dict[int, Image] = {}

    def picture(i: int) -> Image:
        if i in kept:
            return kept[i]
        image = source.prompt("understand", i).images[0]
        if (len(kept) + 1) * image.nbytes <= KEPT_BYTES:
            kept[i] = image
        return image

    def pictures(first: int, count: int) -> list[Image]:
        return [picture(i) for i in range(first, first + count)]

    with Progress(steps) as watch:
        watch.phase("training the autoencoder")
        started = time.monotonic()

        def observe(step: int, loss: float) -> None:
            passed = time.monotonic() - started
            times = {"seconds": passed, "seconds_left": passed / step * (steps - step)}
            watch.step({"step": step, "loss/reconstruction": loss, **times})

        found = train_autoencoder(policy, pictures, steps, observe, batch)
    same = [seen_objects(a) == seen_objects(b) for a, b in zip(read(found.before), read(found.after), strict=True)]
    print(f"reconstruction of new pictures: {found.psnr:.1f} dB, largest error of a pixel {found.largest:.2f}")
    print(f"the verifier reads the same objects in {sum(same)} of {len(same)}")


def give_tiles(policy: JanusPolicy | MagvitPolicy, size: int) -> None:
    """Gives a policy a tile codebook of crowded pictures; prints what survives it of the validation split's pictures.

    Embeddings of a Janus's image tokens start as the principal components of the tiles.
    """
    from lvrpo.data.scenes import ScenePrompts, ScenesConfig, crowded
    from lvrpo.data.scenes.verifier import read
    from lvrpo.policies.janus.policy import JanusPolicy
    from lvrpo.policies.tile_codebook import TileCodebook

    if size % 8 or not 32 <= size <= 256:
        raise InputError(
            f"image_size={size}: scenes have multiples of 8 from 32 to 256: use one, or leave --tile-codebook out"
        )
    pictures = [crowded(i, size) for i in range(CROWDED)]
    if isinstance(policy, JanusPolicy):
        embeddings = policy.model.model.generation_embeddings.weight
        tiles = TileCodebook.learn(pictures, len(embeddings), policy.token_side)
        embeddings.data.copy_(tiles.embeddings(embeddings.shape[1]))
    else:
        tiles = TileCodebook.learn(pictures, policy.magvit.config.codes, policy.magvit.config.patch_size)
    policy.tiles = tiles
    source = ScenePrompts(ScenesConfig(size=size, questions_per_picture=1), "validation", 0)
    shown = [image for i in range(MEASURED) for image in source.prompt("understand", i).images]
    pairs = list(zip(read(shown), read(tiles.decode(tiles.encode(shown))), strict=True))
    total, kept = sum(len(facts_of(a)) for a, _ in pairs), sum(len(facts_of(a) & facts_of(b)) for a, b in pairs)
    same = sum(seen_objects(a) == seen_objects(b) for a, b in pairs)
    count = len(tiles.tiles)
    print(f"{count} tiles: the verifier reads {kept / total:.1%} of {total} facts again (grounds, shapes, colors),")
    print(f"and the same objects in {same} of {len(pairs)} pictures")


def facts_of(reading: Reading) -> set[object]:
    """The facts of a picture: its ground, and of each object shape and color at its place."""
    objects = {(name, o.row, o.col) for o in reading.objects for name in (f"shape {o.shape}", f"color {o.color}")}
    return {reading.ground, *objects}


def seen_objects(reading: Reading) -> tuple[object, ...]:
    """The objects of a picture, without their visibility."""
    return (reading.ground, reading.unreadable, *((o.shape, o.color, o.row, o.col) for o in reading.objects))


INIT = Command(
    "create a randomly initialized model of a known architecture",
    init_options,
    init,
    "examples:\n"
    "  lvrpo init janus-tiny models/janus width=64 depth=2 image_size=32\n"
    "  lvrpo init bagel-tiny models/bagel width=256 depth=6 image_size=64 --train-autoencoder 400",
    check_sizes,
)


def export_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")


def export(options: Options) -> None:
    from lvrpo.commands.inputs import new_model_folder, require_new
    from lvrpo.policies.adapter import AdaptablePolicy, merge
    from lvrpo.policies.loading import load_policy

    folder: Path = options.folder
    require_new(folder)
    policy = load_policy(options.model, options.device, options.dtype, options.base)
    merged = isinstance(policy, AdaptablePolicy) and policy.adapter is not None
    if isinstance(policy, AdaptablePolicy):
        merge(policy)
    with new_model_folder(folder) as part:
        policy.save(part)
    print(f"{folder}: {options.model}{', its adapter merged' if merged else ''}")


EXPORT = Command(
    "write a complete model folder, merging an adapter into its base",
    export_options,
    export,
    "examples:\n  lvrpo export runs/bagel_lvrpo_lora models/aligned --dtype bfloat16",
)
"""``lvrpo export``."""
