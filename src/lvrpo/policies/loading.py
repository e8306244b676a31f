"""MODEL -> policy: a folder, a run, a built-in name, or a model of the Hugging Face Hub in the local cache."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvrpo.distributed import load_sharded, stored_tensors
from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN, POLICIES
from lvrpo.policies.adapter import AdaptablePolicy, has_adapter, load_adapter, read_base
from lvrpo.policies.base import Policy, missing_members
from lvrpo.policies.diffusers_flow import EDITING, INDEX, require_supported
from lvrpo.policies.transformers_library import transformers_library
from lvrpo.reading import path_exists, read_json_object
from lvrpo.registry import resolve
from lvrpo.types import TASKS, SegmentKind, TaskKind

FINAL = "policy.json"
"""In a run directory: names the checkpoint of the result."""
START = "start"
"""In a run directory: the initial policy, which stays the reference of a resumed run."""
TENSORS = "tensors"
"""In the state of a checkpoint: the sharded tensors of all weight sets."""
METHODS = ("load", "sample", "logprobs", "save")
"""Methods that a class must have to be taken for a policy."""
_RUN_FILES = ("config.yaml", "manifest.json", "metrics.jsonl")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(
    model: str | Path, device: str = "cpu", dtype: str | None = None, base: str | Path | None = None
) -> Policy:
    """The policy that MODEL names, at float32, bfloat16 or (None) its own dtype; raises InputError, one line.

    ``base`` is a MODEL too: of an adapter, instead of the base that its files name, or of a fine-tuned BAGEL folder
    that does not store all tensors.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: not supported: use {' or '.join(DTYPES)}")
    folder = policy_folder(model)
    if _is_sharded(folder):
        return _load_sharded_policy(folder, device, dtype, base)
    if has_adapter(folder):
        return _load_adapted(folder, device, dtype, base)
    where = pick_device(device)
    if base is not None:
        return _load_completed(folder, policy_folder(base), where, dtype)
    policy = policy_class(folder).load(folder, where, DTYPES.get(dtype or ""))
    if missing := missing_members(policy):
        raise InputError(
            f"{folder}: its class {type(policy).__name__} lacks {', '.join(missing)}: write them, or derive it from "
            "lvrpo.policies.defaults.PolicyDefaults, which has defaults for most (docs/guides/your_model.md)"
        )
    return policy


def _is_sharded(folder: Path) -> bool:
    """Whether a folder is a checkpoint with sharded weights."""
    return (
        (folder / "state" / TENSORS).is_dir()
        and not any(os.path.lexists(folder / name) for name in ("config.json", INDEX))
        and not has_adapter(folder)
    )


def _load_sharded_policy(folder: Path, device: str, dtype: str | None, base: str | Path | None) -> Policy:
    """The EMA weights of a sharded checkpoint, in the policy that the run started from."""
    start = folder.parent.parent / START
    if not start.is_dir():
        raise InputError(
            f"{folder}: its weights are in the state of a run of several processes, and {start} is not there: copy the "
            "whole run, or make one model of it with `lvrpo export` first"
        )
    policy = load_policy(start, device, dtype, base)
    assert isinstance(policy, nn.Module)
    state = folder / "state" / TENSORS
    sizes = {name: entry for name, entry in stored_tensors(state).items() if name.startswith("ema/")}
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in sizes.items()}
    load_sharded(state, found, finite=True)
    parameters = dict(policy.named_parameters())
    for name, tensor in found.items():
        parameter = parameters.get(name.removeprefix("ema/"))
        if parameter is None or parameter.shape != tensor.shape:
            raise InputError(f"{folder}: {name} belongs to another model than {start}: use another checkpoint")
        parameter.data.copy_(tensor)
    return policy


def policy_class(folder: Path) -> Any:
    """The class of the policy in a folder. A type outside ``POLICIES`` needs its package allowed by name.

    Any: a class of the user. Raises InputError.
    """
    return resolve("model type", model_type(folder), POLICIES, METHODS, from_model=True)


def _load_adapted(folder: Path, device: str, dtype: str | None, given: str | Path | None) -> Policy:
    """A base (``given``, or the one that the adapter's files name) with the adapter of a folder."""
    base = read_base(folder) if given is None else str(given)
    try:
        at = policy_folder(base)
    except InputError as error:
        if given is not None:
            raise
        raise InputError(
            f"{folder}: is an adapter, and its base is not there: name it (--base FOLDER), or link it there: {error}"
        ) from None
    if has_adapter(at):
        raise InputError(f"{folder}: its base {base} is an adapter itself: make one model of it with `lvrpo export`")
    policy = load_policy(base, device, dtype)
    if not isinstance(policy, AdaptablePolicy):
        raise InputError(f"{folder}: its base {base} does not support adapters: name another base")
    load_adapter(policy, folder, base)
    return policy


def _load_completed(folder: Path, base: Path, device: torch.device, dtype: str | None) -> Policy:
    """A fine-tuned BAGEL, with the tensors that it does not store taken from its base."""
    from lvrpo.policies.bagel.policy import BagelPolicy, is_complete

    if has_adapter(base):
        raise InputError(f"base {base}: is an adapter itself: make one model of it with `lvrpo export`")
    if model_type(base) != "bagel":
        raise InputError(f"base {base}: is no BAGEL, and {folder} is no adapter: leave the base out")
    if is_complete(folder):
        raise InputError(f"{folder}: is a whole model, which needs no base: leave the base out")
    return BagelPolicy.load(folder, device, DTYPES.get(dtype or ""), base=base)


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto``: cuda where available, else cpu."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device={name}: unknown: use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name}: not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA cards: use cpu or auto")
    return device


def policy_folder(model: str | Path) -> Path:
    """The folder of weights that MODEL names."""
    name = str(model)
    if name in BUILT_IN:
        return _built_in_folder(name)
    path = Path(name)
    if path.is_dir():
        return _run_result(path) if any((path / file).is_file() for file in _RUN_FILES) else path
    if path.exists():
        raise InputError(f"{path}: is a file: give the folder of a model or of a run")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not path.parent.is_dir():
        return cached_folder(name)
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    names = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {names[0] if names else path.parent / near[0]}? " if names or near else ""
    raise InputError(
        f"model {name!r}: no such folder: {hint}give a folder, a run, a Hub id, or one of {', '.join(BUILT_IN)}"
    )


def stored_image_size(model: str | Path) -> int | None:
    """Side of the square input images of MODEL, found without loading it; None: any size."""
    folder = policy_folder(model)
    if has_adapter(folder):
        return None
    read = getattr(policy_class(folder), "stored_image_size", None)  # optional in a class
    return None if read is None else read(folder)


def possible_tasks(model: str | Path) -> tuple[TaskKind, ...]:
    """The tasks that MODEL supports, found without loading it; of an adapter those of its base, if that is there."""
    folder = policy_folder(model)
    if has_adapter(folder):
        try:
            folder = policy_folder(read_base(folder))
        except InputError:
            return TASKS
    return TASKS if has_adapter(folder) else getattr(policy_class(folder), "tasks", TASKS)  # optional in a class


def stored_segment_kinds(model: str | Path) -> tuple[SegmentKind, ...]:
    """The kinds of segments that MODEL samples, found without loading it; () for an adapter."""
    folder = policy_folder(model)
    if has_adapter(folder):
        return ()
    kinds = getattr(policy_class(folder), "segment_kinds", ())  # a property in somebody's class
    return kinds if isinstance(kinds, tuple) else ()


def has_supervised_losses(model: str | Path) -> bool:
    """Whether MODEL can be trained with supervised losses, found without loading it."""
    folder = policy_folder(model)
    return has_adapter(folder) or hasattr(policy_class(folder), "supervised_losses")


def can_draw_after_text(model: str | Path) -> bool:
    """Whether MODEL can draw after a text that it wrote, found without loading it."""
    folder = policy_folder(model)
    return has_adapter(folder) or getattr(policy_class(folder), "draws_after_text", True)  # optional in a class


def model_type(folder: Path) -> str:
    """The ``model_type`` in a folder's config.json. Show-o is told by its class, BAGEL by its other files."""
    if _is_sharded(folder):
        return model_type(folder.parent.parent / START)
    if (folder / "llm_config.json").is_file() or (folder / "ema.safetensors").is_file():
        return "bagel"
    path = folder / "config.json"
    if (folder / INDEX).is_file():
        return EDITING.get(require_supported(folder), "diffusers")
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no config.json: is no model: give a folder that lvrpo saved, or BAGEL's "
            "(llm_config.json, ema.safetensors, ae.safetensors)"
        )
    tree = read_json_object(path)
    kind = tree.get("model_type")
    if isinstance(kind, str) and (kind in POLICIES or ":" in kind):
        return kind
    if tree.get("_class_name") in CLASSES:
        return CLASSES[tree["_class_name"]]
    built = tree.get("architectures")
    others = [kind, tree.get("_class_name"), *(built if isinstance(built, list) else ())]
    names = [name for name in others if isinstance(name, str)]
    if not names:
        raise InputError(f"{path}: has no model_type: give a folder that lvrpo saved, or a BAGEL's")
    joined = " ".join(names).lower().replace("-", "_")
    family = next((words for key, words in FAMILIES.items() if key in joined), None)
    if family is None and isinstance(kind, str) and kind in image_text_to_text_types(kind):
        return "image_text_to_text"
    if family is None and tree.get("auto_map"):
        raise InputError(
            f"{folder}: model_type {names[0]!r} is computed by code in that folder (auto_map), which lvrpo never runs: "
            "use a model that transformers has itself, or a newer transformers"
        )
    raise InputError(f"{folder}: holds {family}" if family else foreign_model(folder, names[0]))


def image_text_to_text_types(kind: str) -> Mapping[str, str]:
    """The model types that transformers maps to AutoModelForImageTextToText; raises InputError without transformers.

    ``kind``: the type that is looked for.
    """
    transformers_library(f"a model of type {kind!r}")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


CLASSES: Mapping[str, str] = {"Showo": "showo", "Showo2Qwen2_5": "showo2"}
"""``_class_name`` in a config.json without model_type, to an entry of ``POLICIES``."""
FAMILIES: Mapping[str, str] = {
    "multi_modality": "a Janus in its makers' layout: not supported: use that of transformers, such as "
    "deepseek-community/Janus-Pro-1B",
    "emu3": "an Emu3 in its makers' layout: not supported: use that of transformers, such as BAAI/Emu3-Gen-hf",
    "sd3": "the transformer of a Stable Diffusion 3 alone: not supported: use the pipeline that holds model_index.json",
    "flux": "the transformer of a FLUX alone: not supported: use the pipeline that holds model_index.json",
}
"""Known models in a form that is not read, and what to use instead, by a part of their model type or class name."""


def foreign_model(folder: Path, kind: str) -> str:
    """The error message for a model of another type."""
    own = [name for name in POLICIES if not name.startswith("diffusers") and name != "image_text_to_text"]
    near = difflib.get_close_matches(kind.lower(), own, n=1) or ["bagel"]
    return (
        f"{folder}: holds a model of type {kind!r}: not supported: lvrpo knows {', '.join(own)}, pipelines of "
        f"diffusers and image-text-to-text models of transformers; the nearest is {near[0]}; docs/guides/your_model.md "
        "shows how to add one"
    )


def _built_in_folder(name: str) -> Path:
    folder = Path(str(resources.files("lvrpo"))) / "assets" / BUILT_IN[name]
    if not folder.is_dir():
        raise InputError(
            f"model {name!r}: {folder} is missing: make it with `lvrpo pretrain pretrain`, or name a folder"
        )
    return folder


def _run_result(run: Path) -> Path:
    """The chosen checkpoint of a finished run, or the last complete one of an unfinished run."""
    whole = sorted(folder.parent for folder in run.glob("checkpoints/step_*/checkpoint.json"))
    if path_exists(run / FINAL):
        try:
            chosen = run / read_json_object(run / FINAL)["checkpoint"]
        except (InputError, KeyError, TypeError):
            raise InputError(f"{run / FINAL}: does not name a checkpoint: delete it to take the last one") from None
        if chosen not in whole:
            raise InputError(
                f"{run / FINAL}: names {chosen.name}, which is gone: delete it to take the last checkpoint"
            )
        return chosen
    if not whole:
        raise InputError(f"{run}: has no whole checkpoint yet: wait for the first one, or name another run")
    return whole[-1]


def cached_folder(name: str) -> Path:
    """The folder of a Hub id in the local cache; raises InputError where it is not there."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"model {name!r}: a Hub id needs huggingface_hub: pip install huggingface_hub, or name a folder"
        ) from None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        raise InputError(
            f"model {name!r}: no such folder, and not in the local Hub cache: name a folder or a run, or, if this is a "
            f"model of the Hub, run `hf download {name}`"
        ) from None
