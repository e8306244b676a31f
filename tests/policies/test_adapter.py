"""Adapters: nothing changes at first, one base for all, files that peft reads, the base told apart."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from lvrpo.atomic_io import read_tensors, write_tensors
from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.policies import adapter
from lvrpo.policies.adapter import (
    AdapterConfig,
    InputDtypeLinear,
    add_adapter,
    base_fingerprint,
    is_adapter,
    merge,
    require_moved,
)
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.base import Sampling, former_name
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.training.policies import Policies, SetName
from lvrpo.types import Prompt

pytest.importorskip("peft")

SAMPLING = Sampling(group_size=2, max_new_tokens=4, num_steps=3, sampler="flow_sde", window=(0, 1))
EVERYTHING = ("attention", "mlp", "connector", "time", "head")
KINDS = [AdapterConfig(rank=2, modules=EVERYTHING), AdapterConfig(rank=2, dora=True)]


def scores(policy: MoTPolicy, prompts: list[Prompt]) -> torch.Tensor:
    groups = policy.sample(prompts, SAMPLING, list(range(len(prompts))))
    segments = [s for group in groups for t in group.trajectories for s in t.segments]
    latents = [s.latent.flatten() for s in segments if hasattr(s, "latent")]
    return torch.cat([s.behavior_logprobs.flatten() for s in segments] + latents)


def train(policy: MoTPolicy, size: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape))


def test_on_a_bfloat16_base_it_is_computed_in_bfloat16_and_trained_in_float32() -> None:
    sizes = {"width": 32, "depth": 2, "heads": 2, "key_heads": 1, "mlp_width": 32, "read_side": 4, "latent_side": 4}
    encoders = {"vit_width": 8, "vit_depth": 1, "vit_heads": 2, "vit_mlp_width": 8, "image_size": 16}
    create_bagel(BagelSizes.model_validate(sizes | encoders), ["a red circle"]).save(Path("base"))
    policy = load_policy("base", dtype="bfloat16")
    assert isinstance(policy, MoTPolicy)
    add_adapter(policy, AdapterConfig(rank=2), "base")
    train(policy)
    both = [Prompt("g", "generate", ("a red circle",), ("image",)), Prompt("t", "reason", ("a circle",), ("text",))]
    groups = policy.sample(both, SAMPLING, [0, 1])
    matrices = [module for module in policy.modules() if isinstance(module, InputDtypeLinear)]
    used: list[tuple[torch.dtype, torch.dtype]] = []
    for matrix in matrices:
        matrix.register_forward_hook(lambda _, x, y: used.append((x[0].dtype, y.dtype)))
    replayed = policy.logprobs([trajectory for group in groups for trajectory in group.trajectories])
    assert set(used) == {(torch.bfloat16, torch.bfloat16)}
    torch.stack([row.logprobs.sum() for rows in replayed for row in rows]).sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(matrix.weight) for matrix in matrices}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained if p.grad is not None)
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)


@pytest.mark.parametrize("config", KINDS, ids=["lora", "dora"])
def test_a_fresh_adapter_changes_nothing_and_its_base_never_changes(
    config: AdapterConfig, new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    plain, policy = new_policy(), new_policy()
    before = scores(plain, prompts)
    add_adapter(policy, config, "base")
    assert torch.equal(scores(policy, prompts), before)
    frozen, policies = policy.make_reference(), Policies(policy)
    train(policy)
    trained = scores(policy, prompts)
    assert not torch.equal(trained, before)
    policies.weights.copy("ema", "policy")
    train(policy)
    assert torch.equal(scores(frozen, prompts), before)
    for name, expected in {"reference": before, "old": before, "ema": trained}.items():
        with policies.use(cast(SetName, name)) as used:
            assert torch.equal(scores(used, prompts), expected)
    assert not torch.equal(scores(policy, prompts), trained)


@pytest.mark.parametrize("config", KINDS, ids=["lora", "dora"])
def test_the_base_is_stored_once(config: AdapterConfig, new_policy: Callable[..., TinyPolicy]) -> None:
    policy = new_policy()
    places = {tensor.data_ptr() for tensor in policy.state_dict().values()}
    own = sum(tensor.numel() for tensor in policy.state_dict().values())
    add_adapter(policy, config, "base")
    everyone = [policy, policy.make_reference()]
    adapter = [p for p in policy.parameters() if p.requires_grad]
    assert all(len(kept) == len(adapter) for kept in Policies(policy).weights.sets.values())
    for other in everyone:
        shared = {tensor.data_ptr() for name, tensor in other.state_dict().items() if not is_adapter(name)}
        assert shared == places
    storages = {t.untyped_storage().data_ptr(): t.numel() for one in everyone for t in one.state_dict().values()}
    assert sum(storages.values()) == own + sum(p.numel() for p in adapter)
    assert not any(p.requires_grad for one in everyone[1:] for p in one.parameters())
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.named_parameters() if is_adapter(name)
    }


def test_gradients_reach_the_chosen_experts_only(new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]) -> None:
    policy = new_policy()
    add_adapter(policy, AdapterConfig(rank=2, experts=("generate",), modules=("mlp",)), "base")
    train(policy)
    groups = policy.parameter_groups()
    assert not groups["understand"]
    assert not groups["shared"]
    assert len(groups["generate"]) == 2 * 2 * 2  # layers, projections of relu2, factors
    drawings = [t for g in policy.sample(prompts[3:5], SAMPLING, [0, 1]) for t in g.trajectories]
    sum(row[-1].logprobs.sum() for row in policy.logprobs(drawings)).backward()  # type: ignore[union-attr]
    for name, parameter in policy.named_parameters():
        if is_adapter(name):
            assert ".generation." in name
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
        else:
            assert parameter.grad is None


def test_the_gradient_of_the_factors_is_that_of_the_whole_weight(
    new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    config = AdapterConfig(rank=2, alpha=6.0, experts=("generate",), modules=("mlp",))
    policy, whole = new_policy(), new_policy()
    add_adapter(policy, config, "base")
    drawings = [t for g in whole.sample(prompts[3:4], SAMPLING, [0]) for t in g.trajectories]
    for each in (policy, whole):
        sum(row[-1].logprobs.sum() for row in each.logprobs(drawings)).backward()  # type: ignore[union-attr]
    layer: Any = policy.get_submodule("transformer.layers.1.generation.up_proj")  # Any: a layer of peft
    weight = whole.get_submodule("transformer.layers.1.generation.up_proj").weight
    expected = 3.0 * weight.grad @ layer.lora_A["default"].weight.T  # type: ignore[union-attr,operator]
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert not layer.lora_A["default"].weight.grad.any()  # while B is zero


@pytest.mark.parametrize("config", KINDS, ids=["lora", "dora"])
def test_saved_loaded_merged(
    config: AdapterConfig, new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = new_policy()
    policy.save(Path("base"))
    add_adapter(policy, config, str(Path("base").resolve()))
    train(policy)
    expected = scores(policy, prompts)
    policy.save(Path("adapter"))
    assert sorted(path.name for path in Path("adapter").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = load_policy("adapter")
    assert isinstance(loaded, MoTPolicy)
    assert torch.equal(scores(loaded, prompts), expected)
    kept = loaded.make_reference()
    merge(loaded)
    assert not any(is_adapter(name) for name, _ in loaded.named_parameters())
    torch.testing.assert_close(scores(loaded, prompts), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores(kept, prompts), scores(new_policy(), prompts))  # those who shared the base still have it
    loaded.save(Path("whole"))
    whole = load_policy("whole")
    assert isinstance(whole, MoTPolicy)
    assert torch.equal(scores(whole, prompts), scores(loaded, prompts))


def from_config(names: dict[str, torch.Size]) -> nn.Module:
    """A tree of linear layers under these names."""
    root = nn.Module()
    for name, (rows, columns) in names.items():
        module = root
        *parents, last = name.split(".")
        for part in parents:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(last, nn.Linear(columns, rows, bias=False))
    return root


def test_peft_reads_it_by_the_published_names() -> None:
    from peft import PeftModel

    sizes = {"width": 16, "depth": 2, "heads": 2, "key_heads": 1, "mlp_width": 16, "read_side": 4, "latent_side": 4}
    encoders = {"vit_width": 8, "vit_depth": 1, "vit_heads": 2, "vit_mlp_width": 8, "image_size": 16}
    policy = create_bagel(BagelSizes.model_validate(sizes | encoders))
    add_adapter(policy, AdapterConfig(rank=3, alpha=6.0, modules=("attention", "mlp", "connector", "tower")), "base")
    train(policy)
    policy.save(Path("adapter"))
    layers = {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    published = {policy.stored_name(name): module.weight.shape for name, module in layers.items()}
    assert "language_model.model.layers.1.mlp_moe_gen.down_proj" in published
    read = PeftModel.from_pretrained(from_config(published), "adapter")
    for name, module in layers.items():
        twin: Any = read.base_model.model.get_submodule(policy.stored_name(name))  # Any: a layer of peft
        own: Any = module
        assert torch.equal(twin.get_delta_weight("default"), own.get_delta_weight("default"))
        assert bool(own.get_delta_weight("default").any())


def test_the_adapter_of_another_base_is_refused(new_policy: Callable[..., TinyPolicy]) -> None:
    policy, other = new_policy(), new_policy(seed=1)
    policy.save(Path("base"))
    other.save(Path("other"))
    assert base_fingerprint(policy) == base_fingerprint(load_policy("base"))  # type: ignore[arg-type]  # a Module
    assert base_fingerprint(policy) != base_fingerprint(other)
    add_adapter(policy, KINDS[0], "base")
    policy.save(Path("adapter"))
    path = Path("adapter/adapter_config.json")
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "other"}))
    with pytest.raises(InputError, match=r"^adapter: is an adapter of base \w{16}, but other is \w{16}: name its own"):
        load_policy("adapter")
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "nowhere"}))
    with pytest.raises(InputError, match=r"^adapter: is an adapter, and its base is not there: .*--base.*: model "):
        load_policy("adapter")
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON at column 2"):
        load_policy("adapter")
    path.write_text(json.dumps(settings))
    weights = Path("adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_policy("adapter")
    weights.unlink()
    with pytest.raises(InputError, match="no such file: an adapter is"):
        load_policy("adapter")


def test_a_base_that_was_moved_is_named_on_the_command_line(
    new_policy: Callable[..., TinyPolicy], prompts: list[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    policy, other = new_policy(), new_policy(seed=1)
    policy.save(Path("moved"))
    other.save(Path("other"))
    add_adapter(policy, KINDS[0], "gone")
    train(policy)
    policy.save(Path("adapter"))
    found = load_policy("adapter", base="moved")
    assert isinstance(found, TinyPolicy)
    assert torch.equal(scores(found, prompts), scores(policy, prompts))
    assert main(["export", "adapter", "whole"]) == 2
    assert "its base is not there: name it (--base FOLDER), or link it there" in capsys.readouterr().err
    assert main(["export", "adapter", "whole", "--base", "other"]) == 2
    assert "but other is" in capsys.readouterr().err
    assert main(["export", "adapter", "whole", "--base", "adapter"]) == 2
    assert "its base adapter is an adapter itself" in capsys.readouterr().err
    assert not Path("whole").exists()
    assert main(["export", "adapter", "whole", "--base", "moved"]) == 0
    assert capsys.readouterr().out == "whole: adapter, its adapter merged\n"
    merged = load_policy("whole")
    assert isinstance(merged, TinyPolicy)
    torch.testing.assert_close(scores(merged, prompts), scores(policy, prompts), rtol=1e-4, atol=1e-4)
    assert main(["export", "moved", "again", "--base", "moved"]) == 2
    assert "base moved: is no BAGEL, and moved is no adapter: leave the base out" in capsys.readouterr().err


def test_a_fingerprint_does_not_depend_on_the_dtype(new_policy: Callable[..., TinyPolicy]) -> None:
    policy = new_policy()
    assert base_fingerprint(policy) == base_fingerprint(new_policy().bfloat16())


def test_models_and_adapters_of_before_a_renaming_are_read(
    new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    """Until 2026-12 tensors had the names of ``former_names``, which fingerprints keep: records say the same base."""
    policy = new_policy()
    policy.save(Path("base"))
    add_adapter(policy, KINDS[0], str(Path("base").resolve()))
    train(policy)
    policy.save(Path("adapter"))
    for path in (Path("base/model.safetensors"), Path("adapter/adapter_model.safetensors")):
        tensors, metadata = read_tensors(path, "")
        write_tensors(path, {former_name(policy, name): tensor for name, tensor in tensors.items()}, metadata)
    names = [*read_tensors(Path("base/model.safetensors"), "")[0], *read_tensors(path, "")[0]]
    assert not any(word in name for name in names for word in ("encoders", "understanding", "generation", "patch"))
    loaded = load_policy("adapter")
    assert isinstance(loaded, MoTPolicy)
    assert torch.equal(scores(loaded, prompts), scores(policy, prompts))


def test_loading_peft_hides_warnings_of_bitsandbytes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def load(*_: str) -> str:
        log.warning("no kernel")
        log.error("broken")
        return "peft"

    monkeypatch.setattr(adapter, "optional_package", load)
    assert adapter.peft_library() == "peft"
    log.warning("after")
    assert caplog.messages == ["broken", "after"]


def test_the_fingerprints_of_the_shipped_base_are_those_on_record() -> None:
    """In adapters, in files of ``--tune``, in docs/results/scenes."""
    base = load_policy("tiny")
    assert isinstance(base, TinyPolicy)
    assert (base_fingerprint(base), judge_fingerprint(base)) == ("ca4b8d75907fe4ef", "TinyPolicy:5da5087af7d9")


def test_what_cannot_be_adapted_is_refused(new_policy: Callable[..., TinyPolicy]) -> None:
    policy = new_policy()
    with pytest.raises(InputError, match=r"no tower of understand or generate: the model has attention"):
        add_adapter(policy, AdapterConfig(modules=("tower",)), "base")
    with pytest.raises(InputError, match=r"no head of generate"):
        add_adapter(policy, AdapterConfig(modules=("attention", "head"), experts=("generate",)), "base")
    with pytest.raises(ValidationError, match="replay of a rollout"):
        AdapterConfig(dropout=0.1)
    nn.init.zeros_(policy.transformer.layers[0].generation.o_proj.weight)  # type: ignore[union-attr,arg-type]
    with pytest.raises(InputError, match=r"dora=true: transformer.layers.0.generation.o_proj has rows of zeros"):
        add_adapter(policy, AdapterConfig(dora=True), "base")
    add_adapter(policy, AdapterConfig(), "base")
    with pytest.raises(InputError, match="base: has an adapter already"):
        add_adapter(policy, AdapterConfig(), "base")


def test_an_output_layer_of_zeros_that_no_adapter_moves_is_named() -> None:
    """As `lvrpo init bagel-tiny` makes it: an image cannot change, whatever the layers before it do."""
    sizes = BagelSizes.model_validate({"width": 32, "depth": 1, "mlp_width": 32, "vocabulary_size": 512})
    fresh = create_bagel(sizes, ["a red circle"])
    with pytest.raises(
        InputError, match=r"adapter.modules=\[attention, mlp\]: encoders.latent_out of this model is all "
    ):
        require_moved(fresh, AdapterConfig(), ("text", "flow"))
    with pytest.raises(InputError, match=r"use modules: \[attention, mlp, connector\] with experts: \[generate\]"):
        require_moved(fresh, AdapterConfig(), ("flow",))
    require_moved(fresh, AdapterConfig(), ("text",))
    require_moved(fresh, AdapterConfig(modules=("attention", "connector")), ("text", "flow"))
    with pytest.raises(InputError, match="latent_out"):
        require_moved(fresh, AdapterConfig(modules=("connector",), experts=("understand",)), ("flow",))
    trained = load_policy("tiny")
    assert isinstance(trained, MoTPolicy)
    require_moved(trained, AdapterConfig(), ("text", "flow"))
