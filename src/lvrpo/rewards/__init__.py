"""The built-in rewards, by name; ``table`` combines the scores of several."""

from collections.abc import Mapping

REWARDS: Mapping[str, str] = {
    # the model judges itself
    "self_vqa": "lvrpo.rewards.self_vqa:SelfVQA",
    "caption_back": "lvrpo.rewards.caption_back:CaptionBack",
    "agreement": "lvrpo.rewards.agreement:Agreement",
    # the published reward's three terms
    "semantic": "lvrpo.rewards.published:Semantic",
    "instruction": "lvrpo.rewards.published:Instruction",
    "knowledge": "lvrpo.rewards.published:Knowledge",
    # a chat model behind an address judges
    "vlm_endpoint": "lvrpo.rewards.vlm_endpoint:VLMEndpoint",
    # rules
    "exact_answer": "lvrpo.rewards.verifiable_text:ExactAnswer",
    "numeric": "lvrpo.rewards.verifiable_text:Numeric",
    "multiple_choice": "lvrpo.rewards.verifiable_text:MultipleChoice",
    "boxed": "lvrpo.rewards.verifiable_text:Boxed",
    "text_format": "lvrpo.rewards.verifiable_text:TextFormat",
    "text_length": "lvrpo.rewards.verifiable_text:TextLength",
    "ocr": "lvrpo.rewards.verifiable_image:OCR",
    "edit_consistency": "lvrpo.rewards.edit_consistency:EditConsistency",
    # the verifier of the prompt's world
    "scene_facts": "lvrpo.rewards.verifiable_image:SceneFacts",
}
"""Every built-in reward. One of your own is named ``my_package.module:Name``; ``function`` is the shortest way."""

_ENSEMBLE = "was removed: give its members as rewards, one of them with weight 0 for validation.overoptimization"
OLD_NAMES: Mapping[str, str] = {
    "own_vqa": "is called self_vqa now",
    "drawn_text": "is called ocr now",
    "lower_bound": _ENSEMBLE,
    "conservative_ensemble": _ENSEMBLE,
}
"""Names of earlier versions, which are refused with what to use now."""

__all__ = ["OLD_NAMES", "REWARDS"]
