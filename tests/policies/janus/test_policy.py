"""The replay law of a Janus, what it refuses, and its weights on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.janus.create import JanusSizes, create_janus
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.training.preflight import step_zero_contract
from lvrpo.types import Group, ImageTokenSegment, Prompt, RewardTable, TextSegment, Trajectory

BASE = Sampling(group_size=3, max_new_tokens=6, guidance_scale=5.0)
WAYS = {
    "guided": BASE,
    "warm": replace(BASE, temperature=0.7, image_temperature=1.5, guidance_scale=1.0),
    "one branch": replace(BASE, guidance_scale=3.0, guided_logprobs="detach_uncond"),
}


def members(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def difference(policy: JanusPolicy, trajectories: Sequence[Trajectory]) -> float:
    with torch.no_grad():
        replayed = policy.logprobs(trajectories)
    worst = 0.0
    for trajectory, rows in zip(trajectories, replayed, strict=True):
        for segment, row in zip(trajectory.segments, rows, strict=True):
            assert row.logprobs.shape == segment.behavior_logprobs.shape == segment.tokens.shape
            assert row.entropy is not None
            assert row.entropy.shape == row.logprobs.shape
            worst = max(worst, float((row.logprobs - segment.behavior_logprobs).abs().max()))
    return worst


def contract(policy: JanusPolicy, groups: Sequence[Group]) -> dict[str, bool]:
    scores = torch.rand(len(groups), 3, 1, generator=torch.Generator().manual_seed(0))
    tasks = tuple(group.prompt.task for group in groups)
    table = RewardTable(("r",), torch.ones(1), scores, torch.ones_like(scores, dtype=torch.bool), {}, tasks)
    return {check.check: check.ok for check in step_zero_contract(policy, groups, table, 0.01)}


@pytest.mark.parametrize("name", WAYS)
def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(
    janus: JanusPolicy, prompts: list[Prompt], name: str
) -> None:
    assert isinstance(janus, Policy)
    groups = janus.sample(prompts, WAYS[name], range(len(prompts)))
    trajectories = members(groups)
    kinds = [[segment.kind for segment in t.segments] for t in trajectories[::3]]
    assert kinds == [["text"]] * 3 + [["tokens"]] * 2 + [["text", "tokens"], ["text"]]
    assert difference(janus, trajectories) == 0
    others = [difference(janus, trajectories[::-2]), *(difference(janus, [t]) for t in trajectories[::3])]
    print(f"{name}: at most {max(others):.2g} in other batches")
    assert max(others) <= 1e-5
    checks = contract(janus, groups)
    assert all(checks.values()), checks
    assert "replay, image tokens, own batch: max |difference|" in checks
    drawn = [t.segments[-1] for t in trajectories if t.image is not None]
    assert len({tuple(segment.tokens.tolist()) for segment in drawn if isinstance(segment, ImageTokenSegment)}) > 3


def test_what_goes_through_at_once_changes_nothing(folder: Path, prompts: list[Prompt]) -> None:
    policy = JanusPolicy.load(folder)
    whole = members(policy.sample(prompts, BASE, range(len(prompts))))
    policy.limit_tokens(150)
    assert difference(policy, whole) <= 1e-5
    parts = members(policy.sample(prompts, BASE, range(len(prompts))))
    assert difference(policy, parts) == 0
    for one, other in zip(whole, parts, strict=True):
        assert [s.tokens.tolist() for s in one.segments] == [s.tokens.tolist() for s in other.segments]
    text, drawn = (policy.count_tokens(whole[i]) for i in (0, 9))
    assert text.text == len(policy.processor.prompt(prompts[0].parts, False)) + len(whole[0].segments[0].tokens) - 1
    assert drawn.image == drawn.text  # the branch without the prompt


def test_a_picture_thought_about_follows_its_words(janus: JanusPolicy, prompts: list[Prompt]) -> None:
    """The log-probs of image tokens change with the plan, which stands in the place of the answer."""
    (trajectory,) = members(janus.sample(prompts[5:6], replace(BASE, group_size=1, guidance_scale=1.0), [3]))
    text, drawn = trajectory.segments
    assert isinstance(text, TextSegment)
    other = replace(text, tokens=text.tokens.flip(0), ended=False)
    changed = janus.logprobs([replace(trajectory, segments=(other, drawn))])[0][1].logprobs.detach()
    assert float((changed - drawn.behavior_logprobs).abs().max()) > 1e-3
    ended = replace(
        text, tokens=torch.tensor([*text.tokens[:3].tolist(), janus.processor.ids["eos_token"]]), ended=True
    )
    row, _ = janus._scored_row(replace(trajectory, segments=(ended, drawn)), ("text", "tokens"))
    assert janus.processor.ids["eos_token"] not in row.ids


@pytest.mark.parametrize(("mode", "calls"), [("joint", [(4, True)]), ("detach_uncond", [(2, True), (2, False)])])
def test_which_branch_has_a_gradient(
    folder: Path, prompts: list[Prompt], mode: str, calls: list[tuple[int, bool]]
) -> None:
    policy = JanusPolicy.load(folder)
    sampling = replace(BASE, group_size=2, guided_logprobs=mode)  # type: ignore[arg-type]  # one of its literals
    trajectories = members(policy.sample(prompts[3:4], sampling, [0]))
    seen: list[tuple[int, bool]] = []
    policy.model.model.language_model.register_forward_hook(
        lambda module, args, out: seen.append((len(out.last_hidden_state), out.last_hidden_state.requires_grad))
    )
    policy.logprobs(trajectories)
    assert seen == calls


def test_checkpointed_layers_give_the_same_gradient(folder: Path, prompts: list[Prompt]) -> None:
    policy = JanusPolicy.load(folder)
    trajectories = members(policy.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))
    gradients = []
    for on in (False, True):
        policy.checkpoint_gradients(on)
        sum(row.logprobs.sum() for rows in policy.logprobs(trajectories) for row in rows).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])
    again = members(policy.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))  # with its cache
    assert all(
        torch.equal(one.segments[-1].behavior_logprobs, other.segments[-1].behavior_logprobs)
        for one, other in zip(trajectories, again, strict=True)
    )


def test_every_trained_parameter_has_one_expert(folder: Path, prompts: list[Prompt]) -> None:
    policy = JanusPolicy.load(folder)
    groups = policy.parameter_groups()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert sorted(map(id, trained.values())) == sorted(id(p) for group in groups.values() for p in group)
    assert not any("vqmodel" in name for name in trained)
    assert all(groups.values())
    trajectories = members(policy.sample(prompts, replace(BASE, group_size=1), range(len(prompts))))
    sum(row.logprobs.sum() for rows in policy.logprobs(trajectories) for row in rows).backward()  # type: ignore[union-attr]
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not [name for name in without if not name.endswith("k_proj.bias")], without  # softmax drops such a bias


def test_bfloat16_computes_within_its_tolerance(folder: Path, prompts: list[Prompt]) -> None:
    policy = JanusPolicy.load(folder)
    policy.set_compute_dtype(torch.bfloat16)
    assert policy.compute_dtype == torch.bfloat16
    assert all(contract(policy, policy.sample(prompts[::2], BASE, range(4))).values())


def test_both_sides_judge(janus: JanusPolicy, prompts: list[Prompt]) -> None:
    parts = prompts[0].parts
    texts = ["yes", "no it is a red circle"]
    both = janus.text_logprob([parts, prompts[1].parts], texts)
    alone = [janus.text_logprob([p.parts], [text]) for p, text in zip(prompts[:2], texts, strict=True)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)
    ids = janus.processor.answer("yes")
    segment = TextSegment(torch.tensor(ids), torch.zeros(len(ids)), 1.0, "yes", True)
    with torch.no_grad():
        (rows,) = janus.logprobs([Trajectory(prompts[0], 0, (segment,), 0)])
    assert float(both[0]) == pytest.approx(float(rows[0].logprobs.mean()), abs=1e-5)

    (trajectory,) = members(janus.sample(prompts[3:4], replace(BASE, group_size=1, guidance_scale=1.0), [5]))
    (drawn,) = trajectory.segments
    assert isinstance(drawn, ImageTokenSegment)
    found = janus.image_logprob([("a red circle",), ("yes",)], [drawn.image] * 2, 2, [0, 0])
    assert found.shape == (2, 2)
    assert torch.equal(found[:, 0], found[:, 1])
    assert float((found[0] - found[1]).abs().max()) > 1e-3

    words, picture = janus.reading_states(["a red circle", parts[0]], 1)
    assert words.shape == (len(janus.processor.tokenize("a red circle")), 64)
    assert picture.shape == (16, 64)
    with pytest.raises(InputError, match="layer=3: the policy has 2 layers"):
        janus.reading_states(["a"], 3)


REFUSED: list[tuple[Prompt, Sampling, str]] = [
    (Prompt("e", "edit", (torch.rand(3, 32, 32), "red"), ("image",)), BASE, "draws from text alone, not from a pict"),
    (Prompt("u", "understand", ("what",), ("text",)), BASE, "task 'understand' needs a picture"),
    (Prompt("o", "reason", ("x",), ("image", "text")), BASE, "a Janus answers, draws, or thinks and draws, not image,"),
    (Prompt("m", "generate", ("a <end_of_image>",), ("image",)), BASE, "holds <end_of_image>, a marker of the model"),
    (Prompt("l", "generate", ("x" * 600,), ("image",)), BASE, "and 17 after them, the limit is 512: shorten it"),
    (Prompt("s", "generate", ("x",), ("image",)), replace(BASE, image_size=(64, 64)), "this model draws 32 x 32"),
]


@pytest.mark.parametrize(("prompt", "sampling", "words"), REFUSED, ids=[prompt.id for prompt, _, _ in REFUSED])
def test_what_it_cannot_do_is_one_line(janus: JanusPolicy, prompt: Prompt, sampling: Sampling, words: str) -> None:
    with pytest.raises(InputError) as caught:
        janus.sample([prompt], sampling, [0])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- files ---


def test_shards_dtypes_and_saved_folders_load_the_same(folder: Path, janus: JanusPolicy) -> None:
    state = janus.state_dict()
    shutil.copytree(folder, "shards")
    Path("shards/model.safetensors").unlink()
    janus.model.save_pretrained("shards", max_shard_size="500KB")
    assert Path("shards/model.safetensors.index.json").is_file()
    janus.save(Path("again"))
    assert {file.name for file in folder.iterdir()} == {file.name for file in Path("again").iterdir()}
    for other in (load_policy("shards"), load_policy("again", dtype="float32")):
        assert isinstance(other, JanusPolicy)
        assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
    low = JanusPolicy.load(folder, dtype=torch.bfloat16)
    assert low.compute_dtype == torch.bfloat16
    low.save(Path("low"))
    assert json.loads(Path("low/config.json").read_text())["dtype"] == "bfloat16"
    assert load_policy("low", dtype="bfloat16").compute_dtype == torch.bfloat16


def test_a_head_that_is_the_table_of_words_is_kept_once(folder: Path) -> None:
    policy = create_janus(JanusSizes())
    policy.model.config.tie_word_embeddings = True
    policy.model.tie_weights()
    policy.save(Path("tied"))
    assert "lm_head.weight" not in load_file("tied/model.safetensors")
    again = JanusPolicy.load(Path("tied"))
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight
    assert len(again.parameter_groups()["shared"]) == len(policy.parameter_groups()["shared"])


def cut_off(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return damage


def change_json(name: str, **fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


EMBEDDING = "model.language_model.embed_tokens.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (delete("model.safetensors"), "holds no model.safetensors, the weights of a Janus"),
    "cut off": (cut_off, "model.safetensors: truncated"),
    "lacks a tensor": (change_weights(lambda s: s.pop("model.aligner.fc1.bias")), "lack model.aligner.fc1.bias (1 are"),
    "another shape": (change_weights(lambda s: s.update({EMBEDDING: torch.zeros(8, 64)})), "has shape [8, 64], "),
    "nan": (change_weights(lambda s: s[EMBEDDING].fill_(torch.nan)), f"{EMBEDDING} holds nan"),
    "another model": (
        change_json("config.json", model_type="mmada", architectures=[]),
        "an MMaDA, which draws with masked image tokens",
    ),
    "its makers' layout": (
        change_json("config.json", model_type="multi_modality", architectures=[]),
        "that of transformers is read",
    ),
    "no config": (delete("config.json"), "holds no config.json"),
    "bad config": (change_json("config.json", text_config="x"), "config.json: "),
    "no tokenizer": (delete("tokenizer.json"), "holds no tokenizer.json"),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "truncated or damaged"),
    "another tokenizer": (
        change_json("tokenizer_config.json", boi_token="<image>"),
        "tokenizer has no boi_token (<image>",
    ),
    "no settings": (delete("preprocessor_config.json"), "holds no preprocessor_config.json"),
    "other settings": (change_json("preprocessor_config.json", size={"height": 64, "width": 64}), "have side 64, "),
    "bad settings": (change_json("preprocessor_config.json", image_std=0.5), "preprocessor_config.json: image_std=0.5"),
    "bad template": (lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "its chat template: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_one_line(folder: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    shutil.copytree(folder, "bad")
    damage(Path("bad"))
    with pytest.raises(InputError) as caught:
        load_policy("bad")
    assert words in str(caught.value)
    assert "bad" in str(caught.value)
    assert "\n" not in str(caught.value)
