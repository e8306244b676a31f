"""What the processes of ``tests/training/test_ranks.py`` and ``test_offload.py`` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from distributed_work import full
from gradients_only import differentiate
from settings import SMALL
from torch import nn

from lvrpo import distributed as d
from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.errors import ContractError, InputError, LvrpoError
from lvrpo.evaluation.scoring import evaluation_policy
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.base import Scores, judge_fingerprint
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import sample_local, score_local
from lvrpo.training.judge import JudgeConfig, JudgeRefresh
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import KINDS, Advantages, GroupAdvantages
from lvrpo.training.policies import Policies
from lvrpo.training.preflight import Check, require
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import Trainer, train_step
from lvrpo.types import Group, Prompt

ROLLOUT = {"group_size": 4, "num_steps": 3, "max_new_tokens": 4}


def command(folder: Path, *arguments: str) -> int:
    """The exit code of ``lvrpo`` with these arguments."""
    os.chdir(folder)
    return main(arguments)


def config_of(tree: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({"rollout": ROLLOUT, "device": "cpu"} | tree)


def lively(folder: Path) -> Any:
    """A saved policy without layers of zeros."""
    policy = cast(Any, load_policy(folder))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def moved(policies: Policies) -> Policies:
    """The policy, a little away from the reference."""
    with torch.no_grad():
        for parameter in policies.weights.parameters.values():
            d.local(parameter.detach()).add_(0.01)
    return policies


def advantages_of(groups: Sequence[Group]) -> Advantages:
    return dict.fromkeys(KINDS, GroupAdvantages.all_valid(torch.tensor([[-1.5, -0.5, 0.5, 1.5]] * len(groups))))


def sampled(policies: Policies, prompts: Sequence[Prompt], config: TrainConfig) -> list[Group]:
    with policies.use("policy") as policy:
        return sample_local(policy, prompts, config.sampling(0), list(range(len(prompts))))


def gradients(folder: Path, prompts: Sequence[Prompt], tree: dict[str, Any]) -> dict[str, Any]:
    """The gradients of a training step, the texts of the groups that this rank has, and what was logged."""
    config = config_of(tree)
    policies = moved(Policies(lively(folder), offload=config.offload))
    groups = sampled(policies, prompts, config)
    metrics = differentiate(policies, groups, advantages_of(groups), config).means()
    return {
        "texts": [[t.text for t in group.trajectories] for group in groups],
        "metrics": metrics,
        "gradients": {n: full(cast(Any, p.grad)) for n, p in policies.weights.parameters.items() if p.grad is not None},
    }


def fail(folder: Path, prompts: Sequence[Prompt], where: str, broken: int, error: Exception) -> str:
    """What each rank raises where one of them fails."""

    def failing(*_: object, **__: object) -> Any:
        raise error

    def zeros(groups: Sequence[Group], judge: object) -> Scores:
        return Scores(torch.zeros(len(groups), len(groups[0])))

    own = d.rank() == broken
    policies, config = Policies(lively(folder)), config_of({})
    if own and where in ("sample", "velocity"):
        setattr(policies.policy, where, failing)
    try:
        groups = sampled(policies, prompts, config)
        reward: Any = SimpleNamespace(applies=lambda prompt: True, score=failing if own else zeros)
        source = ConfiguredReward(RewardConfig(name="fails", on_failure="stop"), reward)
        if where == "reward":
            with policies.use("judge") as judge:
                score_local([source], groups, judge)
        differentiate(policies, groups, advantages_of(groups), config)
    except LvrpoError as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def contract(broken: int) -> str:
    """What each rank raises where a check of the step-0 contract fails on one of them."""
    own = d.rank() == broken
    check = Check("scores that failed", 0.5 * own, 0.0, not own, "judge: HTTP 503")
    try:
        require([check])
    except ContractError as raised:
        return str(raised)
    return ""


def refreshed() -> tuple[str, list[tuple[str, str]]]:
    """What each rank does with a candidate for the judge that rank 1 alone finds worse, and the sets it copied."""
    copied: list[tuple[str, str]] = []

    def measure(name: str) -> torch.Tensor:
        return torch.tensor([0.5 - 1e-7 * (name == "ema" and d.rank() == 1)])

    sets: Any = SimpleNamespace(
        use=nullcontext, weights=SimpleNamespace(copy=lambda *names: copied.append(cast(Any, names)))
    )
    rows: Any = SimpleNamespace(measures=lambda: {"held_out": measure})
    row = JudgeRefresh(JudgeConfig(refresh_every=1)).update(1, sets, rows)
    return row["judge/action"].partition(":")[0], copied


def asked(answering: Policy, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a policy answers, in the order of the questions."""
    side = answering.image_size or 16
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    texts = ["red", "blue", "two circle", "one", "red circle"]
    images = [(text,) for text in texts], [image] * 5, 2, list(range(5))
    logprobs = [
        answering.text_logprob([(image, "what is it")] * 5, texts),
        answering.image_logprob(*images),
        answering.image_logprob(*images, times=(0.2, 0.6)),
        *answering.hidden_states(("red circle",), 1),
    ]
    groups = answering.sample(prompts, Sampling(2, max_new_tokens=3, num_steps=3), list(range(len(prompts))))
    written = groups[0].trajectories[0]
    replayed = answering.logprobs([written])[0][0].logprobs.detach()  # with the weights that sampled it
    torch.testing.assert_close(replayed, written.segments[0].behavior_logprobs, rtol=0, atol=1e-5)
    assert all(group.prompt is prompt for group, prompt in zip(groups, prompts, strict=True))
    return {
        "size": answering.image_size,
        "identity": judge_fingerprint(answering),
        "logprobs": logprobs,
        "groups": [[(t.member, t.seed, t.text, t.image) for t in group.trajectories] for group in groups],
    }


def evaluate(folder: Path, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The averaged policy and the reference, asked in turn."""
    policies = moved(Policies(lively(folder)))
    with torch.no_grad():
        policies.weights.lerp("ema", 0.5)
    averaged, reference = evaluation_policy(policies, "ema"), evaluation_policy(policies, "reference")
    return [asked(averaged, prompts), asked(reference, prompts), asked(averaged, prompts)]


def steps(folder: Path, prompts: Sequence[Prompt], tree: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a run's state: metrics, and all of its weights and moments."""
    config = config_of(tree)
    state = TrainState.start(lively(folder), config)
    objectives = objectives_of(config, state.policies.policy.segment_kinds)
    found = []
    for step in range(2):
        groups = sampled(state.policies, prompts, config)
        args = state.policies, objectives, state.optimizers, groups, advantages_of(groups), config, step
        found.append(train_step(*args).means())
        state.policies.weights.lerp("ema", 0.5)
    return {"metrics": found, "tensors": {name: full(tensor) for name, tensor in state._tensors().items()}}


def bad_gradient(folder: Path) -> dict[str, Any]:
    """A number that is none in the gradient of one rank."""
    state = TrainState.start(lively(folder), config_of({}))
    with d.whole_weights(state.policies.module, reduce=True):
        for name, parameter in state.policies.module.named_parameters():
            parameter.grad = torch.full_like(parameter, 1 / d.world_size())
            if d.rank() == d.world_size() - 1 and name.endswith("layers.0.understanding.q_proj.weight"):
                parameter.grad[0, 0] = torch.nan
    norms = state.optimizers[0].step(0)
    sizes = {expert: sum(p.numel() for p in own) for expert, own in state.policies.policy.parameter_groups().items()}
    return {"norms": norms, "sizes": sizes, "moved": state.policies.weights.differs_from("reference")}


def farther(folder: Path) -> dict[str, torch.Tensor]:
    """How far the extrapolated weights are from where all began."""
    policies = Policies(lively(folder), offload=True)
    begun = {name: full(tensor) for name, tensor in policies.weights["reference"].items()}
    with torch.no_grad():
        for parameter in policies.weights.parameters.values():
            d.local(parameter.detach()).add_(2.0**-20)
    with policies.use_extrapolated() as policy:
        module = cast(nn.Module, policy)
        return {name: p.detach() - begun[name] for name, p in module.named_parameters() if p.requires_grad}


def write_state(folder: Path, at: Path, prompts: Sequence[Prompt], tree: dict[str, Any]) -> str:
    """A checkpoint after a step; what goes wrong."""
    state = TrainState.start(lively(folder), config_of(tree))
    try:
        state.write(at)
    except InputError as error:
        return str(error)
    return ""


def communicated(folder: Path, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Bytes that FSDP and Muon send in a step, over those of the trained weights."""
    config, sent = config_of({}), dict[str, int]()

    def counted(kind: str, *names: str, of_input: bool = False) -> None:
        for name in names:  # torch has renamed some
            plain = getattr(dist, name, None)
            if plain is None:
                continue

            def count(*args: Any, plain: Callable[..., Any] = plain, **named: Any) -> Any:
                tensors = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
                sent[kind] = sent.get(kind, 0) + tensors[1 if of_input else 0].nbytes
                return plain(*args, **named)

            setattr(dist, name, count)

    counted("gathered", "all_gather_single", "all_gather_into_tensor")
    counted("scattered", "reduce_scatter_single", "reduce_scatter_tensor", of_input=True)
    counted("exchanged", "all_to_all_single")
    state = TrainState.start(lively(folder), config)
    groups = sampled(state.policies, prompts, config)
    sent.clear()
    objectives = objectives_of(config, state.policies.policy.segment_kinds)
    train_step(state.policies, objectives, state.optimizers, groups, advantages_of(groups), config, 0)
    whole = 4 * sum(p.numel() for p in state.policies.weights.parameters.values())
    return {name: size / whole for name, size in sent.items()}


def train_on_a_disk_that_fills(base: Path, run: Path) -> str:
    """Rank 1 cannot write its part of the checkpoint of step 2; what the run ends with."""
    import torch.distributed.checkpoint.filesystem as files

    create = files.FileSystem.create_stream

    def failing(self: Any, path: Any, mode: str) -> Any:
        if "w" in mode and "step_000002" in str(path) and d.rank() == 1:
            raise OSError(28, os.strerror(28), str(path))
        return create(self, path, mode)

    cast(Any, files.FileSystem).create_stream = failing
    trainer = Trainer.start(load_config(TrainConfig, None, full_disk_settings(base)), run)
    try:
        with trainer.run:
            trainer.train()
    except InputError as error:
        assert d.gather(d.rank()) == list(range(d.world_size()))
        return str(error)
    return ""


def full_disk_settings(base: Path) -> list[str]:
    return [*SMALL, f"policy={base}", "steps=4", "checkpoint_every=1"]
