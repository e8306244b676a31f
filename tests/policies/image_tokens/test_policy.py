"""The replay law of the policies of image tokens, what they refuse, and how they judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from refusals import refused
from replays import difference, members

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.image_tokens import ANSWER, ImageTokenPolicy
from lvrpo.training.preflight import rollout_checks
from lvrpo.types import Group, ImageTokenSegment, Prompt, RewardTable, TextSegment, Trajectory

BASE = Sampling(group_size=3, max_new_tokens=6, guidance_scale=5.0)
WAYS = {
    "guided": BASE,
    "warm": replace(BASE, temperature=0.7, image_temperature=1.5, guidance_scale=1.0),
    "one branch": replace(BASE, guidance_scale=3.0, guided_logprobs="detach_uncond"),
}


EXPERTS = {"JanusPolicy": ["understand", "generate", "shared"], "Emu3Policy": ["shared"]}


def contract(policy: ImageTokenPolicy, groups: Sequence[Group]) -> dict[str, bool]:
    scores = torch.rand(len(groups), 3, 1, generator=torch.Generator().manual_seed(0))
    tasks = tuple(group.prompt.task for group in groups)
    table = RewardTable(("r",), torch.ones(1), scores, torch.ones_like(scores, dtype=torch.bool), {}, tasks)
    return {check.check: check.ok for check in rollout_checks(policy, groups, table, 0.01)}


@pytest.mark.parametrize("name", WAYS)
def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(
    policy: ImageTokenPolicy, prompts: list[Prompt], name: str
) -> None:
    assert isinstance(policy, Policy)
    groups = policy.sample(prompts, WAYS[name], range(len(prompts)))
    trajectories = members(groups)
    kinds = [[segment.kind for segment in t.segments] for t in trajectories[::3]]
    assert kinds == [["text"]] * 3 + [["tokens"]] * 2 + [["text", "tokens"], ["text"]]
    assert difference(policy, trajectories) == 0
    others = [difference(policy, trajectories[::-2]), *(difference(policy, [t]) for t in trajectories[::3])]
    print(f"{name}: at most {max(others):.2g} in other batches")
    assert max(others) <= 1e-5
    checks = contract(policy, groups)
    assert all(checks.values()), checks
    assert "replay, image tokens, own batch: max |difference|" in checks
    drawn = [t.segments[-1] for t in trajectories if t.image is not None]
    assert len({tuple(segment.tokens.tolist()) for segment in drawn if isinstance(segment, ImageTokenSegment)}) > 3


def test_what_goes_through_at_once_changes_nothing(own: ImageTokenPolicy, prompts: list[Prompt]) -> None:
    whole = members(own.sample(prompts, BASE, range(len(prompts))))
    own.limit_tokens(150)
    assert difference(own, whole) <= 1e-5
    parts = members(own.sample(prompts, BASE, range(len(prompts))))
    assert difference(own, parts) == 0
    for one, other in zip(whole, parts, strict=True):
        assert [s.tokens.tolist() for s in one.segments] == [s.tokens.tolist() for s in other.segments]
    text, drawn = (own.count_tokens(whole[i]) for i in (0, 9))
    segment = whole[0].segments[0]
    assert isinstance(segment, TextSegment)
    assert text.text == len(own.context(prompts[0].parts, ANSWER).ids) + len(segment.tokens) - 1
    free = own.without_prompt(own._row(prompts[3], (), (32, 32)), (32, 32))
    assert drawn.image - len(free.ids) == drawn.text - len(own._row(prompts[3], (), (32, 32)).ids)


def test_a_image_thought_about_follows_its_words(policy: ImageTokenPolicy, prompts: list[Prompt]) -> None:
    """The log-probs of image tokens change with the plan, which stands in the place of the answer."""
    (trajectory,) = members(policy.sample(prompts[5:6], replace(BASE, group_size=1, guidance_scale=1.0), [3]))
    text, drawn = trajectory.segments
    assert isinstance(text, TextSegment)
    other = replace(text, tokens=text.tokens.flip(0), ended=False)
    changed = policy.logprobs([replace(trajectory, segments=(other, drawn))])[0][1].logprobs.detach()
    assert float((changed - drawn.behavior_logprobs).abs().max()) > 1e-3
    ended = replace(text, tokens=torch.tensor([*text.tokens[:3].tolist(), policy.end_id]), ended=True)
    row, _ = policy._scored_row(replace(trajectory, segments=(ended, drawn)), ("text", "tokens"))
    assert policy.end_id not in row.ids


@pytest.mark.parametrize(("mode", "calls"), [("joint", [(4, True)]), ("detach_uncond", [(2, True), (2, False)])])
def test_which_branch_has_a_gradient(
    own: ImageTokenPolicy, prompts: list[Prompt], mode: str, calls: list[tuple[int, bool]]
) -> None:
    sampling = replace(BASE, group_size=2, guided_logprobs=mode)  # type: ignore[arg-type]  # one of its literals
    trajectories = members(own.sample(prompts[3:4], sampling, [0]))
    seen: list[tuple[int, bool]] = []
    own.transformer.register_forward_hook(
        lambda module, args, out: seen.append((len(out.last_hidden_state), out.last_hidden_state.requires_grad))
    )
    own.logprobs(trajectories)
    assert seen == calls


def test_checkpointed_layers_give_the_same_gradient(own: ImageTokenPolicy, prompts: list[Prompt]) -> None:
    trajectories = members(own.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))
    gradients = []
    for on in (False, True):
        own.checkpoint_gradients(on)
        sum(row.logprobs.sum() for rows in own.logprobs(trajectories) for row in rows).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None})
        own.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])
    again = members(own.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))  # with its cache
    assert all(
        torch.equal(one.segments[-1].behavior_logprobs, other.segments[-1].behavior_logprobs)
        for one, other in zip(trajectories, again, strict=True)
    )


def test_every_trained_parameter_has_one_expert(own: ImageTokenPolicy, prompts: list[Prompt]) -> None:
    groups = own.parameter_groups()
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
    assert sorted(map(id, trained.values())) == sorted(id(p) for group in groups.values() for p in group)
    assert not any("vqmodel" in name for name in trained)
    assert [name for name, group in groups.items() if group] == EXPERTS[type(own).__name__]
    trajectories = members(own.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))
    sum(row.logprobs.sum() for rows in own.logprobs(trajectories) for row in rows).backward()  # type: ignore[union-attr]
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not [name for name in without if not name.endswith("k_proj.bias")], without  # softmax drops such a bias


def test_bfloat16_computes_within_its_tolerance(own: ImageTokenPolicy, prompts: list[Prompt]) -> None:
    own.set_compute_dtype(torch.bfloat16)
    assert own.compute_dtype == torch.bfloat16
    assert all(contract(own, own.sample(prompts[::2], BASE, range(4))).values())


def test_both_sides_judge(policy: ImageTokenPolicy, prompts: list[Prompt]) -> None:
    parts = prompts[0].parts
    texts = ["yes", "no it is a red circle"]
    both = policy.text_logprob([parts, prompts[1].parts], texts)
    alone = [policy.text_logprob([p.parts], [text]) for p, text in zip(prompts[:2], texts, strict=True)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)
    ids = policy.answer_ids(parts, "yes")
    segment = TextSegment(torch.tensor(ids), torch.zeros(len(ids)), 1.0, "yes", True)
    with torch.no_grad():
        (rows,) = policy.logprobs([Trajectory(prompts[0], 0, (segment,), 0)])
    assert float(both[0]) == pytest.approx(float(rows[0].logprobs.mean()), abs=1e-5)

    (trajectory,) = members(policy.sample(prompts[3:4], replace(BASE, group_size=1, guidance_scale=1.0), [5]))
    (drawn,) = trajectory.segments
    assert isinstance(drawn, ImageTokenSegment)
    found = policy.image_logprob([("a red circle",), ("yes",)], [drawn.image] * 2, 2, [0, 0])
    assert found.shape == (2, 2)
    assert torch.equal(found[:, 0], found[:, 1])
    assert float((found[0] - found[1]).abs().max()) > 1e-3

    words, image = policy.hidden_states(["a red circle", parts[0]], 1)
    assert words.shape == (len(policy.input_row("a red circle")[1]), 64)
    assert image.shape == (16, 64)
    with pytest.raises(InputError, match="layer=3: the policy has 2 layers"):
        policy.hidden_states(["a"], 3)


PLAIN = Prompt("s", "generate", ("x",), ("image",))
REFUSED: list[tuple[Prompt, Sampling, str]] = [
    (Prompt("e", "edit", (torch.rand(3, 32, 32), "red"), ("image",)), BASE, "draws from text alone, not from an image"),
    (Prompt("u", "understand", ("what",), ("text",)), BASE, "task 'understand' needs an image"),
    (Prompt("o", "reason", ("x",), ("image", "text")), BASE, "answers, draws, or thinks and draws, not image,"),
    (Prompt("m", "generate", ("a <MARKER>",), ("image",)), BASE, "holds <MARKER>, a marker of the model"),
    (Prompt("q", "reason", ("a <MARKER>",), ("text",)), BASE, "holds <MARKER>, a marker of the model"),
    (Prompt("l", "generate", ("x" * 600,), ("image",)), BASE, "after them, the limit is 512: shorten it"),
    (replace(PLAIN, id="s"), replace(BASE, image_size=(36, 36)), "image_size=(36, 36): this model draws "),
]
MARKERS = {"JanusPolicy": "<end_of_image>", "Emu3Policy": "<|visual token 000003|>"}


@pytest.mark.parametrize(("prompt", "sampling", "words"), REFUSED, ids=[prompt.id for prompt, _, _ in REFUSED])
def test_what_it_cannot_do_is_one_line(
    policy: ImageTokenPolicy, prompt: Prompt, sampling: Sampling, words: str
) -> None:
    marker = MARKERS[type(policy).__name__]
    parts = tuple(part.replace("<MARKER>", marker) if isinstance(part, str) else part for part in prompt.parts)
    with refused(words.replace("<MARKER>", marker)):
        policy.sample([replace(prompt, parts=parts)], sampling, [0])
    if sampling.image_size is not None:
        with pytest.raises(InputError, match="image_size"):
            policy.check_sampling(sampling)
