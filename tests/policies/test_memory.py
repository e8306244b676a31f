"""The memory of a run of every family, estimated from json and tokenizer files, against real steps of small models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from discrete_policy import DiscretePolicy
from families import FAMILIES, Family
from small_vlm import without_videos

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.policies import image_text_to_text, image_tokens
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.decoding import last_step_alone
from lvrpo.policies.loading import load_policy, policy_folder
from lvrpo.training.components import training_source
from lvrpo.training.config import TrainConfig
from lvrpo.training.dry_run import memory_needed
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import GroupAdvantages, Microbatch
from lvrpo.training.memory import MemoryEstimate
from lvrpo.training.memory_estimate import LiveBytes, fake_weights
from lvrpo.training.policies import policy_module
from lvrpo.training.rollout import prompts_of_step
from lvrpo.types import Group, Prompt

SMALL = (
    "rewards=[{name: exact_answer}]",
    "rollout.group_size=2",
    "rollout.max_new_tokens=6",
    "limits={microbatch_size: 1, gradient_checkpointing: false}",
    "validation.prompts={generate: 0, understand: 0, edit: 0, reason: 0}",
)
ONE = "data.prompts_per_step={generate: %d, understand: %d, edit: 0, reason: 0}"


@pytest.fixture(scope="module", autouse=True)
def images_alone() -> Iterator[None]:
    """See ``without_videos``."""
    with without_videos():
        yield


def described(folder: Path, place: Path) -> Path:
    """A folder without its weights."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return place


def config_of(family: Family, folder: Path, *further: str) -> TrainConfig:
    tasks = ONE % (family.recipe != "qwen3_vl_2b", family.recipe != "sd35_medium")
    flow = ["flow.top_bottom_k=1"] if family.recipe in ("showo2_1p5b", "sd35_medium") else []
    settings = [*family.overrides(folder), *SMALL, tasks, *flow, *further]
    return load_config(TrainConfig, shipped_configs()[family.recipe], settings)


def measured(policy: Policy, config: TrainConfig) -> dict[str, int]:
    """The peaks of the phases of a real step, of live tensors."""
    module, found = policy_module(policy), {}
    config.limits.apply(policy)
    prompts = prompts_of_step(training_source(config), config, 0)
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    groups: list[Group] = []
    for prompt in prompts:
        name = "images" if prompt.output == ("image",) else "text"
        with LiveBytes(module.state_dict(keep_vars=True).values()) as live:
            groups += policy.sample([prompt], config.sampling(0), [5])
        found[f"rollout of {name}"] = live.peak
    assert all(not getattr(s, "ended", False) for g in groups for t in g.trajectories for s in t.segments)
    gradients = [p.grad for p in trained if p.grad is not None]
    for objective in objectives_of(config, policy.segment_kinds):
        members = objective.select_members(groups, GroupAdvantages.all_valid(torch.tensor([[-1.0, 1.0]] * len(groups))))
        batch = Microbatch(members[0].trajectory.prompt.task, objective.kind, 0, members, 1.0)
        if objective.output == "image":
            batch = replace(batch, members=members[:1])  # limits.microbatch_size
        with LiveBytes([*module.state_dict(keep_vars=True).values(), *gradients]) as live:
            with torch.no_grad():
                frozen = {name: objective.reference_outputs(name, policy, batch) for name in objective.frozen_policies}
            output = objective.loss(policy, replace(batch, frozen=frozen))
            output.loss.backward()
        found[f"replay of {'images' if objective.output == 'image' else 'text'}"] = live.peak
    return found


@pytest.mark.parametrize(
    ("name", "further"),
    [*((name, ()) for name in FAMILIES), ("mmada", ("rollout.masked_likelihood={kind: path}",))],
)
def test_phases_without_weights_are_those_of_a_real_step(
    name: str, further: tuple[str, ...], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A term of the largest pass of a phase, such as the logits or the outputs of a frozen policy, is more than the
    tolerance; the keys and values of a text are less than the scores after it, and have a test of their own."""
    family = FAMILIES[name]
    folder = family_folder(name)
    # the sizes of a Show-o2's flow head are in its weights alone
    bare = folder if name == "showo2" else described(folder, tmp_path / "described")
    estimate = memory_needed(config_of(family, bare, "precision={}", *further))
    policy = load_policy(folder)
    found = measured(policy, config_of(family, folder, "precision={}", *further))
    assert {phase: peak for phase, peak in estimate.transient.items() if phase in found} == pytest.approx(
        found, rel=0.1
    )
    assert found.keys() == estimate.transient.keys()
    by_hand(policy, estimate)


@pytest.fixture
def small_bagel(tmp_path: Path) -> Path:
    """A random one whose images an update would move."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "key_heads": 1, "mlp_width": 16, "vit_width": 8, "vit_depth": 1}
    rest = {"vit_heads": 2, "vit_mlp_width": 8, "image_size": 32, "read_side": 4, "latent_side": 4}
    create_bagel(BagelSizes.model_validate(sizes | rest), ["a red circle"]).save(tmp_path / "bagel")
    return tmp_path / "bagel"


@pytest.mark.parametrize("tokens", [1, 6])
def test_phases_of_a_mixture_of_transformers_are_those_of_a_real_step(tokens: int, small_bagel: Path) -> None:
    """Of the tiny policy the first token of an answer, as it knows when to end one; BAGEL's words are random."""
    folder = policy_folder("tiny") if tokens == 1 else small_bagel
    settings = ["policy=tiny" if tokens == 1 else f"policy={folder}", *SMALL, ONE % (1, 1), "flow.top_bottom_k=1"]
    config = load_config(TrainConfig, None, [*settings, "device=cpu", f"rollout.max_new_tokens={tokens}"])
    estimate, found = memory_needed(config), measured(load_policy(folder), config)
    assert estimate.transient == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("name", "module"), [("janus", image_tokens), ("emu3", image_tokens), ("qwen3_vl", image_text_to_text)]
)
def test_one_step_of_decoding_takes_what_all_of_them_take(
    name: str, module: ModuleType, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(family_folder(name))
    weights = list(policy_module(policy).state_dict(keep_vars=True).values())
    peaks: list[int] = []

    def watched(decode: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with LiveBytes(weights) as live:
                found = decode(*(() if isinstance(arg, set | frozenset) else arg for arg in args))  # no end token
            peaks.append(live.peak)
            return found

        return call

    for decode in ("generate_text", "generate_image_tokens"):
        if hasattr(module, decode):
            monkeypatch.setattr(module, decode, watched(getattr(module, decode)))
    sampling = Sampling(group_size=4, max_new_tokens=96, guidance_scale=3.0 if module is image_tokens else 1.0)
    prompts = [Prompt("r", "reason", ("what color is it",), ("text",))]
    if module is image_tokens:
        prompts.append(Prompt("g", "generate", ("a red circle",), ("image",)))
    for prompt in prompts:
        policy.sample([prompt], sampling, [0])
    whole, peaks[:] = [*peaks], []
    with last_step_alone():
        for prompt in prompts:
            policy.sample([prompt], sampling, [0])
    assert len(peaks) == len(prompts)
    assert whole[0] <= peaks[0] <= 1.6 * whole[0]  # texts that end make others move, here none
    assert peaks[1:] == pytest.approx(whole[1:], rel=0.1)


def by_hand(policy: Policy, estimate: MemoryEstimate) -> None:
    """Weights are stored once where they are shared; frozen parts have no copies, gradients or moments."""
    module = policy_module(policy)
    frozen = getattr(policy, "frozen_parts", [])
    tensors = {id(t): t for part in (module, *frozen) for t in part.state_dict(keep_vars=True).values()}
    trained = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert estimate.persistent["weights"] == sum(t.nbytes for t in tensors.values())
    assert estimate.persistent["frozen and averaged weights"] == 2 * trained
    assert estimate.persistent["moments"] == 2 * trained
    assert estimate.gradients == trained


def test_a_card_that_is_too_small_is_refused_without_weights(
    family_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES["janus"]
    folder = described(family_folder("janus"), tmp_path / "described")
    settings = [*family.overrides(folder), *SMALL, ONE % (0, 1), "device=auto"]
    assert main(["check", family.recipe, *settings, "--card", "80"]) == 0
    assert capsys.readouterr().out.endswith("of 80 GiB are left\n")
    assert main(["check", family.recipe, *settings, "--card", "0.01"]) == 2
    assert "on a card, 0.0 GiB are free: set offload=true, or train an adapter" in capsys.readouterr().err


def test_a_class_without_an_estimate_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiscretePolicy().save(tmp_path / "model")
    settings = [f"policy={tmp_path / 'model'}", *SMALL, ONE % (0, 1), "device=auto"]
    assert main(["check", FAMILIES["janus"].recipe, *settings, "--allow-code=discrete_policy", "--card", "80"]) == 2
    said = capsys.readouterr().err
    assert "its memory is not estimated, as its class DiscretePolicy has no from_config" in said
    assert said.count("\n") == 1


def test_code_that_looks_at_values_runs_on_fake_weights() -> None:
    layer = torch.nn.Linear(8, 4, device="meta")
    layer.register_buffer("table", torch.empty(5, dtype=torch.int64, device="meta"))
    fake_weights([layer])
    rows, kept = torch.ones(3, 8), torch.tensor([True, False, True])
    with LiveBytes([*layer.parameters(), *layer.buffers()]) as live:
        y = layer(rows)  # 48 bytes
        chosen = y.argmax(dim=1)  # 24
        assert (live.now, chosen.tolist()) == (72, [0, 0, 0])
        assert (y.sum().item(), rows[kept].sum().item()) == (1.0, 16.0)
        assert y[kept].shape == (2, 4)
        y[kept].sum().backward()
    assert layer.weight.grad is not None
    assert layer.table.tolist() == [0] * 5
