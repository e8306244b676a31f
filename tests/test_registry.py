from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import pytest

from lvrpo.errors import InputError
from lvrpo.registry import resolve

MARK = object()
TABLE = {"fraction": "fractions:Fraction", "mark": MARK, "gone": "lvrpo_no_such_package.part:Thing"}


def test_an_entry_is_imported_or_given_as_it_is() -> None:
    assert resolve("reward", "fraction", TABLE) is Fraction
    assert resolve("reward", "mark", TABLE) is MARK


def test_anybodys_class_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvrpo_test_plugin.py").write_text("class Mine:\n    class Inner:\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = resolve("reward", "lvrpo_test_plugin:Mine", TABLE)
    assert mine.__name__ == "Mine"
    assert resolve("reward", "lvrpo_test_plugin:Mine.Inner", TABLE) is mine.Inner
    del sys.modules["lvrpo_test_plugin"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fractoin",
            "reward 'fractoin': unknown: did you mean fraction? there are fraction, gone, mark; "
            "your own is given as my_package.module:Name",
        ),
        (
            "zzz",
            "reward 'zzz': unknown: there are fraction, gone, mark; your own is given as my_package.module:Name",
        ),
        (
            "fractions:Fractoin",
            "reward 'fractions:Fractoin': fractions has no 'Fractoin': did you mean Fraction?",
        ),
        ("fractions:", "reward 'fractions:': write it as my_package.module:Name"),
        (":Fraction", "reward ':Fraction': write it as my_package.module:Name"),
        (
            "lvrpo_nothing:Thing",
            "reward 'lvrpo_nothing:Thing': no module 'lvrpo_nothing': install it or put its folder on PYTHONPATH",
        ),
        (
            "gone",
            "reward 'lvrpo_no_such_package.part:Thing': no module 'lvrpo_no_such_package': "
            "install it or put its folder on PYTHONPATH",
        ),
    ],
)
def test_a_wrong_name_gets_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve("reward", name, TABLE)
    assert str(caught.value) == message


def test_a_plugin_that_misses_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvrpo_test_needy.py").write_text("import lvrpo_absent_dependency.sub\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"needs the package 'lvrpo_absent_dependency'.*pip install"):
        resolve("policy", "lvrpo_test_needy:Thing", {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def f(:\n  pass", r"SyntaxError: invalid syntax \(lvrpo_test_broken_1.py, line 1\)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("\tx = 1\n  y = 2", "IndentationError: unexpected indent"),
        ("from lvrpo.rewards.decorated import nothing", "ImportError: cannot import name 'nothing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_inside_a_plugin_is_one_line_that_names_both(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name = f"lvrpo_test_broken_{request.node.callspec.indices['text']}"
    (tmp_path / f"{name}.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"policy '{name}:Thing': {name} cannot be imported: {said}") as caught:
        resolve("policy", f"{name}:Thing", {})
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
