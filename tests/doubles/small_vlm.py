"""Small random image-text-to-text models with tokenizers of their own, as folders that transformers reads.

The processors of Qwen-VL hold one for videos, which needs torchvision. Where that is missing, ``without_videos`` lets
transformers make them without it: lvrpo reads no videos.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lvrpo.policies.transformers_library import quiet_loading

QWEN_MARKERS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    "<|video_pad|>",
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_MARKERS = (
    *("<pad>", "<s>", "</s>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)),
)
IDEFICS_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_MARKERS = (
    *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
    "<image_soft_token>",
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3")
END_OF_TURN = GEMMA_MARKERS.index("<end_of_turn>")
"""Ends what Gemma says; its tokenizer's own end token does not."""
PARTS = {
    "idefics3": '{"image_seq_len": 4, "processor_class": "Idefics3Processor"}',
    "gemma3": '{"image_seq_length": 4, "processor_class": "Gemma3Processor"}',
}
"""Contents of processor_config.json."""


@contextmanager
def without_videos() -> Iterator[None]:
    """Processors of images and videos are made for images alone where torchvision is missing."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING, ProcessorMixin

    check = ProcessorMixin.check_argument_for_proper_class

    def checked(self: Any, name: str, argument: Any) -> Any:  # Any: of transformers
        return None if name == "video_processor" and argument is None else check(self, name, argument)

    classes = type(MODALITY_TO_AUTOPROCESSOR_MAPPING)._MAPPING_NAMES
    with (
        patch.object(ProcessorMixin, "check_argument_for_proper_class", checked),
        patch.dict(classes, video_processor=(__name__, "NoVideos")),
    ):
        yield


class NoVideos:
    """In the place of a video processor."""

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> None:
        """None."""


def make_tokenizer(markers: Sequence[str], eos: str, pad: str, size: int, **named: Any) -> Any:
    """A byte-level tokenizer of transformers. Any: of an optional package, and its options."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(marker, special=True, normalized=False) for marker in markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what color is it a red circle above a blue square yes no"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, **named)


def create_vlm(
    family: str,
    folder: Path,
    width: int = 32,
    depth: int = 2,
    vocabulary: int = 320,
    max_pixels: int = 4096,
    positions: int | None = None,
) -> Path:
    """Writes a random model with its processor; weights are large enough that an image moves the logits.

    ``max_pixels``: of an image of Qwen-VL; larger ones are resized. ``positions``: the most tokens of a row.
    """
    import transformers

    make = {"idefics3": _idefics, "gemma3": _gemma}.get(family, _qwen)
    config, tokenizer, images, template = make(family, width, depth, vocabulary)
    if positions is not None:
        config.get_text_config().max_position_embeddings = positions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    if family not in PARTS:
        images.size = {"shortest_edge": 64, "longest_edge": max_pixels}
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, END_OF_TURN if family == "gemma3" else 0],
        pad_token_id=0,
        do_sample=True,
        temperature=0.3,
        top_k=1,
    )
    with quiet_loading(transformers):
        for part in (model, tokenizer, images):
            part.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    if family in PARTS:
        (folder / "processor_config.json").write_text(PARTS[family])
    return folder


def _decoder_sizes(width: int, depth: int, vocabulary: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


def _qwen(family: str, width: int, depth: int, vocabulary: int) -> Any:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer(QWEN_MARKERS, "<|im_end|>", "<|endoftext|>", vocabulary)
    image, video, start = (tokenizer.convert_tokens_to_ids(QWEN_MARKERS[i]) for i in (5, 6, 3))
    text = {
        **_decoder_sizes(width, depth, vocabulary),
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "initializer_range": 0.3}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2)
    if family == "qwen2_5_vl":
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": width, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    else:
        text |= {"head_dim": width // 4}
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": width}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=True)
    return config, tokenizer, images, QWEN_TEMPLATE


def _idefics(family: str, width: int, depth: int, vocabulary: int) -> Any:
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer(IDEFICS_MARKERS, "<end_of_utterance>", "<pad>", vocabulary, bos_token="<s>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        pad_token_id=0,
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.3,
    }
    config = transformers.Idefics3Config(
        text_config=text, vision_config=vision, image_token_id=image, scale_factor=2, pad_token_id=0
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    return config, tokenizer, images, IDEFICS_TEMPLATE


def _gemma(family: str, width: int, depth: int, vocabulary: int) -> Any:
    """Layers that see eight places alternate with those that see all, and image tokens see their whole image."""
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    start, end, patch = GEMMA_MARKERS[-3:]
    further = {"boi_token": start, "eoi_token": end, "image_token": patch}
    named = {"bos_token": "<bos>", "extra_special_tokens": further}
    tokenizer = make_tokenizer(GEMMA_MARKERS, "<eos>", "<pad>", vocabulary, **named)
    text = {
        **_decoder_sizes(width, depth, vocabulary),
        "head_dim": width // 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "sliding_window": 8,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)],
        "query_pre_attn_scalar": width // 4,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
        "initializer_range": 0.3,
    }
    ids = {f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in further.items()}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, initializer_range=0.3, **ids
    )
    return config, tokenizer, Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), GEMMA_TEMPLATE


def change_json(path: Path, **fields: Any) -> None:
    """Replaces fields of a JSON file. Any: JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
