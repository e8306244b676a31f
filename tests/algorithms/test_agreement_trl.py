"""TRL's own loss and advantage code on the numbers that ours gets. Where we differ on purpose, a test says so.

Skipped where TRL is not installed: pip install 'lvrpo[peers]'.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lvrpo.algorithms import (
    TOKEN_OBJECTIVES,
    corrected_k3,
    entropy_bonus,
    gdpo_advantages,
    group_relative_advantages,
    k3,
    reduce_tokens,
    truncated_weights,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'lvrpo[peers]'"
    ),
    pytest.mark.filterwarnings("ignore"),  # those of the peer are not ours
]

NAN = float("nan")
P, G, B, L = 3, 4, 12, 5
LENGTHS = [5, 3, 1, 4, 2, 5, 5, 1, 3, 4, 2, 5]
LIMIT = 8
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:  # TRL's types exist only where it is installed
    """A GRPOTrainer of TRL on a tiny random model; nothing is generated or trained."""
    folder = str(tmp_path_factory.mktemp("trl"))
    offline = {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with mock.patch.dict(os.environ, offline), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny_trainer(folder)


def tiny_trainer(folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    sizes = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return GRPOTrainer(
        model=LlamaForCausalLM(sizes),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)] * 2,
        args=GRPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=B,
            num_generations=G,
            max_completion_length=LIMIT,
            gradient_accumulation_steps=1,
            beta=0.0,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * P),
        processing_class=tokenizer,
    )


@pytest.fixture
def batch() -> SimpleNamespace:
    """Log-probs of twelve answers of one to five tokens, some ratios far outside the clip, and their advantages."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(L)[None] < torch.tensor(LENGTHS)[:, None]
    behavior = -2 * torch.rand(B, L, generator=generator)
    return SimpleNamespace(
        mask=mask,
        behavior=behavior,
        logprobs=behavior + 0.3 * torch.randn(B, L, generator=generator),
        reference=behavior + 0.3 * torch.randn(B, L, generator=generator),
        entropy=torch.rand(B, L, generator=generator),
        advantages=torch.randn(B, generator=generator),
    )


def theirs(
    trainer: Any,
    batch: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    *,
    corrected_kl: bool = False,
    **settings: Any,
) -> tuple:
    """The loss of TRL and its gradient to the log-probs."""
    logprobs = batch.logprobs.clone().requires_grad_()
    known = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": CLIP_LOW,
        "epsilon_high": CLIP_HIGH,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, batch.entropy, None),
        **settings,
    }
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", corrected_kl, raising=False)
    for name, value in known.items():
        monkeypatch.setattr(trainer, name, value, raising=False)
    inputs = {
        "prompt_ids": torch.full((B, 1), 2),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.full((B, L), 2),
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.behavior,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": batch.mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


def ours(
    batch: SimpleNamespace,
    objective: str,
    how: str,
    *,
    clip_high: float = CLIP_HIGH,
    kl_coef: float = 0.0,
    corrected_kl: bool = False,
) -> tuple:
    """Our loss and its gradient to the log-probs."""
    logprobs = batch.logprobs.clone().requires_grad_()
    out = TOKEN_OBJECTIVES[objective](
        logprobs,
        batch.behavior,
        batch.advantages[:, None],
        batch.mask,
        clip_low=1.0 if objective == "cispo" else CLIP_LOW,
        clip_high=clip_high,
    )
    kl = corrected_k3(logprobs, batch.reference, batch.behavior) if corrected_kl else k3(logprobs, batch.reference)
    loss = reduce_tokens(out.loss_terms + kl_coef * kl, batch.mask, how, constant=LIMIT)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


def agree(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# Losses


@pytest.mark.parametrize(("kl_coef", "corrected_kl"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize(
    ("loss_type", "how"), [("grpo", "trajectory"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_clipped_losses_agree(trainer, batch, monkeypatch, loss_type, how, kl_coef: float, corrected_kl: bool) -> None:
    """With TRL's default, the corrected estimate of the divergence, and with the plain k3."""
    mine = ours(batch, "grpo", how, kl_coef=kl_coef, corrected_kl=corrected_kl)
    agree(mine, theirs(trainer, batch, monkeypatch, loss_type=loss_type, beta=kl_coef, corrected_kl=corrected_kl))


@pytest.mark.parametrize(("loss_type", "how"), [("grpo", "trajectory"), ("dapo", "token"), ("dr_grpo", "constant")])
def test_sequence_level_ratios_agree(trainer, batch, monkeypatch, loss_type: str, how: str) -> None:
    """Ours is the token form of GSPO, theirs the sequence form."""
    peer = theirs(trainer, batch, monkeypatch, loss_type=loss_type, importance_sampling_level="sequence")
    agree(ours(batch, "gspo", how), peer)


def test_cispo_agrees(trainer, batch, monkeypatch) -> None:
    """TRL's epsilon_high is the largest weight itself, ours (as the paper's) what it may exceed 1 by."""
    peer = theirs(trainer, batch, monkeypatch, loss_type="cispo", epsilon_high=1 + CLIP_HIGH)
    agree(ours(batch, "cispo", "token"), peer)


def test_the_entropy_bonus_agrees_and_theirs_is_a_token_mean_under_every_loss(trainer, batch, monkeypatch) -> None:
    """On purpose: ours has the denominator of the loss that it is added to."""
    plain, _ = theirs(trainer, batch, monkeypatch, loss_type="grpo")
    enabled = {"_entropy_bonus_enabled": True, "use_adaptive_entropy": False, "entropy_coef": 0.3}
    with_bonus, _ = theirs(trainer, batch, monkeypatch, loss_type="grpo", **enabled)
    agree(with_bonus - plain, 0.3 * entropy_bonus(batch.entropy, batch.mask, "token"))
    assert abs(entropy_bonus(batch.entropy, batch.mask, "trajectory") - entropy_bonus(batch.entropy, batch.mask)) > 5e-3


def test_an_answer_that_is_masked_whole_counts_in_their_denominator_but_not_in_ours(
    trainer, batch, monkeypatch
) -> None:
    """On purpose: an answer cut off at the limit is left out, not averaged in as 0."""
    batch.mask[3] = False
    mine, _ = ours(batch, "grpo", "trajectory")
    peer, _ = theirs(trainer, batch, monkeypatch, loss_type="grpo")
    agree(mine * (B - 1) / B, peer)


# Advantages


def their_scores(trainer: Any, rewards: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict:
    """What TRL makes of rewards (P, G, K); nan where a reward does not apply."""
    ids = [[2] * length for length in LENGTHS]
    sampled = settings.pop("sampled", None)
    known = {
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "beta": 0.0,
        "reward_weights": torch.tensor([1.0, 0.5]),
        "_generate": lambda prompts: ([[2]] * B, ids, None, ["a"] * B, sampled, {}, None, None),
        "_calculate_rewards": lambda *_: rewards.reshape(B, -1),
        **settings,
    }
    for name, value in known.items():
        monkeypatch.setattr(trainer, name, value, raising=False)
    return trainer._generate_and_score_completions([{"prompt": "a"}] * B)


@pytest.fixture
def rewards() -> torch.Tensor:
    """Two rewards (P, G, 2): one of two values, one continuous and quiet, both with signal in every group."""
    generator = torch.Generator().manual_seed(1)
    table = torch.rand(P, G, 2, generator=generator)
    table[..., 0] = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 1]])
    table[..., 1] *= 0.05
    return table


WEIGHTS = torch.tensor([1.0, 0.5])
ONE_TASK = torch.zeros(P, dtype=torch.long)


@pytest.mark.parametrize(("scale", "std"), [("group", "sample"), ("none", "none")])
def test_summed_advantages_agree(trainer, rewards, monkeypatch, scale: str, std: str) -> None:
    total = (rewards * WEIGHTS).sum(dim=2)
    mine = group_relative_advantages(total, torch.ones_like(total, dtype=torch.bool), std=std)
    agree(mine.flatten(), their_scores(trainer, rewards, monkeypatch, scale_rewards=scale)["advantages"])


def test_the_std_of_the_batch_is_that_of_the_sample_with_them(trainer, rewards, monkeypatch) -> None:
    """On purpose: ours is the population's, as Flow-GRPO's; the factor is sqrt(B / (B - 1)), eps apart."""
    total = (rewards * WEIGHTS).sum(dim=2)
    mask = torch.ones_like(total, dtype=torch.bool)
    mine = group_relative_advantages(total, mask, std="batch", eps=1e-4 * ((B - 1) / B) ** 0.5)
    peer = their_scores(trainer, rewards, monkeypatch, scale_rewards="batch")["advantages"]
    agree(mine.flatten() * ((B - 1) / B) ** 0.5, peer)


def gdpo_of_trl(trainer: Any, rewards: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    settings = {"multi_objective_aggregation": "normalize_then_sum"}
    return their_scores(trainer, rewards, monkeypatch, **settings)["advantages"].view(P, G)


def test_gdpo_agrees(trainer, rewards, monkeypatch) -> None:
    mine = gdpo_advantages(rewards, ~rewards.isnan(), WEIGHTS, ONE_TASK, std="sample")
    agree(mine, gdpo_of_trl(trainer, rewards, monkeypatch))


def test_gdpo_agrees_on_rewards_that_do_not_apply(trainer, rewards, monkeypatch) -> None:
    rewards[0, :, 1], rewards[1, 2, 0], rewards[2, 3] = NAN, NAN, NAN
    mine = gdpo_advantages(rewards, ~rewards.isnan(), WEIGHTS, ONE_TASK, std="sample")
    agree(mine, gdpo_of_trl(trainer, rewards, monkeypatch))
    assert not mine[2, 3]


def test_gdpo_groups_without_signal_shrink_their_scale_but_not_ours(trainer, rewards, monkeypatch) -> None:
    """On purpose: a dead group does not make the advantages of the others larger."""
    rewards[1] = 0.5
    mask = torch.ones_like(rewards, dtype=torch.bool)
    mine = gdpo_advantages(rewards, mask, WEIGHTS, ONE_TASK, std="sample")
    peer = gdpo_of_trl(trainer, rewards, monkeypatch)
    assert not mine[1].any()
    factor = (11 / 12 * 8 / 7 * 12 / 8) ** 0.5  # of twelve numbers, eight of them not 0, to the std of those eight
    torch.testing.assert_close(peer, mine * factor, rtol=1e-4, atol=1e-4)


def test_gdpo_takes_one_scale_per_task_where_they_take_one_for_all(trainer, rewards, monkeypatch) -> None:
    """On purpose: with two tasks the one with wider scores would set the scale of both."""
    mask = torch.ones_like(rewards, dtype=torch.bool)
    mine = gdpo_advantages(rewards, mask, WEIGHTS, torch.tensor([0, 1, 1]), std="sample")
    alone = gdpo_advantages(rewards[:1], mask[:1], WEIGHTS, ONE_TASK[:1], std="sample")
    agree(mine[:1], alone)
    assert (mine - gdpo_of_trl(trainer, rewards, monkeypatch)).abs().max() > 1e-3


def test_a_tiny_spread_is_no_signal_to_us_but_an_advantage_to_them(trainer, rewards, monkeypatch) -> None:
    """On purpose: ``std_floor``."""
    rewards[..., 1] = 0.5 + 0.004 * torch.rand(P, G, generator=torch.Generator().manual_seed(2))
    total = rewards[..., 1]
    peer = their_scores(trainer, rewards * torch.tensor([0.0, 2.0]), monkeypatch)["advantages"]
    assert peer.abs().max() > 0.8
    assert not group_relative_advantages(total, torch.ones_like(total) > 0, std="sample", std_floor=0.01).any()


# Truncated importance weights


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_weights_agree(trainer, batch, rewards, monkeypatch, level) -> None:
    sampled = [row[:n].tolist() for row, n in zip(batch.behavior, LENGTHS, strict=True)]
    output = their_scores(
        trainer,
        rewards,
        monkeypatch,
        sampled=sampled,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=f"{level}_truncate",
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=1.3,
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.entropy, None),
    )
    mine = truncated_weights(batch.logprobs, batch.behavior, batch.mask, cap=1.3, level=level)
    peer = output["importance_sampling_ratio"].expand(B, L)
    agree(mine, torch.where(batch.mask, peer, 0.0))
    assert (mine == 1.3).any()
    assert ((mine > 0) & (mine < 1.3)).any()
