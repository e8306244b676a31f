"""A stub with the interface of SGLang-Diffusion 0.5.23, around a copy of the policy: runs draw on it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from lvrpo.config import load_config, shipped_configs
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.sampling import guide
from lvrpo.training.config import TrainConfig
from lvrpo.training.image_server import SGLangDiffusionServer
from lvrpo.training.inference_servers import ServerEngineConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer
from lvrpo.types import Prompt

msgpack = pytest.importorskip("msgpack")
pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

DRAWS = Sampling(
    2, num_steps=2, guidance_scale=2.0, guidance_renorm="channel_match", solver="euler", image_size=(32, 32)
)


def packed(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as the server sends it."""
    data = save({"t": tensor.contiguous()})
    return {"__tensor__": True, "data": data, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}


class Stub:
    """Answers as the server does, by the ODE of the policy that it was told to load."""

    def __init__(self, base: Path) -> None:
        self.base, self.policy = base, self.open(base)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.loads = True
        self.change: Callable[[list[dict[str, Any]]], Any] = lambda reply: reply
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.calls.append((self.path, body))
                    content = stub.reply(self.path, body)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def open(folder: Path | str) -> DiffusersPolicy:
        policy = load_policy(folder, "cpu")
        assert isinstance(policy, DiffusersPolicy)
        return policy

    def reply(self, path: str, body: dict[str, Any]) -> bytes | None:
        match path:
            case "/update_weights_from_disk":
                assert body["target_modules"] == ["transformer"]
                (file,) = Path(body["model_path"], "transformer").glob("*.safetensors")
                if self.loads:
                    self.policy.transformer.load_state_dict(load_file(file))
                return b'{"success": true, "message": "updated"}'
            case "/v1/set_lora":
                assert Path(body["lora_path"], "adapter_config.json").exists()
                self.policy = self.open(body["lora_path"])
                return b'{"status": "ok"}'
            case "/rollout/generate":
                return msgpack.packb(self.change(self.generate(body)))
        return None

    @torch.no_grad()
    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        assert body["rollout"]
        assert (body["rollout_sde_type"], body["rollout_log_prob_no_const"]) == ("ode", True)
        policy, scale = self.policy, body["guidance_scale"]
        grid = policy.latent_grid((body["height"], body["width"]))
        times = policy.times(Sampling(num_steps=body["num_inference_steps"]), grid)
        row, empty = (body["prompt"], None), (body.get("negative_prompt"), None)
        replies = []
        for i in range(body["num_outputs_per_prompt"]):
            generator = torch.Generator().manual_seed(body["seed"] + i)
            states = [torch.randn(1, *policy.latent_shape(grid), generator=generator)]
            for t, t_next in pairwise(times):
                v = policy.flow([row], states[-1], t[None], grid, scale)
                if scale != 1 and policy.two_branches:
                    v = guide(
                        v, policy.flow([empty], states[-1], t[None], grid, 1.0), None, scale, 1.0, "channel_match", 0.0
                    )
                states.append(states[-1] + (t_next - t) * v)
            kept = torch.cat([states[k] for k in body["rollout_return_step_indices"]])
            trajectory = {"latents": packed(kept), "timesteps": packed(times[:-1] * 1000), "sigmas": packed(times)}
            pixels = packed(policy.decode_latents(states[-1], grid)[0])
            replies.append(
                {
                    "request_id": "r",
                    "prompt": body["prompt"],
                    "seed": body["seed"],
                    "generated_output": pixels,
                    "rollout_log_probs": packed(torch.zeros(len(times) - 1)),
                    "dit_trajectory": trajectory,
                }
            )
        return replies


@pytest.fixture
def stub(folders: Callable[[str], Path]) -> Iterator[Stub]:
    found = Stub(folders("qwen-image-tiny"))
    yield found
    found.server.shutdown()
    found.server.server_close()


def engine_of(policy: DiffusersPolicy, stub: Stub) -> SGLangDiffusionServer:
    return SGLangDiffusionServer(policy, ServerEngineConfig(kind="sglang", url=stub.url))


def weights_of(policy: DiffusersPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", ["null", "{rank: 2}"])
def test_a_run_draws_on_the_server_with_its_own_weights(adapter: str, stub: Stub) -> None:
    settings = [
        f"policy={stub.base}",
        "device=cpu",
        f"adapter={adapter}",
        "precision.compute=null",
        "limits.gradient_checkpointing=false",
        "data.prompts_per_step={generate: 2, understand: 0, edit: 0, reason: 0}",
        "rollout={group_size: 4, num_steps: 2, solver: euler, guidance_scale: 1}",
        "rollout.image_size=[32, 32]",
        "rollout.sampler=ode",
        "rollout.guided_logprobs=joint",
        f"rollout.engine={{kind: sglang, url: '{stub.url}'}}",
        "flow={kind: nft, top_bottom_k: 2}",
        "rewards=[{name: 'spread:Spread'}]",
        "allow_code=[spread]",
        "validation={every: 2, prompts: {generate: 1}}",
        "reference_eval_every=2",
        "steps=2",
    ]
    trainer = Trainer.start(load_config(TrainConfig, shipped_configs()["sd35_medium"], settings), Path("run"))
    with trainer.run:
        assert trainer.train()
    rows = RunDirectory.read(Path("run")).metrics()[1:]
    assert len(rows) == 2
    assert all(row["grad_norm/generate"] > 0 for row in rows)
    paths = [path for path, _ in stub.calls]
    loads = "/update_weights_from_disk" if adapter == "null" else "/v1/set_lora"
    assert paths.count(loads) >= 2  # the first weights, and those after the first update
    assert paths.count("/rollout/generate") >= 2 * 2 + paths.count(loads)  # of two prompts, and a probe after each load


def test_drawings_are_those_of_the_latents(stub: Stub, policies: Callable[[str], DiffusersPolicy]) -> None:
    policy = policies("qwen-image-tiny")
    engine = engine_of(policy, stub)
    engine.load_weights(weights_of(policy))
    (group,) = engine.sample([Prompt("p", "generate", ("a red circle",), ("image",))], DRAWS, [7])
    segments: list[Any] = [t.segments[0] for t in group.trajectories]
    assert not torch.equal(segments[0].latent, segments[1].latent)
    grid = policy.latent_grid((32, 32))
    for image, segment in zip(
        policy.decode_latents(torch.stack([s.latent for s in segments]), grid), segments, strict=True
    ):
        assert torch.equal(image, segment.image)
        assert segment.trained_steps == ()
    engine.close()


def test_a_server_with_other_weights_or_other_answers_is_refused(
    stub: Stub, policies: Callable[[str], DiffusersPolicy]
) -> None:
    policy, stub.loads = policies("qwen-image-tiny"), False
    engine = engine_of(policy, stub)
    with torch.no_grad():
        for parameter in stub.policy.transformer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ContractError, match=r"a velocity of SGLang-Diffusion differs from the policy's by .* limit 0.1"
    ):
        engine.load_weights(weights_of(policy))
    prompt = Prompt("p", "generate", ("a red circle",), ("image",))

    def with_(**changes: torch.Tensor) -> Callable[[list[dict[str, Any]]], Any]:
        tensors = {name: packed(value) for name, value in changes.items()}
        return lambda reply: [one | {"dit_trajectory": one["dit_trajectory"] | tensors} for one in reply]

    for change, message in (
        (lambda reply: "no", "cannot be read"),
        (lambda reply: [one | {"dit_trajectory": None} for one in reply], "cannot be read"),
        (with_(latents=torch.zeros(1, 4, 2, 2)), "returned states of"),
        (with_(sigmas=torch.tensor([1.0, 0.9, 0.0])), "at other times"),
    ):
        stub.change = change
        with pytest.raises(ContractError, match=message) as error:
            engine.sample([prompt], DRAWS, [7])
        assert "\n" not in str(error.value)
    engine.close()


def test_what_the_server_cannot_do_is_one_line(stub: Stub, policies: Callable[[str], DiffusersPolicy]) -> None:
    with pytest.raises(InputError, match="the policy edits"):
        engine_of(policies("qwen-image-edit-tiny"), stub)
    engine = engine_of(policies("qwen-image-tiny"), stub)
    prompt = Prompt("p", "generate", ("a red circle",), ("image",))
    for field, value in (("solver", "dpm_solver"), ("timestep_shift", 2.0), ("guidance_renorm", "none")):
        with pytest.raises(InputError, match=f"rollout.{field}={value}: SGLang-Diffusion draws with"):
            engine.sample([prompt], replace(DRAWS, **{field: value}), [1])
    engine.close()
