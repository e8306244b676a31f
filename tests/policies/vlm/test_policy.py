"""An image-text-to-text model as a policy: the replay law, parity with transformers, its files, what it refuses."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import change_weights, delete, require_refused
from replays import difference, members
from safetensors.torch import load_file
from small_vlm import change_json

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies import image_text_to_text, transformers_policy
from lvrpo.policies.adapter import AdapterConfig, Modules, add_adapter, merge
from lvrpo.policies.base import RolloutPolicy, Sampling, SavedPolicy
from lvrpo.policies.image_text_to_text import ImageTextToTextPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER
from lvrpo.training.preflight import TOLERANCE, rollout_checks
from lvrpo.types import Prompt, RewardTable, TextSegment, Trajectory

transformers = pytest.importorskip("transformers")

BASE = Sampling(group_size=3, max_new_tokens=9)
GREEDY = Sampling(group_size=2, max_new_tokens=12, temperature=0.0)


def segment_of(trajectory: Trajectory) -> TextSegment:
    (segment,) = trajectory.segments
    assert isinstance(segment, TextSegment)
    return segment


def inputs_of(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """What transformers' own processor makes of some prompts, padded on the left. Any: of transformers."""
    chats = []
    for prompt in prompts:
        parts = (THINK_THEN_ANSWER, *prompt.parts) if prompt.task == "reason" else prompt.parts
        content = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": to_pil(p)} for p in parts
        ]
        chats.append([{"role": "user", "content": content}])
    padding = {"padding": True, "padding_side": "left"}
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=padding,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(
    vlm: ImageTextToTextPolicy, prompts: list[Prompt], temperature: float
) -> None:
    assert isinstance(vlm, RolloutPolicy)
    assert isinstance(vlm, SavedPolicy)
    groups = vlm.sample(prompts, replace(BASE, temperature=temperature), range(len(prompts)))
    trajectories = members(groups)
    assert len({tuple(segment_of(t).tokens.tolist()) for t in trajectories}) > 10
    assert difference(vlm, trajectories) == 0
    others = [difference(vlm, trajectories[:8]), difference(vlm, trajectories[::-2])]
    others += [difference(vlm, [t]) for t in trajectories]  # nothing is padded
    print(f"at most {max(others):.2g} in other batches")
    assert max(others) <= 1e-5
    scores = torch.rand(len(groups), 3, 1, generator=torch.Generator().manual_seed(0))
    tasks = tuple(group.prompt.task for group in groups)
    table = RewardTable(("r",), torch.ones(1), scores, torch.ones_like(scores, dtype=torch.bool), {}, tasks)
    checks = rollout_checks(vlm, groups, table, 0.01)
    assert all(check.ok for check in checks), checks


def test_padding_and_the_batch_change_no_answer(vlm: ImageTextToTextPolicy, prompts: list[Prompt]) -> None:
    together = vlm.sample(prompts, BASE, range(len(prompts)))
    for i, (prompt, group) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = vlm.sample([prompt], BASE, [i])
        for one, other in zip(alone.trajectories, group.trajectories, strict=True):
            assert segment_of(one).tokens.tolist() == segment_of(other).tokens.tolist()


def test_a_prompt_is_read_once_for_its_group(folder: Path, prompts: list[Prompt]) -> None:
    policy = ImageTextToTextPolicy.load(folder)
    rows: list[tuple[int, ...]] = []
    policy.model.get_input_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[:2]))
    groups = policy.sample(prompts[:2], BASE, [4, 5])
    longest = max(len(policy.chat.read(prompt.parts).ids) for prompt in prompts[:2])
    assert rows[0] == (2, longest)
    assert sum(length == longest for _, length in rows) == 1  # scoring the answers does not read it again
    assert max(count for count, length in rows[1:] if length == 1) == 6
    rows.clear()
    policy.logprobs(members(groups))
    assert rows == [(2, longest), (6, max(len(segment_of(t).tokens) for t in members(groups)) - 1)]
    policy.checkpoint_gradients(True)
    rows.clear()
    policy.logprobs(members(groups))
    assert [count for count, _ in rows] == [6]


def test_whole_rows_have_the_same_log_probs_and_gradients(folder: Path, prompts: list[Prompt]) -> None:
    policy = ImageTextToTextPolicy.load(folder)
    trajectories = members(policy.sample(prompts, replace(BASE, group_size=2), range(len(prompts))))
    counts = [policy.count_tokens(trajectories[0])]
    gradients = []
    for on in (False, True):
        policy.checkpoint_gradients(on)
        assert difference(policy, trajectories) <= 1e-5
        torch.stack([row.logprobs.sum() for (row,) in policy.logprobs(trajectories)]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
    one, other = gradients
    assert one.keys() == other.keys() == {name for name, _ in policy.named_parameters()}
    assert any("vis" in name for name in one)
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-4), name
    counts.append(policy.count_tokens(trajectories[0]))
    assert sum(vars(counts[0]).values()) == sum(vars(counts[1]).values())
    assert counts[0].context
    assert not counts[1].context


def test_what_goes_through_at_once_changes_nothing(folder: Path, prompts: list[Prompt]) -> None:
    policy = ImageTextToTextPolicy.load(folder)
    whole = members(policy.sample(prompts, BASE, range(len(prompts))))
    policy.limit_tokens(150)
    assert difference(policy, whole) <= 1e-5
    parts = members(policy.sample(prompts, BASE, range(len(prompts))))
    assert difference(policy, parts) == 0
    assert [segment_of(t).tokens.tolist() for t in whole] == [segment_of(t).tokens.tolist() for t in parts]


def test_bfloat16_keeps_its_tolerance(folder: Path, prompts: list[Prompt]) -> None:
    """Of small weights, as trained ones are: a random model's log-probs are far apart."""
    policy = ImageTextToTextPolicy.load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.3)
    trajectories = members(policy.sample(prompts, BASE, range(len(prompts))))
    assert policy.compute_dtype == torch.bfloat16
    assert difference(policy, trajectories) == 0
    others = [difference(policy, trajectories[::-2]), *(difference(policy, [t]) for t in trajectories)]
    print(f"at most {max(others):.2g} in other batches")
    assert max(others) <= TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_greedy_answers_and_log_probs_are_the_library_s(
    vlm: ImageTextToTextPolicy, folder: Path, prompts: list[Prompt]
) -> None:
    """``generate`` of transformers on the batch, and a plain forward of its prompts and answers."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    never = (~vlm.allowed).nonzero().flatten().tolist()
    for batch in (prompts[:2], prompts[2:3], prompts[4:]):
        inputs = inputs_of(processor, batch)
        length = inputs["input_ids"].shape[1]
        written = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=never)
        for row, prompt, group in zip(written, batch, vlm.sample(batch, GREEDY, range(len(batch))), strict=True):
            segment = segment_of(group.trajectories[1])
            tokens = segment.tokens
            assert row[length : length + len(tokens)].tolist() == tokens.tolist()
            assert set(row[length + len(tokens) :].tolist()) <= {0}  # padding
            assert segment.text == processor.decode(tokens, skip_special_tokens=True).strip()
            alone = dict(inputs_of(processor, [prompt]))
            start = alone["input_ids"].shape[1]
            for name, value in alone.items():
                if value.shape == (1, start):
                    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                    after = more.get(name, torch.zeros_like(tokens))
                    alone[name] = torch.cat([value, after[None]], dim=1)
            logits = model(**alone).logits[0, start - 1 : -1].masked_fill(~vlm.allowed, -torch.inf)
            expected = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]
            assert torch.allclose(segment.behavior_logprobs, expected, atol=1e-5)


def test_generation_config_is_not_applied(vlm: ImageTextToTextPolicy, prompts: list[Prompt]) -> None:
    """The folder says top_k=1 and temperature 0.3, with which all members would be one."""
    assert vlm.model.generation_config.top_k == 1
    (group,) = vlm.sample(prompts[:1], replace(BASE, group_size=8), [0])
    assert len({segment_of(t).tokens[0].item() for t in group.trajectories}) > 2
    assert len(vlm.end_ids) == 2


def test_a_text_is_judged_as_the_template_sets_it(vlm: ImageTextToTextPolicy, prompts: list[Prompt]) -> None:
    contexts = [prompt.parts for prompt in prompts[:2]]
    found = vlm.text_logprob(contexts, ["red", "a blue square"])
    assert found.shape == (2,)
    for parts, text, value in zip(contexts, ["red", "a blue square"], found, strict=True):
        ids = torch.tensor([*vlm.chat.answer(parts, text), vlm.end_id])
        segment = TextSegment(ids, torch.zeros(len(ids)), 1.0, text, True)
        trajectory = Trajectory(Prompt("x", "understand", tuple(parts), ("text",)), 0, (segment,), 0)
        with torch.no_grad():
            assert float(vlm.logprobs([trajectory])[0][0].logprobs.mean()) == pytest.approx(float(value), abs=1e-5)
    spaced = vlm.chat.tokenizer.decode(vlm.chat.answer(contexts[0], "red"))
    assert spaced == (" red" if vlm.model.config.model_type == "idefics3" else "red")
    whole = vlm.chat.tokenizer.decode([*vlm.chat.answer(contexts[0], "red"), vlm.end_id])
    assert vlm.chat.render(contexts[0], "red").startswith(vlm.chat.render(contexts[0]) + whole)
    assert vlm.text_logprob([], []).shape == (0,)
    with pytest.raises(InputError, match="has no method 'image_logprob'"):
        vlm.image_logprob([("x",)], [torch.zeros(3, 8, 8)], 1, [0])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("g", "generate", ("a circle",), ("image",)), "reads images and does not draw them"),
        (Prompt("r", "reason", ("a circle",), ("text", "image")), "reads images and does not draw them"),
        (Prompt("l", "reason", ("circle " * 1100,), ("text",)), "the limit is 1024"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_one_line(vlm: ImageTextToTextPolicy, prompt: Prompt, words: str) -> None:
    with pytest.raises(InputError, match=words):
        vlm.sample([prompt], BASE, [0])


def test_markers_of_the_model_are_no_text(vlm: ImageTextToTextPolicy) -> None:
    marker = next(name for name in ("<image>", "<|image_pad|>", "<start_of_image>") if name in vlm.chat.markers)
    with pytest.raises(InputError, match="a marker of the model: leave it out"):
        vlm.sample([Prompt("m", "reason", (f"look {marker}",), ("text",))], BASE, [0])
    vlm.check_text("2 < 3 <b> |x|")


# --- files ---


def test_a_saved_folder_is_the_same_model_for_transformers(
    folder: Path, vlm: ImageTextToTextPolicy, prompts: list[Prompt]
) -> None:
    vlm.save(Path("saved"))
    kept = {path.name for path in folder.iterdir()}
    assert {path.name for path in Path("saved").iterdir()} == kept
    assert load_file("saved/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    for name in kept - {"config.json", "model.safetensors"}:
        assert Path("saved", name).read_bytes() == (folder / name).read_bytes()
    one, other = (transformers.AutoModelForImageTextToText.from_pretrained(path) for path in (folder, "saved"))
    assert one.config.to_dict() | {"_name_or_path": "saved"} == other.config.to_dict()
    processor = transformers.AutoProcessor.from_pretrained("saved")
    inputs = inputs_of(processor, prompts[:1])
    with torch.no_grad():
        assert torch.equal(one(**inputs).logits, other(**inputs).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # of peft: the head is tied in Qwen3-VL
def test_adapters_share_the_base_and_are_read_by_peft(folder: Path, prompts: list[Prompt]) -> None:
    peft = pytest.importorskip("peft")
    policy = ImageTextToTextPolicy.load(folder)
    joint: tuple[Modules, ...] = () if policy.model.config.model_type == "gemma3" else ("connector",)  # no Linear
    config = AdapterConfig(rank=2, modules=("attention", "mlp", *joint, "head", "tower"))
    targets = config.targets(policy)
    assert len(targets) == sum(isinstance(module, torch.nn.Linear) for module in policy.modules())
    narrow = AdapterConfig(modules=joint).targets(policy) if joint else []
    assert bool(narrow) == bool(joint)
    assert not any("blocks" in name or "layers" in name for name in narrow)
    add_adapter(policy, config, str(folder), 0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.1)
    contexts, texts = [prompts[0].parts], ["red"]
    moved, base = policy.text_logprob(contexts, texts), ImageTextToTextPolicy.load(folder)
    reference = policy.make_reference()
    assert torch.equal(reference.text_logprob(contexts, texts), base.text_logprob(contexts, texts))
    assert reference.model.get_input_embeddings().weight is policy.model.get_input_embeddings().weight
    assert float((moved - base.text_logprob(contexts, texts)).abs()) > 1e-3
    policy.save(Path("tuned"))
    assert torch.equal(load_policy("tuned").text_logprob(contexts, texts), moved)
    base.model = peft.PeftModel.from_pretrained(base.model, "tuned").base_model.model
    assert torch.allclose(base.text_logprob(contexts, texts), moved, atol=1e-5)
    merge(policy)
    policy.save(Path("whole"))
    assert torch.allclose(load_policy("whole").text_logprob(contexts, texts), moved, atol=1e-5)


def change_config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **fields)


TABLE, BIAS = "model.embed_tokens.weight", "visual.merger.mlp.0.bias"
"""Under their published names."""
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (delete("model.safetensors"), "holds no model.safetensors, the weights of an image-text-to-text"),
    "lacks a tensor": (change_weights(lambda s: s.pop(BIAS)), "lack model.visual.merger"),
    "another shape": (
        change_weights(lambda s: s.update({TABLE: torch.zeros(8, 32)})),
        "has shape [8, 32], config.json says [320, 32]",
    ),
    "nan": (change_weights(lambda s: s[TABLE].fill_(torch.nan)), "embed_tokens.weight holds nan"),
    "no config": (delete("config.json"), "holds no config.json"),
    "bad config": (change_config(text_config="x"), "config.json: Validation error for field 'text_config'"),
    "no tokenizer": (delete("tokenizer.json"), "holds no tokenizer.json: copy it"),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "processor cannot be loaded"),
    "no images": (delete("preprocessor_config.json"), "holds no preprocessor_config.json: copy it"),
    "other places of images": (
        lambda folder: change_json(folder / "preprocessor_config.json", merge_size=1),
        "its processor has merge_size=1, config.json says 2",
    ),
    "another token of images": (change_config(image_token_id=9), "image_token_id=5, config.json says 9"),
    "no template": (delete("chat_template.jinja"), "has no chat template: copy chat_template.jinja"),
    "code of its own": (
        change_config(model_type="clever_vl", auto_map={"AutoModel": "modeling_clever.Clever"}),
        "computed by code in that folder (auto_map), which lvrpo never runs",
    ),
    "unknown": (change_config(model_type="clever_vl", architectures=["Clever"]), "a model of type 'clever_vl'"),
    "of an encoder and a decoder": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "florence2"}'),
        "answers by a decoder with an encoder of its own",
    ),
    "bad template": (lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "refuses a prompt"),
}


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_one_line(folder: Path, name: str, prompts: list[Prompt]) -> None:
    require_refused(folder, *DAMAGES[name], lambda bad: load_policy(bad).sample(prompts[:1], BASE, [0]))


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
def test_a_placeholder_outside_the_vocabulary_forbids_no_token(folder: Path, vlm: ImageTextToTextPolicy) -> None:
    shutil.copytree(folder, "other")
    change_json(Path("other/config.json"), video_token_id=5000)
    allowed = ImageTextToTextPolicy.load(Path("other")).allowed
    assert (~allowed).nonzero().flatten().tolist() == [vlm.model.config.image_token_id]


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_a_prompt_is_read_once_without_keeping_its_image_or_every_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ImageTextToTextPolicy.load(folder).chat
    image = torch.rand(3, 40, 40)
    gone, found = weakref.ref(image), chat.read((image, "what color is it"))
    assert chat.read((image, "what color is it")) is found
    del image
    assert gone() is None
    again = [torch.rand(3, 40, 40) for _ in range(20)]  # one of them may get the identity of the first
    read = [chat.read((image, "what color is it")).images["pixel_values"] for image in again]
    assert len({float(pixels.sum()) for pixels in (*read, found.images["pixel_values"])}) == 21
    monkeypatch.setattr(image_text_to_text, "KEPT_BYTES", 2_000_000)
    texts = [weakref.ref(chat.read(("yes " * 50_000, str(i)))) for i in range(4)]
    assert [prompt() is not None for prompt in texts] == [False, False, False, True]


def test_equal_answers_are_scored_once_and_lengths_are_not_mixed(
    vlm: ImageTextToTextPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = vlm.sample(prompts[:1], Sampling(group_size=6, max_new_tokens=12), [3])[0]
    same = [replace(t, segments=(replace(segment_of(t), tokens=segment_of(t).tokens[:n]),))
            for t, n in zip(group.trajectories, (12, 3, 12, 3, 2, 1), strict=True)]  # fmt: skip
    same = [*same, same[0], same[1]]
    shapes: list[tuple[int, ...]] = []
    logits = vlm._logits

    def seen(prompts: Any, tokens: torch.Tensor, *args: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return logits(prompts, tokens, *args)

    monkeypatch.setattr(vlm, "_logits", seen)
    found = {}
    for together in (transformers_policy.TOGETHER, 20):
        monkeypatch.setattr(transformers_policy, "TOGETHER", together)
        shapes.clear()
        found[together] = vlm.logprobs(same)
        distinct = {tuple(segment_of(t).tokens.tolist()) for t in same}
        assert sum(rows for rows, _ in shapes) == len(distinct) < len(same)
        assert len(shapes) == (1 if together > 20 else 2)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one[0].logprobs, other[0].logprobs, rtol=0, atol=1e-5)
    assert torch.equal(found[20][0][0].logprobs, found[20][6][0].logprobs)


def test_keys_grow_in_place(vlm: ImageTextToTextPolicy, prompts: list[Prompt]) -> None:
    """The states of a decoder with room are the bits of one that copies all places for every new one."""
    read = vlm._read([vlm.read_prompt(prompt) for prompt in prompts[:2]])
    held = [layer.keys.clone() for layer in read.cache.layers]
    copied, grown = read.copy(), read.copy()
    grown.reserve(3)
    changes = ([0, 1, 1, 0, 1], [0, 4, 2], [1, 0, 2], [0, 2])  # repeated; dropped in place; reordered; dropped
    with torch.no_grad():
        for step, rows in enumerate(changes):
            for decoder in (copied, grown):
                decoder.select(rows)
            ids = torch.arange(len(rows)) + 30 + step
            assert torch.equal(copied.step(ids), grown.step(ids))  # the fourth has no room left
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(read.cache.layers, held, strict=True))
