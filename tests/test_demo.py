"""The demo: what its page asks a policy, and the page itself where gradio is installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lvrpo.cli import main
from lvrpo.commands.demo import Session, build
from lvrpo.errors import InputError
from lvrpo.policies.loading import load_policy


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(load_policy("tiny"))


def test_a_drawing_is_repeated_by_its_seed_and_judged_by_the_model_itself(session: Session) -> None:
    one, other = (session.draw("two red circles", 3, 0, 2) for _ in range(2))
    pictures = [t.image for t in (*one.trajectories, *other.trajectories)]
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[0] != pictures[1]).any()
    rows = session.judge(one)
    assert len(rows) == 2
    assert all(0 <= float(confidence) <= 1 for _, _, confidence in rows[0])
    assert any("how many" in question and answer == "two" for question, answer, _ in rows[0])
    session.ask(np.zeros((50, 40, 3), np.uint8), "what color is the circle ?")


def test_a_plan_comes_before_its_picture(session: Session) -> None:
    (trajectory,) = session.draw("draw 3 + 4", 0, 0, 1, think=True).trajectories
    assert trajectory.text
    assert trajectory.image is not None


def test_an_edit_starts_from_its_picture(session: Session) -> None:
    (trajectory,) = session.edit(np.full((32, 32, 3), 255, np.uint8), "add a red circle", 0, 1.5).trajectories
    assert trajectory.image is not None
    with pytest.raises(InputError, match="no picture: add one"):
        session.edit(None, "add a red circle", 0, 0)


def test_the_page_has_what_both_models_can_do(session: Session) -> None:
    pytest.importorskip("gradio")
    texts = Session(load_policy("tiny"))
    texts.tasks = ("understand",)
    names = [function.api_name for function in build({"a": session, "b": texts}).fns.values()]
    assert names == ["ask"]
    assert [f.api_name for f in build({"a": session}).fns.values()] == ["draw", "ask", "edit", "think"]


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "tiny"]) == 2
    assert "pip install 'lvrpo[demo]'" in capsys.readouterr().err
