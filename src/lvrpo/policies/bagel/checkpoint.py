"""The published names of BAGEL's tensors."""

from __future__ import annotations

from collections.abc import Mapping

_LAYER: Mapping[str, str] = {
    "input_norm": "input_layernorm{}",
    "post_norm": "post_attention_layernorm{}",
    "gate_proj": "mlp{}.gate_proj",
    "up_proj": "mlp{}.up_proj",
    "down_proj": "mlp{}.down_proj",
    **{part: f"self_attn.{part}{{}}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
}
"""Part of an expert -> module of an official layer; the braces take the suffix of the generation expert."""
_PREFIXES: Mapping[str, str] = {
    "transformer.understanding_norm.": "language_model.model.norm.",
    "transformer.generation_norm.": "language_model.model.norm_moe_gen.",
    "encoders.embed_tokens_table.": "language_model.model.embed_tokens.",
    "encoders.lm_head.": "language_model.lm_head.",
    "encoders.vit.": "vit_model.vision_model.",
    "encoders.connector_in.": "connector.fc1.",
    "encoders.connector_out.": "connector.fc2.",
    "encoders.vit_position": "vit_pos_embed.pos_embed",
    "encoders.latent_in.": "vae2llm.",
    "encoders.latent_out.": "llm2vae.",
    "encoders.latent_position": "latent_pos_embed.pos_embed",
    "encoders.time_in.": "time_embedder.mlp.0.",
    "encoders.time_out.": "time_embedder.mlp.2.",
}
VAE = "encoders.latent_vae."
"""Prefix of the tensors of ae.safetensors; the rest is the official name."""

EMBED_TOKENS, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
"""The token embedding and the output layer over them."""


def official_name(name: str) -> str:
    """The official name of a tensor of the policy, such as language_model.model.layers.0.mlp_moe_gen.up_proj.weight."""
    if name.startswith(VAE):
        return name.removeprefix(VAE)
    if name.startswith("transformer.layers."):
        _, _, layer, expert, part, leaf = name.split(".")
        module = _LAYER[part].format("_moe_gen" if expert == "generation" else "")
        return f"language_model.model.layers.{layer}.{module}.{leaf}"
    for own, official in _PREFIXES.items():
        if name.startswith(own):
            return official + name.removeprefix(own)
    raise KeyError(name)
