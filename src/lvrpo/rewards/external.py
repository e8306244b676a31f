"""External encoders and judges: local folders of ``transformers`` checkpoints, never downloaded.

They are what the published method uses. The rewards that take one (``source``) use the policy's own frozen reading
side by default and need none.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.loading import pick_device
from lvrpo.policies.transformers_checkpoint import line_of
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_json
from lvrpo.types import Image, Parts

OWN = "own"
"""The ``source`` that is the policy's own frozen understanding side."""
ENCODER_TYPES = ("siglip", "siglip2", "clip")
"""``siglip``: fixed sizes (SigLIP, SigLIP 2); ``siglip2``: any size (SigLIP 2 NaFlex)."""
AT_ONCE = 32
READ_AT_ONCE = 16
"""Rows of a reader: its images take hundreds of tokens each."""
FINGERPRINT = ("*.json", "*.jinja", "*.safetensors", "*.bin")
"""Files that an answer depends on: settings, tokenizer, chat template, weights."""
PIECE, PIECES = 4096, 256
"""Bytes of a piece, and about how many of a file are looked at."""

T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """The embedding of one image or text."""

    whole: torch.Tensor
    """float32 (D,)."""
    parts: torch.Tensor
    """float32 (N, D): of its patches or words."""


class ImageTextEncoder:
    """A SigLIP, SigLIP 2 (arXiv:2502.14786) or CLIP (arXiv:2103.00020) in a local folder, or what was trained from
    one, such as PickScore (arXiv:2305.01569).

    Patches and words are put into the common space one by one, through what maps the pooled state there: SigLIP's
    head (of one patch, attention pooling is its value projection), CLIP's norm and projection.
    """

    def __init__(self, folder: str, device: str = "auto") -> None:
        """Raises InputError for a folder that holds none, and without the package."""
        path = _check_encoder(folder)
        self.device = pick_device(device)
        self.model = load_pretrained(path, "AutoModel").to(self.device)
        self.processor = load_pretrained(path, "AutoProcessor")
        self.length = self.model.config.text_config.max_position_embeddings
        self.identity = folder_fingerprint(path)
        self._is_clip = self.model.config.model_type == "clip"

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> list[Embedded]:
        """Texts are cut at the length that the model was trained with."""
        return [found for some in _parts(texts) for found in self._texts(some)]

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> list[Embedded]:
        """Images of any size are brought to the model's own."""
        return [found for some in _parts(images) for found in self._images(some)]

    def _texts(self, texts: Sequence[str]) -> Iterator[Embedded]:
        tokenizer = self.processor.tokenizer
        # SigLIP is trained on lower-case text padded to its full length, and sees the padding; CLIP's text is causal
        padded = {"padding": True} if self._is_clip else {"padding": "max_length"}
        given = list(texts) if self._is_clip else [text.lower() for text in texts]
        found = tokenizer(given, truncation=True, max_length=self.length, return_tensors="pt", **padded)
        inputs = {"input_ids": found["input_ids"].to(self.device)}
        if self._is_clip:
            inputs["attention_mask"] = found["attention_mask"].to(self.device)
        out = self.model.get_text_features(**inputs)
        to_common = self.model.text_projection if self._is_clip else self.model.text_model.head
        words = to_common(out.last_hidden_state).float().cpu()
        marker = torch.isin(found["input_ids"], torch.tensor(tokenizer.all_special_ids))
        for whole, row, is_marker in zip(out.pooler_output.float().cpu(), words, marker, strict=True):
            yield Embedded(whole, row[~is_marker] if (~is_marker).any() else row)

    def _images(self, images: Sequence[Image]) -> Iterator[Embedded]:
        inputs = self.processor.image_processor(images=[to_pil(image) for image in images], return_tensors="pt")
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        valid = inputs.get("pixel_attention_mask")  # only where images of several sizes are padded
        out = self.model.get_image_features(**inputs)
        for i, (whole, patches) in enumerate(zip(out.pooler_output, out.last_hidden_state, strict=True)):
            kept = patches if valid is None else patches[valid[i].bool()]
            yield Embedded(whole.float().cpu(), self._patches(kept).float().cpu())

    def _patches(self, states: torch.Tensor) -> torch.Tensor:
        """Patches (N, D) in the common space; the first state of a CLIP is its class token."""
        if self._is_clip:
            return self.model.visual_projection(self.model.vision_model.post_layernorm(states[1:]))
        return self.model.vision_model.head(states[:, None])


class ExternalVLM:
    """A model of ``transformers`` that reads images and writes, in a local folder: a judge like the policy's own."""

    image_size = None
    """It resizes images itself."""

    def __init__(self, folder: str, device: str = "auto") -> None:
        """Raises InputError for a folder that holds none, and without the package."""
        path = _check_reader(folder)
        self.device = pick_device(device)
        self.model = load_pretrained(path, "AutoModelForImageTextToText").to(self.device)
        self.processor = load_pretrained(path, "AutoProcessor")
        if not getattr(self.processor, "chat_template", None):  # old folders lack it
            raise InputError(f"{path}: has no chat template: use an instruction-tuned checkpoint")
        self.identity = folder_fingerprint(path)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._batches: bool | None = None  # unknown before a batch was compared with its rows

    @torch.inference_mode()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Mean log-prob per token, end token included, of each text as the answer to its context, (batch,).

        Rows whose inputs are of one shape go through the model together, such as the images of a group with one
        question; nothing is padded, as padding moves the log-probs of some models. The first batch is compared with
        its rows one by one, and a model whose batches differ gets every row alone.
        """
        rows = [self._inputs(parts, text) for parts, text in zip(contexts, texts, strict=True)]
        alike: dict[tuple[Any, ...], list[int]] = {}  # Any: names and shapes
        for i, (inputs, count) in enumerate(rows):
            shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in inputs.items())
            alike.setdefault((count, shapes), []).append(i)
        found: dict[int, torch.Tensor] = {}
        for same in alike.values():
            for part in _parts(same, READ_AT_ONCE):
                found.update(zip(part, self._batch([rows[i][0] for i in part], rows[part[0]][1]), strict=True))
        return torch.stack([found[i] for i in range(len(rows))])

    def _batch(self, rows: Sequence[dict[str, torch.Tensor]], count: int) -> list[torch.Tensor]:
        """Rows of one shape, whose answers have ``count`` tokens: together if that changes nothing."""
        if len(rows) == 1 or self._batches is False:
            return [self._forward(row, count)[0] for row in rows]
        # one row of texts, and one or several of each image: both are laid one after the other
        inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        try:
            together = self._forward(inputs, count)
        except torch.OutOfMemoryError:
            return [self._forward(row, count)[0] for row in rows]
        except (RuntimeError, ValueError, IndexError, TypeError):
            together = torch.zeros(0)
        if self._batches is None:
            alone = torch.stack([self._forward(row, count)[0] for row in rows])
            close = 1e-3 if self.model.dtype == torch.float32 else 5e-2
            self._batches = together.shape == alone.shape and torch.allclose(together, alone, rtol=0, atol=close)
            return list(together if self._batches else alone)  # as after the first one, so that resuming moves nothing
        if together.shape != (len(rows),):
            return [self._forward(row, count)[0] for row in rows]
        return list(together)

    def _forward(self, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        """Mean log-prob (B,) of the last ``count`` tokens of rows of one length; only their logits are made."""
        kept = {"logits_to_keep": count + 1} if self._keeps else {}
        logits = self.model(**inputs, **kept).logits[:, -count - 1 : -1].float()
        answers = inputs["input_ids"][:, -count:]
        return torch.log_softmax(logits, dim=-1).gather(2, answers[..., None])[..., 0].mean(dim=1).cpu()

    def _inputs(self, parts: Parts, text: str) -> tuple[dict[str, torch.Tensor], int]:
        """The model's inputs for a context with its answer, and the answer's tokens."""
        tokenizer = self.processor.tokenizer
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": to_pil(part)}
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
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        more |= {name: torch.zeros_like(ids) for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
        for name, values in more.items():
            inputs[name] = torch.cat([inputs[name], values.to(inputs[name])], dim=1)
        return inputs, len(answer)


def _check_encoder(folder: str) -> Path:
    """The folder of a SigLIP or CLIP; raises InputError, without reading weights, where it is none."""
    path, kind = _folder(folder)
    if kind not in ENCODER_TYPES:
        raise InputError(
            f"{path}: model_type={kind!r}: use a folder of {', '.join(ENCODER_TYPES[:-1])} or {ENCODER_TYPES[-1]}"
        )
    transformers_library("source: a folder")
    return path


def _check_reader(folder: str) -> Path:
    """The folder of a model that reads images and writes; raises InputError, without reading weights, otherwise."""
    path, kind = _folder(folder)
    transformers_library("source: a folder")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(f"{path}: model_type={kind!r}: no model of transformers that reads images and writes")
    return path


def _folder(folder: str) -> tuple[Path, object]:
    """A folder of a model, and its ``model_type``; raises InputError."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"no folder with a config.json: give a local folder, or {OWN}")
    found = read_json(path / "config.json")
    return path, found.get("model_type") if isinstance(found, dict) else None


def _own_or(check: Callable[[str], Path]) -> AfterValidator:
    """``OWN``, or a folder that passes the check; weights are not read."""

    def valid(source: str) -> str:
        if source != OWN:
            try:
                check(source)
            except InputError as error:
                raise ValueError(str(error)) from None
        return source

    return AfterValidator(valid)


EncoderSource = Annotated[str, _own_or(_check_encoder)]
"""``OWN``, or a local folder of a SigLIP or CLIP."""
ReaderSource = Annotated[str, _own_or(_check_reader)]
"""``OWN``, or a local folder of a model that reads images and writes."""


def folder_fingerprint(path: Path) -> str:
    """Name of the folder and a hash of its settings, and of the sizes and evenly spaced pieces of its weights.

    Training moves whole tensors, so that pieces of them identify a checkpoint without reading gigabytes.
    """
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted(file for pattern in FINGERPRINT for file in path.glob(pattern) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(PIECE, size // PIECES)):
                content.seek(start)
                digest.update(content.read(PIECE))
    return f"{path.resolve().name}:{digest.hexdigest()}"


def load_pretrained(path: Path, kind: str) -> Any:
    """Any: a model or processor of the optional package."""
    transformers = transformers_library("source: a folder")
    try:
        with quiet_loading(transformers):
            found = getattr(transformers, kind).from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise InputError(f"{path}: {kind} cannot be loaded ({line_of(error)}): restore the folder") from None
    return found.eval().requires_grad_(False) if isinstance(found, torch.nn.Module) else found


def _parts(items: Sequence[T], size: int = AT_ONCE) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
