"""The demo: what its page asks a policy, and the page itself where gradio is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from lvrpo.cli import main
from lvrpo.commands.demo import Session
from lvrpo.errors import InputError
from lvrpo.policies.loading import load_policy


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(load_policy("tiny"))


def test_a_drawing_is_repeated_by_its_seed_and_judged_by_the_model_itself(session: Session) -> None:
    one, other = (session.draw("two red circles", 3, 0, 2) for _ in range(2))
    images = [t.image for t in (*one.trajectories, *other.trajectories)]
    assert (images[0] == images[2]).all()
    assert (images[0] != images[1]).any()
    rows = session.judge(one)
    assert len(rows) == 2
    assert all(0 <= float(confidence) <= 1 for _, _, confidence in rows[0])
    assert any("how many" in question and answer == "two" for question, answer, _ in rows[0])
    session.ask(np.zeros((50, 40, 3), np.uint8), "what color is the circle ?")


def test_a_plan_comes_before_its_image(session: Session) -> None:
    (trajectory,) = session.draw("draw 3 + 4", 0, 0, 1, think=True).trajectories
    assert trajectory.text
    assert trajectory.image is not None


def test_an_edit_starts_from_its_image(session: Session) -> None:
    (trajectory,) = session.edit(np.full((32, 32, 3), 255, np.uint8), "add a red circle", 0, 1.5).trajectories
    assert trajectory.image is not None
    with pytest.raises(InputError, match="no image: add one"):
        session.edit(None, "add a red circle", 0, 0)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")
def test_the_page_has_what_both_models_can_do() -> None:
    """In a process of its own, as gradio leaves event loops open."""
    code = (
        "from lvrpo.commands.demo import Session, build\nfrom lvrpo.policies.loading import load_policy\n"
        "session, texts = Session(load_policy('tiny')), Session(load_policy('tiny'))\ntexts.tasks = ('understand',)\n"
        "for models in ({'a': session, 'b': texts}, {'a': session}):\n"
        "    print(*[function.api_name for function in build(models).fns.values()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ask", "draw ask edit think"]


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "tiny"]) == 2
    assert "pip install 'lvrpo[demo]'" in capsys.readouterr().err
