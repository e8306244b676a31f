"""A whole run on free text that an endpoint splits and judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from lvrpo.config import load_config
from lvrpo.errors import ContractError
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.training import rollout_log
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer

KEY = "a-hidden-word"


def answer(body: dict[str, Any]) -> str:
    """Questions of a prompt; of an image, an answer that depends on its bytes."""
    content = body["messages"][0]["content"]
    if content[0]["type"] == "text":
        return "is there a circle? yes\nis it red? yes"
    return "yes" if crc32(content[0]["image_url"]["url"].encode()) % 2 else "no"


pytestmark = pytest.mark.filterwarnings("ignore:data.jsonl.validation is not set")


@pytest.fixture
def config(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    sizes = MoTConfig(width=32, depth=1, heads=2, key_heads=2, mlp_width=32)
    words = ("draw", "a", "red", "circle")
    policy = TinyPolicy.from_vocabulary(TinyConfig(image_size=16, tower_width=16, transformer=sizes), words)
    for parameter in policy.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # a fresh policy draws one image only
    policy.save(tmp_path / "policy")
    rows = [{"task": "generate", "prompt": prompt} for prompt in ("a red circle", "draw a circle")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server.answer = answer
    endpoint = server.options(key_env="JUDGE_KEY")
    split = {"by": "endpoint", "endpoint": endpoint, "cache": str(tmp_path / "cache")}
    reward = {"name": "vlm_endpoint", "options": {"endpoint": endpoint, "questions": split}, "max_failed": 0.5}
    settings = (
        f"policy={tmp_path / 'policy'}",
        f"data={{source: jsonl, jsonl: {{train: {tmp_path / 'rows.jsonl'}}}, prompts_per_step: {{generate: 2}}}}",
        "rollout={group_size: 8, num_steps: 2}",
        f"rewards={json.dumps([reward])}",
        "steps=1",
        "device=cpu",
    )
    return load_config(TrainConfig, None, list(settings))


def test_an_endpoint_judges_a_run_and_its_key_is_nowhere(config: TrainConfig, server: Any, tmp_path: Path) -> None:
    alignment = Trainer.start(config, tmp_path / "run")
    assert alignment.train()
    alignment.run.close()
    (row,) = [row for row in alignment.run.metrics() if "reward/generate/vlm_endpoint" in row]
    assert 0 < row["reward/generate/vlm_endpoint"] < 1
    assert set(server.keys) == {f"Bearer {KEY}"}
    splits = [body for body in server.bodies if body["messages"][0]["content"][0]["type"] == "text"]
    assert len(splits) == 2  # of two prompts, judged in the contract, the step and the control
    judge = f"judge-1 at {server.url}, temperature 0.0, 256 tokens"
    samples = [json.loads(line) for path in tmp_path.rglob("groups.jsonl") for line in path.read_text().splitlines()]
    assert samples
    who = f"{judge}; questions by {judge}"
    assert all(row["judged_by"] == {"vlm_endpoint": who} for row in samples)
    (record,) = rollout_log.read_steps(alignment.run.path)
    assert record.judged_by == (who,)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_a_dead_endpoint_stops_the_run(config: TrainConfig, server: Any, tmp_path: Path) -> None:
    server.answer = lambda body: (503, "")
    alignment = Trainer.start(config, tmp_path / "run")
    with pytest.raises(ContractError, match=r"'vlm_endpoint' failed on 16 of 16 outputs, max_failed=0.5: .*HTTP 503"):
        alignment.train()
    alignment.run.close()
