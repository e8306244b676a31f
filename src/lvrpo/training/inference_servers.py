"""Rollout engines for text: vLLM and SGLang servers over HTTP; for images see ``image_server``.

The server runs the model of the run's base; new weights reach it through a folder. It samples answers with their
log-probs, which are compared with those of the trainer by the step-0 contract and corrected by importance weights.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

import torch
from pydantic import Field, field_validator

from lvrpo.config import Config
from lvrpo.distributed import is_main
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Policy, Sampling, announce
from lvrpo.policies.image_text_to_text import ImageTextToTextPolicy, ReadPrompt
from lvrpo.reading import parse_json
from lvrpo.rewards.endpoint import (
    HEADERS,
    LateError,
    Reply,
    UnreadableError,
    http_packages,
    image_url,
    post,
    user_message,
)
from lvrpo.sampling import derive_seed
from lvrpo.training.policies import weights_checksum
from lvrpo.training.weights_folder import WeightsFolder
from lvrpo.types import Group, Prompt, TextSegment, Trajectory

TRIES = 4
FORBIDDEN = -100.0
"""Bias of the logits of tokens that an answer must not contain."""


class Answer(NamedTuple):
    """A sampled answer."""

    ids: Sequence[int]
    """With the end token, if it was sampled."""
    logprobs: Sequence[float]


class ServerEngineConfig(Config):
    """An inference server with the model of the base; each rank sends its prompts to it."""

    kind: Literal["vllm", "sglang"]
    """vllm: takes new weights as an adapter only. sglang: as an adapter or as a whole model; SGLang-Diffusion where the
    policy is a pipeline of diffusers."""
    url: str = "http://localhost:8000"
    """Address of the server; 8000 is the port of vLLM, 30000 that of SGLang."""
    weights_folder: str | None = None
    """Folder for new weights, which the server must be able to read; null: a temporary one in shared memory, for a
    server on the same machine."""
    timeout_s: float = Field(default=600.0, gt=0, le=86_400)
    """Limit for a response: all answers to one prompt, or the loading of weights."""
    workers: int = Field(default=64, ge=1, le=4096)
    """Concurrent requests of each rank."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise ValueError("must be http(s)://HOST[:PORT], such as http://localhost:8000")
        return url.rstrip("/")


class EngineClient:
    """The client of a server with the model of the base: its address, and a folder from which it loads new weights."""

    name: ClassVar[str]
    command: ClassVar[str]
    """The command that starts such a server."""
    most_bytes: ClassVar[int] = 2**28
    """Limit of a response: a group of 64 answers of 4,096 tokens has 30 MB."""

    def __init__(self, config: ServerEngineConfig) -> None:
        self.config = config
        self._http, self._tenacity = http_packages()
        limits = self._http.Limits(max_connections=config.workers, max_keepalive_connections=0)
        self._client = self._http.Client(timeout=config.timeout_s, headers=HEADERS, limits=limits)
        self._folder = WeightsFolder(config.weights_folder, 0o755)  # the server may run as another user

    def close(self) -> None:
        """Closes the connections; the server goes on."""
        self._client.close()
        self._folder.close()

    def _update_weights(self, folder: Path, **options: Any) -> None:
        """SGLang's request to load the model of a folder; raises ContractError. Any: JSON values."""
        body = {"model_path": str(folder), "flush_cache": True, **options}
        reply = self._request("/update_weights_from_disk", body)
        if not isinstance(reply, dict) or reply.get("success") is not True:
            raise ContractError(f"rollout engine: {self.name} did not load the weights: {str(reply)[:200]}")

    def _request(self, path: str, body: Mapping[str, Any], accept: Collection[int] = ()) -> Any:
        """Posts JSON and returns the response's, None for a status in ``accept``. Any: JSON values."""
        reply = self._send(path, body, accept)
        try:
            return None if reply is None else parse_json(reply.text, path)
        except InputError:
            return None if reply is None else reply.text  # of a request that has no result

    def _send(self, path: str, body: Mapping[str, Any], accept: Collection[int] = ()) -> Reply | None:
        """Posts JSON and returns the response, None for a status in ``accept``.

        Broken connections and statuses of 500 and above are tried again. Raises ContractError.
        """
        http, tenacity, url = self._http, self._tenacity, self.config.url + path
        passing = (http.TransportError, UnreadableError, _BusyError)
        late = (LateError, http.TimeoutException)  # some are TransportErrors
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential(max=10),
            retry=tenacity.retry_if_exception_type(passing) & tenacity.retry_if_not_exception_type(late),
            reraise=True,
        )
        try:
            reply = retrying(self._post, url, body)
        except late:
            raise ContractError(f"rollout engine: {url}: no response within {self.config.timeout_s:g} s") from None
        except passing as error:
            why = " ".join(str(error).split()) or type(error).__name__
            remedy = "see its log" if isinstance(error, _BusyError) else f"start it with: {self.command}"
            raise ContractError(f"rollout engine: {url}: {why[:200]}: {remedy}") from None
        if reply.status in accept:
            return None
        if reply.status != 200:
            raise ContractError(f"rollout engine: {url}: HTTP {reply.status}: {' '.join(reply.text.split())[:200]}")
        return reply

    def _post(self, url: str, body: Mapping[str, Any]) -> Reply:
        reply = post(self._client, url, body, self.config.timeout_s, self.most_bytes)
        if reply.status >= 500:
            raise _BusyError(f"HTTP {reply.status}: {reply.text}")
        return reply


class InferenceServer(EngineClient, ABC):
    """Samples answers on a server and sends it new weights; see ``RolloutEngine``."""

    def __init__(self, policy: Policy, config: ServerEngineConfig) -> None:
        """``policy``: the trained policy. Raises InputError for one that is no image-text-to-text model."""
        if not isinstance(policy, ImageTextToTextPolicy):
            raise InputError(
                f"rollout.engine.kind={config.kind}: samples answers of image-text-to-text models, and the policy is "
                f"a {type(policy).__name__}: use rollout.engine.kind=process or policy"
            )
        super().__init__(config)
        self.policy = policy
        self.adapter = ""
        """Name of the loaded adapter; "" for the whole model."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        """Loads the policy's current weights into the server; see ``RolloutEngine.load_weights``.

        Rank 0 sends them, before the other ranks leave ``Policies.use``. A server does not report its weights: the
        returned checksum is that of the sent ones, and the divergence of log-probs verifies them.
        """
        checksum = weights_checksum(weights)
        before, self.adapter = self.adapter, f"lvrpo-{checksum[:16]}" if self.policy.adapter is not None else ""
        if is_main():
            folder = self._folder.path / checksum[:16]
            self.policy.save(folder)
            if self.policy.adapter is None:
                self._load_model(folder)
            else:
                self._request(self.unload_path, {"lora_name": self.adapter}, accept=(400, 404))  # of a stopped run
                self._request(self.load_path, {"lora_name": self.adapter, "lora_path": str(folder)})
                if before and before != self.adapter:
                    self._request(self.unload_path, {"lora_name": before}, accept=(400, 404))
            shutil.rmtree(folder)
        return checksum

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """A group of answers per prompt, one request each; see ``RolloutEngine.sample``."""
        policy = self.policy
        read = [policy.read_prompt(prompt) for prompt in prompts]
        for prompt in prompts:
            policy.check_prompt(prompt, sampling)
        groups = []
        with ThreadPoolExecutor(min(self.config.workers, max(1, len(prompts)))) as pool:
            answers = pool.map(lambda one, seed: self._sample(one, sampling, seed), read, seeds)
            for prompt, seed, group in zip(prompts, seeds, answers, strict=True):
                members = [
                    Trajectory(prompt, m, (self._segment(answer, sampling),), derive_seed(seed, m))
                    for m, answer in enumerate(group)
                ]
                announce(members)
                groups.append(Group(prompt, tuple(members)))
        return groups

    load_path: ClassVar[str]
    unload_path: ClassVar[str]

    @abstractmethod
    def _load_model(self, folder: Path) -> None: ...

    @abstractmethod
    def _sample(self, prompt: ReadPrompt, sampling: Sampling, seed: int) -> list[Answer]: ...

    def _segment(self, answer: Answer, sampling: Sampling) -> TextSegment:
        if len(answer.ids) != len(answer.logprobs) or not answer.ids:
            raise ContractError(
                f"rollout engine: {self.name} gave {len(answer.logprobs)} log-probs for {len(answer.ids)} tokens"
            )
        return replace(
            self.policy.make_segment(answer.ids, sampling.temperature), behavior_logprobs=torch.tensor(answer.logprobs)
        )

    def _forbidden(self) -> dict[str, float]:
        """Biases of the tokens that an answer must not contain, by id."""
        return {str(i): FORBIDDEN for i in (~self.policy.allowed).nonzero()[:, 0].tolist()}

    def _require_same_prompt(self, wanted: Sequence[int], found: Sequence[int]) -> None:
        """Raises ContractError where the server read other tokens than the trainer."""
        if list(wanted) != list(found):
            raise ContractError(
                f"rollout engine: {self.name} read a prompt as {len(found)} tokens and the trainer as {len(wanted)}, "
                "or as other ones: start it on the folder of the base, with its own chat template and image processor"
            )


class _BusyError(Exception):
    """A failure of the server that another try may not meet."""


class VLLMServer(InferenceServer):
    """``vllm serve`` with its OpenAI-compatible chat; adapters are replaced at run time."""

    name = "vLLM"
    command = (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank RANK "
        "--logprobs-mode processed_logprobs"
    )
    load_path, unload_path = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

    def _load_model(self, folder: Path) -> None:
        raise ContractError("rollout engine: vLLM takes new weights as an adapter only: set adapter")

    def _sample(self, prompt: ReadPrompt, sampling: Sampling, seed: int) -> list[Answer]:
        body = {
            "model": self.adapter,
            "messages": [user_message(prompt.parts)],
            "n": sampling.group_size,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": self._forbidden(),
            "stop_token_ids": sorted(self.policy.end_ids),
            "seed": seed % 2**31,
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
        }
        reply = self._request("/v1/chat/completions", body)
        with _shape_errors(self.name):
            plain = self.policy.allowed.tolist()
            wanted, found = ([i for i in ids if plain[i]] for ids in (prompt.ids.tolist(), reply["prompt_token_ids"]))
            # without the placeholders of images, which are not allowed in a text
            self._require_same_prompt(wanted, found)
            return [
                Answer(choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]])
                for choice in sorted(reply["choices"], key=lambda choice: choice["index"])
            ]


class SGLangServer(InferenceServer):
    """``sglang.launch_server`` with its native interface; adapters or the whole model are replaced at run time."""

    name = "SGLang"
    command = "python -m sglang.launch_server --model-path BASE (with an adapter: --enable-lora --max-lora-rank RANK)"
    load_path, unload_path = "/load_lora_adapter", "/unload_lora_adapter"

    def _load_model(self, folder: Path) -> None:
        self._update_weights(folder)

    def _sample(self, prompt: ReadPrompt, sampling: Sampling, seed: int) -> list[Answer]:
        body: dict[str, Any] = {
            "text": self.policy.chat.render(prompt.parts),
            "sampling_params": {
                "n": sampling.group_size,
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "logit_bias": self._forbidden(),
                "stop_token_ids": sorted(self.policy.end_ids),
                "sampling_seed": seed % 2**31,
            },
            "return_logprob": True,
        }
        if images := [image_url(part) for part in prompt.parts if not isinstance(part, str)]:
            body["image_data"] = images
        if self.adapter:
            body["lora_path"] = self.adapter
        reply = self._request("/generate", body)
        with _shape_errors(self.name):
            answers = [answer["meta_info"] for answer in (reply if isinstance(reply, list) else [reply])]
            for answer in answers[:1]:
                self._require_same_prompt(range(len(prompt.ids)), range(answer["prompt_tokens"]))
            pairs = [answer["output_token_logprobs"] for answer in answers]
            return [Answer([int(p[1]) for p in one], [float(p[0]) for p in one]) for one in pairs]


@contextmanager
def _shape_errors(name: str) -> Iterator[None]:
    """Raises ContractError where a response lacks a field."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ContractError(
            f"rollout engine: a response of {name} lacks {error}: use a version that returns token ids and log-probs"
        ) from None


SERVERS: Mapping[str, type[InferenceServer]] = {"vllm": VLLMServer, "sglang": SGLangServer}
