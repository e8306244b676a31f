from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lvrpo.distributed import save_sharded, stored_tensors
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.memory_estimate import LiveBytes
from lvrpo.training.optimizer import OptimizerConfig, Optimizers, update_ema
from lvrpo.training.state import TrainState


def policy(seed: int = 0) -> TinyPolicy:
    config = TinyConfig(
        image_size=16, tower_width=8, transformer=MoTConfig(width=16, depth=1, heads=2, key_heads=2, mlp_width=16)
    )
    return TinyPolicy.from_vocabulary(config, ("red", "it"), seed)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (50, 1.0), (75, 0.6), (99, 1 - 0.8 * 49 / 50), (100, 0.2), (500, 0.2)],
)
def test_the_schedule_at_literal_steps(step: int, rate: float) -> None:
    config = OptimizerConfig(warmup_steps=4, decay_start=0.5, final_lr=0.2)
    assert Optimizers(policy(), config, 100).rate(step) == pytest.approx(rate, abs=1e-12)


def test_the_schedule_without_warmup_or_decay() -> None:
    optimizers = Optimizers(policy(), OptimizerConfig(warmup_steps=0, decay_start=1.0), 10)
    assert [optimizers.rate(step) for step in range(10)] == [1.0] * 10
    short = Optimizers(policy(), OptimizerConfig(warmup_steps=0, decay_start=0.0, final_lr=0.0), 1)
    assert short.rate(0) == 1.0


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = policy()
    optimizers = Optimizers(model, OptimizerConfig(), 10)
    muon, adamw = optimizers.optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{names[id(p)] for group in o.param_groups for p in group["params"]} for o in (muon, adamw)]
    assert found[0] == {name for name in names.values() if ".layers." in name and "proj" in name}
    assert found[0] | found[1] == set(names.values())
    assert not found[0] & found[1]
    (only,) = Optimizers(model, OptimizerConfig(kind="adamw"), 10).optimizers
    assert isinstance(only, torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_learning_rates_per_expert_really_differ(kind: str) -> None:
    model = policy()
    config = OptimizerConfig.model_validate(
        {"kind": kind, "expert_lr": {"understand": 0.1, "shared": 0.0}, "warmup_steps": 0, "clip_norm": 1e9}
    )
    optimizers = Optimizers(model, config, 10)
    before = weights(model)
    set_gradients(model, 0)
    optimizers.step(0)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["encoders.embed_tokens_table.weight"] == 0
    adamw_lr = 5e-4
    assert moved["encoders.lm_head.weight"] == pytest.approx(0.1 * adamw_lr, rel=1e-3)
    assert moved["encoders.latent_out.weight"] == pytest.approx(adamw_lr, rel=1e-3)
    twins = [name for name in moved if ".understanding." in name and "proj" in name]
    ratios = [moved[name] / moved[name.replace(".understanding.", ".generation.")] for name in twins]
    assert all(0.05 < ratio < 0.2 for ratio in ratios)


def test_one_experts_burst_does_not_shrink_the_others_step() -> None:
    model = policy()
    optimizers = Optimizers(model, OptimizerConfig(clip_norm=1.0), 10)
    groups = model.parameter_groups()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    drawing, reading = groups["generate"][0], groups["understand"][0]
    drawing.grad, reading.grad = torch.full_like(drawing, 100.0), torch.full_like(reading, 1e-3)
    norms = optimizers.step(0)
    assert norms["generate"] == pytest.approx(100 * math.sqrt(drawing.numel()), rel=1e-5)
    assert norms["understand"] == pytest.approx(1e-3 * math.sqrt(reading.numel()), rel=1e-5)
    assert norms["shared"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_leaves_weights_and_state_alone(bad: float) -> None:
    model = policy()
    optimizers = Optimizers(model, OptimizerConfig(), 10)
    set_gradients(model, 0)
    optimizers.step(0)
    before, state = weights(model), copy.deepcopy(optimizers.moments())
    set_gradients(model, 1)
    broken = model.parameter_groups()["generate"][0]
    assert broken.grad is not None
    broken.grad.view(-1)[0] = bad
    norms = optimizers.step(1)
    assert not math.isfinite(norms["generate"])
    assert math.isfinite(norms["understand"])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    set_gradients(model, 2)
    optimizers.step(2)

    other = policy()
    again = Optimizers(other, OptimizerConfig(), 10)
    other.load_state_dict(before)
    again.set_moments(state)
    set_gradients(other, 2)
    again.step(2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_without_any_gradient_changes_nothing() -> None:
    model = policy()
    before = weights(model)
    assert Optimizers(model, OptimizerConfig(weight_decay=0.1), 10).step(0) == {}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_steps_are_identical(kind: str) -> None:
    config = OptimizerConfig.model_validate({"kind": kind, "weight_decay": 0.01, "warmup_steps": 3})
    whole = policy()
    optimizers = Optimizers(whole, config, 6)
    for step in range(3):
        set_gradients(whole, step)
        optimizers.step(step)
    saved, state = weights(whole), optimizers.moments()
    resumed = policy(seed=9)
    resumed.load_state_dict(saved)
    others = Optimizers(resumed, config, 6)
    others.set_moments(state)
    for step in range(3, 6):
        for model, o in ((whole, optimizers), (resumed, others)):
            set_gradients(model, step)
            o.step(step)
    assert not all(torch.equal(saved[name], p) for name, p in whole.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_scale_multiplies_the_rates() -> None:
    one, half = policy(), policy()
    config = OptimizerConfig(kind="adamw", warmup_steps=0)
    start = weights(one)
    for model, scale in ((one, 1.0), (half, 0.5)):
        set_gradients(model, 0)
        Optimizers(model, config, 10).step(0, scale)
    for (name, p), q in zip(one.named_parameters(), half.parameters(), strict=True):
        torch.testing.assert_close((q - start[name]) * 2, p - start[name], rtol=1e-2, atol=1e-7)


def test_a_restored_state_holds_its_moments_once() -> None:
    trained, restored = (TrainState.start(policy(), TrainConfig()) for _ in range(2))
    set_gradients(trained.policies.module, 0)
    trained.optimizers[0].step(0)
    Path("tensors").mkdir()
    save_sharded(Path("tensors"), trained._tensors())
    with LiveBytes(()) as live:
        restored._allocate_moments(stored_tensors(Path("tensors")), trained._other_moments())
    moments = trained.optimizers[0].moments()
    again = restored.optimizers[0].moments()
    assert {name: [*each] for name, each in again.items()} == {name: [*each] for name, each in moments.items()}
    size = sum(tensor.nbytes for each in moments.values() for tensor in each.values())
    assert size <= live.peak < 1.1 * size


def test_average_into_is_literal() -> None:
    slow, fast = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        slow.weight.fill_(1.0)
        slow.bias.fill_(-2.0)
        fast.weight.fill_(3.0)
        fast.bias.fill_(2.0)
    update_ema(slow, fast, 0.75)
    assert (slow.weight.item(), slow.bias.item()) == (1.5, -1.0)
    update_ema(slow, fast, 0.0)
    assert (slow.weight.item(), slow.bias.item()) == (3.0, 2.0)
    assert (fast.weight.item(), fast.bias.item()) == (3.0, 2.0)
    assert slow.weight.grad is None
