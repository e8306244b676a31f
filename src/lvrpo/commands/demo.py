"""``lvrpo demo``: draw, ask, edit and think-then-draw in the browser, with the model's own judgement of images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lvrpo.commands.infer import prompt, sample
from lvrpo.commands.options import Options
from lvrpo.errors import InputError, LvrpoError, optional_package
from lvrpo.images import middle_square, to_uint8
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.questions import QuestionConfig
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.types import Group, Image, TaskKind

MAX_IMAGES = 8
JUDGED = ("question", "right answer", "confidence")


def demo(options: Options) -> None:
    gradio = optional_package("gradio", "the demo needs gradio", "demo")
    torch.set_num_threads(options.threads)
    sessions = {options.model: Session(load_policy(options.model, options.device, options.dtype, options.base))}
    if options.against in sessions:
        raise InputError(f"--against {options.against}: is the same model: name another")
    if options.against is not None:
        sessions[options.against] = Session(load_policy(options.against, options.device, options.dtype))
    app = build(sessions)
    try:
        app.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,  # else it says how to publish the page
            prevent_thread_lock=True,
            max_file_size="32mb",
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
        )
    except OSError:  # gradio's message names its own settings
        raise InputError(f"port {options.port} of {options.host} cannot be used: choose another with --port") from None
    print(f"http://{options.host}:{options.port}: the demo; Ctrl-C ends it", flush=True)
    app.block_thread()


class Session:
    """One policy behind the page; requests are answered one at a time."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tasks: tuple[TaskKind, ...] = getattr(policy, "tasks", ("understand", "generate", "edit", "reason"))
        self._lock = threading.Lock()

    def draw(self, text: str, seed: float, guidance: float, count: float = 1, think: bool = False) -> Group:
        """``count`` images of a text, after a written plan with ``think``; guidance 0: the model's own."""
        task: TaskKind = "reason" if think else "generate"
        asked = prompt(task, (text,), ("text", "image") if think else ("image",), 0)
        return self._sample(asked, seed, guidance, count)

    def edit(self, image: Any, instruction: str, seed: float, guidance: float) -> Group:
        """An image, changed. Any: an array (height, width, 3) of uint8, or None."""
        asked = prompt("edit", (self._image(image), instruction), ("image",), 0)
        return self._sample(asked, seed, guidance, 1)

    def ask(self, image: Any, question: str) -> str:
        """The greedy answer. Any: as in ``edit``."""
        group = self._sample(prompt("understand", (self._image(image), question), ("text",), 0), 0, 0, 1)
        return group.trajectories[0].text or ""

    def judge(self, group: Group) -> list[list[list[str]]]:
        """Per image its rows of ``JUDGED``: the model's confidence in the answers that the prompt implies.

        The questions follow from the words by the grammar of the built-in world, else the model writes them.
        """
        why = ""
        for by in ("grammar", "policy"):
            try:
                with self._lock:
                    return self._judge(group, SelfVQA(questions=QuestionConfig(by=by)))
            except InputError as error:  # its words, or words of the request, are not of this model
                why = why or str(error)
        return [[[f"not judged: {why}", "", ""]] for _ in range(len(group))]

    def _judge(self, group: Group, reward: SelfVQA) -> list[list[list[str]]]:
        assert reward.generator is not None
        (asked,), missing = reward.generator.with_questions(
            [group], self.policy, lambda pairs: reward.confirm(pairs, self.policy)
        )
        if missing:
            raise InputError(missing[0])
        found, failures = reward.confidences([asked], self.policy, self.policy)
        facts = asked.prompt.facts
        return [
            [[f.question, f.answer, f"{c:.2f}"] for f, c in zip(facts, found[0, g].tolist(), strict=True)]
            if (0, g) in found
            else [[f"not judged: {failures[0, g]}", "", ""]]
            for g in range(len(group))
        ]

    def _sample(self, asked: Any, seed: float, guidance: float, count: float) -> Group:
        settings = Options(seed=int(seed), guidance=guidance or None)
        with self._lock:
            return sample(self.policy, [asked], settings, int(count), asked.task)[0]

    def _image(self, image: Any) -> Image:
        if image is None:
            raise InputError("no image: add one")
        tensor = torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1).float() / 255
        side = self.policy.image_size
        return tensor if side is None or tensor.shape[1:] == (side, side) else middle_square(tensor, side)


def build(sessions: dict[str, Session]) -> Any:
    """The page, not launched. Any: a gradio.Blocks."""
    gradio = optional_package("gradio", "the demo needs gradio", "demo")
    tasks = set.intersection(*(set(session.tasks) for session in sessions.values()))
    with gradio.Blocks(title="lvrpo", analytics_enabled=False) as app, gradio.Tabs():
        if "generate" in tasks:
            with gradio.Tab("Draw"):
                text = gradio.Textbox(label="Prompt", value="two red circles")
                settings = [*_drawing(gradio), gradio.Slider(1, MAX_IMAGES, 4, step=1, label="Images")]
                _answer(gradio, "Draw", sessions, lambda s, *v: _drawn(s, s.draw(*v)), [text, *settings])
        if "understand" in tasks:
            with gradio.Tab("Ask"):
                given = [gradio.Image(label="Image", type="numpy"), gradio.Textbox(label="Question")]
                _answer(gradio, "Ask", sessions, lambda s, *v: (s.ask(*v),), given, draws=False)
        if "edit" in tasks:
            with gradio.Tab("Edit"):
                given = [gradio.Image(label="Image", type="numpy"), gradio.Textbox(label="Instruction")]
                _answer(gradio, "Edit", sessions, lambda s, *v: _drawn(s, s.edit(*v)), [*given, *_drawing(gradio)])
        if "reason" in tasks and "generate" in tasks:
            with gradio.Tab("Think, then draw"):
                given = [gradio.Textbox(label="Prompt", value="draw 3 + 4"), *_drawing(gradio)]
                think = lambda s, text, seed, guidance: _drawn(s, s.draw(text, seed, guidance, 1, True))  # noqa: E731
                _answer(gradio, "Think, then draw", sessions, think, given)
    return app


def _drawing(gradio: Any) -> list[Any]:
    seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
    return [seed, gradio.Slider(0, 10, 0, step=0.25, label="Guidance (0: the model's own; 1: none)")]


def _answer(
    gradio: Any,
    label: str,
    sessions: dict[str, Session],
    call: Callable[..., Sequence[Any]],
    inputs: list[Any],
    draws: bool = True,
) -> None:
    """A button, and below it a column per model with its outputs."""
    button, outputs = gradio.Button(label, variant="primary"), []
    with gradio.Row():
        for name in sessions:
            title = Path(name).name
            with gradio.Column():
                if draws:
                    gradio.Markdown(f"### {title}")  # a label of the gallery would lie on an image
                    outputs.append(gradio.Gallery(show_label=False, columns=2, object_fit="contain", height="auto"))
                    outputs.append(gradio.Textbox(label="Plan", visible=label.startswith("Think")))
                    outputs.append(gradio.Dataframe(headers=["#", *JUDGED], label="Its own judgement"))
                else:
                    outputs.append(gradio.Textbox(label=title))

    def run(*values: Any) -> list[Any]:
        try:
            return [value for session in sessions.values() for value in call(session, *values)]
        except LvrpoError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    button.click(run, inputs, outputs, api_name=label.partition(",")[0].lower())


def _drawn(session: Session, group: Group) -> tuple[Any, str, list[list[str]]]:
    """The images as arrays, the text before them, and the rows of their judgement."""
    images = [to_uint8(t.image) for t in group.trajectories if t.image is not None]
    rows = [[str(g + 1), *row] for g, rows in enumerate(session.judge(group)) for row in rows]
    return images, group.trajectories[0].text or "", rows
