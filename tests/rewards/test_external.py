"""Towers and readers of transformers in local folders: small random ones, made here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.external import ExternalVLM, ImageTextEncoder, folder_fingerprint
from lvrpo.rewards.published import Instruction, Knowledge, Semantic
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Fact, Group, Prompt

transformers = pytest.importorskip("transformers")

WORDS = (
    "<pad>",
    "<eos>",
    "<image>",
    "<unk>",
    "<bos>",
    "red",
    "blue",
    "cube",
    "yes",
    "no",
    "is",
    "it",
    "?",
    "user",
    ":",
)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = (
    "{% for m in messages %}user : {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %} {{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def tokenizer(kind: str = "words") -> Any:
    if kind == "siglip2":  # single letters
        letters = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\N{LOWER ONE EIGHTH BLOCK}", *"redcub")
        return transformers.Siglip2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)})
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "clip":
        ends = [(word, WORDS.index(word)) for word in ("<bos>", "<eos>")]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def image_processor(kind: str) -> Any:
    if kind == "clip":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    if kind == "siglip2":
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        return Siglip2ImageProcessorPil(patch_size=4, max_num_patches=9)
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 12, "width": 12})


def tower_folder(folder: Path, kind: str) -> Path:
    torch.manual_seed(1)
    text = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 10, "projection_size": 16}
    if kind == "siglip2":
        vision = {**SMALL, "patch_size": 4, "num_patches": 9}
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model, processor = transformers.Siglip2Model(config), transformers.Siglip2Processor
    elif kind == "clip":
        vision = {**SMALL, "patch_size": 4, "image_size": 12}
        text |= {"bos_token_id": WORDS.index("<bos>"), "eos_token_id": WORDS.index("<eos>")}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model, processor = transformers.CLIPModel(config), transformers.CLIPProcessor
    else:
        vision = {**SMALL, "patch_size": 4, "image_size": 12}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model, processor = transformers.SiglipModel(config), transformers.SiglipProcessor
    model.save_pretrained(folder)
    quietly(lambda: processor(image_processor=image_processor(kind), tokenizer=tokenizer(kind)).save_pretrained(folder))
    return folder


@pytest.fixture(scope="module", params=["siglip", "siglip2", "clip"])
def tower(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quietly(lambda: tower_folder(tmp_path_factory.mktemp("tower"), request.param))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")

    def make() -> None:
        torch.manual_seed(2)
        vision = transformers.SiglipVisionConfig(**SMALL, patch_size=4, image_size=12, vision_use_head=False)
        text = transformers.LlamaConfig(**SMALL, vocab_size=len(WORDS), num_key_value_heads=2)
        config = transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=WORDS.index("<image>"),
            image_seq_length=9,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
        model = transformers.LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder)
        processor = transformers.LlavaProcessor(
            image_processor=image_processor("siglip"),
            tokenizer=tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
            chat_template=CHAT,
            image_token="<image>",
        )
        processor.save_pretrained(folder)

    quietly(make)
    return folder


def test_a_tower_embeds_wholes_and_parts(tower: Path) -> None:
    found = ImageTextEncoder(str(tower), "cpu")
    images = [torch.rand(3, 12, 12), torch.rand(3, 20, 9), torch.rand(3, 12, 12)]
    texts = found.texts(["red cube", "RED cube", "cube"])
    lengths = (8, 8, 4) if found.model.config.model_type == "siglip2" else (2, 2, 1)
    assert [tuple(t.parts.shape) for t in texts] == [(length, 16) for length in lengths]
    assert torch.allclose(texts[0].whole, texts[1].whole, atol=1e-6)
    assert torch.allclose(found.texts(["cube"])[0].whole, texts[2].whole, atol=1e-6)  # alone as beside longer ones
    embedded = found.images(images)
    assert {tuple(p.whole.shape) for p in embedded} == {(16,)}
    assert all(p.parts.shape[1] == 16 and 1 <= p.parts.shape[0] <= 9 for p in embedded)
    alone = found.images(images[1:2])[0]
    assert torch.allclose(alone.whole, embedded[1].whole, atol=1e-5)
    assert torch.allclose(alone.parts, embedded[1].parts, atol=1e-5)


def test_its_similarity_is_that_of_the_model(tower: Path) -> None:
    """The model's own logits per image are scale cos + bias; CLIP has no bias."""
    found = ImageTextEncoder(str(tower), "cpu")
    image, text = torch.rand(3, 12, 12), "red cube"
    model = found.model
    tokens = found.processor.tokenizer([text], padding="max_length", max_length=10, return_tensors="pt")
    kept = {"attention_mask": tokens["attention_mask"]} if model.config.model_type == "clip" else {}
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    inputs = found.processor.image_processor(images=[pixels], return_tensors="pt")
    with torch.no_grad():
        logit = model(input_ids=tokens["input_ids"], **kept, **inputs).logits_per_image.item()
    bias = 0.0 if model.config.model_type == "clip" else model.logit_bias.item()
    cosine = (logit - bias) / model.logit_scale.exp().item()
    reward = Semantic(form="global", source=str(tower), device="cpu")
    assert reward.similarity(found.texts([text])[0], found.images([image])[0]) == pytest.approx(cosine, abs=1e-4)


def test_semantic_takes_the_tower_for_images_of_any_size(group: Callable[..., Group], tower: Path) -> None:
    prompt = Prompt("p", "generate", ("draw red cube",), ("image",))
    images = [[torch.rand(3, 16, 16)], [torch.rand(3, 9, 24)], [torch.full((3, 12, 12), torch.nan)]]
    for form in ("dense", "global"):
        scores = Semantic(form=form, source=str(tower), device="cpu").score([group(prompt, images)], None)  # type: ignore[arg-type]
        assert scores.values[0, :2].abs().max() <= 1
        assert scores.values[0, 0] != scores.values[0, 1]
        assert scores.failures == {(0, 2): "the image holds values that are no numbers"}


def test_a_reader_gives_the_mean_log_prob_of_an_answer(vlm: Path) -> None:
    reader = ExternalVLM(str(vlm), "cpu")
    image = torch.rand(3, 12, 12)
    found = reader.text_logprob([(image, "is it red ?")] * 2 + [(image * 0, "is it red ?")], ["yes", "red cube", "yes"])
    ids = {word: i for i, word in enumerate(WORDS)}
    row = [ids[w] for w in ("user", ":", *["<image>"] * 9, "is", "it", "red", "?", "red", "cube", "<eos>")]
    pixels = reader.processor.image_processor(
        images=[(image * 255).round().byte().permute(1, 2, 0).numpy()], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        logits = reader.model(input_ids=torch.tensor([row]), pixel_values=pixels).logits[0]
    steps = torch.log_softmax(logits[-4:-1], -1)[range(3), [ids["red"], ids["cube"], ids["<eos>"]]]
    assert found[1].item() == pytest.approx(steps.mean().item(), abs=1e-4)
    assert found[0] != found[2]


def cases() -> tuple[list[Any], list[str]]:
    """Rows of several shapes: images of two sizes, none, two at once, answers of one and two words."""
    torch.manual_seed(3)
    images = [torch.rand(3, 12, 12), torch.rand(3, 20, 9), torch.rand(3, 12, 12)]
    contexts = [(image, question) for image in images for question in ("is it red ?", "is it ?")]
    contexts += [(images[0], images[1], "is it ?"), (images[1], images[0], "is it ?"), ("is it red ?",)]
    texts = ["yes", "no", "yes", "red cube", "red cube", "no", "yes", "yes", "no"]
    return contexts, texts


def test_rows_of_one_shape_are_read_together_and_score_as_alone(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, texts = cases()
    alone = torch.cat(
        [ExternalVLM(str(vlm), "cpu").text_logprob([c], [t]) for c, t in zip(contexts, texts, strict=True)]
    )
    reader = ExternalVLM(str(vlm), "cpu")
    sizes: list[int] = []
    forward = reader._forward

    def noted(inputs: Any, count: int) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        return forward(inputs, count)

    monkeypatch.setattr(reader, "_forward", noted)
    first = reader.text_logprob(contexts, texts)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)
    assert sizes[:3] == [2, 1, 1]  # the first batch is compared with its rows
    sizes.clear()
    assert torch.equal(reader.text_logprob(contexts, texts), first)
    assert sorted(sizes) == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("fault", ["mixes its rows", "takes one row"])
def test_a_model_that_does_not_take_batches_gets_every_row_alone(
    fault: str, vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts, texts = cases()
    expected = ExternalVLM(str(vlm), "cpu").text_logprob(contexts, texts)
    reader = ExternalVLM(str(vlm), "cpu")
    forward, sizes = reader._forward, []

    def broken(inputs: Any, count: int) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1 and fault == "takes one row":
            raise ValueError("one row at a time")
        return forward(inputs, count).flip(0)

    monkeypatch.setattr(reader, "_forward", broken)
    torch.testing.assert_close(reader.text_logprob(contexts, texts), expected, rtol=0, atol=1e-5)
    assert sizes.count(2) == 1


def test_a_folder_is_told_by_its_weights(vlm: Path, tower: Path, tmp_path: Path) -> None:
    """Weights of the same sizes and another chat template are another judge."""
    for path in vlm.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = folder_fingerprint(tmp_path)
    assert first.partition(":")[2] == folder_fingerprint(vlm).partition(":")[2]
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + bytes(4))
    assert folder_fingerprint(tmp_path) != first
    weights.write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("another")
    assert folder_fingerprint(tmp_path) != first
    for reward in (Knowledge(source=str(vlm)), Instruction(source=str(vlm))):
        assert reward.judged_by == folder_fingerprint(vlm)
    assert Semantic(source=str(tower)).judged_by == folder_fingerprint(tower)
    assert Knowledge().judged_by == Instruction().judged_by == Semantic().judged_by == ""


def test_knowledge_and_instruction_ask_the_reader(group: Callable[..., Group], vlm: Path) -> None:
    fact = Fact("exists", "is it red ?", "yes")
    draw = Prompt("d", "generate", ("red",), ("image",), facts=(fact,))
    ask = Prompt("q", "understand", (torch.rand(3, 12, 12), "is it ?"), ("text",))
    image = torch.rand(3, 12, 12)
    groups = [group(draw, [[image], [torch.rand(3, 30, 20)]]), group(ask, [["yes"], [" "]])]
    reader = ExternalVLM(str(vlm), "cpu")
    expected = reader.text_logprob([(image, "is it red ?"), ask.parts], ["yes", "yes"]).exp()
    scores = Knowledge(source=str(vlm), device="cpu").score(groups, None)  # type: ignore[arg-type]
    assert scores.values[:, 0].tolist() == pytest.approx(expected.tolist())
    assert scores.failures == {(1, 1): "the answer is empty"}
    for above, kept in ((float(expected[0]) - 1e-4, 1.0), (float(expected[0]) + 1e-4, 0.0)):
        binary = Instruction(source=str(vlm), above=above, device="cpu")
        assert binary.score(groups[:1], None).values[0, 0] == kept  # type: ignore[arg-type]


def test_folders_that_hold_no_reader(vlm: Path, tower: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"model_type='(siglip2?|clip)': no model of transformers that reads"
    ) as caught:
        build_rewards([RewardConfig(name="knowledge", options={"source": str(tower)})])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="model_type='llava': use a folder of siglip, siglip2 or clip"):
        build_rewards([RewardConfig(name="semantic", options={"source": str(vlm)})])
    for path in vlm.iterdir():
        if "template" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("*.json"):
        tree = json.loads(path.read_text())
        tree.pop("chat_template", None)
        path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="has no chat template: use an instruction-tuned checkpoint"):
        ExternalVLM(str(tmp_path), "cpu")
    for name in ("knowledge", "instruction"):
        with pytest.raises(InputError, match=r"options.source=nowhere: no folder with a config"):
            build_rewards([RewardConfig(name=name, options={"source": "nowhere"})])
