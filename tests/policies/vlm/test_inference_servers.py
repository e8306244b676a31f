"""Stubs with the interfaces of vLLM and SGLang, around copies of the policy: runs sample on them as on the policy."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lvrpo.config import load_config, shipped_configs
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.image_text_to_text import ImageTextToTextPolicy, ReadPrompt
from lvrpo.policies.loading import load_policy
from lvrpo.training import inference_servers
from lvrpo.training.config import TrainConfig
from lvrpo.training.inference_servers import SERVERS, ServerEngineConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer
from lvrpo.types import Prompt, TextSegment

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")
pytestmark = pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)


def image(url: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


class Stub:
    """Answers as a server does, by sampling from the policies that it was told to load."""

    def __init__(self, base: Path) -> None:
        self.models: dict[str, ImageTextToTextPolicy] = {"": self.open(base)}
        self.loads: list[str] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.change: Callable[[Any], Any] = lambda reply: reply
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.calls.append((self.path, body))
                    status, reply = stub.reply(self.path, body)
                content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def open(folder: Path | str) -> ImageTextToTextPolicy:
        policy = load_policy(folder, "cpu")
        assert isinstance(policy, ImageTextToTextPolicy)
        return policy

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        match path.removeprefix("/v1"):
            case "/load_lora_adapter":
                if body["lora_name"] in self.models:
                    return 400, "is loaded already"
                self.models[body["lora_name"]] = self.open(body["lora_path"])
                self.loads.append(body["lora_name"])
                return 200, "Success"
            case "/unload_lora_adapter":
                return (200, "Success") if self.models.pop(body["lora_name"], None) else (404, "not found")
            case "/update_weights_from_disk":
                self.models[""] = self.open(body["model_path"])
                self.loads.append("")
                return 200, self.change({"success": True, "message": ""})
            case "/chat/completions":
                return 200, self.change(self.chat(body))
            case "/generate":
                return 200, self.change(self.generate(body))
        return 404, "no such path"

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        policy = self.models[body["model"]]
        parts = tuple(
            item["text"]
            if item["type"] == "text"
            else torch.from_numpy(np.array(image(item["image_url"]["url"]))).permute(2, 0, 1) / 255
            for item in body["messages"][0]["content"]
        )
        read = policy.read_prompt(Prompt("p", "understand", parts, ("text",)))
        choices = [
            {"index": i, "token_ids": s.tokens.tolist(), "logprobs": {"content": [{"logprob": x} for x in logprobs(s)]}}
            for i, s in enumerate(self.sample(policy, read, body, body["n"], body["max_tokens"]))
        ]
        return {"prompt_token_ids": read.ids.tolist(), "choices": choices[::-1]}

    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        policy, settings = self.models[body.get("lora_path", "")], body["sampling_params"]
        images = [image(url) for url in body.get("image_data", [])]
        made = dict(policy.chat.processor(text=[body["text"]], images=images or None, return_tensors="pt"))
        ids, _ = made.pop("input_ids"), made.pop("attention_mask")
        kinds = {name: made.pop(name)[0] for name, value in [*made.items()] if value.shape == ids.shape}
        if not kinds:  # a processor leaves them out where there is no image
            kinds = {name: torch.zeros_like(ids[0]) for name in policy.chat.read(("a",)).kinds}
        read = ReadPrompt((), ids[0], kinds, made)
        return [
            {
                "text": s.text,
                "meta_info": {
                    "prompt_tokens": len(read.ids),
                    "output_token_logprobs": [
                        [x, i, None] for x, i in zip(logprobs(s), s.tokens.tolist(), strict=True)
                    ],
                },
            }
            for s in self.sample(policy, read, settings, settings["n"], settings["max_new_tokens"])
        ]

    @staticmethod
    def sample(
        policy: ImageTextToTextPolicy, read: ReadPrompt, settings: dict[str, Any], n: int, longest: int
    ) -> list[TextSegment]:
        sampling = Sampling(group_size=n, temperature=settings["temperature"], max_new_tokens=longest)
        seed = settings["seed"] if "seed" in settings else settings["sampling_seed"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "read_prompt", lambda prompt: read)
            group = policy.sample([Prompt("p", "understand", ("x",), ("text",))], sampling, [seed])[0]
        segments = [trajectory.segments[0] for trajectory in group.trajectories]
        return [segment for segment in segments if isinstance(segment, TextSegment)]


def logprobs(segment: TextSegment) -> list[float]:
    return segment.behavior_logprobs.tolist()


@pytest.fixture
def stub(folder: Path) -> Iterator[Stub]:
    made = Stub(folder)
    yield made
    made.server.shutdown()
    made.server.server_close()


def settings_of(folder: Path, stub: Stub, kind: str, *more: str) -> TrainConfig:
    return load_config(
        TrainConfig,
        shipped_configs()["qwen3_vl_2b"],
        [
            f"policy={folder}",
            "device=cpu",
            "precision.compute=null",
            "data.prompts_per_step={generate: 0, understand: 2, edit: 0, reason: 2}",
            "data.scenes.size=32",
            "rollout.group_size=4",
            "rollout.max_new_tokens=6",
            f"rollout.engine={{kind: {kind}, url: '{stub.url}'}}",
            "rewards=[{name: 'spread:Spread'}]",
            "allow_code=[spread]",
            "optimizer.warmup_steps=0",
            "optimizer.adamw_lr=1e-2",
            "validation={every: 2, prompts: {understand: 2, reason: 1}}",
            "steps=2",
            *more,
        ],
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize(
    ("kind", "adapter"), [("vllm", "adapter={rank: 2}"), ("sglang", "adapter={rank: 2}"), ("sglang", "adapter=null")]
)
def test_a_run_samples_on_the_server_with_its_newest_weights(folder: Path, stub: Stub, kind: str, adapter: str) -> None:
    if adapter != "adapter=null":
        pytest.importorskip("peft")
    trainer = Trainer.start(settings_of(folder, stub, kind, adapter), Path("run"))
    with trainer.run:
        assert trainer.train()
    checks = {check["check"]: check for check in json.loads(Path("run/contract.json").read_text())}
    divergence = checks["rollout engine, text: divergence"]
    assert divergence["ok"]
    assert divergence["value"] < 1e-9  # the same tokens and the same distribution
    rows = RunDirectory.read(Path("run")).metrics()[1:]
    assert all(abs(row["importance/text"] - 1) < 1e-4 for row in rows)  # also after an update
    assert len(stub.loads) == 2  # before the contract and after the first update
    if adapter != "adapter=null":
        assert set(stub.models) == {"", stub.loads[-1]}  # the older ones are unloaded


def test_a_server_samples_ahead_and_not_again_after_a_resume(folder: Path, stub: Stub) -> None:
    """The third step is sampled with the weights of before the second update, so its importance weights are not 1."""
    ahead = ("steps=3", "checkpoint_every=1", "rollout.steps_ahead=1")
    trainer = Trainer.start(settings_of(folder, stub, "sglang", *ahead), Path("run"))
    with trainer.run:
        trainer.train(interrupted=lambda: trainer.state.step == 2)
    importance = [row["importance/text"] for row in RunDirectory.read(Path("run")).metrics()[1:]]
    assert importance[0] == pytest.approx(1, abs=1e-4)
    asked = len([path for path, _ in stub.calls if path == "/generate"])
    trainer = Trainer.resume(Path("run"))
    with trainer.run:
        assert trainer.train()
    assert asked == len([path for path, _ in stub.calls if path == "/generate"])
    importance = [row["importance/text"] for row in RunDirectory.read(Path("run")).metrics()[1:]]
    assert len(importance) == 3
    assert abs(importance[2] - 1) > 1e-4


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_groups_are_what_the_server_sampled(
    folder: Path, vlm: ImageTextToTextPolicy, prompts: list[Prompt], stub: Stub, kind: str
) -> None:
    engine = SERVERS[kind](vlm, ServerEngineConfig(kind=kind, url=stub.url))  # pyright: ignore[reportArgumentType]
    sampling = Sampling(group_size=3, temperature=0.7, max_new_tokens=5)
    groups = engine.sample(prompts, sampling, list(range(len(prompts))))
    engine.close()
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.prompt is prompt
        assert [t.member for t in group.trajectories] == [0, 1, 2]
        for trajectory, replayed in zip(group.trajectories, vlm.logprobs(group.trajectories), strict=True):
            segment = trajectory.segments[0]
            assert isinstance(segment, TextSegment)
            assert segment.temperature == 0.7
            torch.testing.assert_close(segment.behavior_logprobs, replayed[0].logprobs, atol=1e-5, rtol=0)
    assert {path for path, _ in stub.calls} == {"/v1/chat/completions" if kind == "vllm" else "/generate"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vllm", lambda reply: {**reply, "prompt_token_ids": [1, 2]}, "read a prompt as 2 tokens and the trainer as"),
        ("vllm", lambda reply: {**reply, "choices": [{"index": 0}]}, "a response of vLLM lacks 'token_ids'"),
        ("vllm", lambda reply: [], "a response of vLLM lacks"),
        ("sglang", lambda reply: [{"meta_info": {"prompt_tokens": 1}}], "read a prompt as 1 tokens"),
        ("sglang", lambda reply: [{"text": "yes"}], "a response of SGLang lacks 'meta_info'"),
        ("sglang", lambda reply: "no JSON", "a response of SGLang lacks"),
    ],
)
def test_a_server_of_another_model_or_version_is_one_line(
    vlm: ImageTextToTextPolicy, prompts: list[Prompt], stub: Stub, kind: str, change: Callable[[Any], Any], message: str
) -> None:
    stub.change = change
    engine = SERVERS[kind](vlm, ServerEngineConfig(kind=kind, url=stub.url))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ContractError, match=message) as caught:
        engine.sample(prompts[:1], Sampling(group_size=2, max_new_tokens=4), [0])
    engine.close()
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_or_refuses_is_one_line(
    vlm: ImageTextToTextPolicy, prompts: list[Prompt], stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_servers, "TRIES", 1)
    engine = SERVERS["sglang"](vlm, ServerEngineConfig(kind="sglang", url=f"{stub.url}/other"))
    with pytest.raises(ContractError, match=r"other/generate: HTTP 404: no such path$"):
        engine.sample(prompts[:1], Sampling(group_size=2), [0])
    engine.close()
    stub.server.shutdown()
    stub.server.server_close()
    engine = SERVERS["vllm"](vlm, ServerEngineConfig(kind="vllm", url=stub.url))
    with pytest.raises(ContractError, match=r"start it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE"):
        engine.sample(prompts[:1], Sampling(group_size=2), [0])
    engine.close()


def test_a_late_answer_is_not_waited_for_again(vlm: ImageTextToTextPolicy, prompts: list[Prompt], stub: Stub) -> None:
    config = ServerEngineConfig(kind="sglang", url=stub.url, timeout_s=0.3)
    engine = SERVERS["sglang"](vlm, config)
    with stub.lock, pytest.raises(ContractError, match=r"/generate: no response within 0.3 s$"):
        engine.sample(prompts[:1], Sampling(group_size=2), [0])
    engine.close()
    assert len(stub.calls) <= 1


def test_weights_that_the_server_did_not_load_stop_the_run(vlm: ImageTextToTextPolicy, stub: Stub) -> None:
    stub.change = lambda reply: {"success": False, "message": "shapes do not fit"}
    engine = SERVERS["sglang"](vlm, ServerEngineConfig(kind="sglang", url=stub.url))
    with pytest.raises(ContractError, match=r"SGLang did not load the weights: .*shapes do not fit"):
        engine.load_weights(dict(vlm.named_parameters()))
    engine.close()


def test_bad_settings_are_one_line(folder: Path, stub: Stub, small_base: Path) -> None:
    with pytest.raises(InputError, match=r"kind=vllm: takes new weights as a LoRA adapter only: set adapter"):
        settings_of(folder, stub, "vllm", "adapter=null")
    for url in ("localhost:8000", "http://user@host", "ftp://host", "http://"):
        with pytest.raises(InputError, match=r"url.*must be http"):
            settings_of(folder, stub, "sglang", f"rollout.engine.url='{url}'")
    with pytest.raises(
        InputError, match="samples answers of image-text-to-text models, and the policy is a TinyPolicy"
    ):
        SERVERS["sglang"](load_policy(small_base), ServerEngineConfig(kind="sglang", url=stub.url))
