"""Encoders and judges that the user brings: folders of ``transformers`` checkpoints, never downloaded.

They are what the published method uses. The rewards that take one (``source``) use the policy's own frozen reading
side by default and need none.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lvrpo.errors import InputError
from lvrpo.types import Image, Parts

OWN = "own"
"""The ``source`` that is the policy's own frozen reading side."""
TOWERS = ("siglip", "siglip2")
"""Fixed sizes (SigLIP, SigLIP 2) and any size (SigLIP 2 NaFlex)."""
AT_ONCE = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """What a tower makes of one picture or text."""

    whole: torch.Tensor
    """float32 (D,)."""
    parts: torch.Tensor
    """float32 (N, D): of its patches or words."""


class SiglipTower:
    """A SigLIP or SigLIP 2 (arXiv:2502.14786) in a local folder.

    Patches and words are put into the common space one by one, through the head that pools them all: of one patch,
    attention pooling is its value projection.
    """

    def __init__(self, folder: str, device: str = "auto") -> None:
        """Raises InputError for a folder that holds none, and without the package."""
        path = check_tower(folder)
        self.device = torch.device(_device(device))
        self.model = _loaded(path, "AutoModel").to(self.device)
        self.processor = _loaded(path, "AutoProcessor")
        self.length = self.model.config.text_config.max_position_embeddings
        self.identity = folder_identity(path)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> list[Embedded]:
        """Texts are cut at the length that the model was trained with."""
        return [found for some in _parts(texts) for found in self._texts(some)]

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> list[Embedded]:
        """Pictures of any size are brought to the model's own."""
        return [found for some in _parts(images) for found in self._images(some)]

    def _texts(self, texts: Sequence[str]) -> Iterator[Embedded]:
        tokenizer, tower = self.processor.tokenizer, self.model.text_model
        # SigLIP is trained on lower-case text padded to its full length, and sees the padding
        lower = [text.lower() for text in texts]
        found = tokenizer(lower, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        ids = found["input_ids"].to(self.device)
        out = self.model.get_text_features(input_ids=ids)
        words = tower.head(out.last_hidden_state).float().cpu()
        marker = torch.isin(ids.cpu(), torch.tensor(tokenizer.all_special_ids))
        for whole, row, is_marker in zip(out.pooler_output.float().cpu(), words, marker, strict=True):
            yield Embedded(whole, row[~is_marker] if (~is_marker).any() else row)

    def _images(self, images: Sequence[Image]) -> Iterator[Embedded]:
        inputs = self.processor.image_processor(images=[_picture(image) for image in images], return_tensors="pt")
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        valid = inputs.get("pixel_attention_mask")  # only where pictures of several sizes are padded
        out = self.model.get_image_features(**inputs)
        for i, (whole, patches) in enumerate(zip(out.pooler_output, out.last_hidden_state, strict=True)):
            kept = patches if valid is None else patches[valid[i].bool()]
            yield Embedded(whole.float().cpu(), self.model.vision_model.head(kept[:, None]).float().cpu())


class ExternalVLM:
    """A model of ``transformers`` that reads pictures and writes, in a local folder: a judge like the reading side."""

    image_size = None
    """It brings pictures to its own size itself."""

    def __init__(self, folder: str, device: str = "auto") -> None:
        """Raises InputError for a folder that holds none, and without the package."""
        path = check_reader(folder)
        self.device = torch.device(_device(device))
        self.model = _loaded(path, "AutoModelForImageTextToText").to(self.device)
        self.processor = _loaded(path, "AutoProcessor")
        if not getattr(self.processor, "chat_template", None):  # old folders lack it
            raise InputError(f"{path}: has no chat template: use an instruction-tuned checkpoint")
        self.identity = folder_identity(path)

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Mean log-prob per token, end token included, of each text as the answer to its context, (batch,).

        One row at a time: padding moves the log-probs of some models.
        """
        return torch.stack([self._row(parts, text) for parts, text in zip(contexts, texts, strict=True)])

    def _row(self, parts: Parts, text: str) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": _picture(part)}
            for part in parts
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([answer], device=self.device)
        for name, more in (("input_ids", ids), ("attention_mask", torch.ones_like(ids))):
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name])], dim=1)
        if "token_type_ids" in inputs or "mm_token_type_ids" in inputs:
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids).to(inputs[name])], dim=1)
        logits = self.model(**inputs).logits[0, -len(answer) - 1 : -1].float()
        return torch.log_softmax(logits, dim=-1).gather(1, ids[0][:, None]).mean().cpu()


def once(build: Callable[[], T]) -> Callable[[], T]:
    """Loads at the first call: configurations are checked without reading weights."""
    found: list[T] = []

    def get() -> T:
        if not found:
            found.append(build())
        return found[0]

    return get


def check_tower(folder: str) -> Path:
    """The folder of a SigLIP; raises InputError, without reading weights, where it is none."""
    path = _folder(folder)
    kind = _config(path).get("model_type")
    if kind not in TOWERS:
        raise InputError(f"{path}: model_type={kind!r}: use a folder of {' or '.join(TOWERS)}")
    _transformers()
    return path


def check_reader(folder: str) -> Path:
    """The folder of a model that reads pictures and writes; raises InputError, without reading weights, otherwise."""
    path = _folder(folder)
    kind = _config(path).get("model_type")
    _transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(f"{path}: model_type={kind!r}: no model of transformers that reads pictures and writes")
    return path


def _folder(folder: str) -> Path:
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"source={folder!r}: no folder with a config.json: give a local folder, or {OWN}")
    return path


def _transformers() -> Any:
    """Any: the package is optional."""
    try:
        import transformers
    except ImportError:
        raise InputError("source: a folder needs the package transformers: pip install 'lvrpo[external]'") from None
    return transformers


def folder_identity(path: Path) -> str:
    """Name of the folder and a hash of its configuration and the sizes of its weights."""
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=6)
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name}{file.stat().st_size}".encode())
    return f"{path.resolve().name}:{digest.hexdigest()}"


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        raise InputError(f"{path / 'config.json'}: is no JSON: restore the file") from None


def _loaded(path: Path, kind: str) -> Any:
    """Any: a model or processor of the optional package."""
    transformers = _transformers()
    try:
        with _quiet(transformers):
            found = getattr(transformers, kind).from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{path}: {kind} cannot be loaded ({line[:200]}): restore the folder") from None
    return found.eval().requires_grad_(False) if isinstance(found, torch.nn.Module) else found


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Loading says much that is of no use to a run. Any: the optional package."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _picture(image: Image) -> Any:
    """Any: a PIL picture."""
    from PIL import Image as PilImage

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return PilImage.fromarray(pixels)


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]
