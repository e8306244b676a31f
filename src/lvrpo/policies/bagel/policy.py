"""BAGEL as a policy: loads and saves the published folder, and trains on examples in one packed pass."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import psutil
import torch
from torch.nn import functional

from lvrpo.atomic_io import write_atomic, write_tensors
from lvrpo.errors import InputError
from lvrpo.policies.bagel.checkpoint import VAE, official_name
from lvrpo.policies.bagel.config import (
    WHOLE,
    BagelConfig,
    BagelSettings,
    config_files,
    config_from_json,
    is_bagel,
    read_config,
    several,
    with_tied_head,
)
from lvrpo.policies.bagel.encoders import BagelEncoders
from lvrpo.policies.bagel.tokenizer import BagelTokenizer
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot.attention import Span
from lvrpo.policies.mot.likelihood import FeatureLoss
from lvrpo.policies.mot.model_runner import Grid, ModelRunner, Piece, Row, row_tokens, split_by_tokens
from lvrpo.policies.mot.policy import MoTPolicy, with_autocast
from lvrpo.policies.mot.transformer import MoT
from lvrpo.policies.safetensors_reader import StoredTensor, find_tensors
from lvrpo.sampling import flow_time
from lvrpo.types import Example, Group, Image, Part, Prompt, TaskKind

WEIGHTS = ("ema", "model"), "the weights of BAGEL"
"""Stems of the model files, with descriptions; the EMA is preferred."""
AUTOENCODER = ("ae",), "the autoencoder that images go through"
MAX_TOKENS = 32768
"""Tokens that go through the transformer at once: eight images of 1024 x 1024."""
THOUGHT_TOKENS = 1000
"""Default ``max_new_tokens``."""
TEXT_TOKENS = 512
"""Tokens that a text to sample counts in ``split_by_tokens``, whatever its length."""
THINK_THEN_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \nThe planning process "
    "is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
THINK_THEN_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \nThe "
    "reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer "
    "here"
)


class BagelPolicy(MoTPolicy):
    """BAGEL (arXiv:2505.14683) of any size.

    Prompts of the task ``reason`` begin with the published instruction to think.
    Differs from the paper: the autoencoder's posterior of a condition is sampled once per image, as a function of its
    pixels, so that old and new policies see the same context.
    """

    model_type = "bagel"
    has_condition_dropout = True
    encoders: BagelEncoders  # type: ignore[assignment]  # narrower than the core's protocol

    def __init__(self, config: BagelConfig, tokenizer: BagelTokenizer) -> None:
        super().__init__(MoT(config.transformer), BagelEncoders(config), tokenizer)
        self.config = config
        self.max_tokens = MAX_TOKENS
        """Most tokens of a forward pass, contexts and outputs together."""

    @property
    def image_size(self) -> None:
        """None: images of any size."""
        return None

    def pixels_per_token(self) -> int:
        return self.config.token_pixels

    def timestep_shift(self) -> float:
        return self.config.settings.timestep_shift

    def default_sampling(self, task: TaskKind) -> Sampling:
        """The published settings: 49 Euler steps, text guidance at t > 0.4; edits at all times, with image guidance.

        Texts of up to 1000 tokens, or of half the positions where a model has fewer than 2000.
        """
        published = Sampling(
            max_new_tokens=min(THOUGHT_TOKENS, max(1, self.config.max_positions // 2)),
            num_steps=49,
            timestep_shift=self.timestep_shift(),
            solver="euler",
            guidance_scale=4.0,
            guidance_renorm="global",
            guidance_interval=(0.4, 1.0),
        )
        if task != "edit":
            return published
        return replace(
            published, image_guidance_scale=2.0, guidance_renorm="text_channel", guidance_interval=(0.0, 1.0)
        )

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; raises InputError for a prompt that ``check_prompt`` refuses."""
        for prompt in prompts:
            self.check_prompt(prompt, sampling)
        return super().sample(prompts, sampling, seeds)

    def _row(self, prompt: Prompt) -> Row:
        parts: tuple[Part, ...] = prompt.parts
        if prompt.task == "reason":
            parts = (THINK_THEN_DRAW if "image" in prompt.output else THINK_THEN_ANSWER, *parts)
        row = self.runner.row(parts, draws="image" in prompt.output)
        self.check_length(f"prompt {prompt.id!r}", row, 1)
        return row

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises InputError for a question or an edit without an image, and for a prompt that is too long.

        Counted is all that it may become: text with its markers, image.
        """
        if prompt.task in ("understand", "edit") and not prompt.images:
            raise InputError(f"prompt {prompt.id!r}: task {prompt.task!r} needs an image: give one")
        row, new, remedy = self._row(prompt), 0, ""
        if "image" in prompt.output:
            new = self.runner.noise(self._grid(prompt, sampling)).span.length
        if "text" in prompt.output:
            left = self.config.max_positions - row_tokens(row) - new - 2
            remedy = f", or write less: max_new_tokens <= {left}" if left > 0 else ""
            new += sampling.max_new_tokens + 2
        self.check_length(f"prompt {prompt.id!r}", row, new, remedy)

    def max_row_tokens(self) -> int:
        """The positions that the model was trained on."""
        return self.config.max_positions

    def limit_tokens(self, limit: int | None) -> None:
        """See ``Policy.limit_tokens``; a member or a context of more goes through alone."""
        self.max_tokens = limit or MAX_TOKENS

    def _cut(self, prompts: Sequence[Prompt], grid: Grid) -> list[list[int]]:
        contexts: dict[str, int] = {}
        for prompt in prompts:
            if prompt.id not in contexts:
                contexts[prompt.id] = row_tokens(self._row(prompt))
        image_tokens = grid[0] * grid[1] + 2
        new = [max(image_tokens, TEXT_TOKENS) if "text" in prompt.output else image_tokens for prompt in prompts]
        ids = [prompt.id for prompt in prompts]
        return split_by_tokens(ids, [contexts[name] for name in ids], new, self.max_tokens)

    def split_rows(self, rows: Sequence[Row], new: Sequence[int]) -> list[list[int]]:
        keys = [tuple(piece.key for piece in row) for row in rows]
        return split_by_tokens(keys, [row_tokens(row) for row in rows], new, self.max_tokens)

    # ---------------------------------------------------------------- supervised
    @with_autocast
    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: FeatureLoss | None = None
    ) -> Mapping[str, torch.Tensor]:
        """ "text": cross-entropy per token; "image": flow loss at logit-normal times, in one packed pass.

        Conditions of images are dropped at random (``settings``), for classifier-free guidance.
        """
        if represent is not None:
            raise InputError("representation with a BAGEL checkpoint: its packed pass keeps no states: leave it out")
        rows = [self._trained_row(example) for example in examples]
        latents = self._encoded(rows)
        filled = [self._filled(row, latents, generator) for row in rows]
        losses = packed_losses(self.runner, filled)
        found = {"text": losses.cross_entropy, "image": losses.squared_error}
        return {name: values.mean() for name, values in found.items() if values.numel()}

    def _trained_row(self, example: Example) -> list[TrainedPiece]:
        """The conditions, then the outputs; images are not encoded yet."""
        row = [TrainedPiece(piece) for piece in self._row(example.prompt)]
        for output in example.outputs:
            if isinstance(output, str):
                row.append(TrainedPiece(self.runner.text(self.tokenizer.encode(output)), loss=True))
            else:
                piece = replace(self.runner.noise(self.encoders.latent_grid(output)), image=output)
                row.append(TrainedPiece(piece, loss=True))
        self.check_length(f"example {example.prompt.id!r}", tuple(trained.piece for trained in row), 0)
        return row

    def _encoded(self, rows: Sequence[Sequence[TrainedPiece]]) -> dict[int, torch.Tensor]:
        """The latent (N, C) of every clean or noisy image, by its id; those of one grid are encoded together."""
        images: dict[Grid, dict[int, Image]] = {}
        for piece in (trained.piece for row in rows for trained in row):
            if piece.image is not None and piece.span.kind in ("clean", "noise"):
                images.setdefault(piece.grid, {})[id(piece.image)] = piece.image
        latents: dict[int, torch.Tensor] = {}
        for same in images.values():
            latents.update(zip(same, self.encoders.encode_latents(list(same.values())), strict=True))
        return latents

    def _filled(
        self, row: Sequence[TrainedPiece], latents: Mapping[int, torch.Tensor], generator: torch.Generator
    ) -> list[TrainedPiece]:
        """The row with its latents, noise and times, and without the conditions that chance leaves out."""
        draws = any(trained.piece.span.kind == "noise" for trained in row)
        out: list[TrainedPiece] = []
        for trained in row:
            kept: TrainedPiece | None = trained
            if draws and not trained.loss:
                kept = self._drop(trained, float(torch.rand((), generator=generator)))
            if kept is None:
                continue
            piece = kept.piece
            if piece.image is not None and piece.span.kind in ("clean", "noise"):
                clean = latents[id(piece.image)]
                if piece.span.kind == "clean":
                    kept = TrainedPiece(replace(piece, state=(clean, clean.new_zeros(()))))
                else:
                    kept = self._noisy(piece, clean, generator)
            out.append(kept)
        return out

    def _drop(self, trained: TrainedPiece, u: float) -> TrainedPiece | None:
        settings = self.config.settings
        shares = {"text": settings.drop_text, "clean": settings.drop_latent, "read": settings.drop_read}
        return dropped(trained) if u < shares[trained.piece.span.kind] else trained

    def _noisy(self, piece: Piece, clean: torch.Tensor, generator: torch.Generator) -> TrainedPiece:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        t = flow_time(torch.randn((), generator=generator), self.config.settings.training_shift).to(clean)
        return noisy_piece(piece, clean, noise, t)

    # ---------------------------------------------------------------- weights
    def stored_name(self, name: str) -> str:
        return official_name(f"{name}.weight").removesuffix(".weight")

    def save_model(self, folder: Path) -> None:
        """Writes the published layout: ema.safetensors, ae.safetensors, the json files, the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        whole = {official_name(name): tensor for name, tensor in state.items() if not name.startswith(VAE)}
        autoencoder = {official_name(name): tensor for name, tensor in state.items() if name.startswith(VAE)}
        write_tensors(folder / "ema.safetensors", whole, {"format": "pt"})
        write_tensors(folder / "ae.safetensors", autoencoder, {"format": "pt"})
        for name, content in config_files(self.config, self.tokenizer.bos_id, self.tokenizer.eos_id).items():
            write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
        self.tokenizer.save(folder)

    @classmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """See ``MoTPolicy.from_config``; for a folder without weights, from its json files."""
        folder = Path(folder)
        if not is_bagel(folder):
            raise InputError(f"{folder}: is no BAGEL: give a folder with llm_config.json and ema.safetensors")
        if has_weights(folder):
            config = read_config(folder, find_tensors(folder, *WEIGHTS), find_tensors(folder, *AUTOENCODER))
        else:
            config = config_from_json(folder)
        policy = cls(config, BagelTokenizer.load(folder, config.vocabulary_size))
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        state = {n: t if n.startswith(VAE) else t.to(dtype) for n, t in policy.state_dict().items()}
        policy.load_state_dict(state, assign=True)
        return policy

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        base: Path | None = None,
        settings: BagelSettings | None = None,
    ) -> Self:
        """Reads the published layout straight to its device and dtype, tensor by tensor.

        ``dtype`` of all but the autoencoder, which stays float32; None: float32 on a CPU, bfloat16 elsewhere.
        ``base`` gives what a fine-tuned folder leaves out: tensors, configuration, tokenizer. ``settings`` replace
        those of the folder.
        Raises InputError, one line, for a folder that is not BAGEL, missing or truncated files, tensors that are
        missing or do not fit, other dtypes, and too little memory; warns of tensors that are not used.
        """
        folder, device = Path(folder), torch.device(device)
        home = base or folder
        for place in {folder, home}:
            if not is_bagel(place) and not (base and (place / "model.safetensors").is_file()):
                raise InputError(f"{place}: is no BAGEL: give a folder with llm_config.json and ema.safetensors")
        stored = find_tensors(folder, *WEIGHTS)
        if base:
            stored = find_tensors(base, *WEIGHTS) | stored
        stored = with_tied_head(home, stored)
        autoencoder = find_tensors(folder if (folder / "ae.safetensors").is_file() else home, *AUTOENCODER)
        config = read_config(home, stored, autoencoder, settings)
        tokenizer = BagelTokenizer.load(home, config.vocabulary_size)
        with torch.device("meta"):
            policy = cls(config, tokenizer)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        policy._fill(folder, stored, autoencoder, dtype, device)
        return policy

    def _fill(
        self,
        folder: Path,
        stored: Mapping[str, StoredTensor],
        autoencoder: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Replaces the tensors of a policy on the meta device."""
        wanted = {name: tensor.shape for name, tensor in self.state_dict().items()}
        places = {name: (autoencoder if name.startswith(VAE) else stored).get(official_name(name)) for name in wanted}
        found = {name: place for name, place in places.items() if place is not None}
        missing = [official_name(name) for name in wanted if name not in found]
        if missing:
            raise InputError(f"{folder}: {_tensors(missing)} missing: {several(missing)}: {WHOLE}")
        for name, place in found.items():
            if place.shape != wanted[name] and place.shape != self._convolution(name):
                raise InputError(
                    f"{place.path}: {place.name} is {list(place.shape)}, the configuration wants {list(wanted[name])}: "
                    "use the files of one model"
                )
        used = {official_name(name) for name in found}
        unused = [name for name in (*stored, *autoencoder) if name not in used]
        if unused:
            warnings.warn(f"{folder}: {_tensors(unused)} not used: {several(unused)}", stacklevel=3)
        dtypes = {name: torch.float32 if name.startswith(VAE) else dtype for name in found}
        need = sum(place.count * dtypes[name].itemsize for name, place in found.items())
        check_memory(folder, need, device)
        state = {name: self._read(name, place, dtypes[name], device) for name, place in found.items()}
        self.load_state_dict(state, assign=True)
        self.to(device)  # what is not stored: the angles

    def _read(self, name: str, place: StoredTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = place.read(dtype, device)
        if place.shape == self._convolution(name):
            return tensor.permute(0, 2, 3, 1).flatten(1)
        return tensor

    def _convolution(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that a plain SigLIP stores as a convolution."""
        vit = self.config.vit
        is_patches = name == "encoders.vit.embeddings.patch_embedding.weight"
        return (vit.width, 3, vit.patch_size, vit.patch_size) if is_patches else None


def has_weights(folder: Path) -> bool:
    """Whether any file of the model's weights is there; the autoencoder's alone is none."""
    return any(path.stem not in AUTOENCODER[0] for path in folder.glob("*.safetensors"))


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a complete BAGEL, which needs no base."""
    if not (is_bagel(folder) and has_weights(folder) and (folder / "ae.safetensors").is_file()):
        return False
    try:
        with torch.device("meta"):
            wanted = BagelPolicy.from_config(folder, dtype=torch.float32).state_dict()
        stored = {**with_tied_head(folder, find_tensors(folder, *WEIGHTS)), **find_tensors(folder, *AUTOENCODER)}
    except InputError:  # a json file, a tokenizer or the tensors that sizes come from are left out
        return False
    return all(official_name(name) in stored for name in wanted)


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def check_memory(folder: Path, need: int, device: torch.device) -> None:
    """Raises InputError where the weights alone do not fit."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"{folder}: the weights need {need / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free: "
            "load in bfloat16 (--dtype), use another device, or free memory"
        )


@dataclass(frozen=True, eq=False)
class TrainedPiece:
    """A piece of a supervised row."""

    piece: Piece
    loss: bool = False
    """Text: whether its ids and its end are predicted. A noisy image: whether its velocity is."""
    next_id: int | None = None
    """Target of the closing token, such as the begin of an image; nothing by default."""
    noise: torch.Tensor | None = None
    """(N, C): the noise of a noisy image."""
    clean: torch.Tensor | None = None
    """(N, C): the latent of a noisy image."""


TrainedRow = Sequence[TrainedPiece]


@dataclass(frozen=True)
class Targets:
    """Targets of a packed batch, as rows of its two blocks."""

    labels: torch.Tensor
    """int64 (n,): the tokens to predict."""
    label_rows: torch.Tensor
    """int64 (n,): rows of the understanding block that predict them."""
    label_weights: torch.Tensor
    """float32 (n,): 1 / sqrt(predicted tokens of the text)."""
    velocity_rows: torch.Tensor
    """int64 (m,): rows of the generation block with a flow loss."""
    velocities: torch.Tensor
    """float32 (m, C): noise - latent."""


@dataclass(frozen=True)
class PackedLosses:
    """Losses before any mean."""

    cross_entropy: torch.Tensor
    """(n,)."""
    squared_error: torch.Tensor
    """(m, C)."""
    targets: Targets


def noisy_piece(piece: Piece, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> TrainedPiece:
    """An image to generate at time t (): x_t = (1 - t) clean + t noise; clean and noise are (N, C)."""
    x_t = (1 - t) * clean + t * noise
    return TrainedPiece(replace(piece, state=(x_t, t)), loss=True, noise=noise, clean=clean)


def dropped(trained: TrainedPiece) -> TrainedPiece | None:
    """A condition left out: an image keeps its rope id, a text leaves nothing."""
    if trained.piece.span.kind == "text":
        return None
    return TrainedPiece(Piece(Span("dropped", 0), ()))


def find_targets(rows: Sequence[TrainedRow], channels: int, device: torch.device) -> Targets:
    """Finds the loss positions of a packed batch; tokens of the two blocks are counted in row order."""
    labels: list[int] = []
    label_rows: list[int] = []
    weights: list[float] = []
    velocity_rows: list[int] = []
    velocities: list[torch.Tensor] = []
    understanding = generation = 0
    for trained in (trained for row in rows for trained in row):
        piece = trained.piece
        ids = len(piece.ids)
        if trained.loss and piece.span.kind == "text":
            labels += piece.ids[1:]
            label_rows += range(understanding, understanding + ids - 1)
            weights += [(ids - 1) ** -0.5] * (ids - 1)
        if trained.next_id is not None:
            labels.append(trained.next_id)
            label_rows.append(understanding + ids - 1)
            weights.append(1.0)
        understanding += ids
        tokens = piece.span.length - ids
        if trained.loss and trained.noise is not None and trained.clean is not None:
            velocity_rows += range(generation, generation + tokens)
            velocities.append(trained.noise - trained.clean)
        generation += tokens
    return Targets(
        labels=torch.tensor(labels, dtype=torch.int64, device=device),
        label_rows=torch.tensor(label_rows, dtype=torch.int64, device=device),
        label_weights=torch.tensor(weights, dtype=torch.float32, device=device),
        velocity_rows=torch.tensor(velocity_rows, dtype=torch.int64, device=device),
        velocities=torch.cat(velocities) if velocities else torch.zeros(0, channels, device=device),
    )


def packed_losses(runner: ModelRunner, rows: Sequence[TrainedRow]) -> PackedLosses:
    """One pass over whole rows, without a cache, and the losses of all their targets."""
    pieces = [tuple(trained.piece for trained in row) for row in rows]
    hidden = runner.run(pieces, runner.transformer.empty_cache(len(rows)), extend=False)
    encoders = runner.encoders
    targets = find_targets(rows, encoders.channels, hidden.understanding.device)
    logits = encoders.text_logits(hidden.understanding.index_select(0, targets.label_rows)).float()
    selected = hidden.generation.index_select(0, targets.velocity_rows)
    still = targets.velocities.new_zeros(0)
    velocity = encoders.velocity(selected, still, still)
    return PackedLosses(
        cross_entropy=functional.cross_entropy(logits, targets.labels, reduction="none"),
        squared_error=(velocity - targets.velocities).square(),
        targets=targets,
    )
