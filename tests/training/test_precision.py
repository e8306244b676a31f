"""float32 weights computed in bfloat16, a bfloat16 base under a float32 adapter, moments in 8 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import killed_copy, stored
from torch import nn

from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.adapter import is_adapter
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.checkpoint import load_state, save_state
from lvrpo.training.config import TrainConfig
from lvrpo.training.optimizer import OptimizerConfig, Optimizers
from lvrpo.training.preflight import TOLERANCE, _replay_checks, rollout_checks
from lvrpo.training.setup import open_policy
from lvrpo.training.trainer import Trainer
from lvrpo.types import Example, FlowSegment, Prompt, RewardTable, Trajectory

SAMPLING = Sampling(group_size=3, max_new_tokens=4, num_steps=3, sampler="flow_sde", window=(0, 1))
SIZES = {"width": 32, "depth": 2, "heads": 2, "key_heads": 1, "mlp_width": 32, "read_side": 4, "latent_side": 4}
TOWERS = {"vit_width": 8, "vit_depth": 1, "vit_heads": 2, "vit_mlp_width": 8, "image_size": 16}


def lively_bagel() -> MoTPolicy:
    policy = create_bagel(BagelSizes.model_validate(SIZES | TOWERS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return policy


@pytest.mark.parametrize("kind", ["tiny", "bagel"])
def test_weights_and_latents_stay_float32(
    kind: str, lively_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = lively_policy() if kind == "tiny" else lively_bagel()
    exact = policy.sample(prompts, SAMPLING, list(range(len(prompts))))
    policy.set_compute_dtype(torch.bfloat16)
    assert policy.compute_dtype == policy.make_reference().compute_dtype == torch.bfloat16
    groups = policy.sample(prompts, SAMPLING, list(range(len(prompts))))
    trajectories = [t for group in groups for t in group.trajectories]
    drawings = [s for t in trajectories for s in t.segments if isinstance(s, FlowSegment)]
    assert {s.latent.dtype for s in drawings} == {s.states.dtype for s in drawings} == {torch.float32}
    before = [s for group in exact for t in group.trajectories for s in t.segments if isinstance(s, FlowSegment)]
    apart = max(float((a.latent - b.latent).abs().max()) for a, b in zip(drawings, before, strict=True))
    assert 1e-5 < apart < 0.5
    checks = _replay_checks(policy, trajectories)
    assert all(check.ok for check in checks), checks
    assert {check.limit for check in checks if "replay" in check.check} == {TOLERANCE[torch.bfloat16]}
    assert any(check.check == "replay, text, other batch: max |difference|, bfloat16" for check in checks)
    assert max(check.value for check in checks) > 1e-6  # measured on rows that are alone, too
    sum(scored.logprobs.sum() for row in policy.logprobs(trajectories) for scored in row).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients
    assert {g.dtype for g in gradients} == {torch.float32}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_the_context_is_kept_in_the_computed_dtype(lively_policy: Callable[..., TinyPolicy]) -> None:
    policy = lively_policy()
    row = policy.runner.row(("red circle",), draws=False)
    assert policy.runner.prefill([row]).layer(0)[0].dtype == torch.float32
    policy.set_compute_dtype(torch.bfloat16)
    with policy.autocast():
        cache = policy.runner.prefill([row])
    assert {t.dtype for i in range(len(policy.transformer.layers)) for t in cache.layer(i)} == {torch.bfloat16}


def test_every_method_that_runs_the_model_computes_in_bfloat16(
    lively_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = lively_policy()
    policy.set_compute_dtype(torch.bfloat16)
    seen: list[bool] = []
    policy.transformer.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    image = torch.rand(3, policy.image_size, policy.image_size)
    group = policy.sample(prompts[:1], SAMPLING, [0])[0]
    latent = torch.zeros(1, policy.config.image_tokens, policy.config.channels)
    examples = [Example(Prompt("s", "generate", ("red circle",), ("image",)), (image,))]
    calls: list[Callable[[], object]] = [
        lambda: policy.sample(prompts, SAMPLING, list(range(len(prompts)))),
        lambda: policy.sample_member(prompts[0], SAMPLING, 0, 0),
        lambda: policy.logprobs(group.trajectories),
        lambda: policy.velocity([drawn(policy, prompts)], latent, torch.ones(1)),
        lambda: policy.text_logprob([("red circle",)], ["red"]),
        lambda: policy.image_logprob([("red circle",)], [image], 1, [0]),
        lambda: policy.supervised_losses(examples, torch.Generator()),
        lambda: policy.image_features([image], 1),
        lambda: policy.hidden_states(["red circle"], 1),
        lambda: policy.context_states([("red circle",)]),
        lambda: policy.generation_states([("red circle",)], [image], 1.0, 0),
    ]
    for call in calls:
        seen.clear()
        call()
        assert seen
        assert all(seen)


def drawn(policy: TinyPolicy, prompts: list[Prompt]) -> Trajectory:
    """An image."""
    prompt = next(prompt for prompt in prompts if prompt.output == ("image",))
    return policy.sample([prompt], SAMPLING, [0])[0].trajectories[0]


@pytest.mark.parametrize("dora", [False, True])
def test_a_float32_adapter_on_a_bfloat16_base(dora: bool, prompts: list[Prompt]) -> None:
    pytest.importorskip("peft")
    lively_bagel().save(Path("base"))
    tree = ["policy=base", "device=cpu", "precision={weights: bfloat16}", f"adapter={{rank: 2, dora: {dora}}}".lower()]
    policy, _ = open_policy(load_config(TrainConfig, None, tree))
    assert isinstance(policy, MoTPolicy)
    plain = policy.make_reference()
    for name, parameter in policy.named_parameters():
        expected = torch.float32 if is_adapter(name) or "latent_vae" in name else torch.bfloat16
        assert parameter.dtype == expected, name
    groups = [each.sample(prompts, SAMPLING, list(range(len(prompts)))) for each in (policy, plain)]
    for one, other in zip(*groups, strict=True):
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            for s, t in zip(a.segments, b.segments, strict=True):
                assert torch.equal(s.behavior_logprobs, t.behavior_logprobs)
    table = RewardTable(
        ("r",), torch.ones(1), torch.rand(len(prompts), 3, 1), torch.ones(len(prompts), 3, 1, dtype=torch.bool), {}, ()
    )
    assert all(check.ok for check in rollout_checks(policy, groups[0], table, 1e-6))


def test_trained_weights_in_bfloat16_are_refused() -> None:
    with pytest.raises(InputError, match=r"precision.weights=bfloat16: weights that are trained have to be float32"):
        load_config(TrainConfig, None, ["precision={weights: bfloat16}"])
    with pytest.raises(InputError, match=r"precision.compute=float32: has no effect"):
        load_config(TrainConfig, None, ["precision={weights: bfloat16, compute: float32}", "adapter={rank: 2}"])


def test_the_quickstart_computes_as_before(small_base: Path) -> None:
    policy, _ = open_policy(load_config(TrainConfig, None, [f"policy={small_base}", "device=cpu"]))
    assert isinstance(policy, MoTPolicy)
    assert policy.compute_dtype == torch.float32
    assert policy.adapter is None


def test_a_run_in_bfloat16_with_moments_in_8_bits_goes_on_bit_for_bit(small_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    few = "data.prompts_per_step={understand: 8, reason: 4}"
    watching = "validation={every: 2, prompts: {understand: 2}}"
    dtype = ["precision={compute: bfloat16}", "optimizer={kind: adamw_8bit}", "rewards=[{name: exact_answer}]"]
    sizes = ["rollout={group_size: 4, num_steps: 3}", "steps=2", "checkpoint_every=1", "device=cpu"]
    config = load_config(TrainConfig, None, [f"policy={small_base}", few, watching, *dtype, *sizes])
    whole = Trainer.start(config, Path("whole"))
    with whole.run:
        whole.train()
    killed = killed_copy(Path("whole"), 1)
    again = Trainer.resume(killed)
    with again.run:
        assert again.state.step == 1
        again.train()
    one, other = (stored(run / "checkpoints/step_000002") for run in (Path("whole"), killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert torch.uint8 in {tensor.dtype for name, tensor in one.items() if name.endswith("/state1")}


def test_moments_in_8_bits_step_like_those_in_32(lively_policy: Callable[..., TinyPolicy]) -> None:
    pytest.importorskip("bitsandbytes")

    def stepped(kind: Any) -> tuple[torch.Tensor, Optimizers]:
        policy = lively_policy()
        policy.encoders.read_in = nn.Linear(192, 64)  # large enough for 8 bits
        policy.encoders.read_in.weight.data.zero_()
        optimizers = Optimizers(policy, OptimizerConfig(kind=kind, adamw_lr=0.1, warmup_steps=0), 100)
        for step in range(3):
            for parameter in policy.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizers.step(step)
        return policy.encoders.read_in.weight.detach().clone(), optimizers

    (low, optimizers), (high, _) = stepped("adamw_8bit"), stepped("adamw")
    assert float(high.abs().mean()) > 0.05
    assert float((low - high).abs().mean() / high.abs().mean()) < 0.03
    save_state(Path.cwd(), optimizers.moments())
    names = {p: n for n, p in optimizers.named}
    (large,) = (p for p in names if p.shape == (64, 192))
    saved = load_state(Path.cwd())[names[large]]
    assert saved["state1"].dtype == torch.uint8
    optimizers.set_moments(load_state(Path.cwd()))
    assert torch.equal(optimizers.optimizers[0].state[large]["state1"], saved["state1"])


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [("optimizer={kind: adamw_8bit}", "bitsandbytes", "eight-bit"), ("adapter={rank: 2}", "peft", "peft")],
)
def test_a_missing_package_is_one_line_before_anything_is_loaded(
    setting: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'lvrpo\[{extra}\]'"):
        open_policy(load_config(TrainConfig, None, ["policy=no/such/folder", setting]))
