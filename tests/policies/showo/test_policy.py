"""Rollout, replay, likelihoods, judging and files of a small random Show-o."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import change_json, change_weights, cut_off, delete, pickle_instead, require_refused
from refusals import refused
from replays import difference, members
from safetensors.torch import load_file

from lvrpo.errors import InputError
from lvrpo.policies.base import MaskedScoring, Sampling, missing_members
from lvrpo.policies.loading import load_policy
from lvrpo.policies.magvit.checkpoint import AUTOENCODER
from lvrpo.policies.showo.checkpoint import LANGUAGE
from lvrpo.policies.showo.create import ShowoSizes, create_showo
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.types import Example, MaskedSegment, Prompt, TextSegment, Trajectory

BASE = Sampling(group_size=2, max_new_tokens=6, num_steps=4, guidance_scale=3.0, choice_temperature=1.0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"guidance_scale": 1.0},
        {"guided_logprobs": "detach_uncond"},
        {"guided_logprobs": "none", "masked": MaskedScoring("monte_carlo", 2)},
        {"masked": MaskedScoring("monte_carlo", 3, "uniform")},
        {"temperature": 0.0, "image_temperature": 0.7},
    ],
)
def test_a_replay_gives_what_was_recorded(
    showo: ShowoPolicy, prompts: list[Prompt], changed: dict[str, object]
) -> None:
    sampling = replace(BASE, **changed)  # type: ignore[arg-type]  # its fields
    whole = members(showo.sample(prompts, sampling, range(len(prompts))))
    assert difference(showo, whole) == 0
    assert difference(showo, whole[::-1]) < 1e-6
    for trajectory in whole:
        assert difference(showo, [trajectory]) < 1e-6
    eight = members(showo.sample(prompts[4:5], replace(sampling, group_size=8), [7]))
    assert difference(showo, eight) == 0
    assert len({tuple(t.segments[0].tokens.tolist()) for t in eight}) > 1  # type: ignore[union-attr]
    (alone,) = members(showo.sample(prompts[4:5], replace(sampling, group_size=1), [7]))
    assert alone.segments[0].tokens.tolist() == eight[0].segments[0].tokens.tolist()  # type: ignore[union-attr]


def test_parts_of_a_batch_give_the_same(folder: Path, prompts: list[Prompt]) -> None:
    """Limits on tokens change neither samples nor, beyond rounding, log-probs."""
    policy = ShowoPolicy.load(folder)
    whole = members(policy.sample(prompts, BASE, range(len(prompts))))
    policy.limit_tokens(100)
    parts = members(policy.sample(prompts, BASE, range(len(prompts))))
    assert difference(policy, parts) == 0
    assert difference(policy, whole) < 1e-6
    for one, other in zip(whole, parts, strict=True):
        assert [s.tokens.tolist() for s in one.segments] == [s.tokens.tolist() for s in other.segments]  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@torch.no_grad()
def test_all_drawings_of_one_order_have_probability_1(scale: float) -> None:
    """Two codes at four places, in two steps: 16 images. A step fixes tokens independently of one another."""
    policy = create_showo(ShowoSizes(image_size=16, bits=1))
    steps, one = torch.tensor([1, 0, 1, 0]), torch.ones(1, 4, dtype=torch.bool)
    prompt, total = Prompt("g", "generate", ("a red circle",), ("image",)), []
    for codes in itertools.product((0, 1), repeat=4):
        image = torch.zeros(3, 16, 16)
        segment = MaskedSegment(torch.tensor(codes), steps, one, torch.zeros(1, 4), "path", 1.0, scale, image)
        total.append(Trajectory(prompt, 0, (segment,), 0))
    each = torch.stack([rows[0].logprobs.sum() for rows in policy.logprobs(total)])
    assert float(each.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(each.max() - each.min()) > 1e-3


@torch.no_grad()
def test_a_drawing_follows_its_steps(showo: ShowoPolicy, prompts: list[Prompt]) -> None:
    (trajectory,) = members(showo.sample(prompts[3:4], replace(BASE, group_size=1), [0]))
    (segment,) = trajectory.segments
    assert isinstance(segment, MaskedSegment)
    assert segment.reveal_steps.bincount().tolist() == [2, 3, 5, 6]  # 16 cos(pi s / 8), from 16
    assert segment.image.shape == (3, 32, 32)
    assert 0 <= float(segment.image.min()) < float(segment.image.max()) <= 1
    contexts = [showo.segment_context(trajectory.prompt, (), "masked"), showo.layout.caption([])]
    given, other = showo.image_logits(contexts, segment.tokens.repeat(2, 1), True, 1.0, "none")
    assert float((given - other).abs().max()) > 1e-3  # the prompt is seen


@torch.no_grad()
def test_a_plan_stands_in_the_row_of_its_drawing(showo: ShowoPolicy, prompts: list[Prompt]) -> None:
    (trajectory,) = members(showo.sample(prompts[5:6], replace(BASE, group_size=1), [3]))
    text, drawing = trajectory.segments
    assert isinstance(text, TextSegment)
    assert isinstance(drawing, MaskedSegment)
    other = replace(text, tokens=text.tokens.flip(0), ended=False)
    changed = showo.logprobs([replace(trajectory, segments=(other, drawing))])[0][1].logprobs
    assert float((changed - drawing.behavior_logprobs).abs().max()) > 1e-3
    ended = replace(text, tokens=torch.tensor([5, 6, showo.end_id]), ended=True)
    row = showo.segment_context(trajectory.prompt, (ended,), "masked")
    assert row[-3:] == [5, 6, showo.end_id]
    assert row.count(showo.end_id) == 2


def test_answers_are_texts_and_images_are_seen(showo: ShowoPolicy, prompts: list[Prompt]) -> None:
    groups = showo.sample(prompts[:2], replace(BASE, group_size=8, max_new_tokens=12), [0, 1])
    for trajectory in members(groups):
        (segment,) = trajectory.segments
        assert isinstance(segment, TextSegment)
        assert bool(showo.text_tokens[segment.tokens].all())
        assert segment.ended == (segment.tokens[-1] == showo.end_id)
        assert showo.end_id not in segment.tokens[:-1]
    other = (torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(9)), "what color is it")
    scores = showo.text_logprob([prompts[0].parts, other], ["yes", "yes"])
    assert float((scores[0] - scores[1]).abs()) > 1e-4


@pytest.mark.parametrize(
    ("mode", "calls"),
    [("joint", [(1, True), (2, True)] * 2), ("detach_uncond", [(1, False), (2, False), (1, True), (2, True)])],
)
def test_which_branch_has_a_gradient(
    folder: Path, prompts: list[Prompt], mode: str, calls: list[tuple[int, bool]]
) -> None:
    policy = ShowoPolicy.load(folder)
    trajectories = members(policy.sample(prompts[3:4], replace(BASE, guided_logprobs=mode), [0]))  # type: ignore[arg-type]
    seen: list[tuple[int, bool]] = []
    policy.model.model.register_forward_hook(
        lambda module, args, out: seen.append((len(out.last_hidden_state), out.last_hidden_state.requires_grad))
    )
    policy.logprobs(trajectories)
    assert seen == calls * 4  # in each step the text of a branch, then the images of both members after it


def test_checkpointed_layers_give_the_same_gradient(folder: Path, prompts: list[Prompt]) -> None:
    """Members then have whole rows; those that share their texts have the same gradient by other sums."""
    policy = ShowoPolicy.load(folder)
    trajectories = members(policy.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))
    gradients = []
    for on, whole in ((False, True), (True, True), (False, False)):
        policy.checkpoint_gradients(on)
        policy.checkpointed = whole
        torch.stack([row.logprobs.sum() for rows in policy.logprobs(trajectories) for row in rows]).sum().backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert gradients[0].keys() == gradients[1].keys() == gradients[2].keys() == trained
    assert not any(name.startswith("magvit.") for name in trained)
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in trained)
    for name in trained:
        assert float((gradients[2][name] - gradients[1][name]).norm() / gradients[1][name].norm()) < 1e-5


def test_low_precision_reads_the_same_codes(folder: Path, showo: ShowoPolicy, prompts: list[Prompt]) -> None:
    """The autoencoder stays float32, since a code is the signs of its numbers."""
    low = ShowoPolicy.load(folder, dtype=torch.bfloat16)
    assert low.compute_dtype == torch.bfloat16
    assert low.model.model.rotary_emb.inv_freq.dtype == torch.float32
    for prompt in prompts[:3]:
        assert low.context_ids(prompt.parts) == showo.context_ids(prompt.parts)
    policy = ShowoPolicy.load(folder)
    policy.set_compute_dtype(torch.bfloat16)
    whole = members(policy.sample(prompts[:5], BASE, range(5)))
    assert difference(policy, whole) == 0
    assert policy.compute_dtype == torch.bfloat16


def test_both_sides_judge(showo: ShowoPolicy, prompts: list[Prompt]) -> None:
    texts = ["yes", "no it is a red circle"]
    both = showo.text_logprob([prompts[0].parts, prompts[1].parts], texts)
    alone = [showo.text_logprob([p.parts], [text]) for p, text in zip(prompts[:2], texts, strict=True)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)
    (drawn,) = members(showo.sample(prompts[3:4], replace(BASE, group_size=1), [5]))
    image = drawn.segments[0].image  # type: ignore[union-attr]
    found = showo.image_logprob([("a red circle",), ("yes",)], [image] * 2, 2, [0, 0])
    assert found.shape == (2, 2)
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    words, patches = showo.hidden_states(["a red circle", prompts[0].parts[0]], 1)
    assert words.shape == (len(showo.layout.encode("a red circle")), 64)
    assert patches.shape == (16, 64)
    with pytest.raises(InputError, match="layer=3: the policy has 2 layers"):
        showo.hidden_states(["a"], 3)
    assert missing_members(showo) == []


IMAGE = torch.rand(3, 32, 32)
REFUSED: list[tuple[Prompt, Sampling, str]] = [
    (Prompt("e", "edit", (IMAGE, "red"), ("image",)), BASE, "draws from text alone, not from an image"),
    (Prompt("u", "understand", ("what",), ("text",)), BASE, "task 'understand' needs an image"),
    (Prompt("two", "understand", (IMAGE, IMAGE, "what"), ("text",)), BASE, "2 images: a Show-o reads one"),
    (
        Prompt("o", "reason", ("x",), ("image", "text")),
        BASE,
        "a Show-o answers, draws, or thinks and draws, not image,",
    ),
    (Prompt("m", "generate", ("a <|eoi|>",), ("image",)), BASE, "holds <|eoi|>, a marker of the model"),
    (Prompt("end", "generate", ("a <|endoftext|>",), ("image",)), BASE, "holds <|endoftext|>, a marker"),
    (Prompt("l", "generate", ("x" * 200,), ("image",)), BASE, "200 tokens, the limit is 126: shorten it"),
    (Prompt("p", "reason", ("x" * 121,), ("text", "image")), BASE, "121 tokens and 6 after them (max_new_tokens)"),
    (Prompt("q", "understand", (IMAGE, "x" * 600), ("text",)), BASE, "the limit is 512: shorten it"),
    (Prompt("s", "generate", ("x",), ("image",)), replace(BASE, image_size=(64, 64)), "this model draws 32 x 32"),
    (Prompt("t", "generate", ("x",), ("image",)), replace(BASE, num_steps=17), "num_steps=17 for 16 masked tokens"),
]


@pytest.mark.parametrize(("prompt", "sampling", "words"), REFUSED, ids=[prompt.id for prompt, _, _ in REFUSED])
def test_what_it_cannot_do_is_one_line(showo: ShowoPolicy, prompt: Prompt, sampling: Sampling, words: str) -> None:
    with refused(words):
        showo.sample([prompt], sampling, [0])


def test_examples_and_contexts_of_a_judge_are_whole_or_refused(showo: ShowoPolicy) -> None:
    """Not only prompts of a rollout: an image or a text without a place in the row was left out or misplaced."""
    with refused("2 images: a Show-o reads one"):
        showo.text_logprob([(IMAGE, IMAGE, "what")], ["red"])
    with refused("2000 tokens, the limit is 126"):
        showo.image_logprob([("x" * 2000,)], [IMAGE], 1, [0])
    read = Example(Prompt("two", "understand", (IMAGE, IMAGE, "what"), ("text",)), ("red",))
    edit = Example(Prompt("e", "generate", (IMAGE, "make it red"), ("image",)), (IMAGE,))
    for example, words in ((read, "2 images: a Show-o reads one"), (edit, "draws from text alone")):
        with refused(words):
            showo.supervised_losses([example], torch.Generator())


# --- files ---


def test_saved_folders_load_the_same(folder: Path, showo: ShowoPolicy) -> None:
    state = showo.state_dict()
    showo.save(Path("again"))
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert all((folder / name).read_bytes() == Path("again", name).read_bytes() for name in files)
    again = load_policy("again", dtype="float32")
    assert isinstance(again, ShowoPolicy)
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    low = ShowoPolicy.load(folder, dtype=torch.bfloat16)
    low.save(Path("low"))
    assert load_file("low/pytorch_model.safetensors")["showo.lm_head.weight"].dtype == torch.bfloat16


def test_parts_may_lie_elsewhere(folder: Path, showo: ShowoPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published: the language model is named in config.json, and the autoencoder is a repository of its own."""
    shutil.copytree(folder, "model")
    shutil.move(f"model/{LANGUAGE}", "language")
    shutil.move(f"model/{AUTOENCODER}", "autoencoder")
    change_json("config.json", llm_model_path="language")(Path("model"))
    monkeypatch.setattr("lvrpo.policies.magvit.checkpoint.AUTOENCODER_ID", "autoencoder")
    found = load_policy("model")
    assert isinstance(found, ShowoPolicy)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in showo.state_dict().items())


WEIGHTS = "pytorch_model.safetensors"


def change_model(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return change_weights(change, WEIGHTS)


EMBEDDING = "showo.model.embed_tokens.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (delete("pytorch_model.safetensors"), "holds no pytorch_model.safetensors, the weights of a Show-o"),
    "pickle": (pickle_instead(WEIGHTS), "as pytorch_model.bin, a pickle, which is not read"),
    "cut off": (lambda folder: cut_off(folder, WEIGHTS), "pytorch_model.safetensors: truncated"),
    "lacks a tensor": (change_model(lambda s: s.pop("showo.lm_head.bias")), "lack showo.lm_head.bias (1 are missing"),
    "another tensor": (change_model(lambda s: s.update(extra=torch.zeros(2))), "hold extra, which its configuration"),
    "another shape": (change_model(lambda s: s.update({EMBEDDING: torch.zeros(8, 64)})), "has shape [8, 64], "),
    "another model": (change_model(lambda s: s.clear() or s.update(x=torch.zeros(2))), "weights of another model"),
    "nan": (change_model(lambda s: s[EMBEDDING].fill_(torch.nan)), f"{EMBEDDING} holds nan"),
    "no config": (delete("config.json"), "holds no config.json"),
    "clip": (change_json("config.json", w_clip_vit=True), "reads images through CLIP, which is not supported"),
    "vocabulary": (change_json("config.json", vocab_size=99), "vocab_size=99: text, 10 markers, 64 image tokens"),
    "not square": (change_json("config.json", num_vq_tokens=15), "num_vq_tokens=15: must be a square number"),
    "bad config": (change_json("config.json", llm_vocab_size="x"), "config.json: llm_vocab_size="),
    "no language model": (delete(LANGUAGE), "holds no folder phi-1_5, and its llm_model_path phi-1_5 is not in"),
    "no tokenizer": (delete(f"{LANGUAGE}/tokenizer.json"), "holds no tokenizer.json: copy it from"),
    "damaged tokenizer": (lambda f: (f / LANGUAGE / "tokenizer.json").write_text("{"), "truncated or damaged"),
    "another tokenizer": (
        change_json("config.json", llm_vocab_size=300, vocab_size=375),
        "tokens, llm_vocab_size says 300: use the tokenizer",
    ),
    "another end": (change_json(f"{LANGUAGE}/tokenizer_config.json", eos_token="</s>"), "has no </s>: use the"),
    "another language model": (change_json(f"{LANGUAGE}/config.json", model_type="llama"), "type 'llama', not 'phi'"),
    "bad language model": (change_json(f"{LANGUAGE}/config.json", hidden_size="x"), "phi-1_5/config.json: "),
    "no autoencoder": (delete(AUTOENCODER), "holds no folder magvitv2, and its autoencoder showlab/magvitv2 is not in"),
    "autoencoder weights": (delete(f"{AUTOENCODER}/pytorch_model.safetensors"), "the weights of MAGVIT-v2: copy it"),
    "autoencoder pickle": (
        pickle_instead(f"{AUTOENCODER}/{WEIGHTS}"),
        "weights of MAGVIT-v2 as pytorch_model.bin, a pickle",
    ),
    "autoencoder codes": (change_json(f"{AUTOENCODER}/config.json", z_channels=7), "has 128 codes, codebook_size=64"),
    "autoencoder sizes": (
        change_json(f"{AUTOENCODER}/config.json", decoder_ch_mult=[1]),
        "decoder_ch_mult=[1]: must ha",
    ),
    "autoencoder nan": (
        change_weights(lambda s: s["decoder.conv_in.weight"].fill_(torch.nan), f"{AUTOENCODER}/{WEIGHTS}"),
        "decoder.conv_in.weight holds nan",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_one_line(folder: Path, name: str) -> None:
    require_refused(folder, *DAMAGES[name], load_policy)
