"""An Emu3's folder: what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import change_json, change_weights, cut_off, delete, require_refused

from lvrpo.policies.base import Sampling
from lvrpo.policies.emu3.policy import Emu3Policy
from lvrpo.policies.loading import load_policy
from lvrpo.types import Prompt


def rename_tokens(**names: str) -> Callable[[Path], None]:
    """Other names of tokens in vocabulary_map."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["vocabulary_map"] = {names.get(name, name): i for name, i in config["vocabulary_map"].items()}
        path.write_text(json.dumps(config))

    return damage


TABLE = "text_model.model.embed_tokens.weight"
HEAD = "text_model.lm_head.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (delete("model.safetensors"), "holds no model.safetensors, the weights of an Emu3"),
    "cut off": (cut_off, "model.safetensors: truncated"),
    "lacks a tensor": (change_weights(lambda s: s.pop(HEAD)), "lack lm_head.weight (1 are"),
    "another shape": (change_weights(lambda s: s.update({TABLE: torch.zeros(8, 64)})), "has shape [8, 64], "),
    "nan": (change_weights(lambda s: s[TABLE].fill_(torch.nan)), "holds nan"),
    "its makers' layout": (
        change_json("config.json", model_type="Emu3", architectures=["Emu3ForCausalLM"], auto_map={"AutoConfig": "x"}),
        "use that of transformers, such as BAAI/Emu3-Gen-hf",
    ),
    "no tokenizer": (delete("tokenizer.json"), "holds no tokenizer.json"),
    "no settings": (delete("preprocessor_config.json"), "its processor cannot be loaded"),
    "no marker": (
        change_json("tokenizer_config.json", extra_special_tokens={}, boi_token=None),
        "its processor cannot",
    ),
    "other tokens": (change_json("preprocessor_config.json", spatial_factor=16), "image tokens of 8 and of 16 pixels"),
    "fewer codes": (
        rename_tokens(**{"<|visual token 000007|>": "x"}),
        "names 63 image tokens in vocabulary_map, the autoencoder has 64",
    ),
    "no vocabulary": (change_json("config.json", vocabulary_map={}), "names 0 image tokens in vocabulary_map"),
    "no end of line": (rename_tokens(**{"<|extra_200|>": "x"}), "its tokenizer does not fit vocabulary_map"),
    "bad template": (lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "its processor refuses"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_one_line(folder: Path, name: str) -> None:
    require_refused(
        folder,
        *DAMAGES[name],
        lambda bad: load_policy(bad).sample(
            [Prompt("r", "reason", ("x",), ("text",))], Sampling(max_new_tokens=2), [0]
        ),
    )


def test_shards_and_dtypes_load_the_same(folder: Path, emu3: Emu3Policy) -> None:
    shutil.copytree(folder, "shards")
    Path("shards/model.safetensors").unlink()
    emu3.model.save_pretrained("shards", max_shard_size="500KB")
    assert Path("shards/model.safetensors.index.json").is_file()
    again = load_policy("shards")
    assert isinstance(again, Emu3Policy)
    assert all(torch.equal(emu3.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    low = Emu3Policy.load(folder, dtype=torch.bfloat16)
    assert low.compute_dtype == torch.bfloat16
    low.save(Path("low"))
    assert json.loads(Path("low/config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_without_a_chat_template_has_a_default_one(folder: Path, emu3: Emu3Policy) -> None:
    shutil.copytree(folder, "plain")
    Path("plain/chat_template.jinja").unlink()
    plain = load_policy("plain")
    assert isinstance(plain, Emu3Policy)
    assert plain.context(("a red circle",), ("text",)).ids == emu3.context(("a red circle",), ("text",)).ids
