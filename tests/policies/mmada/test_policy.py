"""Rollout, replay, likelihoods, judging and files of a small random MMaDA; images are also Show-o's tests."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import change_json, change_weights, delete, pickle_instead, require_refused
from refusals import refused
from replays import difference, members
from safetensors.torch import load_file, save_file

from lvrpo.policies.base import MaskedScoring, Sampling, missing_members
from lvrpo.policies.loading import load_policy
from lvrpo.policies.magvit.checkpoint import AUTOENCODER
from lvrpo.policies.masked_text import MaskedPass
from lvrpo.policies.mmada.create import MmadaSizes, create_mmada
from lvrpo.policies.mmada.policy import MmadaPolicy
from lvrpo.sampling import monte_carlo_logprob
from lvrpo.training.losses.dpo import whole_logprobs
from lvrpo.training.preflight import _group_checks
from lvrpo.types import Example, MaskedSegment, MaskedTextSegment, Prompt, Trajectory

BASE = Sampling(
    group_size=2,
    max_new_tokens=7,
    num_steps=4,
    guidance_scale=3.0,
    choice_temperature=1.0,
    block_length=4,
    tokens_per_step=2,
)
ASK = Prompt("r", "reason", ("what color is it",), ("text",))


def answer(trajectory: Trajectory) -> MaskedTextSegment:
    segment = trajectory.segments[0]
    assert isinstance(segment, MaskedTextSegment)
    return segment


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"masked": MaskedScoring(steps_per_pass=3), "guided_logprobs": "detach_uncond"},
        {"masked": MaskedScoring("monte_carlo", 2, "uniform"), "guidance_scale": 1.0},
        {"masked": MaskedScoring("coupled", 1, "uniform"), "temperature": 0.7, "guided_logprobs": "none"},
    ],
)
def test_a_replay_gives_what_was_recorded(
    mmada: MmadaPolicy, prompts: list[Prompt], changed: dict[str, object]
) -> None:
    sampling = replace(BASE, **changed)  # type: ignore[arg-type]  # its fields
    whole = members(mmada.sample(prompts, sampling, range(len(prompts))))
    assert difference(mmada, whole) == 0
    assert difference(mmada, whole[::-1]) < 1e-6
    assert max(difference(mmada, [trajectory]) for trajectory in whole[::2]) < 1e-6
    alone = members(mmada.sample(prompts[1:2], sampling, [1]))
    assert [answer(t).tokens.tolist() for t in alone] == [answer(t).tokens.tolist() for t in whole[2:4]]
    for trajectory in whole:
        for segment in trajectory.segments:
            assert isinstance(segment, MaskedSegment | MaskedTextSegment)
            assert bool((segment.behavior_logprobs[segment.scored] < 0).all())
            assert not bool(segment.behavior_logprobs[~segment.scored].any())


def make_answer(tokens: Sequence[int], steps: Sequence[int], length: int | None = None) -> Trajectory:
    """A text along a path; ``length``: of its tokens, where more places were decoded."""
    decoded = torch.tensor(tokens)
    own = decoded[:length]
    none, every = torch.zeros(len(own)), torch.ones(len(own), dtype=torch.bool)
    fields = {"decoded": decoded, "reveal_steps": torch.tensor(steps), "scored": every}
    segment = MaskedTextSegment(own, none, 1.0, "", False, **fields, likelihood="path")
    return Trajectory(ASK, 0, (segment,), 0)


@pytest.mark.parametrize("steps", [(0, 1, 2), (2, 0, 1), (1, 0, 1)])
@torch.no_grad()
def test_all_texts_of_one_order_have_probability_1(
    mmada: MmadaPolicy, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    """Three tokens at three places: 27 texts. Tokens of one step are independent of one another."""
    allowed = torch.zeros_like(mmada.text_tokens)
    allowed[100:103] = True
    monkeypatch.setattr(mmada, "text_tokens", allowed)
    total = [make_answer(tokens, steps) for tokens in itertools.product((100, 101, 102), repeat=3)]
    each = torch.stack([rows[0].logprobs.sum() for rows in mmada.logprobs(total)])
    assert float(each.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(each.max() - each.min()) > 1e-2


@torch.no_grad()
def test_each_token_is_scored_given_the_places_of_earlier_steps(mmada: MmadaPolicy) -> None:
    """By hand: rows of the prompt and the answer with masks, the places after the end among them."""
    ids, steps = [100, 101, mmada.end_id, 103, 104], [2, 0, 1, 0, 3]
    (rows,) = mmada.logprobs([make_answer(ids, steps, 3)])
    context, mask = mmada.context_ids(mmada_parts()), mmada.layout.mask
    for place, step in enumerate(steps[:3]):
        row = [*context, *(token if s < step else mask for token, s in zip(ids, steps, strict=True))]
        logits = mmada.model.lm_head(mmada._states([row])[0][len(context) + place])
        expected = torch.log_softmax(logits.masked_fill(~mmada.text_tokens, -torch.inf), dim=-1)[ids[place]]
        assert float(rows[0].logprobs[place]) == pytest.approx(float(expected), abs=1e-5)


def mmada_parts() -> tuple[str, ...]:
    from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER

    return THINK_THEN_ANSWER, "what color is it"


@torch.no_grad()
def test_random_masks_estimate_the_exact_log_prob(mmada: MmadaPolicy) -> None:
    """With uniform masks the mean is that over all orders, one token at a time (LLaDA, arXiv:2502.09992)."""
    ids, draws = (100, 101, 102), 400
    orders = [make_answer(ids, steps) for steps in itertools.permutations(range(3))]
    exact = float(torch.stack([rows[0].logprobs.sum() for rows in mmada.logprobs(orders)]).mean())
    scored = MaskedScoring("monte_carlo", draws, "uniform").masks([0], 3)[0]
    segment = replace(
        answer(orders[0]), scored=scored, likelihood="monte_carlo", behavior_logprobs=torch.zeros(draws, 3)
    )
    (rows,) = mmada.logprobs([replace(orders[0], segments=(segment,))])
    whole = [float(monte_carlo_logprob(rows[0].logprobs[None, :n], scored[None, :n], "elbo")) for n in (20, draws)]
    assert whole[1] == pytest.approx(exact, abs=0.03)
    assert abs(whole[1] - exact) <= abs(whole[0] - exact) + 0.01
    pairs = MaskedScoring("coupled", 5, "uniform").masks([0], 3)[0].view(5, 2, 3)
    assert all(bool((a ^ b).all()) or (bool(a.all()) and bool(b.all())) for a, b in pairs)


@torch.no_grad()
def test_preferences_compare_whole_texts(mmada: MmadaPolicy, prompts: list[Prompt]) -> None:
    """For random masks the mean over draws per token, times the tokens; for a path the sum."""
    for scoring in (MaskedScoring(), MaskedScoring("coupled", 2, "uniform")):
        texts = members(mmada.sample(prompts[:2], replace(BASE, masked=scoring), [0, 1]))
        found = whole_logprobs(mmada, texts, "text")
        for value, segment in zip(found.tolist(), map(answer, texts), strict=True):
            each, scored = segment.behavior_logprobs, segment.scored
            if scored.ndim == 1:
                expected = float(each.sum())
            else:
                expected = float(((each * scored).sum(dim=1) / scored.sum(dim=1)).mean()) * len(segment.tokens)
            assert value == pytest.approx(expected, abs=1e-4)


def test_answers_are_decoded_block_by_block(mmada: MmadaPolicy, prompts: list[Prompt]) -> None:
    (group,) = mmada.sample(prompts[:1], replace(BASE, group_size=6, max_new_tokens=7), [0])
    for trajectory in group.trajectories:
        segment = answer(trajectory)
        reached = [s for s in segment.reveal_steps.tolist() if s < 7]
        assert sorted(reached[:4]) == [0, 0, 1, 1]
        assert sorted(reached[4:]) == [2, 2, 3][: len(reached) - 4]  # ceil(3 / 2) steps, the first fixes one more
        assert bool(mmada.text_tokens[segment.tokens].all())
        assert segment.ended == (int(segment.tokens[-1]) in mmada.end_ids)
    assert len({tuple(answer(t).tokens.tolist()) for t in group.trajectories}) > 1
    (merged,) = mmada.sample(
        prompts[:1], replace(BASE, group_size=6, max_new_tokens=7, masked=MaskedScoring(steps_per_pass=3)), [0]
    )
    (random,) = mmada.sample(
        prompts[:1], replace(BASE, group_size=6, masked=MaskedScoring("monte_carlo", 2, "uniform")), [0]
    )
    mixed = replace(group, trajectories=(*group.trajectories[:3], *random.trajectories[3:]))
    assert [_group_checks([one])[0].ok for one in (group, random, mixed)] == [True, True, False]
    for one, other in zip(group.trajectories, merged.trajectories, strict=True):
        assert torch.equal(answer(one).decoded, answer(other).decoded)
        reached = answer(one).reveal_steps < 7
        assert torch.equal(answer(one).reveal_steps[reached] // 3, answer(other).reveal_steps[reached])


def test_a_text_ends_at_its_end_token(
    mmada: MmadaPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks after the end are not decoded, and the places after it are seen by earlier steps and never scored."""
    allowed = torch.zeros_like(mmada.text_tokens)
    allowed[[100, 101, mmada.end_id]] = True
    monkeypatch.setattr(mmada, "text_tokens", allowed)
    whole = members(mmada.sample(prompts[:2], replace(BASE, group_size=6, max_new_tokens=12), [0, 1]))
    assert difference(mmada, whole) == 0
    texts = [answer(t) for t in whole]
    ended = [s for s in texts if s.ended and len(s.tokens) <= 4]
    assert ended
    for segment in ended:
        assert mmada.end_id not in segment.tokens[:-1]
        assert segment.reveal_steps[4:].tolist() == [12] * 8
        assert segment.behavior_logprobs.shape == segment.tokens.shape
        assert "<|" not in segment.text
    for segment in map(
        answer, members(mmada.sample(prompts[:1], replace(BASE, max_new_tokens=12, block_length=1), [0]))
    ):
        assert segment.reveal_steps.tolist() == [*range(len(segment.tokens)), *[12] * (12 - len(segment.tokens))]


@torch.no_grad()
def test_a_plan_stands_in_the_row_of_its_drawing(mmada: MmadaPolicy, prompts: list[Prompt]) -> None:
    (trajectory,) = members(mmada.sample(prompts[4:5], replace(BASE, group_size=1), [3]))
    text, drawing = trajectory.segments
    assert isinstance(text, MaskedTextSegment)
    assert isinstance(drawing, MaskedSegment)
    assert drawing.image.shape == (3, 32, 32)
    other = replace(text, tokens=text.tokens.flip(0), ended=False)
    changed = mmada.logprobs([replace(trajectory, segments=(other, drawing))])[0][1].logprobs
    assert float((changed - drawing.behavior_logprobs).abs().max()) > 1e-3
    not_asked, asked = mmada.logprobs([trajectory], ["masked"])[0]
    assert bool(not_asked.logprobs.isnan().all())
    assert torch.equal(asked.logprobs, drawing.behavior_logprobs)
    alone = replace(trajectory, segments=(drawing,))
    plan = len(text.tokens) - text.ended
    assert mmada.count_tokens(trajectory).image == mmada.count_tokens(alone).image + plan


def test_gradients_are_the_same_when_layers_are_computed_again(folder: Path, prompts: list[Prompt]) -> None:
    policy = MmadaPolicy.load(folder)
    trajectories = members(policy.sample(prompts[1:5:2], replace(BASE, group_size=1), [0, 1]))
    gradients = []
    for on in (False, True):
        policy.checkpoint_gradients(on)
        torch.stack([row.logprobs.sum() for rows in policy.logprobs(trajectories) for row in rows]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert gradients[0].keys() == gradients[1].keys() == trained
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in trained)


def test_both_sides_judge_and_imitate(mmada: MmadaPolicy, prompts: list[Prompt]) -> None:
    texts = ["yes", "no it is a red circle"]
    both = mmada.text_logprob([prompts[0].parts, prompts[1].parts], texts)
    alone = [mmada.text_logprob([p.parts], [text]) for p, text in zip(prompts[:2], texts, strict=True)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)
    left_to_right = make_answer(mmada.answer_ids((), "yes"), range(len(mmada.answer_ids((), "yes"))))
    with torch.no_grad():
        expected = mmada.logprobs([replace(left_to_right, prompt=prompts[0])])[0][0].logprobs.mean()
    assert float(both[0]) == pytest.approx(float(expected), abs=1e-6)
    image = prompts[0].parts[0]
    assert isinstance(image, torch.Tensor)
    assert mmada.image_logprob([("a red circle",)], [image], 2, [0]).shape == (1, 2)
    words, seen = mmada.hidden_states(["a red circle", image], 1)
    assert words.shape == (len(mmada.layout.encode("a red circle")), 64)
    assert seen.shape == (16, 64)
    losses = mmada.supervised_losses([Example(prompts[0], ("yes",))], torch.Generator().manual_seed(0))
    assert losses.keys() == {"text"}
    assert losses["text"].requires_grad
    assert missing_members(mmada) == []
    assert mmada.count_tokens(Trajectory(prompts[0], 0, (make_answer((100, 101), (0, 1)).segments), 0)).text > 50


REFUSED: list[tuple[Prompt, Sampling, str]] = [
    (Prompt("e", "edit", (torch.rand(3, 32, 32), "red"), ("image",)), BASE, "an MMaDA draws from text alone"),
    (Prompt("m", "generate", ("a <|eot_id|>",), ("image",)), BASE, "holds <|eot_id|>, a marker of the model"),
    (Prompt("k", "reason", ("a <|mdm_mask|>",), ("text",)), BASE, "holds <|mdm_mask|>, a marker of the model"),
    (Prompt("q", "reason", ("x" * 600,), ("text",)), BASE, "the limit is 512: shorten it"),
    (Prompt("l", "generate", ("x" * 600,), ("image",)), BASE, "600 tokens, the limit is 491: shorten it"),
]


@pytest.mark.parametrize(("prompt", "sampling", "words"), REFUSED, ids=[prompt.id for prompt, _, _ in REFUSED])
def test_what_it_cannot_do_is_one_line(mmada: MmadaPolicy, prompt: Prompt, sampling: Sampling, words: str) -> None:
    with refused(words):
        mmada.sample([prompt], sampling, [0])


# --- files ---


def test_saved_folders_load_the_same(folder: Path, mmada: MmadaPolicy) -> None:
    mmada.save(Path("again"))
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert all((folder / name).read_bytes() == Path("again", name).read_bytes() for name in files)
    again = load_policy("again", dtype="float32")
    assert isinstance(again, MmadaPolicy)
    state = mmada.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    low = MmadaPolicy.load(folder, dtype=torch.bfloat16)
    row = low.context_ids(("red",))
    next(low.answer_logits([row, row], [MaskedPass(torch.full((4,), -1), torch.arange(4))] * 2))
    assert not torch.is_autocast_enabled("cpu")
    assert low.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert low.magvit.encoder.conv_in.weight.dtype == torch.float32


def test_a_tied_head_is_in_no_file() -> None:
    policy = create_mmada(MmadaSizes(depth=1))
    policy.save(Path("untied"))
    state = load_file("untied/model.safetensors")
    state.pop("model.transformer.ff_out.weight")
    shutil.copytree("untied", "tied")
    save_file(state, "tied/model.safetensors", {"format": "pt"})
    change_json("config.json", weight_tying=True)(Path("tied"))
    found = MmadaPolicy.load(Path("tied"))
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    found.save(Path("again"))
    assert load_file("again/model.safetensors").keys() == state.keys()


WTE = "model.transformer.wte.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (delete("model.safetensors"), "the weights of an MMaDA"),
    "pickle": (pickle_instead("model.safetensors"), "pytorch_model.bin, a pickle"),
    "lacks a tensor": (change_weights(lambda s: s.pop(WTE)), f"lack {WTE} (1 are missing"),
    "another model": (change_weights(lambda s: s.clear() or s.update(x=torch.zeros(2))), "weights of another model"),
    "another shape": (change_weights(lambda s: s.update({WTE: torch.zeros(8, 64)})), "has shape [8, 64], "),
    "mask": (change_json("config.json", mask_token_id=10_000), "mask_token_id=10000: the vocabulary has"),
    "mask among images": (change_json("config.json", mask_token_id=400), "tokens, mask_token_id 400 is not among them"),
    "markers": (change_json("config.json", first_marker_id=126084), "markers end at 126094 is not among them"),
    "codes": (change_json("config.json", codebook_size=128), "has 64 codes, codebook_size=128"),
    "vocabulary": (change_json("config.json", embedding_size=330), "text tokens and 64 image tokens are"),
    "not square": (change_json("config.json", num_vq_tokens=15), "num_vq_tokens=15: must be a square number"),
    "other blocks": (change_json("config.json", block_type="sequential"), "config.json: block_type="),
    "heads": (change_json("config.json", n_heads=5), "n_heads=5: d_model=64 is not divided evenly"),
    "no tokenizer": (delete("tokenizer.json"), "holds no tokenizer.json: copy it from"),
    "no autoencoder": (delete(AUTOENCODER), "holds no folder magvitv2, and its autoencoder show"),
    "no type": (change_json("config.json", model_type="llada"), "a model of type 'llada'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_one_line(folder: Path, name: str) -> None:
    require_refused(folder, *DAMAGES[name], load_policy)
