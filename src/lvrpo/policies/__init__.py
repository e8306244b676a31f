"""Policies: one contract (``base``), the Mixture-of-Transformers core (``mot``), and models."""

from __future__ import annotations

from collections.abc import Mapping

POLICIES: Mapping[str, str] = {
    "lvrpo_tiny": "lvrpo.policies.tiny:TinyPolicy",
    "bagel": "lvrpo.policies.bagel.policy:BagelPolicy",
    "janus": "lvrpo.policies.janus.policy:JanusPolicy",
    "emu3": "lvrpo.policies.emu3.policy:Emu3Policy",
    "showo": "lvrpo.policies.showo.policy:ShowoPolicy",
    "showo2": "lvrpo.policies.showo2.policy:Showo2Policy",
    "mmada": "lvrpo.policies.mmada.policy:MmadaPolicy",
    "image_text_to_text": "lvrpo.policies.image_text_to_text:ImageTextToTextPolicy",
    "diffusers": "lvrpo.policies.diffusers_flow.policy:DiffusersPolicy",
    "diffusers_edit": "lvrpo.policies.diffusers_flow.policy:DiffusersEditPolicy",
    "diffusers_edit_only": "lvrpo.policies.diffusers_flow.policy:DiffusersEditOnlyPolicy",
}
"""Class by the ``model_type`` of a model's config.json; an own one is named ``my_package.module:Class`` there, and its
package allowed by name (``--allow-code=my_package``). ``image_text_to_text`` is every type that transformers maps to
AutoModelForImageTextToText and that has no entry of its own."""

BUILT_IN: Mapping[str, str] = {
    "tiny": "tiny-base",
    "tiny-token": "tiny-token",
    "tiny-masked": "tiny-masked",
}
"""Shipped weights: name -> folder of ``lvrpo/assets``."""

__all__ = ["BUILT_IN", "POLICIES"]
