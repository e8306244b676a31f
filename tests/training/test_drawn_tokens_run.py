"""Whole runs of policies that draw image tokens or masked image tokens, and their wrong settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from color_task import Colors
from discrete_policy import DiscretePolicy
from stored import killed_copy, stored

from lvrpo.config import dump_config, load_config
from lvrpo.errors import InputError
from lvrpo.evaluation.recorded_groups import read_recorded_run
from lvrpo.evaluation.reward_audit import audit_rewards
from lvrpo.registry import allow_code
from lvrpo.training.config import TrainConfig
from lvrpo.training.rollout_log import TRAITS, read_steps
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.setup import open_policy
from lvrpo.training.trainer import Trainer
from lvrpo.types import (
    SegmentKind,
)

RUN = (
    "device=cpu",
    "allow_code=[color_task, discrete_policy]",
    "data.source='color_task:Colors'",
    "rewards=[{name: 'color_task:ShareOfColor', label: share}, {name: 'color_task:Says', label: says}]",
    "validation.every=100",
    "checkpoint_every=9",
    "samples_every=100",
    "optimizer={kind: adamw, adamw_lr: 5e-3}",
    "data.prompts_per_step={understand: 2, generate: 3, reason: 3}",
    "steps=12",
)
RUNS: dict[str, tuple[SegmentKind, tuple[str, ...]]] = {
    "image tokens, guided": (
        "tokens",
        ("tokens={lr_scale: 0.8}", "rollout={max_new_tokens: 4, guidance_scale: 1.5}", "advantages.stages=per_segment"),
    ),
    "masked, along the path": (
        "masked",
        ("masked={clip_high: 0.2}", "rollout={max_new_tokens: 4, num_steps: 4, choice_temperature: 1}"),
    ),
    "masked, by Monte Carlo": (
        "masked",
        (
            "masked.kind=gspo",
            "rollout={max_new_tokens: 4, num_steps: 4, masked_likelihood: {kind: monte_carlo, draws: 3}}",
        ),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_raises_its_rewards_and_goes_on_bit_for_bit(name: str) -> None:
    kind, settings = RUNS[name]
    DiscretePolicy((kind,)).save(Path("policy"))
    config = load_config(TrainConfig, None, ["policy=policy", *RUN, *settings])
    straight = Trainer.start(config, Path("straight"))
    with straight.run:
        assert straight.train()
    rows = RunDirectory.read(Path("straight")).metrics()[1:]
    for reward in ("generate/share", "reason/share", "understand/says", "reason/says"):
        first, last = ([row[f"reward/{reward}"] for row in some] for some in (rows[:2], rows[-2:]))
        assert sum(last) / 2 > sum(first) / 2 + 0.25, reward
        assert sum(last) / 2 > 0.4, reward
    assert rows[0]["ratio/text"] == 1
    assert rows[0][f"ratio/{kind}"] == pytest.approx(1, abs=0 if kind == "masked" else 1e-2)  # stepped after the text
    assert {f"loss/{kind}/generate", f"kl/{kind}/reason", f"entropy/{kind}/reason", "loss/text/reason"} <= set(rows[0])

    killed = killed_copy(Path("straight"), 9)
    again = Trainer.resume(killed, config)
    with again.run:
        assert again.state.step == 9
        assert again.train()
    untimed = [
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in RunDirectory.read(run).metrics()]
        for run in (Path("straight"), killed)
    ]
    assert untimed[0] == untimed[1]
    one, other = (stored(run / "checkpoints" / "step_000012") for run in (Path("straight"), killed))
    assert {name.split("/")[0] for name in one if not name.startswith("optimizer")} == {"policy", "ema"}  # no old ones
    assert all(torch.equal(one[key], other[key]) for key in one)

    record = list(read_steps(Path("straight")))[-1]
    draws = [task != "understand" for task in record.tasks]
    assert torch.tensor(record.picture_diversity).isfinite().tolist() == draws
    assert torch.tensor(record.traits[:, 0, TRAITS.index("red")]).isfinite().tolist() == draws
    audit = audit_rewards(read_recorded_run(Path("straight")))
    assert {scorer.name for scorer in audit.tasks["generate"].scorers} == {"share"}
    assert audit.tasks["generate"].drift["picture_diversity"].last is not None
    assert Path("straight/samples/step_000012/grid.png").is_file()


# --- bad input ---


def configure(settings: Sequence[str], writes: Sequence[SegmentKind] | None) -> None:
    config = load_config(TrainConfig, None, settings)
    if writes is not None:
        config.require_policy_fit(writes)


TOKENS: tuple[SegmentKind, ...] = ("text", "tokens")
MASKED: tuple[SegmentKind, ...] = ("text", "masked")
FLOWS: tuple[SegmentKind, ...] = ("text", "flow")
BAD: list[tuple[tuple[str, ...], Sequence[SegmentKind] | None, str]] = [
    (("tokens={}",), FLOWS, "tokens: policy=tiny writes no such segments, only text, flow: leave it out"),
    (("masked={}",), FLOWS, "masked: policy=tiny writes no such segments"),
    (("tokens={}", "masked={}"), TOKENS, "masked: policy=tiny writes no such segments, only text, tokens"),
    (("tokens={}", "flow.lr_scale=0.5"), TOKENS, "flow: policy=tiny writes no such segments, only text, tokens"),
    ((), TOKENS, "tokens: policy=tiny draws such segments, and nothing says how they are trained: add the section"),
    (("tokens={}", "rollout.sampler=flow_sde"), TOKENS, "rollout.sampler=flow_sde: applies to flow, and policy=tiny"),
    (("tokens={}", "rollout.num_steps=4"), TOKENS, "rollout.num_steps=4: applies to flow and masked, and policy=tiny"),
    (("tokens={}", "rollout.choice_temperature=1"), TOKENS, "rollout.choice_temperature=1.0: applies to masked"),
    (("rollout.image_temperature=2",), FLOWS, "rollout.image_temperature=2.0: applies to tokens and masked"),
    (("tokens={weight: 0}", "text.weight=0"), TOKENS, "text.weight=0 and tokens.weight=0: nothing would be trained"),
    (("masked={}", "rollout.sample_from=reference"), MASKED, "text.kind=grpo learns from its own outputs only"),
    (("masked={}", "rollout.sample_from=reference", "text.kind=dpo"), MASKED, "masked.kind=grpo learns from its own"),
    (
        ("tokens={lr_scale: 2}", "gradient_mixing=pcgrad"),
        TOKENS,
        "with text.lr_scale=1.0 and tokens.lr_scale=2.0 kinds of segments",
    ),
    (("tokens={importance_cap: 2, kind: dpo}",), TOKENS, "tokens.importance_cap: applies to tokens.kind=grpo or gspo"),
    (("tokens.kind=nft",), None, "tokens.kind=nft: trains a flow, and this section is for tokens: set flow.kind"),
    (("masked.kind=clip",), None, "masked.kind=clip: is called grpo"),
    (("tokens.kl=k1",), None, "tokens.kl=k1"),
    (("tokens.clip_low=0",), None, "tokens.clip_low=0: must be > 0"),
    (("tokens.likelihood=path",), None, "tokens.likelihood=path: says how masked tokens are scored"),
    (("masked.draws=4",), None, "masked.draws=4: says how masked tokens are scored: set rollout.masked_likelihood"),
    (
        ("rollout.masked_likelihood.schedule=uniform",),
        None,
        "masked_likelihood.schedule: applies to rollout.masked_likelihood.kind=monte_carlo or coupled, not to path",
    ),
    (("rollout.masked_likelihood={kind: monte_carlo, draws: 0}",), None, "masked_likelihood.draws=0: must be >= 1"),
    (("rollout.masked_likelihood.kind=montecarlo",), None, "did you mean monte_carlo?"),
    (
        ("tokens={}", "rollout.guided_logprobs=detach_uncond"),
        None,
        "has no effect with rollout.guidance_scale=1: leave it out",
    ),
    (
        ("tokens={}", "rollout.guided_logprobs=none", "rollout.guidance_scale=3"),
        None,
        "rollout.guided_logprobs=none: would score another distribution than the guided one that is sampled",
    ),
    (
        ("masked={}", "rollout.guided_logprobs=none", "rollout.guidance_scale=3"),
        None,
        "rollout.guided_logprobs=none: would score",
    ),
    (("tokens.guided_logprobs=none",), None, "tokens.guided_logprobs=none: is of all policies that draw with tokens"),
    (("rollout.guided_logprobs=detach_uncond",), FLOWS, "has no effect with flow.kind=nft, which trains no recorded"),
    (
        ("flow={kind: flow_grpo}", "rollout={sampler: flow_sde, guided_logprobs: none, guidance_scale: 3}"),
        FLOWS,
        "rollout.guided_logprobs=none: would score another distribution than the guided one that is sampled",
    ),
]


@pytest.mark.parametrize(("settings", "writes", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_answered_in_one_line(
    settings: tuple[str, ...], writes: Sequence[SegmentKind] | None, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        configure(settings, writes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_whose_class_says_what_it_writes_is_not_loaded_in_vain(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvrpo.training.setup.load_policy", lambda *_: pytest.fail("loaded"))
    config = load_config(TrainConfig, None, [f"policy={small_base}", "device=cpu", "tokens={}"])
    with pytest.raises(InputError, match="writes no such segments, only text, flow"):
        open_policy(config)


def test_segment_kinds_of_a_policy_are_checked_before_a_run_starts() -> None:
    allow_code(["color_task", "discrete_policy"])
    DiscretePolicy(("masked",)).save(Path("policy"))
    config = load_config(TrainConfig, None, ["policy=policy", "device=cpu", "tokens={}"])
    with pytest.raises(InputError, match="tokens: policy=policy writes no such segments, only text, masked"):
        open_policy(config)
    with pytest.raises(InputError, match="nothing says how they are trained: add the section"):
        open_policy(load_config(TrainConfig, None, ["policy=policy", "device=cpu"]))
    sampling, prompts = (
        load_config(TrainConfig, None, ["rollout.num_steps=17"]).sampling(0),
        Colors(None, "", 0).prompts("generate", 1),
    )
    with pytest.raises(InputError, match=r"sampling.num_steps=17 for 16 masked tokens: use 1..16"):
        DiscretePolicy(("masked",)).sample(prompts, sampling, [0])


def test_the_sections_survive_the_file_of_a_run() -> None:
    settings = [
        "tokens={lr_scale: 0.5}",
        "masked={}",
        "rollout.masked_likelihood.kind=monte_carlo",
        "rollout.guidance_scale=2",
        "flow.kind=best_of",
    ]
    config = load_config(TrainConfig, None, settings)
    Path("config.yaml").write_text(dump_config(config))
    assert load_config(TrainConfig, Path("config.yaml")) == config
