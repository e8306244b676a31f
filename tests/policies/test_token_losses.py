"""Supervised losses of policies of discrete tokens, and runs of ``lvrpo pretrain``, on small random models."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.data.scenes import web_corpus
from lvrpo.errors import InputError
from lvrpo.policies.janus.create import JanusSizes, create_janus
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.policies.magvit.layout import TokenLayout
from lvrpo.policies.showo.create import ShowoSizes, create_showo
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig, Pretrainer, SupervisedState, initial_policy
from lvrpo.training.setup import open_policy
from lvrpo.types import Example, Image, Prompt

pytest.importorskip("transformers")

TEXTS = ("a red circle above a blue square", "what color is it", "yes no")
ROWS = {
    "corpus": {"scenes": 30, "edits": 0, "reasons": 12},
    "batch": {"generate": 6, "caption": 2, "question": 8, "reason": 3},
    "held_out_every": 0,
    "device": "cpu",
}


def image(seed: int) -> Image:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


QUESTION = Example(Prompt("u", "understand", (image(1), "what color is it"), ("text",)), ("a red",))
DRAWING = Example(Prompt("g", "generate", ("a red circle above a square",), ("image",)), (image(2),))
DROPPED = Example(DRAWING.prompt, DRAWING.outputs, dropped="text")
PLANNED = Example(Prompt("r", "reason", ("draw a square",), ("text", "image")), ("a blue square", image(3)))


@pytest.fixture(scope="module")
def janus() -> JanusPolicy:
    return create_janus(JanusSizes(), TEXTS)


@pytest.fixture(scope="module")
def showo() -> ShowoPolicy:
    return create_showo(ShowoSizes(), TEXTS)


@torch.no_grad()
def test_losses_of_janus_are_those_of_its_model(janus: JanusPolicy) -> None:
    asked = torch.tensor([janus.processor.prompt(QUESTION.prompt.parts, draws=False)])
    answer = torch.tensor(janus.processor.answer("a red"))
    assert int(answer[-1]) == janus.processor.ids["eos_token"]
    ids = torch.cat([asked.where(asked >= 0, janus.processor.ids["image_token"]), answer[None]], dim=1)
    pixels = janus.processor.image_settings.pixels([image(1)])
    logits = janus.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    expected = functional.cross_entropy(logits[-len(answer) - 1 : -1], answer)
    losses = janus.supervised_losses([QUESTION], generator())
    assert losses.keys() == {"text"}
    assert float(losses["text"]) == pytest.approx(float(expected), rel=1e-5)

    begin, start, pad = (janus.processor.ids[name] for name in ("bos_token", "boi_token", "pad_token"))
    prompt = [*janus.processor.prompt(DRAWING.prompt.parts, draws=True), start]
    codes = janus.encode_image(image(2)).flatten()
    inner = janus.model.model
    for example, row in ((DRAWING, prompt), (DROPPED, [i if i in (begin, start) else pad for i in prompt])):
        drawn = janus.model.prepare_embeddings_for_image_generation(codes[:-1])
        x = torch.cat([janus.model.get_input_embeddings()(torch.tensor(row)), drawn])
        states = inner.language_model(inputs_embeds=x[None]).last_hidden_state[0, len(row) - 1 :]
        expected = functional.cross_entropy(inner.generation_head(states), codes)
        assert float(janus.supervised_losses([example], generator())["image"]) == pytest.approx(
            float(expected), rel=1e-5
        )


@torch.no_grad()
def test_losses_of_showo_are_those_of_its_masked_tokens(showo: ShowoPolicy) -> None:
    codes = showo.encode_image(image(2))
    for example, text in ((DRAWING, showo.layout.encode("a red circle above a square")), (DROPPED, [])):
        with mock.patch.object(TokenLayout, "drawing", autospec=True, side_effect=TokenLayout.drawing) as drawing:
            loss = float(showo.supervised_losses([example], generator())["image"])
        inputs = torch.tensor(drawing.call_args_list[0].args[2])
        masked = inputs < 0
        assert 0 < int(masked.sum()) <= len(codes)
        assert torch.equal(inputs[~masked], codes[~masked])
        logits = showo.image_logits([showo.layout.caption(text)], inputs[None], True, 1.0, "joint")[0]
        assert loss == pytest.approx(float(functional.cross_entropy(logits[masked], codes[masked])), rel=1e-5)


def test_the_shares_of_masked_tokens_follow_the_cosine(showo: ShowoPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    logits = showo.image_logits

    def spy(contexts: list[list[int]], tokens: torch.Tensor, *args: object) -> torch.Tensor:
        shares.extend((tokens < 0).float().mean(dim=1).tolist())
        return logits(contexts, tokens, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(showo, "image_logits", spy)
    with torch.no_grad():
        showo.supervised_losses([DRAWING] * 300, generator())
    assert sum(shares) / len(shares) == pytest.approx(2 / torch.pi, abs=0.06)  # the mean of cos(pi u / 2)
    assert min(shares) < 0.2
    assert max(shares) == 1


@pytest.mark.parametrize("family", ["janus", "showo"])
def test_a_mixed_batch_has_the_losses_of_its_parts(family: str, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue(family)
    assert isinstance(policy, JanusPolicy | ShowoPolicy)
    with torch.no_grad():
        both = policy.supervised_losses([QUESTION, PLANNED], generator())
        question = policy.supervised_losses([QUESTION], generator())
        planned = policy.supervised_losses([PLANNED], generator())
    tokens = [len(policy.answer_ids((), text)) for text in ("a red", "a blue square")]
    expected = (tokens[0] * question["text"] + tokens[1] * planned["text"]) / sum(tokens)
    assert float(both["text"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(both["image"]) == pytest.approx(float(planned["image"]), rel=1e-5)
    with pytest.raises(InputError, match="draws from text alone"):
        policy.supervised_losses([Example(DRAWING.prompt, DRAWING.outputs, dropped="image")], generator())


@pytest.fixture(params=["janus", "showo"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.getfixturevalue(request.param).save(tmp_path / "base")
    return tmp_path / "base"


def test_both_losses_fall_and_every_part_learns(base: Path) -> None:
    fast = {"muon_lr": 0.02, "adamw_lr": 3e-3, "warmup_steps": 2}
    config = PretrainConfig.model_validate({**ROWS, "init": str(base), "steps": 30, "optimizer": fast})
    state = SupervisedState(config, initial_policy(config), web_corpus(config.corpus))
    before = {name: p.detach().clone() for name, p in state.weights.named_parameters()}
    losses = [state.train_step() for _ in range(14)]
    assert {name for name in losses[0] if name.startswith("loss/")} == {"loss/text", "loss/image"}
    for name in ("loss/text", "loss/image"):
        assert sum(row[name] for row in losses[-3:]) < 0.9 * sum(row[name] for row in losses[:3])
    still = {name for name, p in state.weights.named_parameters() if torch.equal(p, before[name])}
    assert all("vqmodel" in name or "magvit" in name for name in still), still
    assert {name for name in before if "vqmodel" in name or "magvit" in name} <= still


def test_a_run_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    tree = {**ROWS, "init": str(base), "steps": 3, "checkpoint_every": 1, "condition_dropout": 0.4}
    config = PretrainConfig.model_validate(tree)
    whole = Pretrainer.start(config, tmp_path / "whole")
    assert whole.train()
    short = Pretrainer.start(config, tmp_path / "short")
    assert not short.train(interrupted=lambda: short.state.step >= 2)
    short.run.close()
    assert Pretrainer.resume(tmp_path / "short").train()
    found, expected = (dict(load_policy(tmp_path / name).state_dict()) for name in ("short", "whole"))  # type: ignore[attr-defined]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_policy_cannot_learn_is_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["batch.edit=0", "corpus={scenes: 30, edits: 0, reasons: 30}"]
    for settings, words in (
        (["batch.edit=2"], "batch.edit=2: init="),
        (["batch.edit=0"], "held_out.edit=150: init="),
        ([*small, "held_out_every=0", "corpus.size=40"], "corpus.size=40: this policy draws 32 x 32"),
        ([*small, "held_out_every=0", "representation.weight=0.5"], "keeps no states for it: set it to 0"),
    ):
        out = tmp_path / "run"
        assert main(["pretrain", "pretrain", f"init={base}", *settings, "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
        assert not out.exists()


def test_the_recipes_pretrain_and_fit_the_result(base: Path, tmp_path: Path) -> None:
    kind = "token" if isinstance(load_policy(base), JanusPolicy) else "masked"
    few = {
        "batch": {"edit": 0, "generate": 2, "question": 4, "caption": 1, "reason": 1},
        "held_out": {"edit": 0, "reason": 2},
    }
    tree = {**ROWS, **few, "init": str(base), "steps": 1, "checkpoint_every": 1, "held_out_every": 1}
    settings = [f"{key}={json.dumps(value)}" for key, value in tree.items()]
    assert main(["pretrain", f"pretrain_{kind}", *settings, "--out", str(tmp_path / "run")]) == 0
    overrides = [f"policy={tmp_path / 'run'}", "device=cpu"]
    config = load_config(TrainConfig, shipped_configs()[f"quickstart_{kind}"], overrides)
    policy, _ = open_policy(config)
    assert list(config.sections(policy.segment_kinds)) == list(policy.segment_kinds)
