"""Detectors and color classifiers of ``transformers``, in a local folder or the local Hub cache; none runs own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage

from lvrpo.data.geneval import COLORS
from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.loading import cached_folder, pick_device
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.reading import read_json_object
from lvrpo.rewards.external import folder_fingerprint, load_pretrained
from lvrpo.types import Image

OFFICIAL_THRESHOLDS = (0.3, 0.9)
"""Of GenEval's Mask2Former: objects of every prompt, and objects of prompts about numbers."""
LABELS: Mapping[str, tuple[str, ...]] = {
    "computer mouse": ("mouse",),
    "tv remote": ("remote",),
    "computer keyboard": ("keyboard",),
    "hair drier": ("hair dryer",),
    "tv": ("tvmonitor", "television"),
    "motorcycle": ("motorbike",),
    "airplane": ("aeroplane",),
    "couch": ("sofa",),
    "potted plant": ("pottedplant",),
    "dining table": ("diningtable",),
    "donut": ("doughnut",),
}
"""What detectors call GenEval's objects that are named otherwise in some of them."""
BACKGROUND = (0x99, 0x99, 0x99)
"""What is drawn around an object whose color is classified."""
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


@dataclass(frozen=True)
class Detection:
    """One object that a detector found."""

    score: float
    """In [0, 1]."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: torch.Tensor | None = None
    """bool (height, width) of the image; None from a detector of boxes."""


def model_folder(name: str, what: str) -> tuple[Path, str]:
    """The folder of a local checkpoint or cached Hub id, and its ``model_type``; ``what`` begins the InputError."""
    path = Path(name)
    if not path.is_dir():
        path = cached_folder(name)
    if not (path / "config.json").is_file():
        raise InputError(f"{what} {name}: holds no config.json: give a folder of transformers")
    return path, str(read_json_object(path / "config.json").get("model_type"))


class Detector:
    """Finds the objects of given names in an image.

    Zero-shot detectors (Grounding DINO, OWLv2) are queried for one name at a time, so that each box belongs to it;
    detectors of fixed classes (Mask2Former, DETR and others) must know every name, in the words of COCO.
    """

    def __init__(self, name: str, thresholds: tuple[float, float] | None = None, device: str = "auto") -> None:
        """``thresholds``: scores that count, of all prompts and of those about numbers; None: the official ones, which
        mean something for Mask2Former alone. Raises InputError for a model that is no detector."""
        transformers_library(f"detector {name}")
        from transformers.models.auto import modeling_auto as auto

        path, kind = model_folder(name, "detector")
        self.zero_shot = kind in auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
        self.masks = kind in ("mask2former", "maskformer")
        boxes = kind in auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
        if not (self.zero_shot or self.masks or boxes):
            raise InputError(
                f"detector {name}: model_type={kind!r}: is no detector of transformers: give a Mask2Former, Grounding "
                "DINO, OWLv2 or DETR"
            )
        if thresholds is None and not self.masks:
            raise InputError(
                f"detector {name}: its scores are on another scale than those of GenEval's Mask2Former: name the two "
                "that count (--thresholds OBJECT,COUNTING)"
            )
        self.thresholds = thresholds or OFFICIAL_THRESHOLDS
        head = "ZeroShotObjectDetection" if self.zero_shot else "UniversalSegmentation"
        head = head if self.zero_shot or self.masks else "ObjectDetection"
        self.device = pick_device(device)
        self.model = load_pretrained(path, f"AutoModelFor{head}").to(self.device)
        self.processor = load_pretrained(path, "AutoProcessor" if self.zero_shot else "AutoImageProcessor")
        self.kind = kind
        self.identity = f"{folder_fingerprint(path)} above {self.thresholds[0]:g}, counting {self.thresholds[1]:g}"

    def require_names(self, names: Sequence[str]) -> None:
        """Raises InputError for a name that is none of the classes of a detector with fixed classes."""
        known = set() if self.zero_shot else {*map(str.lower, self.model.config.id2label.values())}
        unknown = [] if self.zero_shot else [n for n in names if not known & {n, *LABELS.get(n, ())}]
        if unknown:
            raise InputError(
                f"detector {self.identity}: knows no {unknown[0]!r} ({len(unknown)} of {len(names)} names missing): "
                "give one trained on COCO, or a zero-shot detector"
            )

    @torch.inference_mode()
    def __call__(self, image: Image, names: Sequence[str]) -> dict[str, list[Detection]]:
        """The detections of each name in an image, of any score above the lower threshold."""
        pil = to_pil(image)
        width, height = pil.size
        if self.zero_shot:
            return {name: [_inside(d, width, height) for d in self._named(pil, name)] for name in names}
        found = [(label, _inside(d, width, height)) for label, d in self._fixed(pil)]
        return {name: [d for label, d in found if label in {name, *LABELS.get(name, ())}] for name in names}

    def _named(self, pil: PilImage.Image, name: str) -> list[Detection]:
        """Text prompts as the two families were trained: a phrase with a full stop, or a photo of the object."""
        text = f"{name}." if "dino" in self.kind else [[f"a photo of a {name}"]]
        inputs = self.processor(images=pil, text=text, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        size = [(pil.height, pil.width)]
        options = {"threshold": min(self.thresholds), "target_sizes": size}
        more = {"input_ids": inputs["input_ids"], "text_threshold": 0.0} if "dino" in self.kind else {}
        found = self.processor.post_process_grounded_object_detection(outputs, **options, **more)[0]
        rows = zip(found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Detection(score, tuple(box)) for score, box in rows]

    def _fixed(self, pil: PilImage.Image) -> list[tuple[str, Detection]]:
        inputs = self.processor(images=pil, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        size, low = [(pil.height, pil.width)], min(self.thresholds)
        if not self.masks:
            found = self.processor.post_process_object_detection(outputs, threshold=low, target_sizes=size)[0]
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
            return [(self._label(label), Detection(score, tuple(box))) for label, score, box in rows]
        found = self.processor.post_process_instance_segmentation(
            outputs, threshold=low, target_sizes=size, return_binary_maps=True
        )[0]
        instances = []
        maps = found["segmentation"] if found["segments_info"] else ()
        for segment, mask in zip(found["segments_info"], maps, strict=True):
            held = mask.bool().cpu()
            box = PilImage.fromarray(held.numpy()).getbbox()
            if box is not None:  # of no pixel
                instances.append((self._label(segment["label_id"]), Detection(float(segment["score"]), box, held)))
        return instances

    def _label(self, number: int) -> str:
        return str(self.model.config.id2label[number]).lower()


def _inside(found: Detection, width: int, height: int) -> Detection:
    """With the box cut at the ends of the image."""
    left, top, right, bottom = found.box
    x = [min(max(end, 0.0), width) for end in (left, right)]
    y = [min(max(end, 0.0), height) for end in (top, bottom)]
    return replace(found, box=(x[0], y[0], x[1], y[1]))


class ColorClassifier:
    """Chooses the color of an object by a CLIP or SigLIP: the mean of three texts per color, the nearest to the crop.

    What surrounds the mask of an object is gray; an object without mask is its box.
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        """Raises InputError for a model without embeddings of images and texts."""
        transformers_library(f"color classifier {name}")
        from transformers.models.auto import modeling_auto as auto

        path, kind = model_folder(name, "color classifier")
        if kind not in auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            raise InputError(f"color classifier {name}: model_type={kind!r}: give a CLIP or a SigLIP")
        self.device = pick_device(device)
        self.model = load_pretrained(path, "AutoModel").to(self.device)
        if not all(hasattr(self.model, f"get_{side}_features") for side in ("text", "image")):
            raise InputError(f"color classifier {name}: model_type={kind!r} gives no embeddings: give a CLIP or SigLIP")
        self.processor = load_pretrained(path, "AutoProcessor")
        self.padding = "max_length" if "siglip" in kind else True
        self.identity = folder_fingerprint(path)
        self._colors: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image, name: str, objects: Sequence[Detection]) -> list[str]:
        """The color of each object of an image, one of ``COLORS``."""
        pil = to_pil(image)
        crops = [_crop(pil, each) for each in objects]
        pixels = self.processor.image_processor(images=crops, return_tensors="pt").to(self.device)
        seen = _unit(self.model.get_image_features(**pixels))
        return [COLORS[i] for i in (seen @ self._of_name(name).T).argmax(dim=1).tolist()]

    def _of_name(self, name: str) -> torch.Tensor:
        """Unit vectors (10, D) of the colors of a name."""
        if name not in self._colors:
            texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
            inputs = self.processor.tokenizer(texts, padding=self.padding, return_tensors="pt").to(self.device)
            vectors = _unit(self.model.get_text_features(**inputs))
            self._colors[name] = _unit(vectors.view(len(COLORS), len(COLOR_TEMPLATES), -1).mean(dim=1))
        return self._colors[name]


def _unit(found: Any) -> torch.Tensor:
    """Unit vectors. Any: what a method of transformers returns, by version a tensor or an output with one."""
    vectors = found if isinstance(found, torch.Tensor) else found.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _crop(pil: PilImage.Image, found: Detection) -> PilImage.Image:
    if found.mask is not None:
        mask = PilImage.fromarray(found.mask.numpy().astype("uint8") * 255)
        pil = PilImage.composite(pil, PilImage.new("RGB", pil.size, BACKGROUND), mask)
    left, top, right, bottom = (round(end) for end in found.box)
    return pil.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
