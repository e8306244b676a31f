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
    "exact_answer": "lvrpo.rewards.answers:ExactAnswer",
    "numeric": "lvrpo.rewards.answers:Numeric",
    "multiple_choice": "lvrpo.rewards.answers:MultipleChoice",
    "boxed": "lvrpo.rewards.answers:Boxed",
    "text_format": "lvrpo.rewards.answers:TextFormat",
    "text_length": "lvrpo.rewards.answers:TextLength",
    "drawn_text": "lvrpo.rewards.drawn_text:DrawnText",
    "edit_consistency": "lvrpo.rewards.edit_consistency:EditConsistency",
    # the verifier of the prompt's world
    "scene_facts": "lvrpo.rewards.scene_facts:SceneFacts",
}
"""Every reward by name; an own one is named ``my_package.module:Name`` (see ``decorated`` for the shortest way)."""

__all__ = ["REWARDS"]
