"""Rewards: one per file, combined by ``table``."""

from collections.abc import Mapping

REWARDS: Mapping[str, str] = {
    # the model judges itself
    "own_vqa": "lvrpo.rewards.own_vqa:OwnVQA",
    "lower_bound": "lvrpo.rewards.lower_bound:LowerBound",
    "caption_back": "lvrpo.rewards.caption_back:CaptionBack",
    "agreement": "lvrpo.rewards.agreement:Agreement",
    # the published reward's three terms
    "semantic": "lvrpo.rewards.semantic:Semantic",
    "instruction": "lvrpo.rewards.instruction:Instruction",
    "knowledge": "lvrpo.rewards.knowledge:Knowledge",
    # a chat model behind an address judges
    "vlm_endpoint": "lvrpo.rewards.vlm_endpoint:VLMEndpoint",
    # rules
    "exact_answer": "lvrpo.rewards.exact_answer:ExactAnswer",
    "numeric": "lvrpo.rewards.numeric:Numeric",
    "multiple_choice": "lvrpo.rewards.multiple_choice:MultipleChoice",
    "boxed": "lvrpo.rewards.boxed:Boxed",
    "text_format": "lvrpo.rewards.text_format:TextFormat",
    "text_length": "lvrpo.rewards.text_length:TextLength",
    "drawn_text": "lvrpo.rewards.drawn_text:DrawnText",
    "edit_consistency": "lvrpo.rewards.edit_consistency:EditConsistency",
    # the verifier of the prompt's world
    "scene_facts": "lvrpo.rewards.scene_facts:SceneFacts",
}
"""Every reward by name; an own one is named ``my_package.module:Name`` (see ``decorated`` for the shortest way)."""

__all__ = ["REWARDS"]
