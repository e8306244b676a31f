from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.data.scenes import CorpusConfig, WebCorpus, web_corpus
from lvrpo.errors import InputError
from lvrpo.policies.mot.policy import remaining
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.training.optimizer import update_ema
from lvrpo.training.pretrain import (
    PretrainConfig,
    Representation,
    RepresentationConfig,
    SupervisedState,
    initial_policy,
)

BATCH = {"generate": 6, "caption": 3, "question": 8, "edit": 3, "reason": 4}


def make_config(**changes: Any) -> PretrainConfig:
    sizes = TinyConfig(tower_width=16, transformer=MoTConfig(width=32, depth=1, heads=2, key_heads=2, mlp_width=32))
    tree: dict[str, Any] = {"policy": sizes, "batch": BATCH, "steps": 40, "device": "cpu"}
    return PretrainConfig.model_validate(tree | changes)


@pytest.fixture(scope="module")
def corpus() -> WebCorpus:
    return web_corpus(CorpusConfig(scenes=30, edits=20, reasons=20))


@pytest.fixture
def trainer(corpus: WebCorpus) -> Callable[..., SupervisedState]:
    def build(**changes: Any) -> SupervisedState:
        config = make_config(**changes)
        return SupervisedState(config, initial_policy(config), corpus)

    return build


def test_every_row_comes_once_an_epoch_in_a_new_order(
    trainer: Callable[..., SupervisedState], corpus: WebCorpus
) -> None:
    supervised = trainer(batch={"generate": 4, "question": 6}, condition_dropout=0.0)
    walks = {"generate": len(corpus.generate), "question": len(corpus.question)}
    seen: dict[str, list[str]] = {kind: [] for kind in walks}
    for step in range(60):
        for example in supervised.batch(step):
            kind = "question" if example.prompt.output == ("text",) else "generate"
            seen[kind].append(example.prompt.id)
    for kind, n in walks.items():
        epochs = [seen[kind][i : i + n] for i in range(0, len(seen[kind]) - n + 1, n)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == n for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_questions_come_in_runs_that_share_a_image(trainer: Callable[..., SupervisedState]) -> None:
    rows = trainer(batch={"question": 12}).batch(3)
    images = [id(example.prompt.parts[0]) for example in rows]
    assert sorted(Counter(images).values()) == [4, 4, 4]
    assert all(len(set(images[i : i + 4])) == 1 for i in (0, 4, 8))


def test_a_batch_is_a_function_of_seed_and_step(trainer: Callable[..., SupervisedState]) -> None:
    one, other, seeded = trainer(), trainer(), trainer(seed=1)

    def ids(supervised: SupervisedState, step: int) -> list[str]:
        return [example.prompt.id for example in supervised.batch(step)]

    for step in (0, 1, 25, 2):
        assert ids(one, step) == ids(other, step)
    late = trainer()
    assert ids(late, 25) == ids(one, 25)
    assert ids(late, 3) == ids(one, 3)
    assert ids(one, 0) != ids(one, 1)
    assert ids(one, 0) != ids(seeded, 0)
    assert len(one.batch(0)) == sum(BATCH.values())


def test_some_drawings_lose_their_text_or_their_image_but_not_both(trainer: Callable[..., SupervisedState]) -> None:
    supervised = trainer(condition_dropout=0.5, picture_dropout=0.2)
    rows = [example for step in range(30) for example in supervised.batch(step)]
    drawings = [example for example in rows if example.prompt.output == ("image",)]
    without = [e for e in drawings if e.dropped == "text"]
    assert 0.35 < len(without) / len(drawings) < 0.65
    assert {e.prompt.task for e in without} == {"generate", "edit"}
    assert not any(e.dropped for e in rows if e.prompt.output != ("image",))
    no_image = [e for e in drawings if e.dropped == "image"]
    assert {e.prompt.task for e in no_image} == {"edit"}
    for example in (*without, *no_image):
        kept = remaining(example)
        left_out = [part for part in example.prompt.parts if isinstance(part, str) == (example.dropped == "text")]
        assert left_out
        assert len(kept.parts) == len(example.prompt.parts) - len(left_out)
        assert kept.id == f"{example.prompt.id}/no {example.dropped}"
    whole = trainer(condition_dropout=0.0, picture_dropout=0.0)
    assert not any(e.dropped for step in range(5) for e in whole.batch(step))


def test_a_resumed_run_is_identical(trainer: Callable[..., SupervisedState]) -> None:
    whole, resumed = trainer(), trainer(seed=0)
    for _ in range(3):
        whole.train_step()
    resumed.weights.load_state_dict(whole.weights.state_dict())
    resumed.average_weights.load_state_dict(whole.average_weights.state_dict())
    resumed.optimizers.set_moments(whole.optimizers.moments())
    resumed.step = whole.step
    for _ in range(2):
        assert whole.train_step() == resumed.train_step()
    for one, other in ((whole.weights, resumed.weights), (whole.average_weights, resumed.average_weights)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_both_losses_fall(trainer: Callable[..., SupervisedState]) -> None:
    supervised = trainer(optimizer={"muon_lr": 0.02, "adamw_lr": 2e-3, "warmup_steps": 2})
    reports = [supervised.train_step() for _ in range(25)]
    norms = {"grad_norm/understand", "grad_norm/generate", "grad_norm/shared"}
    assert set(reports[0]) == {"loss/text", "loss/image"} | norms
    for name in ("text", "image"):
        first, last = (sum(r[f"loss/{name}"] for r in part) / 5 for part in (reports[:5], reports[-5:]))
        assert last < 0.9 * first


def test_the_weights_of_the_losses(trainer: Callable[..., SupervisedState]) -> None:
    def first_norms(**weights: float) -> dict[str, float]:
        row = trainer(**weights).train_step()
        return {name.removeprefix("grad_norm/"): norm for name, norm in row.items() if name.startswith("grad_norm/")}

    plain, double = first_norms(text_weight=0.5, image_weight=1.0), first_norms(text_weight=1.0, image_weight=2.0)
    assert all(double[expert] == pytest.approx(2 * plain[expert], rel=1e-4) for expert in plain)
    assert first_norms(text_weight=0.5, image_weight=0.0)["generate"] == 0
    assert first_norms(text_weight=0.0, image_weight=1.0)["generate"] == pytest.approx(plain["generate"], rel=1e-4)


def test_a_gradient_that_is_not_finite_does_not_reach_the_head_of_representation_alignment() -> None:
    policy = initial_policy(make_config())
    assert isinstance(policy, TinyPolicy)
    representation = Representation(RepresentationConfig(weight=0.5, layer=1), policy, lr=0.1, seed=0)
    first, *others = representation.head.parameters()
    before = [parameter.detach().clone() for parameter in (first, *others)]
    for value in (float("nan"), 1.0):
        for parameter in others:
            parameter.grad = torch.ones_like(parameter)
        first.grad = torch.full_like(first, value)
        representation.step(1.0)
        same = [torch.equal(one, other) for one, other in zip(before, (first, *others), strict=True)]
        assert same == [value != value] * 4


def test_the_average_is_short_at_first(trainer: Callable[..., SupervisedState]) -> None:
    supervised = trainer()
    by_hand = copy.deepcopy(supervised.average_weights)
    for step in range(4):
        supervised.train_step()
        update_ema(by_hand, supervised.weights, [0, 1 / 11, 2 / 12, 3 / 13][step])
    for mine, theirs in zip(by_hand.parameters(), supervised.average_weights.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not any(p.requires_grad for p in supervised.average_weights.parameters())


def test_a_run_starts_from_random_weights_or_a_folder(tmp_path: Path) -> None:
    config = make_config(seed=4)
    one, two = initial_policy(config), initial_policy(config)
    assert isinstance(one, TinyPolicy)
    assert isinstance(two, TinyPolicy)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    one.save(tmp_path / "base")
    again = initial_policy(make_config(seed=5, init=str(tmp_path / "base")))
    assert isinstance(again, TinyPolicy)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert all(p.requires_grad for p in again.parameters())
    with pytest.raises(InputError, match="nowhere"):
        initial_policy(make_config(init=str(tmp_path / "nowhere")))


def test_a_rate_that_is_set_leaves_the_others_those_of_pretraining() -> None:
    default = PretrainConfig.model_validate({}).optimizer
    assert (default.muon_lr, default.adamw_lr, default.final_lr) == (0.02, 2e-3, 0.0)
    changed = PretrainConfig.model_validate({"optimizer": {"adamw_lr": 1e-3}}).optimizer
    assert changed == default.model_copy(update={"adamw_lr": 1e-3})
