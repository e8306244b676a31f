from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.types import Example, Prompt


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(image: Any) -> list[Example]:
    return [
        Example(Prompt("u", "understand", (image(1), "what color is it"), ("text",)), ("red",)),
        Example(Prompt("g", "generate", ("a blue circle",), ("image",)), (image(2),)),
        Example(Prompt("e", "edit", (image(3), "make it red"), ("image",)), (image(4),)),
        Example(Prompt("r", "reason", ("draw one",), ("text", "image")), ("one", image(5))),
        Example(Prompt("n", "generate", (), ("image",)), (image(6),)),
    ]


def test_text_loss_by_hand(policy: TinyPolicy, whole_row: Callable[..., Any], image: Any) -> None:
    source = image(1)
    rows = [
        Example(Prompt("0", "understand", (source, "what is it"), ("text",)), ("a red circle",)),
        Example(Prompt("1", "understand", (source, "is it red"), ("text",)), ("it",)),
    ]
    total = []
    for example in rows:
        question, answer = example.prompt.parts[1], str(example.outputs[0])
        ids = [*policy.tokenizer.encode(answer), policy.tokenizer.eos_id]
        logits = whole_row(policy, [("read", source), question, answer]).logits[-len(ids) - 1 : -1]
        logits = logits.masked_fill(policy.tokenizer.suppressed_tokens(), -torch.inf)
        total += [float(-torch.log_softmax(logits, dim=-1)[i, token]) for i, token in enumerate(ids)]
    losses = policy.supervised_losses(rows, generator())
    assert set(losses) == {"text"}
    assert float(losses["text"].detach()) == pytest.approx(sum(total) / 6, rel=1e-5)


@pytest.mark.parametrize("which", ["generate", "edit", "thought", "no condition"])
def test_image_loss_by_hand(which: str, policy: TinyPolicy, whole_row: Callable[..., Any], image: Any) -> None:
    """Times and noise are recovered from the generator: the loss is linear in neither."""
    batch = examples(image)
    example, context = {
        "generate": (batch[1], ["a blue circle"]),
        "edit": (batch[2], [("clean", image(3)), ("read", image(3)), "make it red"]),
        "thought": (batch[3], ["draw one", "one"]),
        "no condition": (batch[4], []),
    }[which]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    embed = policy.encoders.embed_latents

    def spy(latents: torch.Tensor, t: torch.Tensor, *grid: Any) -> torch.Tensor:
        seen.append((latents, t))
        return embed(latents, t, *grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.encoders, "embed_latents", spy)
        loss = policy.supervised_losses([example], generator())["image"]
    x_t, t = seen[-1][0][0], float(seen[-1][1])
    target = example.outputs[-1]
    assert isinstance(target, torch.Tensor)
    x_0 = policy.encoders.encode_latents([target])[0]
    noise = (x_t - (1 - t) * x_0) / t
    torch.testing.assert_close(noise, torch.randn(1, 4, 192, generator=generator())[0], rtol=1e-4, atol=1e-4)
    v = whole_row(policy, [*context, ("noise", (x_t, t))]).velocity
    weight = (t / max(t, policy.config.min_time)) ** 2
    expected = weight * float((v - (noise - x_0)).square().mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_a_mixed_batch_is_that_of_its_parts(policy: TinyPolicy, image: Any) -> None:
    batch = examples(image)
    texts = [float(policy.supervised_losses([batch[i]], generator())["text"].detach()) for i in (0, 3)]
    both = policy.supervised_losses(batch, generator())
    assert float(both["text"].detach()) == pytest.approx(sum(texts) / 2, rel=1e-5)
    again = policy.supervised_losses(batch, generator())
    assert float(both["image"].detach()) == float(again["image"].detach())
    other = policy.supervised_losses(batch, generator(1))
    assert float(both["image"].detach()) != float(other["image"].detach())


def test_gradient_reaches_every_parameter(new_policy: Callable[..., TinyPolicy], image: Any) -> None:
    policy = new_policy(0, mlp="swiglu", attention_bias=True)
    sum(policy.supervised_losses(examples(image), generator()).values()).backward()  # type: ignore[union-attr]
    without = {name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()
    table = policy.encoders.embed_tokens_table.weight.grad
    used = {
        policy.tokenizer.bos_id,
        policy.tokenizer.eos_id,
        policy.tokenizer.image_start_id,
        policy.tokenizer.image_end_id,
    }
    used |= {i for text in ("what color is it", "red", "a blue circle", "make it red", "draw one", "one")
             for i in policy.tokenizer.encode(text)}  # fmt: skip
    assert set(table.any(dim=1).nonzero()[:, 0].tolist()) == used


def test_each_side_learns_from_its_own_loss(new_policy: Callable[..., TinyPolicy], image: Any) -> None:
    policy = new_policy()
    batch = examples(image)
    groups = policy.parameter_groups()
    assert {id(p) for ps in groups.values() for p in ps} == {id(p) for p in policy.parameters()}
    assert sum(len(ps) for ps in groups.values()) == len(list(policy.parameters()))

    policy.supervised_losses(batch[:1], generator())["text"].backward()
    assert all(p.grad is None or not p.grad.any() for p in groups["generate"])
    assert all(p.grad is not None and p.grad.any() for p in groups["understand"])
    policy.zero_grad()
    policy.supervised_losses(batch[1:2], generator())["image"].backward()
    assert all(p.grad is not None and p.grad.any() for p in groups["generate"])


def test_a_fresh_policy_is_uniform_over_the_words_it_may_write(image: Any) -> None:
    fresh = TinyPolicy.from_vocabulary(TinyConfig(image_size=16, tower_width=24), ("is", "it", "red"))
    example = Example(Prompt("u", "understand", (image(1), "is it"), ("text",)), ("red",))
    loss = fresh.supervised_losses([example], generator())["text"]
    assert float(loss.detach()) == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-6)
