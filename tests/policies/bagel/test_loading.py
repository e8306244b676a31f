"""A folder in, the same folder out; what is wrong with it is said in one line before anything is computed."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.policies import safetensors_reader
from lvrpo.policies.bagel import policy as policy_module
from lvrpo.policies.bagel.checkpoint import official_name
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.bagel.tokenizer import FILES, BagelTokenizer
from lvrpo.policies.loading import load_policy


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same(one: BagelPolicy, other: BagelPolicy) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_names_are_the_published_ones(parity: Any) -> None:
    if not parity.whole:
        pytest.skip("the excerpt has no list of names")
    names = json.loads((parity.folder / "io" / "checkpoint_keys.json").read_text())
    own = {official_name(n): list(t.shape) for n, t in parity.policy.state_dict().items() if "latent_vae" not in n}
    assert own == names


def test_what_is_saved_is_loaded(small: BagelPolicy, saved: Path) -> None:
    loaded = load_policy(saved)
    assert isinstance(loaded, BagelPolicy)
    assert loaded.config == small.config
    assert same(loaded, small)
    assert loaded.tokenizer.encode("two red circles") == small.tokenizer.encode("two red circles")
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        n for n, _ in loaded.named_parameters() if "latent_vae" in n
    ]


def test_groups_of_parameters(small: BagelPolicy) -> None:
    groups = small.parameter_groups()
    trained = [p for p in small.parameters() if p.requires_grad]
    assert sum(map(len, groups.values())) == len(trained)
    names = {id(p): n for n, p in small.named_parameters()}
    assert [names[id(p)] for p in groups["shared"]] == ["encoders.embed_tokens_table.weight"]
    own = re.compile(r"understanding|lm_head|encoders\.(vit|connector)")
    assert all(own.search(names[id(p)]) for p in groups["understand"])


def test_weights_arrive_in_pieces_of_any_size(saved: Path, small: BagelPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_reader, "CHUNK_BYTES", 1000)
    assert same(BagelPolicy.load(saved), small)


def test_bfloat16_files_and_bfloat16_models(folder: Path, small: BagelPolicy) -> None:
    state = load_file(folder / "ema.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "ema.safetensors")
    wide = BagelPolicy.load(folder)
    for name, tensor in small.state_dict().items():
        expected = tensor if "latent_vae" in name else tensor.bfloat16().float()
        assert torch.equal(wide.state_dict()[name], expected), name
    narrow = BagelPolicy.load(folder, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in narrow.state_dict().items()}
    assert {kind for name, kind in kinds.items() if "latent_vae" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "latent_vae" not in name} == {torch.bfloat16}
    assert narrow.transformer.inv_freq.dtype == torch.float32


def split(folder: Path, shards: int = 3) -> None:
    """ema.safetensors in shards with an index."""
    state = load_file(folder / "ema.safetensors")
    places = {name: f"ema-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == shard}, folder / shard)
    (folder / "ema.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "ema.safetensors").unlink()


def test_shards(folder: Path, small: BagelPolicy) -> None:
    split(folder)
    assert same(BagelPolicy.load(folder), small)
    (folder / "ema-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard ema-00002-of-00003.safetensors is missing"):
        BagelPolicy.load(folder)


@pytest.mark.parametrize("content", ['{"name": ["BAGEL-7B-MoT"],}', "[]", None, '{"model_type": "bagel"}'])
def test_config_json_is_not_trusted(content: str | None, folder: Path, small: BagelPolicy) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    loaded = load_policy(folder)
    assert isinstance(loaded, BagelPolicy)
    assert same(loaded, small)


def test_wrong_numbers_of_config_json_do_not_matter(folder: Path, small: BagelPolicy) -> None:
    path = folder / "config.json"
    wrong = json.loads(path.read_text()) | {"max_latent_size": 32, "vit_max_num_patch_per_side": 3}
    path.write_text(json.dumps(wrong))
    assert BagelPolicy.load(folder).config == small.config


def test_llm_config_may_come_from_config_json(folder: Path, small: BagelPolicy) -> None:
    (folder / "llm_config.json").unlink()
    (folder / "vit_config.json").unlink()
    assert same(BagelPolicy.load(folder), small)


def test_patches_of_a_plain_siglip(folder: Path, small: BagelPolicy) -> None:
    state = load_file(folder / "ema.safetensors")
    name = "vit_model.vision_model.embeddings.patch_embedding.weight"
    state[name] = state[name].unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2).contiguous()
    save_file(state, folder / "ema.safetensors")
    assert same(BagelPolicy.load(folder), small)


def test_a_fine_tuned_folder_lies_over_its_base(saved: Path, small: BagelPolicy, tmp_path: Path) -> None:
    tuned = tmp_path / "0001234"
    tuned.mkdir()
    state = load_file(saved / "ema.safetensors")
    rest = {name: tensor + 1 for name, tensor in state.items() if not name.startswith("vit_model.")}
    save_file(rest, tuned / "model.safetensors")
    loaded = BagelPolicy.load(tuned, base=saved).state_dict()
    for name, tensor in small.state_dict().items():
        kept = "encoders.vit." in name or "latent_vae" in name
        assert torch.equal(loaded[name], tensor if kept else tensor + 1), name


def test_a_fine_tuned_folder_is_completed_from_the_command_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, new = tmp_path / "tuned", tmp_path / "new"
    tuned.mkdir()
    state = load_file(saved / "ema.safetensors")
    save_file({name: t + 1 for name, t in state.items() if "vit" not in name}, tuned / "model.safetensors")
    assert main(["export", str(tuned), str(new), "--base", str(saved)]) == 0
    for name, tensor in load_file(new / "ema.safetensors").items():
        assert torch.equal(tensor, state[name] if "vit" in name else state[name] + 1), name
    capsys.readouterr()
    assert main(["export", str(new), str(tmp_path / "again"), "--base", str(saved)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {new}: is a whole model, which needs no base: leave the base out\n"


def test_an_output_layer_that_is_tied_and_left_out_is_the_table_of_words(folder: Path) -> None:
    """As in Qwen's small models."""
    edit_json(folder, "llm_config.json", tie_word_embeddings=True)
    with_head = load_policy(folder).state_dict()
    assert not torch.equal(with_head["encoders.lm_head.weight"], with_head["encoders.embed_tokens_table.weight"])
    rewrite(folder, lambda state: state.pop("language_model.lm_head.weight"))
    state = load_policy(folder).state_dict()
    assert torch.equal(state["encoders.lm_head.weight"], with_head["encoders.embed_tokens_table.weight"])
    edit_json(folder, "llm_config.json", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"1 tensor is missing: language_model\.lm_head\.weight"):
        load_policy(folder)


def test_words_from_vocabulary_and_merges(parity: Any, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(parity.folder / "checkpoint" / name, tmp_path)
    words = BagelTokenizer.load(tmp_path, parity.policy.config.vocabulary_size)
    for row in parity.meta["tokenizer"]:
        assert words.encode(row["text"]) == row["ids"]
        assert words.decode(row["ids"]) == row["text"]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "ema.safetensors")
    change(state)
    save_file(state, folder / "ema.safetensors")


def without(folder: Path, prefix: str) -> None:
    rewrite(folder, lambda state: [state.pop(name) for name in list(state) if name.startswith(prefix)])


def repeat_layer(folder: Path, prefix: str, source: int, target: int) -> None:
    """Stores layer ``source`` once more under another number."""
    old, new = f"{prefix}{source}.", f"{prefix}{target}."
    rewrite(
        folder,
        lambda state: state.update(
            {name.replace(old, new): tensor.clone() for name, tensor in state.items() if name.startswith(old)}
        ),
    )


def edit_json(folder: Path, name: str, **changes: object) -> None:
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(found))


def split_by_tokens(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def without_image_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|vision_start|>", "<|other|>"))


def another_dtype(folder: Path) -> None:
    state = load_file(folder / "ema.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in state.items()}, folder / "ema.safetensors")


NORM = "language_model.model.norm_moe_gen.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "ema.safetensors").unlink(), r"holds no ema\.safetensors, the weights"),
    "no autoencoder": (lambda f: (f / "ae.safetensors").unlink(), r"holds no ae\.safetensors, the autoencoder that"),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], r"is no model: .* or BAGEL's"),
    "cut off": (lambda f: split_by_tokens(f / "ema.safetensors", 200_000), r"truncated \(200000 of \d+ bytes\)"),
    "cut in the header": (lambda f: split_by_tokens(f / "ema.safetensors", 500), r"truncated \(500 bytes"),
    "empty": (lambda f: split_by_tokens(f / "ema.safetensors", 0), r"empty or no safetensors file"),
    "pointer": (
        lambda f: (f / "ema.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"git-lfs pointer",
    ),
    "no header": (
        lambda f: (f / "ema.safetensors").write_bytes(struct.pack("<Q", 9) + b"not json!"),
        r"ema\.safetensors: not JSON at column 1 .*: fetch the file again",
    ),
    "tensor missing": (lambda f: rewrite(f, lambda s: s.pop(NORM)), rf"1 tensor is missing: {NORM}: fetch"),
    "layer missing": (
        lambda f: without(f, "language_model.model.layers.1."),
        r"28 tensors are missing: (language_model\.model\.layers\.1\S+, ){2}\S+ and 25 more: fetch",
    ),
    "layer too many": (
        lambda f: repeat_layer(f, "language_model.model.layers.", 1, 2),
        r"holds language_model\.model\.layers\.2, llm_config\.num_hidden_layers=2: use",
    ),
    "last layer of the vision tower missing": (
        lambda f: without(f, "vit_model.vision_model.encoder.layers.1."),
        r"holds no \S+encoder\.layers\.1, vit_config\.num_hidden_layers=3 wants 2 layers: fetch",
    ),
    "first layer of the vision tower missing": (
        lambda f: without(f, "vit_model.vision_model.encoder.layers.0."),
        r"holds no \S+encoder\.layers\.0, vit_config\.num_hidden_layers=3 wants 2 layers: fetch",
    ),
    "two layers of the vision tower too many": (
        lambda f: [repeat_layer(f, "vit_model.vision_model.encoder.layers.", 1, i) for i in (2, 3)],
        r"holds \S+encoder\.layers\.3, vit_config\.num_hidden_layers=3: use",
    ),
    "heads of the vision tower that do not fit": (
        lambda f: edit_json(f, "vit_config.json", num_attention_heads=5),
        r"vit_config: width=16, heads=5: the width must be a multiple of the heads",
    ),
    "table of positions without sides": (
        lambda f: rewrite(f, lambda s: s.update({"vit_pos_embed.pos_embed": torch.tensor(1.0)})),
        r"vit_pos_embed\.pos_embed has shape \[\], which has no rows",
    ),
    "number beyond all numbers": (
        lambda f: edit_json(f, "vit_config.json", num_hidden_layers=float("inf")),
        r"vit_config\.json: Infinity is not JSON: restore the file",
    ),
    "tensor of another shape": (
        lambda f: rewrite(f, lambda s: s.update({NORM: torch.ones(7)})),
        rf"{NORM} is \[7\], the configuration wants \[32\]",
    ),
    "integers": (another_dtype, r"has dtype I8: use weights in F32, BF16, F16"),
    "a number that is none": (
        lambda f: rewrite(f, lambda s: s[NORM].fill_(1).view(-1)[3:4].fill_(float("nan"))),
        rf"ema\.safetensors: tensor {NORM} holds nan \(1 of 32 numbers are not finite\): fetch the file again",
    ),
    "llm_config no JSON": (lambda f: (f / "llm_config.json").write_text("{"), r"llm_config\.json: not JSON"),
    "llm_config of another size": (
        lambda f: edit_json(f, "llm_config.json", intermediate_size=64),
        r"is \[48, 32\], the configuration wants \[64, 32\]",
    ),
    "llm_config without a number": (
        lambda f: edit_json(f, "llm_config.json", rope_theta=None),
        r"llm_config\.rope_theta=None: no number",
    ),
    "heads that do not fit": (lambda f: edit_json(f, "llm_config.json", num_attention_heads=5), r"heads=5"),
    "another activation": (lambda f: edit_json(f, "llm_config.json", hidden_act="relu"), r"hidden_act='relu'"),
    "no tokenizer": (lambda f: [(f / name).unlink() for name in FILES], r"holds no tokenizer\.json"),
    "damaged tokenizer": (
        lambda f: split_by_tokens(f / "tokenizer.json", 300),
        r"tokenizer\.json: truncated or damaged",
    ),
    "tokenizer without image tokens": (without_image_tokens, r"the tokenizer has no <\|vision_start\|>"),
    "settings that do not exist": (
        lambda f: edit_json(f, "config.json", lvrpo={"timestep_shift": -1}),
        r"timestep_shift: .* greater than 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder(case: str, folder: Path) -> None:
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_unused_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"language_model.model.rotary": torch.ones(2)}))
    with pytest.warns(UserWarning, match=r"1 tensor is not used: language_model.model.rotary"):
        BagelPolicy.load(folder)


@pytest.mark.filterwarnings("always")
def test_the_command_line_warns_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {f"language_model.model.odd{i}": torch.ones(2) for i in range(5)}
    rewrite(folder, lambda state: state.update(odd))
    make = ["generate", str(folder), "--prompt", "a", "--num-steps", "1", "--device", "cpu", "--out"]
    assert main([*make, str(folder / "out")]) == 0
    names = "language_model.model.odd0, language_model.model.odd1, language_model.model.odd2 and 2 more"
    assert capsys.readouterr().err == f"warning: {folder}: 5 tensors are not used: {names}\n"


def test_the_last_layer_of_a_whole_reading_tower_is_left_out(folder: Path, small: BagelPolicy) -> None:
    repeat_layer(folder, "vit_model.vision_model.encoder.layers.", 1, 2)
    with pytest.warns(UserWarning, match=r"16 tensors are not used: vit_model\S+layers\.2") as warned:
        loaded = BagelPolicy.load(folder)
    assert len(warned) == 1
    assert same(loaded, small)


def test_files_have_the_rights_of_any_other(small: BagelPolicy, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        small.save(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


def test_a_folder_with_tokenizer_json_alone_keeps_its_ids(folder: Path, small: BagelPolicy) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    words = BagelPolicy.load(folder).tokenizer
    assert words.encode("two red circles, it's 2") == small.tokenizer.encode("two red circles, it's 2")
    assert list(words.files) == ["tokenizer.json"]


def test_transformers_reads_the_tokenizer_of_a_fresh_model(small: BagelPolicy, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small.tokenizer.save(tmp_path)
    texts = [
        "two red circles",
        "it's 2 + 40,  No?\n\n  x",
        "e\u0301 \u00dcn\u00efcode \u732b 12345\r\n",
    ]
    for _ in range(2):
        theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
        ours = BagelTokenizer.load(tmp_path, small.config.vocabulary_size)
        for text in texts:
            ids = small.tokenizer.encode(text)
            split = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert split == ours.encode(text) == ids
        marker = theirs.encode("<|im_start|>", add_special_tokens=False)
        assert len(marker) == 1
        assert not set(marker) & set(ours.encode("<|im_start|>a"))  # in a text it is plain text
        assert theirs.eos_token_id == small.tokenizer.eos_id
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)  # once more from vocab.json and merges.txt alone


def test_another_folder_is_no_bagel(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is no BAGEL"):
        BagelPolicy.load(tmp_path)


def test_too_little_memory_is_said_before_the_load(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 100_000

    monkeypatch.setattr(policy_module.psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(safetensors_reader.StoredTensor, "read", lambda *_: pytest.fail("read before the estimate"))
    with pytest.raises(InputError, match=r"the weights need 0\.0 GiB on cpu, 0\.0 GiB are free: load in bfloat16"):
        BagelPolicy.load(saved)
