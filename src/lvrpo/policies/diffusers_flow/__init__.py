"""Flow-matching text-to-image pipelines of ``diffusers`` as policies."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from lvrpo.errors import InputError
from lvrpo.reading import read_json_object

INDEX = "model_index.json"
"""The file that names the class and the parts of a pipeline."""
PIPELINES: Mapping[str, str] = {
    "StableDiffusion3Pipeline": "lvrpo.policies.diffusers_flow.stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "lvrpo.policies.diffusers_flow.flux:Flux",
    "FluxKontextPipeline": "lvrpo.policies.diffusers_flow.flux:FluxKontext",
    "QwenImagePipeline": "lvrpo.policies.diffusers_flow.qwen_image:QwenImage",
    "QwenImageEditPipeline": "lvrpo.policies.diffusers_flow.qwen_image:QwenImageEdit",
    "QwenImageEditPlusPipeline": "lvrpo.policies.diffusers_flow.qwen_image:QwenImageEditPlus",
    "ZImagePipeline": "lvrpo.policies.diffusers_flow.z_image:ZImage",
}
"""The class of each supported pipeline, by ``_class_name``."""
EDITING: Mapping[str, str] = {
    "FluxKontextPipeline": "diffusers_edit",
    "QwenImageEditPipeline": "diffusers_edit_only",
    "QwenImageEditPlusPipeline": "diffusers_edit_only",
}
"""The type of policy of the pipelines that edit images, too, or only."""


def require_supported(folder: Path) -> str:
    """The pipeline class that a folder names; raises InputError for one outside ``PIPELINES``."""
    name = str(read_json_object(folder / INDEX).get("_class_name"))
    if name in PIPELINES:
        return name
    near = difflib.get_close_matches(name, PIPELINES, n=1, cutoff=0.0)
    raise InputError(
        f"{folder}: holds a {name} of diffusers: not supported: lvrpo trains {', '.join(PIPELINES)}; the nearest is "
        f"{near[0]}; docs/guides/your_model.md shows how to add a model"
    )
