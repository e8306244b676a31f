"""The built-in world: small images of colored shapes and handwritten digits, with a grammar and a verifier."""

from lvrpo.data.scenes.corpus import CleanPrompts, CleanPromptsConfig, CorpusConfig, WebCorpus, web_corpus
from lvrpo.data.scenes.grammar import DESCRIBE, VOCABULARY, normalize
from lvrpo.data.scenes.objects import (
    COLOR,
    COLORS,
    DIGITS,
    GROUND,
    GROUNDS,
    HELD_OUT,
    SHAPES,
    SPLITS,
    Scene,
    SceneObject,
    Split,
    crowded,
    render,
)
from lvrpo.data.scenes.prompts import CATEGORIES, ScenePrompts, ScenesConfig
from lvrpo.data.scenes.verifier import Reading, SeenObject, Verifier, fact_results, holds, read, verify

__all__ = [
    "CATEGORIES",
    "COLOR",
    "COLORS",
    "DESCRIBE",
    "DIGITS",
    "GROUND",
    "GROUNDS",
    "HELD_OUT",
    "SHAPES",
    "SPLITS",
    "VOCABULARY",
    "CleanPrompts",
    "CleanPromptsConfig",
    "CorpusConfig",
    "Reading",
    "Scene",
    "SceneObject",
    "ScenePrompts",
    "ScenesConfig",
    "SeenObject",
    "Split",
    "Verifier",
    "WebCorpus",
    "crowded",
    "fact_results",
    "holds",
    "normalize",
    "read",
    "render",
    "verify",
    "web_corpus",
]
