"""Servers that drip, flood and refuse: each answer has an end, in time and in bytes."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lvrpo.errors import InputError
from lvrpo.rewards import endpoint
from lvrpo.rewards.endpoint import ChatEndpoint, EndpointConfig, NoAnswer

pytest.importorskip("tenacity")
pytest.importorskip("httpx2")

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
Speak = Callable[[socket.socket, threading.Event], None]


class RawServer:
    """Reads a request and then says whatever it is told to, byte by byte."""

    def __init__(self, speak: Speak) -> None:
        self.stop, self.connections = threading.Event(), 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"
        self.speak = speak
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            connection.recv(65536)
            self.speak(connection, self.stop)
        except OSError:
            pass  # the client has left
        finally:
            connection.close()


@pytest.fixture
def raw() -> Iterator[Callable[[Speak], RawServer]]:
    servers: list[RawServer] = []

    def start(speak: Speak) -> RawServer:
        servers.append(RawServer(speak))
        return servers[-1]

    yield start
    for server in servers:
        server.stop.set()
        server.listening.close()


def asked(url: str, **changes: Any) -> Any:
    options = {"base_url": url, "model": "m", "backoff_s": 0.001, "retries": 0, "timeout_s": 0.3} | changes
    return ChatEndpoint(EndpointConfig.model_validate(options)).ask([("q",)])[0]


def drip(before: bytes, byte: bytes) -> Speak:
    def speak(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(before)
        while not stop.wait(0.05):
            connection.sendall(byte)

    return speak


DRIPS = {
    "nothing at all": drip(b"", b""),
    "status line": drip(b"HTTP/1.1 ", b" "),
    "headers": drip(HEAD + b"x-drip: ", b"x"),
    "body of a length": drip(HEAD + b"content-length: 100000\r\n\r\n", b" "),
    "chunks": drip(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "body to the end": drip(HEAD + b"connection: close\r\n\r\n{", b" "),
    "an error's body": drip(b"HTTP/1.1 500 Oh\r\ncontent-length: 100000\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("name", DRIPS)
def test_a_server_that_drips_is_given_up(name: str, raw: Any) -> None:
    started = time.monotonic()
    assert asked(raw(DRIPS[name]).url) == NoAnswer("no answer within 0.3 s (1 tries)")
    assert time.monotonic() - started < 5  # without the limit it goes on until the test ends


def flood(before: bytes, chunk: bytes) -> Speak:
    def speak(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(before)
        while not stop.is_set():
            connection.sendall(chunk)

    return speak


FLOODS = {
    "plain": flood(HEAD + b"connection: close\r\n\r\n", b"x" * 65536),
    "chunks": flood(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "packed": flood(HEAD + b"content-encoding: gzip\r\nconnection: close\r\n\r\n", gzip.compress(b"\0" * 2**28, 1)),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_server_that_floods_is_given_up(name: str, raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.post, "__defaults__", (2**20,))
    tracemalloc.start()
    try:
        assert asked(raw(FLOODS[name]).url, timeout_s=20) == NoAnswer("an answer of more than 1 MiB (1 tries)")
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_packed_answer_is_read(server: Any) -> None:
    def speak(connection: socket.socket, stop: threading.Event) -> None:
        body = gzip.compress(b'{"choices": [{"message": {"content": "yes"}}]}')
        connection.sendall(HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    plain = RawServer(speak)
    assert asked(plain.url) == "yes"
    plain.listening.close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_decided_at_the_first_request(status: int, server: Any) -> None:
    endpoint = ChatEndpoint(EndpointConfig.model_validate(server.options(workers=8)))
    server.replies = [(status, "")]
    with pytest.raises(InputError, match=f"HTTP {status}"):
        endpoint.ask([("q",)] * 30)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_after_good_answers_is_one_failure(status: int, server: Any) -> None:
    endpoint = ChatEndpoint(EndpointConfig.model_validate(server.options(workers=1)))
    server.replies = ["yes", "yes", (status, ""), "no"]
    refused = NoAnswer(f"HTTP {status}: refused after other requests were answered")
    assert endpoint.ask([("q",)] * 4) == ["yes", "yes", refused, "no"]
    server.replies = [(status, "")]
    found = endpoint.ask([("q",)] * 10)
    assert found == [refused] * 2 + [NoAnswer("not asked: the endpoint failed 2 times in a row")] * 8


def test_no_redirect_is_followed(server: Any) -> None:
    server.headers = {"location": server.url}
    server.replies = [(302, "elsewhere")]
    assert asked(server.url) == NoAnswer("HTTP 302: elsewhere")
    assert len(server.bodies) == 1
