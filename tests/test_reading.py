"""Whatever is no regular file of bounded size, and whatever JSON cannot hold, is one line at once."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from lvrpo.cli import main, printable
from lvrpo.commands.inputs import read_rows
from lvrpo.errors import InputError
from lvrpo.patterns import compile_pattern, full_match
from lvrpo.reading import parse_json, read_bytes, read_text
from lvrpo.strict_yaml import parse_yaml

LONG = "x" * 300
ODD = {
    "pipe": "pipe: is a pipe, not a regular file: give a file",
    "folder": "folder: is a folder, not a regular file: give a file",
    "socket": "socket: is a socket, not a regular file: give a file",
    "/dev/zero": "/dev/zero: is a device, not a regular file: give a file",
    "/dev/null": "/dev/null: is a device, not a regular file: give a file",
    "loop": "loop: is a link that leads to itself: name the file that it should lead to",
    "pipe.link": "pipe.link: is a pipe, not a regular file: give a file",
    "file/below": "file/below: lies below a file, not a folder: correct the path",
    "nowhere": "nowhere: no such file: give a file",
    "large": "large: has 2048 MiB, more than 1024 are read: give a file",
    "nul\0": "nul\0: is no path (embedded null byte): give a file",
    LONG: f"{LONG}: is a name that no file can have, it is too long: name a file",
}


@pytest.fixture
def shelf() -> None:
    """One of each kind in the working directory."""
    os.mkfifo("pipe")
    Path("folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    Path("loop").symlink_to("loop")
    Path("pipe.link").symlink_to("pipe")
    Path("file").write_text("text")
    with Path("large").open("wb") as file:
        file.truncate(2**31)


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_regular_file_is_one_line(name: str, shelf: None) -> None:
    with pytest.raises(InputError) as caught:
        read_text(Path(name), "give a file")
    assert str(caught.value) == ODD[name]


def test_the_bound_holds_for_files_that_say_they_are_empty(shelf: None) -> None:
    assert stat.S_ISREG(os.stat("/proc/kallsyms").st_mode)
    with pytest.raises(InputError, match="has more than the 0 MiB that are read"):
        read_bytes(Path("/proc/kallsyms"), "give a file", 1000)
    assert read_bytes(Path("file"), "give a file", 4) == b"text"
    Path("bytes").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="byte 2 is not UTF-8"):
        read_text(Path("bytes"), "give a file")


COMMANDS = {
    "configuration": ("train", "{}"),
    "yaml": ("train", "{}.yaml"),
    "extends": ("train", "extending.yaml"),
    "rows": ("train", "quickstart", "data={{source: jsonl, jsonl: {{train: {}}}}}"),
    "benchmark": ("evaluate", "tiny", "--benchmark", "{}.jsonl"),
    "prompts": ("generate", "tiny", "--prompts", "{}", "--out", "new"),
    "questions": ("ask", "tiny", "--questions", "{}"),
    "image": ("ask", "tiny", "--image", "{}", "what color is the circle ?"),
    "edited image": ("edit", "tiny", "remove the circle", "--image", "{}", "--out", "new.png"),
}


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("name", ["pipe", "loop"])
def test_every_file_that_a_command_names(kind: str, name: str, shelf: None, capfd: pytest.CaptureFixture[str]) -> None:
    for end in (".yaml", ".jsonl"):
        os.symlink(name, name + end)
    Path("extending.yaml").write_text(f"extends: {name}\n")
    before = sorted(Path().iterdir())
    assert main([part.format(name) for part in COMMANDS[kind]]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "not a regular file" in line or "leads to itself" in line
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", LONG),
        ("train", "quickstart", "--out", LONG),
        ("train", "quickstart", f"policy={LONG}"),
        ("generate", LONG, "--prompt", "a red circle", "--out", "new"),
        ("generate", "tiny", "--prompt", "a red circle", "--out", LONG),
        ("report", LONG),
        ("evaluate", "tiny", "--json", LONG),
    ],
)
def test_a_name_that_is_too_long(arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 700
    assert list(Path().iterdir()) == []


def test_an_error_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[31mred\x07 name\n\tof  one line \u202e") == "a\\x1b[31mred\\x07 name of one line \\u202e"
    assert len(printable("x" * 10**6)) < 300
    assert len(printable("x " * 10**6)) < 1100


# --- JSON and YAML ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1" * 5000, "here: a number of too many digits: correct it"),
        ('{"n": -' + "9" * 5000 + "}", "here: a number of too many digits: correct it"),
        ("1e999", "here: 1e999 is beyond every number: correct it"),
        ("NaN", "here: NaN is not JSON: correct it"),
        ("[-Infinity]", "here: -Infinity is not JSON: correct it"),
        ("[" * 100_000, "here: nested too deeply for JSON: correct it"),
        ('{"a":' * 100_000, "here: nested too deeply for JSON: correct it"),
        ('{"a": 1', "here: not JSON at column 8 (Expecting ',' delimiter): correct it"),
        (b'"\xff"', "here: not JSON (byte 1 is not UTF-8): correct it"),
        ("", "here: not JSON at column 1 (Expecting value): correct it"),
    ],
)
def test_json_that_cannot_be_read(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text, "here")
    assert str(caught.value) == message


def test_json_that_can_be_read() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "x"]}', "here") == {"a": [1, 2.5, None, True, "x"]}


def bomb(levels: int, kind: str) -> str:
    lines = ["a0: &a0 " + {"list": "[x, x]", "map": "{x: 1}", "merge": "{x: 1}"}[kind]]
    for level in range(1, levels):
        before = ", ".join([f"*a{level - 1}"] * 10)
        each = {
            "list": f"[{before}]",
            "map": "{" + ", ".join(f"k{i}: *a{level - 1}" for i in range(10)) + "}",
            "merge": f"{{<<: [{before}]}}",
        }[kind]
        lines.append(f"a{level}: &a{level} {each}")
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["list", "map", "merge"])
def test_aliases_that_stand_for_too_much(kind: str) -> None:
    with pytest.raises(
        InputError, match=r"here: not valid YAML .its aliases stand for more than 100000 values.*: correct"
    ):
        parse_yaml(bomb(9, kind), "here")
    assert parse_yaml(bomb(3, kind), "here")["a0"]


def test_aliases_under_the_options_of_a_reward(capfd: pytest.CaptureFixture[str]) -> None:
    inner = "\n".join("      " + line for line in bomb(9, "list").splitlines())
    Path("bomb.yaml").write_text(f"rewards:\n  - name: self_vqa\n    options:\n{inner}\n")
    assert main(["train", "bomb.yaml"]) == 2
    assert "its aliases stand for more than" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "a: !!timestamp x",
        "a: !!bool x",
        "a: !!int x",
        "a: !!int ''",
        "a: !!float x",
        "a: !!python/object/apply:os.system [x]",
        "a: !!python/name:os.system",
        "a: " + "9" * 5000,
        "[" * 5000,
        "{a: " * 5000,
        "? {a: b}\n: c",
    ],
)
def test_odd_yaml_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^here(:\d+)?: not valid YAML \(.+\): correct"):
        parse_yaml(text, "here")


# --- regular expressions ---


def test_exponential_backtracking_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvrpo.patterns.TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError, match=r"the form took more than 0\.05 s to match"):
        full_match(r"(a|a)+(b|b)+c(?<!x)\1", "a" * 40 + "b" * 40 + "c")
    assert not full_match("([a-z]+)+!", "a" * 24)
    assert full_match("a.b", "a\nb")


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999}", "(" * 400 + ")" * 400, "x" * 1001, "*", "[", "(?P<a"])
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(InputError, match=r"no regular expression|1000 are allowed"):
        compile_pattern(pattern)


def test_a_row_may_hold_a_line_separator_that_is_no_newline() -> None:
    Path("rows.jsonl").write_text('{"prompt": "a\u2028b"}\r\n\n{"prompt": "c\x85"}\n', encoding="utf-8")
    assert read_rows(Path("rows.jsonl")) == [
        ("rows.jsonl:1", {"prompt": "a\u2028b"}),
        ("rows.jsonl:3", {"prompt": "c\x85"}),
    ]
