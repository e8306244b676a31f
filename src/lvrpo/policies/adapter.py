"""Low-rank adapters (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353) on a Mixture-of-Transformers, through ``peft``.

Policy, old policy, EMA and reference are separate modules that share the base's tensors; the adapter's matrices alone
are copied.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, field_validator
from torch import nn

from lvrpo import distributed
from lvrpo.atomic_io import read_weights, write_tensors
from lvrpo.config import Config
from lvrpo.errors import InputError, optional_package
from lvrpo.policies.base import current_name, former_name
from lvrpo.policies.defaults import PolicyDefaults
from lvrpo.reading import read_json_object
from lvrpo.types import SegmentKind

P = TypeVar("P", bound="AdaptablePolicy")

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter, as peft names them."""
NAME = "default"
"""peft's name of the adapter."""
SAMPLED = 4096
"""Values of each tensor in the fingerprint of a base."""

Expert = Literal["understand", "generate"]
Modules = Literal["attention", "mlp", "connector", "time", "head", "tower"]

PATTERNS: Mapping[Modules, str] = {
    "attention": r"transformer\.layers\.\d+\.(?P<expert>understanding|generation)\.[qkvo]_proj",
    "mlp": r"transformer\.layers\.\d+\.(?P<expert>understanding|generation)\.(gate|up|down)_proj",
    "connector": r"encoders\.(?P<expert>patch|connector|latent)_(in|out)",
    "time": r"encoders\.(?P<expert>time)_(in|out)",
    "head": r"encoders\.(?P<expert>lm)_head",
    "tower": r"encoders\.(?P<expert>vit)\..+",
}
"""Regular expressions of linear layers by kind; the group names their expert."""
OUTPUTS: Mapping[SegmentKind, tuple[str, Modules, Expert, str]] = {
    "flow": ("encoders.latent_out", "connector", "generate", "image"),
    "text": ("encoders.lm_head", "head", "understand", "text"),
}
"""Per kind of segment: its output layer, the kind of module and expert, and a name for messages."""
READERS = ("aligner", "connector", "multi_modal_projector", "vision_model", "vision_tower", "visual")
"""Names that models of transformers give to modules that encode images."""
EXPERTS: Mapping[str, tuple[Expert, ...]] = {
    **dict.fromkeys((*READERS, "understanding", "patch", "vit", "lm", "lm_head"), ("understand",)),
    **dict.fromkeys(("generation", "latent", "time", "generation_aligner", "generation_head"), ("generate",)),
    "transformer": ("generate",),
    **dict.fromkeys(("language_model", "text_model", "layers"), ("understand", "generate")),
    **dict.fromkeys(("showo", "fusion_proj"), ("understand", "generate")),
    **dict.fromkeys(("diff_proj", "diffusion_head_a"), ("generate",)),
    "und_trans": ("understand",),
}
"""Whose a layer is, by the group of its pattern; one of both experts is adapted with either."""


class AdapterConfig(Config):
    """Low-rank adapters of chosen linear layers, trained instead of the weights."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of the factors."""
    alpha: float = Field(default=32.0, gt=0)
    """The correction is alpha / rank times the product of the two matrices."""
    dora: bool = False
    """Train the norm of every row of a weight apart from its direction; slower, since the norms are recomputed at every
    call."""
    dropout: float = 0.0
    """0: a rollout could not be replayed otherwise."""
    experts: tuple[Expert, ...] = Field(default=("understand", "generate"), min_length=1)
    """Experts that get an adapter."""
    modules: tuple[Modules, ...] = Field(default=("attention", "mlp"), min_length=1)
    """attention, mlp: of the transformer's layers; connector: encoders to transformer; time: timestep embedding;
    head: lm_head; tower: the vision encoder's own layers (BAGEL)."""

    @field_validator("dropout")
    @classmethod
    def _replayable(cls, dropout: float) -> float:
        if dropout:
            raise ValueError("the replay of a rollout would drop other numbers than the rollout did: use 0")
        return dropout

    def targets(self, policy: AdaptablePolicy) -> list[str]:
        """Names of the chosen linear layers; raises InputError where a choice finds none."""
        found: dict[tuple[Modules, Expert], list[str]] = {}
        for name, module in policy.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            for kind, pattern in policy.adapter_patterns.items():
                if match := re.fullmatch(pattern, name):
                    for expert in EXPERTS[match["expert"]]:
                        found.setdefault((kind, expert), []).append(name)
        for kind in self.modules:
            if not any((kind, expert) in found for expert in self.experts):
                have = sorted({f"{kind} ({expert})" for kind, expert in found})
                raise InputError(
                    f"adapter.modules: no {kind} of {' or '.join(self.experts)}: the model has {', '.join(have)}"
                )
        chosen = [found.get((kind, expert), []) for kind in self.modules for expert in self.experts]
        return list(dict.fromkeys(name for names in chosen for name in names))


@dataclass(frozen=True)
class Adapter:
    """The adapter of a policy."""

    config: AdapterConfig
    base: str
    """MODEL of the base: a folder or a built-in name."""
    fingerprint: str
    """``base_fingerprint`` of the base."""


class AdaptablePolicy(PolicyDefaults):
    """A policy that an adapter can be put on."""

    adapter_patterns: ClassVar[Mapping[Modules, str]] = PATTERNS
    """Patterns of its linear layers by kind, each with a group ``expert`` that is a key of ``EXPERTS``."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter: Adapter | None = None
        self.peft_config: dict[str, Any] = {}  # Any: of an optional package

    def make_reference(self) -> Self:
        """A frozen copy; with an adapter, the base without it, whose tensors are shared, not copied."""
        plain = copy.deepcopy(self) if self.adapter is None else without_adapter(self)
        plain.requires_grad_(False)
        return plain.eval()

    def stored_name(self, name: str) -> str:
        """The published name of a module, which the files of an adapter use."""
        return name

    def save(self, folder: Path) -> None:
        """Writes a folder that ``load_policy`` reads: the whole model, or the adapter alone where there is one."""
        if self.adapter is None:
            self.save_model(folder)
        else:
            save_adapter(self, folder)

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``load`` reads."""


def add_adapter(policy: AdaptablePolicy, config: AdapterConfig, base: str, seed: int = 0) -> None:
    """Adds a fresh adapter to a policy, in place: outputs do not change, and it alone is trainable.

    A matrices are a function of the seed, B matrices zero; both are float32.
    Raises InputError where peft is missing, a choice finds no layer, or the policy has an adapter already.
    """
    if policy.adapter is not None:
        raise InputError(
            f"{base}: has an adapter already: make one model of it with `lvrpo export`, then start from that"
        )
    adapter = Adapter(config, base, base_fingerprint(policy))
    _require_directions(policy, config)
    inject_adapter(policy, config, seed)
    policy.adapter = adapter


def _require_directions(policy: AdaptablePolicy, config: AdapterConfig) -> None:
    """Raises InputError where DoRA would divide by the zero norm of a row."""
    if config.dora:
        for name in config.targets(policy):
            if not bool(policy.get_submodule(name).weight.any(dim=1).all()):  # type: ignore[operator]  # a Linear
                raise InputError(
                    f"adapter.dora=true: {name} has rows of zeros, which have no direction: use dora=false, or a "
                    "trained base"
                )


def require_moved(policy: AdaptablePolicy, config: AdapterConfig, kinds: Collection[SegmentKind]) -> None:
    """Raises InputError where an output layer is all zeros, so that the adapter changes no output."""
    for kind in kinds:
        name, module, expert, word = OUTPUTS.get(kind, ("", "head", "understand", ""))
        layers = [layer for own, layer in policy.named_modules() if own == name and isinstance(layer, nn.Linear)]
        reached = module in config.modules and expert in config.experts
        if layers and not reached and not bool(layers[0].weight.any()):
            raise InputError(
                f"adapter.modules=[{', '.join(config.modules)}]: {name} of this model is all zeros, so nothing the "
                f"adapter changes before it changes a {word}: use modules: [{', '.join((*config.modules, module))}] "
                f"with experts: [{expert}] among them, or train the base first"
            )


def inject_adapter(policy: AdaptablePolicy, config: AdapterConfig, seed: int = 0) -> None:
    """Injects a fresh adapter, float32; nothing else stays trainable. LoRA multiplies in the dtype of its input."""
    peft, targets = peft_library(), config.targets(policy)
    policy.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # a float is fine: peft divides by the rank
        use_dora=config.dora,
        lora_dropout=0.0,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        shell = peft.inject_adapter_in_model(settings, _shell(policy), adapter_name=NAME)
    policy.peft_config = shell.peft_config
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()
    for layer in _layers(policy).values():
        if config.dora:  # peft initializes the norms at the base's dtype, but computes them in float32 in forward
            layer.lora_magnitude_vector[NAME].weight.data = torch.linalg.norm(layer.weight.float(), dim=1)
            continue
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[NAME] = InputDtypeLinear(matrices[NAME].weight)


class InputDtypeLinear(nn.Module):
    """A linear layer without bias, weight (out, in), that multiplies in the dtype of its input, whatever its own.

    So a float32 adapter on a bfloat16 base is computed in bfloat16, and its inputs are kept so for the backward pass.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to the adapter."""
    return ".lora_" in name


def without_adapter(policy: P) -> P:
    """The base as a policy without adapter; its tensors are shared."""
    shared: dict[int, Any] = {}  # Any: what copy.deepcopy takes as its memo
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        if not is_adapter(name):
            shared[id(tensor)] = tensor
    plain = copy.deepcopy(policy, shared)
    for name, layer in _layers(plain).items():
        plain.set_submodule(name, layer.base_layer)
    plain.adapter = None
    return plain


def merge(policy: AdaptablePolicy) -> None:
    """Merges the adapter into copies of the weights, in float32; shared base tensors are not changed."""
    for name, layer in (_layers(policy) if policy.adapter is not None else {}).items():
        base = layer.base_layer
        dtype = base.weight.dtype
        base.weight = nn.Parameter(base.weight.detach().float().clone(), requires_grad=False)
        layer.merge(safe_merge=True)
        base.weight = nn.Parameter(base.weight.detach().to(dtype))
        policy.set_submodule(name, base)
    policy.adapter = None


# --- files ---


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_WEIGHTS).is_file()


def save_adapter(policy: AdaptablePolicy, folder: Path) -> None:
    """Writes the adapter in peft's format; metadata of the weights has the fingerprint of the base."""
    assert policy.adapter is not None
    peft, adapter = peft_library(), policy.adapter
    folder.mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(_shell(policy), adapter_name=NAME, save_embedding_layers=False)
    tensors = {_stored_name(policy, name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {
        "format": "pt",
        "lvrpo_base": adapter.fingerprint,
        "lvrpo_adapter": adapter.config.model_dump_json(),
    }
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, metadata)
    settings = copy.deepcopy(policy.peft_config[NAME])
    settings.base_model_name_or_path = adapter.base
    with distributed.without_adapter(policy):
        settings.target_modules = {policy.stored_name(name) for name in adapter.config.targets(policy)}
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def read_base(folder: Path) -> str:
    """The MODEL of an adapter's base; raises InputError."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        raise InputError(f"{path}: no such file: an adapter is {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    base = read_json_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: names no base_model_name_or_path: restore the file, or write the base's folder in")
    return base


def load_adapter(policy: AdaptablePolicy, folder: Path, base: str) -> None:
    """Loads a saved adapter into its base, in place.

    Raises InputError for a damaged file, one that lvrpo did not save, or the adapter of another base.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: no such file: an adapter is {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    found, metadata = read_weights(path, "restore the file")
    tensors = {current_name(policy, name): tensor for name, tensor in found.items()}
    if "lvrpo_base" not in metadata or "lvrpo_adapter" not in metadata:
        raise InputError(f"{path}: does not say which base it belongs to: give an adapter that lvrpo saved")
    own = base_fingerprint(policy)
    if metadata["lvrpo_base"] != own:
        raise InputError(
            f"{folder}: is an adapter of base {metadata['lvrpo_base']}, but {base} is {own}: name its own base "
            f"(--base FOLDER, or in {ADAPTER_CONFIG})"
        )
    config = AdapterConfig.model_validate_json(metadata["lvrpo_adapter"])
    inject_adapter(policy, config)
    policy.adapter = Adapter(config, base, own)
    stored = {
        _stored_name(policy, name): name
        for name in peft_library().get_peft_model_state_dict(
            _shell(policy), adapter_name=NAME, save_embedding_layers=False
        )
    }
    wrong = sorted(stored.keys() ^ tensors.keys())
    if wrong:
        raise InputError(f"{path}: weights do not fit at {wrong[0]}: use the two files of one adapter")
    state = {stored[name]: tensor for name, tensor in tensors.items()}
    try:
        peft_library().set_peft_model_state_dict(_shell(policy), state, adapter_name=NAME)
    except RuntimeError as error:
        raise InputError(f"{path}: weights do not fit ({str(error).splitlines()[-1].strip()})") from None


def base_fingerprint(policy: nn.Module) -> str:
    """A hash of names, shapes and evenly spaced values of the base's weights, at bfloat16, whatever their dtype."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in policy.state_dict().items():
        if is_adapter(name):
            continue
        name = former_name(policy, name.replace(".base_layer.", "."))
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLED)].bfloat16().float()
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def _stored_name(policy: AdaptablePolicy, name: str) -> str:
    """Name of an adapter's tensor in its file: peft's prefix, the published layer name, peft's suffix."""
    layer, _, ending = name.partition(".lora_")
    return f"base_model.model.{policy.stored_name(layer)}.lora_{ending}"


def _shell(policy: AdaptablePolicy) -> nn.Module:
    """The modules of a policy in a plain module: peft expects a ``config`` of transformers."""
    shell = nn.Module()
    for name, child in policy.named_children():
        shell.add_module(name, child)
    if policy.peft_config:
        shell.peft_config = policy.peft_config  # type: ignore[assignment]  # no tensor
    return shell


def _layers(policy: nn.Module) -> dict[str, Any]:
    """The adapted layers by name. Any: classes of peft, which is an optional package."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}


def peft_library() -> Any:
    """The package. Any: it is optional."""
    log = logging.getLogger("bitsandbytes")  # peft imports it, and it warns of kernels of 4-bit weights on some CPUs
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return optional_package("peft", "an adapter needs peft", "peft")
    finally:
        log.setLevel(level)
