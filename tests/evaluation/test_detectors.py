"""Detectors and color classifiers of transformers: small random ones in local folders, made here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.detectors import BACKGROUND, ColorClassifier, Detector, _crop, model_folder
from lvrpo.evaluation.benchmarks.geneval import Detection
from lvrpo.images import to_pil

transformers = pytest.importorskip("transformers")

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", ".", "a", "photo", "of", "red", "bench", "sports", "ball", "clock")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 16}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EYE = {**SMALL, "patch_size": 8, "image_size": 32}
SQUARE = {"height": 32, "width": 32}
LABELS = {0: "bench", 1: "sports ball", 2: "mouse"}
IMAGE = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(3))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="[SEP]", model_max_length=16, **special
    )


def swin(*stages: str) -> Any:
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2, "image_size": 32}
    return transformers.SwinConfig(**sizes, out_features=[f"stage{s}" for s in stages])


def mask2former(folder: Path) -> None:
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    config = transformers.Mask2FormerConfig(
        backbone_config=swin(*"1234"),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
        **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label=LABELS,
        label2id={label: i for i, label in LABELS.items()},
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def owlv2(folder: Path) -> None:
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    config = transformers.Owlv2Config(text_config=TEXT, vision_config=EYE, projection_dim=16)
    transformers.Owlv2ForObjectDetection(config).save_pretrained(folder)
    processor = Owlv2ImageProcessorPil(size=SQUARE)
    transformers.Owlv2Processor(image_processor=processor, tokenizer=tokenizer()).save_pretrained(folder)


def grounding_dino(folder: Path) -> None:
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    text = transformers.BertConfig(**{**TEXT, "max_position_embeddings": 64})
    sizes = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=swin(*"234"), text_config=text, d_model=32, num_queries=6, max_text_len=16, **sizes
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    transformers.GroundingDinoProcessor(image_processor=processor, tokenizer=tokenizer()).save_pretrained(folder)


def clip(folder: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = transformers.CLIPConfig(text_config=TEXT, vision_config=EYE, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer()).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "mask2former": mask2former,
    "owlv2": owlv2,
    "grounding_dino": grounding_dino,
    "clip": clip,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in MAKERS.items():
            torch.manual_seed(0)
            found[name] = tmp_path_factory.mktemp(name)
            make(found[name])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mask2former", "owlv2", "grounding_dino"])
def test_what_a_detector_finds_lies_in_the_image(folders: dict[str, Path], kind: str) -> None:
    detector = Detector(str(folders[kind]), (0.0, 0.0), "cpu")
    detector.require_names(["bench", "computer mouse"])
    found = detector(IMAGE, ["bench", "sports ball"])
    assert list(found) == ["bench", "sports ball"]
    assert found["bench"]
    for detection in (d for each in found.values() for d in each):
        left, top, right, bottom = detection.box
        assert 0 <= left <= right <= 48
        assert 0 <= top <= bottom <= 32
        assert 0 <= detection.score <= 1
        assert (detection.mask is None) == (kind != "mask2former")
        if detection.mask is not None:
            assert detection.mask.shape == (32, 48)
    surer = Detector(str(folders[kind]), (0.6, 0.8), "cpu")(IMAGE, ["bench"])["bench"]
    assert [d.score for d in surer] == [d.score for d in found["bench"] if d.score > 0.6]


@pytest.mark.filterwarnings("ignore")
def test_the_thresholds_of_genevals_detector_are_for_its_kind_alone(folders: dict[str, Path]) -> None:
    detector = Detector(str(folders["mask2former"]), device="cpu")
    assert detector.thresholds == (0.3, 0.9)
    with pytest.raises(InputError, match=r"knows no 'cow' \(1 of 2 names missing\)"):
        detector.require_names(["bench", "cow"])
    with pytest.raises(InputError, match=r"another scale .*--thresholds OBJECT,COUNTING"):
        Detector(str(folders["owlv2"]))


def test_what_is_no_detector_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_type='clip': is no detector of transformers"):
        Detector(str(folders["clip"]))
    with pytest.raises(InputError, match="model_type='mask2former': give a CLIP or a SigLIP"):
        ColorClassifier(str(folders["mask2former"]))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        model_folder(str(tmp_path), "detector")
    with pytest.raises(InputError, match="not in the local Hub cache"):
        model_folder("somebody/detector", "detector")


@pytest.mark.filterwarnings("ignore")
def test_the_color_is_that_of_the_nearest_texts(folders: dict[str, Path]) -> None:
    """By hand: the mean of the three texts of each color, and the crop of the object."""
    classifier = ColorClassifier(str(folders["clip"]), "cpu")
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[4:20, 6:30] = True
    objects = [Detection(0.9, (0, 0, 20, 20)), Detection(0.9, (6, 4, 30, 20), mask)]
    colors = torch.nn.functional.normalize(torch.randn(10, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    classifier._colors["bench"] = colors
    crops = [_crop(to_pil(IMAGE), each) for each in objects]
    assert [crop.size for crop in crops] == [(20, 20), (24, 16)]
    pixels = classifier.processor.image_processor(images=crops, return_tensors="pt")
    with torch.no_grad():
        seen = classifier.model.get_image_features(**pixels).pooler_output
    expected = [data_color(i) for i in (seen @ colors.T).argmax(dim=1).tolist()]
    assert classifier(IMAGE, "bench", objects) == expected
    with torch.no_grad():
        texts = ["a photo of a red clock", "a photo of a red-colored clock", "a photo of a red object"]
        inputs = classifier.processor.tokenizer(texts, padding=True, return_tensors="pt")
        vectors = classifier.model.get_text_features(**inputs).pooler_output
        mean = torch.nn.functional.normalize(torch.nn.functional.normalize(vectors, dim=-1).mean(dim=0), dim=-1)
    assert torch.allclose(classifier._of_name("clock")[0], mean, atol=1e-5)


def data_color(number: int) -> str:
    from lvrpo.data.geneval import COLORS

    return COLORS[number]


def test_what_surrounds_a_mask_is_gray_and_a_crop_is_never_empty() -> None:
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[0, 0] = True
    image = to_pil(torch.ones(3, 32, 48))
    crop = _crop(image, Detection(0.9, (0, 0, 2, 1), mask))
    assert [crop.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), BACKGROUND]
    assert _crop(image, Detection(0.9, (5.2, 3.4, 5.3, 3.4))).size == (1, 1)
