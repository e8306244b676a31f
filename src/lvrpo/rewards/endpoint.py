"""Client of an OpenAI-compatible chat endpoint (vLLM, SGLang, a provider): texts and images in, a text out.

The key comes from an environment variable that the configuration names; it is in no configuration, file or message.
"""

from __future__ import annotations

import base64
import os
import random
import re
import socket
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.images import png
from lvrpo.reading import parse_json
from lvrpo.rewards.async_scoring import cancellation
from lvrpo.rewards.secrets import is_variable_name, looks_like_secret
from lvrpo.types import Image, Parts

LONGEST_WAIT = 60.0
"""Seconds between two tries at most, also where the server asks for more."""
SHORTEST_KEY = 8
"""Characters; a shorter value is a placeholder ("EMPTY", "none") for servers that require some key."""
EXCERPT = 120
"""Characters of a server's message that a reason quotes."""
PASSING = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed later."""


class EndpointConfig(Config):
    """Address of the model, limits and retries."""

    base_url: str = Field(min_length=1)
    """Up to the version, such as http://localhost:8000/v1; /chat/completions is added."""
    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    key_env: str | None = None
    """The environment variable that holds the key; None: the server wants none."""
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """Limit for a whole answer, from connecting to the last byte."""
    retries: int = Field(default=4, ge=0, le=100)
    """After a timeout, a broken connection, statuses 429 and 5xx, an answer that is no JSON or empty."""
    backoff_s: float = Field(default=1.0, ge=0, le=3600)
    """The first wait; it doubles with every try, up to a minute, with some chance added."""
    workers: int = Field(default=8, ge=1, le=256)
    """Requests at once."""
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)
    """Longest answer; a truncated one is not used."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """Sampling temperature of the endpoint."""

    @model_validator(mode="after")
    def _address_and_key(self) -> Self:
        # messages show no value: one in a wrong place may be a key
        try:
            url = urlsplit(self.base_url)
            plain = url.scheme in ("http", "https") and url.hostname and "@" not in url.netloc
        except ValueError:
            raise ValueError("base_url: is no address: write http://HOST:PORT/v1") from None
        if not plain or url.query or url.fragment:
            raise ValueError("base_url: must be http(s)://HOST[:PORT]/PATH without user, query or key: see key_env")
        for name, value in (("base_url", self.base_url), ("model", self.model)):
            if looks_like_secret(value):
                raise ValueError(f"{name}: looks like it holds a key: put it into an environment variable: see key_env")
        if self.key_env is not None and not is_variable_name(self.key_env):
            raise ValueError(
                "key_env: must be the name of an environment variable, such as JUDGE_KEY, never the key itself"
            )
        return self


@dataclass(frozen=True)
class NoAnswer:
    """The reason why a question has no answer."""

    reason: str


Answer = str | NoAnswer


class _UnusableError(Exception):
    """An answer that the same request would give again; ``refused``: as would any other request."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class _PassingError(Exception):
    """A failure that another try may not meet."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


_chance = random.Random()
"""Of waits alone: those of a thread must not move Python's own generator."""


class _Batch:
    """State shared by the requests of one call: the number of consecutive failures after all retries."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0
        self.over = cancellation()
        self._lock = threading.Lock()

    def note(self, failed: bool) -> None:
        with self._lock:
            self.in_a_row = self.in_a_row + 1 if failed else 0
            if self.in_a_row >= self.limit:
                self.over.set()


class ChatEndpoint:
    """Asks one model; safe to use from several threads."""

    def __init__(self, config: EndpointConfig) -> None:
        """Raises InputError where the environment lacks the key, or the packages are not installed."""
        self.config = config
        self._key = None
        if config.key_env is not None:
            self._key = os.environ.get(config.key_env, "").strip()
            if not self._key or not self._key.isascii() or not self._key.isprintable():
                raise InputError(
                    f"endpoint.key_env={config.key_env}: the environment holds no key under this name: "
                    f"export {config.key_env}=..."
                )
            for name, value in (("base_url", config.base_url), ("model", config.model)):
                if len(self._key) >= SHORTEST_KEY and self._key in unquote(value):
                    raise InputError(f"endpoint.{name}: holds the key of key_env={config.key_env}: take it out")
        self._http, self._tenacity = http_packages()
        self._answered = False
        limits = self._http.Limits(max_connections=config.workers, max_keepalive_connections=0)
        self._client = self._http.Client(timeout=config.timeout_s, headers=self._headers(), limits=limits)

    @property
    def identity(self) -> str:
        """Model, address and what shapes its answers."""
        config = self.config
        return f"{config.model} at {config.base_url}, temperature {config.temperature}, {config.max_tokens} tokens"

    def ask(self, conversations: Sequence[Parts]) -> list[Answer]:
        """One answer per conversation of texts and images, in order.

        After more consecutive failures than workers, each with all its retries, the remaining requests are not sent.
        Raises InputError where the server refuses the key, or does not know the address or the model, before it has
        answered anything: the first request is sent alone. A refusal later on is one of the failures.
        """
        if not conversations:
            return []
        workers = min(self.config.workers, len(conversations))
        batch = _Batch(max(2, self.config.workers + 1))
        first = [] if self._answered else [self._answer(conversations[0], batch)]
        with ThreadPoolExecutor(workers, thread_name_prefix="endpoint") as pool:
            try:
                rest = conversations[len(first) :]
                return [*first, *pool.map(lambda parts: self._answer(parts, batch), rest)]
            except BaseException:
                batch.over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, parts: Parts, batch: _Batch) -> Answer:
        tenacity, config = self._tenacity, self.config
        backoff = tenacity.wait_exponential(config.backoff_s, LONGEST_WAIT)

        def wait(state: Any) -> float:  # Any: tenacity's
            error = state.outcome.exception()
            return max(backoff(state) + _chance.uniform(0, config.backoff_s), min(error.wait_s, LONGEST_WAIT))

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(config.retries + 1) | tenacity.stop_when_event_set(batch.over),
            wait=wait,
            retry=tenacity.retry_if_exception_type(_PassingError),
            sleep=tenacity.sleep_using_event(batch.over),
            reraise=True,
        )
        if batch.over.is_set():
            return NoAnswer(f"not asked: the endpoint failed {batch.limit} times in a row")
        try:
            text = retrying(self._once, _body(config, parts))
        except _UnusableError as error:
            batch.note(failed=error.refused)
            return NoAnswer(str(error))
        except _PassingError as error:
            batch.note(failed=True)
            tries = retrying.statistics.get("attempt_number", 1)
            return NoAnswer(f"{error} ({tries} tries)")
        batch.note(failed=False)
        return text

    def _once(self, body: dict[str, Any]) -> str:
        """One request; raises _PassingError or _UnusableError."""
        http, config = self._http, self.config
        try:
            response = post(self._client, f"{config.base_url.rstrip('/')}/chat/completions", body, config.timeout_s)
        except UnreadableError as error:
            raise _PassingError(str(error)) from None
        except (LateError, http.TimeoutException):
            raise _PassingError(f"no answer within {config.timeout_s:g} s") from None
        except http.TransportError as error:
            raise _PassingError(f"no connection: {self._plain(str(error) or type(error).__name__)}") from None
        except http.RequestError:
            raise _PassingError("an answer that cannot be decoded") from None
        status = response.status
        if status in (401, 403, 404) and self._answered:
            raise _UnusableError(f"HTTP {status}: refused after other requests were answered", refused=True)
        if status in (401, 403, 404):
            what = "key_env names a key that" if config.key_env else "without key_env it"
            wrong = (
                f"does not know this address or the model {config.model!r}" if status == 404 else f"{what} is refused"
            )
            raise InputError(f"endpoint {config.base_url}: HTTP {status}: {wrong}: correct the options")
        if status in PASSING or status >= 500:
            raise _PassingError(f"HTTP {status}", _seconds(response.headers.get("retry-after")))
        if status != 200:
            raise _UnusableError(f"HTTP {status}: {self._plain(response.text)}")
        self._answered = True
        answer = _content(response.text, config.max_tokens)
        # a server that shows the key must not get it into reasons and caches
        return answer.replace(self._key, "***") if self._key and len(self._key) >= SHORTEST_KEY else answer

    def _plain(self, text: str) -> str:
        """One short line without the key."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."

    def _headers(self) -> dict[str, str]:
        return HEADERS if self._key is None else {**HEADERS, "Authorization": f"Bearer {self._key}"}


def strip_thinking(text: str) -> str:
    """The text after ``</think>``, stripped; "" if the thinking never ended."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def _content(text: str, max_tokens: int) -> str:
    """The text of an answer; raises _PassingError for garbage or nothing, _UnusableError for one cut off."""
    try:
        found = parse_json(text, "answer")
    except InputError:
        raise _PassingError("an answer that is no JSON") from None
    try:
        choice = found["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _PassingError("an answer without choices") from None
    if finish == "length":
        raise _UnusableError(f"the answer was cut off at {max_tokens} tokens")
    if finish == "content_filter":
        raise _UnusableError("the answer was withheld by a content filter")
    if content is not None and not isinstance(content, str):
        raise _PassingError("an answer without text")
    answer = strip_thinking(content or "")
    if not answer:
        raise _PassingError("the answer is empty")
    return answer


def _body(config: EndpointConfig, parts: Parts) -> dict[str, Any]:
    return {
        "model": config.model,
        "messages": [user_message(parts)],
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
    }


def user_message(parts: Parts) -> dict[str, Any]:
    """A user's turn of texts and images in an OpenAI-compatible chat. Any: JSON values."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": image_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def image_url(image: Image) -> str:
    """An image (3, H, W) in [0, 1] as PNG in a data address."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def _seconds(header: str | None) -> float:
    """The value of a Retry-After header that is a number; 0 for a date or nothing."""
    return float(header) if header and re.fullmatch(r"\d{1,6}(\.\d+)?", header.strip()) else 0.0


def http_packages() -> tuple[Any, Any]:
    """httpx2 and tenacity. Any: they are optional. Raises InputError."""
    try:
        import httpx2
        import tenacity
    except ImportError as error:
        raise InputError(f"endpoint: needs the package {error.name}: pip install 'lvrpo[endpoint]'") from None
    return httpx2, tenacity


# --- one request with a limit of time and of bytes ---


MOST_BYTES = 8 * 2**20
"""Limit of an unpacked answer; the longest answer of a chat model is a hundredth of it."""
HEADERS = {"Accept-Encoding": "gzip, deflate"}
"""Encodings that ``post`` can unpack with a size limit."""


class LateError(Exception):
    """The answer was not whole in time."""


class UnreadableError(Exception):
    """The answer is too long or cannot be decompressed, as the message says."""


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
