from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image as PilImage

from lvrpo.config import parse_section
from lvrpo.errors import InputError
from lvrpo.rewards.endpoint import ChatEndpoint, EndpointConfig, NoAnswer, strip_thinking


def endpoint(options: dict[str, Any]) -> ChatEndpoint:
    return ChatEndpoint(EndpointConfig.model_validate(options))


def test_texts_and_images_go_out_and_a_text_comes_back(server: Any) -> None:
    image = torch.rand(3, 5, 7)
    assert endpoint(server.options()).ask([("how many ?", image)]) == ["yes"]
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.0, 256)
    text, shown = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "how many ?"}
    head, _, data = shown["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    file = PilImage.open(io.BytesIO(base64.b64decode(data)))
    sent = torch.tensor(list(file.tobytes())).view(5, 7, 3).permute(2, 0, 1)
    assert torch.equal(sent, (image * 255).round().long())
    assert server.keys == [None]


def test_answers_keep_the_order_of_the_questions(server: Any) -> None:
    server.answer = lambda body: body["messages"][0]["content"][0]["text"].upper()
    asked = [f"q{i}" for i in range(20)]
    assert endpoint(server.options(workers=4)).ask([(q,) for q in asked]) == [q.upper() for q in asked]
    assert endpoint(server.options()).ask([]) == []


PASSING = {
    "500": (500, "oh"),
    "503": (503, ""),
    "429": (429, "slow down"),
    "no JSON": (200, "<html>bad gateway</html>"),
    "cut JSON": (200, '{"choices": [{"message'),
    "no choices": (200, '{"choices": []}'),
    "a list": (200, "[1, 2]"),
    "nested": (200, "[" * 100_000),
    "parts": (200, '{"choices": [{"message": {"content": [1]}}]}'),
    "null": (200, '{"choices": [{"message": {"content": null}}]}'),
    "empty": "  ",
    "thought alone": "<think>is it red? yes",
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again(fault: str, server: Any) -> None:
    server.replies = [PASSING[fault], PASSING[fault], "no"]
    assert endpoint(server.options()).ask([("is it ?",)]) == ["no"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("no JSON", "an answer that is no JSON"),
        ("no choices", "an answer without choices"),
        ("parts", "an answer without text"),
        ("empty", "the answer is empty"),
    ],
)
def test_a_fault_that_stays_is_told_after_all_tries(fault: str, reason: str, server: Any) -> None:
    server.replies = [PASSING[fault]]
    assert endpoint(server.options()).ask([("is it ?",)]) == [NoAnswer(f"{reason} (3 tries)")]
    assert len(server.bodies) == 3


def test_what_would_come_again_is_not_asked_again(server: Any, finished: Callable[..., str]) -> None:
    for reply, reason in (
        ((200, finished("it is a", "length")), "the answer was cut off at 256 tokens"),
        ((200, finished("", "length")), "the answer was cut off at 256 tokens"),
        ((200, finished("", "content_filter")), "the answer was withheld by a content filter"),
        ((400, '{"error": "too many images"}'), 'HTTP 400: {"error": "too many images"}'),
    ):
        server.replies = [reply]
        server.bodies.clear()
        assert endpoint(server.options()).ask([("is it ?",)]) == [NoAnswer(reason)]
        assert len(server.bodies) == 1


def test_a_server_that_says_nothing_is_given_up(server: Any) -> None:
    server.replies = [0.4]
    found = endpoint(server.options(timeout_s=0.1, retries=1)).ask([("is it ?",)])
    assert found == [NoAnswer("no answer within 0.1 s (2 tries)")]


def test_a_server_that_is_not_there(server: Any) -> None:
    options = server.options(retries=1)
    server.close()
    (found,) = endpoint(options).ask([("is it ?",)])
    assert isinstance(found, NoAnswer)
    assert found.reason.startswith("no connection: ")
    assert found.reason.endswith("(2 tries)")


def test_an_answer_that_is_packed_wrongly(server: Any) -> None:
    server.headers = {"content-encoding": "gzip"}
    found = endpoint(server.options(retries=1)).ask([("is it ?",)])
    assert found == [NoAnswer("an answer that cannot be decoded (2 tries)")]


def test_a_dead_server_is_not_asked_to_the_end(server: Any) -> None:
    server.replies = [(500, "")]
    found = endpoint(server.options(workers=1, retries=1)).ask([("q",)] * 50)
    assert len(server.bodies) == 4
    assert found[1] == NoAnswer("HTTP 500 (2 tries)")
    assert set(found[2:]) == {NoAnswer("not asked: the endpoint failed 2 times in a row")}


def test_the_server_may_ask_for_a_longer_wait(server: Any) -> None:
    server.replies, server.headers = [(429, ""), "yes"], {"retry-after": "0.2"}
    started = time.monotonic()
    assert endpoint(server.options()).ask([("q",)]) == ["yes"]
    assert time.monotonic() - started >= 0.2
    server.replies, server.headers = [(429, ""), "yes"], {"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}
    assert endpoint(server.options()).ask([("q",)]) == ["yes"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "without key_env it is refused"), (403, "refused"), (404, "does not know this address or the model")],
)
def test_what_is_wrong_for_every_question_stops(status: int, message: str, server: Any) -> None:
    server.replies = [(status, "")]
    with pytest.raises(InputError, match=message) as caught:
        endpoint(server.options(workers=1)).ask([("q",)] * 30)
    assert "\n" not in str(caught.value)
    assert len(server.bodies) < 5


def test_the_key_comes_from_the_environment_and_shows_nowhere(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-1234567890abcdefghij"
    monkeypatch.setenv("JUDGE_KEY", key)
    chat = endpoint(server.options(key_env="JUDGE_KEY"))
    server.replies = [(400, f"key {key} may not do this")]
    assert chat.ask([("q",)]) == [NoAnswer("HTTP 400: key *** may not do this")]
    assert server.keys == [f"Bearer {key}"]
    assert key not in chat.identity + repr(chat.config) + json.dumps(server.bodies)
    server.replies = [(401, f"wrong key {key}")]
    with pytest.raises(InputError, match="key_env names a key that is refused") as caught:
        chat.ask([("q",)])
    assert key not in str(caught.value)


@pytest.mark.parametrize("said", ["the key is {key}, yes", "<think>{key}</think>{key}"])
def test_a_server_that_says_the_key_is_not_quoted(said: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef"
    monkeypatch.setenv("JUDGE_KEY", key)
    server.replies = [said.format(key=key)]
    assert endpoint(server.options(key_env="JUDGE_KEY")).ask([("q",)]) == [said.format(key="***").split(">")[-1]]
    monkeypatch.setenv("JUDGE_KEY", "yes")  # where a server wants any key
    server.replies = ["yes"]
    assert endpoint(server.options(key_env="JUDGE_KEY")).ask([("q",)]) == ["yes"]


@pytest.mark.parametrize(
    "change", [{"base_url": "http://host/KEY/v1"}, {"base_url": "http://KEY.host"}, {"model": "KEY"}]
)
def test_the_key_itself_in_the_address(change: dict[str, str], server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789+abcdef"
    monkeypatch.setenv("JUDGE_KEY", key)
    options = server.options(key_env="JUDGE_KEY") | {n: v.replace("KEY", key) for n, v in change.items()}
    with pytest.raises(InputError, match="holds the key of key_env=JUDGE_KEY: take it out") as caught:
        endpoint(options)
    assert key not in str(caught.value)
    options |= {n: v.replace("KEY", "0123456789%2Babcdef") for n, v in change.items()}
    with pytest.raises(InputError, match="holds the key"):
        endpoint(options)


def test_a_key_that_is_not_there(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for value in (None, "", " \n"):
        if value is not None:
            monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(InputError, match="holds no key under this name: export JUDGE_KEY"):
            endpoint(server.options(key_env="JUDGE_KEY"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url: must be http"),
        ({"base_url": "http://me:SECRET@host/v1"}, "without user, query or key"),
        ({"base_url": "http://host/v1?key=SECRET"}, "without user, query or key"),
        ({"base_url": "http://[host"}, "base_url: is no address"),
        ({"base_url": "http://host/sk-SECRETSECRETSECRET/v1"}, "base_url: looks like it holds a key"),
        ({"base_url": "http://host/sk%2DSECRETSECRETSECRET/v1"}, "base_url: looks like it holds a key"),
        ({"model": "gsk_SECRETSECRETSECRET"}, "model: looks like it holds a key"),
        ({"key_env": "sk-SECRET"}, "key_env: must be the name of an environment variable, such as JUDGE_KEY, never"),
        ({"key_env": "hf_SECRETSECRETSECRET"}, "key_env: must be the name"),
        ({"key_env": "SECRETd41d8cd98f00b204e"}, "key_env: must be the name"),
        ({"key_env": "SECRETSECRETSECRETSECRET"}, "key_env: must be the name"),
        ({"key_env": "SECRET0123456"}, "key_env: must be the name"),
        ({"api_key": "SECRET"}, "api_key: unknown key"),
        ({"modle": "x"}, "judge.modle: unknown key: did you mean model"),
        ({"retries": -1}, "judge.retries=-1"),
        ({"timeout_s": 0}, "judge.timeout_s=0"),
        ({"model": None}, "judge.model"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_section(EndpointConfig, {"base_url": "http://host/v1", "model": "m"} | change, "judge")
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thinking_aloud_is_no_answer() -> None:
    assert strip_thinking("<think>no, yes</think>\n yes ") == "yes"
    assert strip_thinking("yes") == "yes"
    assert strip_thinking("<think> it was cut") == ""
