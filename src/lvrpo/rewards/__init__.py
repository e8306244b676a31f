"""Rewards: one per file, combined by ``table``."""

from collections.abc import Mapping

REWARDS: Mapping[str, str] = {
    "exact_answer": "lvrpo.rewards.exact_answer:ExactAnswer",
    "scene_facts": "lvrpo.rewards.scene_facts:SceneFacts",
    "own_vqa": "lvrpo.rewards.own_vqa:OwnVQA",
    "mutual": "lvrpo.rewards.mutual:Mutual",
}
"""Every reward by name; an own one is named ``my_package.module:Class``."""

__all__ = ["REWARDS"]
