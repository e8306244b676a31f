"""Groups of outputs made by hand, and a judge whose answers are known."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from lvrpo.types import FlowSegment, Group, Image, Parts, Prompt, Segment, TextSegment, Trajectory


def text_segment(text: str) -> TextSegment:
    return TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 1.0, text, True)


def flow_segment(image: Image) -> FlowSegment:
    none = torch.zeros(0, 1, 1)
    return FlowSegment(
        torch.zeros(1, 1), torch.zeros(2), (), none, none, torch.zeros(0), "ode", 0.0, 1.0, 1.0, "none", "mean", image
    )


def make_group(prompt: Prompt, outputs: Sequence[Sequence[str | Image]]) -> Group:
    """One member per entry of ``outputs``."""
    trajectories = []
    for member, parts in enumerate(outputs):
        segments: list[Segment] = [text_segment(p) if isinstance(p, str) else flow_segment(p) for p in parts]
        trajectories.append(Trajectory(prompt, member, tuple(segments), seed=member))
    return Group(prompt, tuple(trajectories))


class FakeJudge:
    """Answers from a table (mean of the image, question, answer) -> probability, and notes what it was asked."""

    def __init__(self, table: dict[tuple[float, str, str], float]) -> None:
        self.table = table
        self.asked: list[tuple[Parts, str]] = []

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.asked += zip(contexts, texts, strict=True)
        out = []
        for (image, question), answer in zip(contexts, texts, strict=True):
            assert isinstance(image, torch.Tensor)
            out.append(self.table[round(float(image.mean()), 3), str(question), answer])
        return torch.tensor(out).log()


@pytest.fixture
def group() -> Callable[[Prompt, Sequence[Sequence[str | Image]]], Group]:
    return make_group


@pytest.fixture
def judge() -> Callable[[dict[tuple[float, str, str], float]], FakeJudge]:
    return FakeJudge


Reply = tuple[int, str] | str | float
"""Status and body; or the text of a good answer; or how many seconds to say nothing before closing."""


def completion(text: str | None, finish: str = "stop") -> str:
    """The body of an OpenAI-compatible answer."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})


class ChatServer:
    """A chat endpoint on this machine that answers as told: by a list in turn (the last one stays), or a function."""

    def __init__(self) -> None:
        self.replies: list[Reply] = ["yes"]
        self.answer: Callable[[dict[str, Any]], Reply] | None = None
        self.headers: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers["authorization"])
                    told = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                reply = outer.answer(body) if outer.answer else told
                if isinstance(reply, float):
                    time.sleep(reply)
                    return
                status, content = (200, completion(reply)) if isinstance(reply, str) else reply
                if self.path != "/v1/chat/completions":
                    status, content = 404, "no such path"
                self.send_response(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def options(self, **changes: Any) -> dict[str, Any]:
        """An impatient client's."""
        return {"base_url": self.url, "model": "judge-1", "backoff_s": 0.001, "retries": 2, "timeout_s": 5.0} | changes

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    pytest.importorskip("tenacity")
    pytest.importorskip("httpx2")
    chat = ChatServer()
    yield chat
    chat.close()


@pytest.fixture
def finished() -> Callable[..., str]:
    return completion
