"""A Janus's weights and files on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import change_json, change_weights, cut_off, delete, require_refused
from safetensors.torch import load_file

from lvrpo.policies.janus.create import JanusSizes, create_janus
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.loading import load_policy


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


EMBEDDING = "model.language_model.embed_tokens.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (delete("model.safetensors"), "holds no model.safetensors, the weights of a Janus"),
    "cut off": (cut_off, "model.safetensors: truncated"),
    "lacks a tensor": (change_weights(lambda s: s.pop("model.aligner.fc1.bias")), "lack model.aligner.fc1.bias (1 are"),
    "another shape": (change_weights(lambda s: s.update({EMBEDDING: torch.zeros(8, 64)})), "has shape [8, 64], "),
    "nan": (change_weights(lambda s: s[EMBEDDING].fill_(torch.nan)), f"{EMBEDDING} holds nan"),
    "another model": (
        change_json("config.json", model_type="gpt2", architectures=[]),
        "a model of type 'gpt2'",
    ),
    "its makers' layout": (
        change_json("config.json", model_type="multi_modality", architectures=[]),
        "use that of transformers, such as deepseek-community/Janus-Pro-1B",
    ),
    "another number of image tokens": (
        lambda folder: change_json(
            "config.json",
            vision_config=json.loads((folder / "config.json").read_text())["vision_config"] | {"num_image_tokens": 25},
        )(folder),
        "num_image_tokens=25: images of 32 x 32 in patches of 8 x 8 have 16",
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
    require_refused(folder, *DAMAGES[name], load_policy)
