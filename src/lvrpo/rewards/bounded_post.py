"""One request over HTTP with a limit of time and a limit of bytes for the whole answer, headers included.

The timeouts of an HTTP client are for one pause each, so that a server which sends a byte now and then is waited for
without end. Here a timer shuts the connection down; for that each request has a connection of its own.
"""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

MOST_BYTES = 8 * 2**20
"""Of an answer, unpacked; the longest that a chat model writes is a hundredth of it."""
HEADERS = {"Accept-Encoding": "gzip, deflate"}
"""What ``post`` can unpack with a bound."""


class LateError(Exception):
    """The answer was not whole in time."""


class UnreadableError(Exception):
    """The answer is too long, or packed in a way that cannot be undone; the message says which."""


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def text(self) -> str:
        """Bytes that are no UTF-8 become a replacement character."""
        return self.content.decode("utf-8", errors="replace")


def post(client: Any, url: str, body: Any, seconds: float, most_bytes: int = MOST_BYTES) -> Reply:
    """Sends JSON and returns the whole answer. Any: an optional package's client, and JSON.

    The client must keep no connections. Raises LateError, UnreadableError, and what the client raises.
    """
    with _Deadline(seconds) as deadline:
        try:
            with client.stream("POST", url, json=body, extensions={"trace": deadline.watch}) as response:
                content = _unpacked(response.iter_raw(), response.headers.get("content-encoding", ""), most_bytes)
        except Exception:
            if deadline.over:  # what it met is our own doing
                raise LateError from None
            raise
        if deadline.over:
            raise LateError
    return Reply(response.status_code, response.headers, content)


class _Deadline:
    """Shuts a connection down when its time is over, which ends every wait for it."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def watch(self, event: str, info: Mapping[str, Any]) -> None:
        """The client calls it at every stage of a request; new connections are remembered. Any: its streams."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            if self.over:
                self._shut()

    def _end(self) -> None:
        self.over = True
        self._shut()

    def _shut(self) -> None:
        with self._lock:
            if self._socket is not None:
                with suppress(OSError):  # closed already
                    self._socket.shutdown(socket.SHUT_RDWR)


def _unpacked(chunks: Iterable[bytes], encoding: str, most_bytes: int) -> bytes:
    """The bytes of an answer, of which never more than the bound are in memory."""
    plain = encoding.strip().lower() in ("", "identity")
    if not plain and encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        raise UnreadableError("an answer that cannot be decoded")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its head says
    content = bytearray()
    try:
        for chunk in chunks:
            content += chunk if plain else unpack.decompress(chunk, most_bytes + 1 - len(content))
            if len(content) > most_bytes:
                raise UnreadableError(f"an answer of more than {most_bytes / 2**20:g} MiB")
    except zlib.error:
        raise UnreadableError("an answer that cannot be decoded") from None
    if not plain and content and not unpack.eof:
        raise UnreadableError("an answer that cannot be decoded")
    return bytes(content)
