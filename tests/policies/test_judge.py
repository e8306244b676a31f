from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from refusals import refused
from small_vlm import without_videos

from lvrpo.errors import InputError
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot.attention import forget_packings
from lvrpo.policies.mot.likelihood import JUDGE_TIMES
from lvrpo.policies.mot.model_runner import ModelRunner
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.sampling import derive_seed, normal_noise
from lvrpo.types import Example, Parts, Prompt


def test_text_logprob_is_the_mean_of_token_log_softmaxes(
    policy: TinyPolicy, whole_row: Callable[..., Any], image: Any
) -> None:
    source, answer = image(1), "a red circle"
    row = whole_row(policy, [("read", source), "what is it", answer])
    ids = [*policy.tokenizer.encode(answer), policy.tokenizer.eos_id]
    logits = row.logits[-len(ids) - 1 : -1].masked_fill(policy.tokenizer.suppressed_tokens(), -torch.inf)
    logprobs = torch.log_softmax(logits, dim=-1)
    expected = sum(logprobs[i, token] for i, token in enumerate(ids)) / len(ids)
    (scored,) = policy.text_logprob([(source, "what is it")], [answer])
    assert float(scored) == pytest.approx(float(expected), abs=1e-5)
    assert not scored.requires_grad


def test_sharing_a_image_among_questions_changes_nothing(policy: TinyPolicy, image: Any) -> None:
    source = image(1)
    questions = ["what color is it", "is it a circle", "what color is it", "is it a circle"]
    answers = ["red", "a", "blue", "a"]
    shared = policy.text_logprob([(source, q) for q in questions], answers)
    apart = policy.text_logprob([(source.clone(), q) for q in questions], answers)
    alone = [policy.text_logprob([(source, q)], [a])[0] for q, a in zip(questions, answers, strict=True)]
    torch.testing.assert_close(shared, apart, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared, torch.stack(alone), rtol=1e-6, atol=1e-6)
    assert shared[1] == shared[3]
    assert shared[0] != shared[2]


def test_comparisons_share_the_image_that_they_begin_with(
    policy: TinyPolicy, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six ordered pairs of three images: three first ones are read, then six second ones."""
    images = [image(i) for i in range(3)]
    contexts = [(a, b, "is it a circle") for a in images for b in images if a is not b]
    alone = torch.stack([policy.text_logprob([context], ["red"])[0] for context in contexts])
    read: list[int] = []
    run = ModelRunner.run

    def noted(self: ModelRunner, rows: Any, *rest: Any, **options: Any) -> Any:
        read.append(sum(piece.span.kind == "read" for row in rows for piece in row))
        return run(self, rows, *rest, **options)

    monkeypatch.setattr(ModelRunner, "run", noted)
    shared = policy.text_logprob(contexts, ["red"] * 6)
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=1e-6)
    assert [n for n in read if n] == [3, 6]


def test_edits_that_are_compared_share_their_source_and_the_first_result(
    policy: TinyPolicy, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sources with two ordered pairs each, and an image's pair: nothing is read twice, nothing is padded."""
    sources, results = [image(i) for i in range(2)], [image(i) for i in range(2, 5)]
    contexts: list[Parts] = [(s, results[0], other, "is it a circle") for s in sources for other in results[1:]]
    contexts.append((results[0], results[1], "is it a circle"))
    alone = torch.stack([policy.text_logprob([context], ["red"])[0] for context in contexts])
    read: list[list[int]] = []
    run = ModelRunner.run

    def noted(self: ModelRunner, rows: Any, *rest: Any, **options: Any) -> Any:
        read.append([sum(piece.span.kind == "read" for piece in row) for row in rows])
        return run(self, rows, *rest, **options)

    monkeypatch.setattr(ModelRunner, "run", noted)
    shared = policy.text_logprob(contexts, ["red"] * 5)
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=1e-6)
    assert read == [[2, 2], [1, 1, 1, 1], [2]]


@pytest.mark.parametrize("cells", [1 << 24, 0], ids=["under one mask", "span by span"])
def test_texts_after_one_context_do_not_see_each_other(
    cells: int, policy: TinyPolicy, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few are options of one row, many continue a context that is kept; both as if each were alone."""
    monkeypatch.setattr("lvrpo.policies.mot.attention.MASK_CELLS", cells)
    forget_packings()
    few, many = (image(1), "is it a red circle"), (image(1), "it")
    texts = [(few, "red"), (many, "a red circle"), (few, "a"), (many, "it is a"), (few, "red"), (("it",), "a circle")]
    alone = torch.stack([policy.text_logprob([context], [text])[0] for context, text in texts])
    together = policy.text_logprob([context for context, _ in texts], [text for _, text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    forget_packings()


def test_the_outputs_asked_for_are_those_of_all(policy: TinyPolicy, image: Any) -> None:
    runner = policy.runner
    rows = [runner.row((image(1), "is it"), draws=False), runner.row(("a red circle",), draws=False)]
    whole = runner.run(rows, policy.transformer.empty_cache(2))
    some = runner.run(rows, policy.transformer.empty_cache(2), outputs=torch.tensor([2, 5, 7]))
    torch.testing.assert_close(some.understanding, whole.understanding[[2, 5, 7]], rtol=1e-6, atol=1e-6)
    assert torch.equal(some.cache.layer(1)[0], whole.cache.layer(1)[0])


def test_unknown_words_of_an_answer_are_named(policy: TinyPolicy, image: Any) -> None:
    with pytest.raises(InputError, match=r"'circlle'.*did you mean 'circle'\?"):
        policy.text_logprob([(image(1), "is it")], ["a circlle"])


def by_hand(
    policy: TinyPolicy, whole_row: Any, context: Sequence[Any], image: torch.Tensor, draws: int, seed: int
) -> list[float]:
    x_0 = policy.encoders.encode_latents([image])[0]
    low, high = JUDGE_TIMES
    out = []
    for k in range(draws):
        noise = normal_noise([derive_seed(seed, "judge", k)], x_0.shape)[0]
        t = low + (high - low) * (k + 0.5) / draws
        x_t = (1 - t) * x_0 + t * noise
        v = whole_row(policy, [*context, ("noise", (x_t, t))]).velocity
        out.append(-(high - low) * (1 - t) / t * float((v - (noise - x_0)).square().sum()))
    return out


@pytest.mark.parametrize("draws", [1, 3])
def test_image_logprob_is_the_weighted_flow_loss_under_the_noise_of_the_row(
    draws: int, policy: TinyPolicy, whole_row: Callable[..., Any], image: Any
) -> None:
    source, target = image(1), image(2)
    contexts: list[Parts] = [("a red circle",), (source, "make it red"), ("a red circle",), ()]
    rows = [["a red circle"], [("clean", source), ("read", source), "make it red"], ["a red circle"], []]
    images, seeds = [target, image(3), target, target], [9, 9, 9, 4]
    scored = policy.image_logprob(contexts, images, draws, seeds)
    assert scored.shape == (4, draws)
    for i, row in enumerate(rows):
        assert scored[i].tolist() == pytest.approx(
            by_hand(policy, whole_row, row, images[i], draws, seeds[i]), rel=1e-5
        )
    assert torch.equal(scored[0], scored[2])
    assert not scored.requires_grad
    other_seeds = policy.image_logprob(contexts, images, draws, [10] * 4)
    assert (scored - other_seeds).abs().min() > 0


def test_a_row_is_judged_alike_in_any_company(policy: TinyPolicy, image: Any, monkeypatch: Any) -> None:
    images = [image(i) for i in range(5)]
    contexts, seeds = [("a red circle",), ("a",), ("a red circle",), (), ()], [1, 2, 1, 3, 3]
    together = policy.image_logprob(contexts, images, 2, seeds)
    monkeypatch.setattr("lvrpo.policies.mot.model_runner.MAX_ROWS", 2)
    torch.testing.assert_close(policy.image_logprob(contexts, images, 2, seeds), together, rtol=1e-5, atol=1e-4)


def test_a_image_of_another_size_is_refused(policy: TinyPolicy) -> None:
    with pytest.raises(InputError, match=r"\(3, 8, 8\).*reads \(3, 16, 16\)"):
        policy.image_logprob([("a",)], [torch.zeros(3, 8, 8)], 1, [0])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd3"])
def test_a_text_longer_than_the_model_is_neither_judged_nor_imitated(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    with without_videos():
        model = load_policy(family_folder(name))
    text = "a " * (model.positions + 1)
    prompt = Prompt("p", "understand", (torch.zeros(3, 32, 32), "what color is it"), ("text",))
    with refused("the limit is"):
        model.text_logprob([prompt.parts], [text])
    with refused("the limit is"):
        model.text_logprob([(*prompt.parts, text)], ["red"])
    if hasattr(model, "supervised_losses"):
        with refused("the limit is"):
            model.supervised_losses([Example(prompt, (text,))], torch.Generator().manual_seed(0))
