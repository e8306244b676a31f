"""The plug-in of lmms-eval, by stubs of its requests and of its two classes: every kind of request, by hand."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PilImage

from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.lmms import AnswerFile, Answers, Options
from lvrpo.images import load_image, png
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.sampling import derive_seed
from lvrpo.types import Prompt


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture
def policy(small_base: Path) -> Policy:
    return load_policy(small_base)


@pytest.fixture
def docs(tmp_path: Path) -> list[dict[str, Any]]:
    found = []
    for number, prompt in enumerate(ScenePrompts(split="test").prompts("understand", 4)):
        image, question = prompt.parts
        assert isinstance(image, torch.Tensor)
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(image))
        found.append({"image": path, "question": question, "answer": prompt.answer})
    return found


def visual(doc: dict[str, Any]) -> list[Any]:
    with PilImage.open(doc["image"]) as image:
        return [image.convert("RGB")]


def answers(policy: Policy, docs: list[dict[str, Any]], **options: Any) -> Answers:
    found = Answers(policy, Options(**options))
    found.task_dict = {"t": {"test": docs}}
    return found


def asked(docs: list[dict[str, Any]], **generation: Any) -> list[Any]:
    return [Request((doc["question"], generation, visual, i, "t", "test")) for i, doc in enumerate(docs)]


def by_hand(policy: Policy, key: str, task: Any, parts: tuple[Any, ...], **changes: Any) -> Any:
    prompt = Prompt(key, task, parts, ("text",) if task == "understand" else ("image",))
    sampling = replace(policy.default_sampling(task), group_size=1, temperature=0.0, **changes)
    return policy.sample([prompt], sampling, [derive_seed(0, "lmms-eval", key)])[0].trajectories[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_of_the_policy(policy: Policy, docs: list[dict[str, Any]], batch_size: int) -> None:
    given = answers(policy, docs, batch_size=batch_size).generate_until(asked(docs, max_new_tokens=6))
    hand = [
        by_hand(policy, f"t/test/{i}", "understand", (load_image(d["image"]), d["question"]), max_new_tokens=6).text
        for i, d in enumerate(docs)
    ]
    assert given == [(text or "").strip() for text in hand]
    stopped = answers(policy, docs).generate_until(asked(docs, until=[given[0][1:], ""]))
    assert stopped[0] == given[0][:1].strip()


def test_likelihoods_are_losses_of_which_tasks_take_the_smallest(policy: Policy, docs: list[dict[str, Any]]) -> None:
    choices = ("yes", "red")
    requests: list[Any] = [
        Request((d["question"], f" {c}", visual, i, "t", "test")) for i, d in enumerate(docs) for c in choices
    ]
    given = answers(policy, docs).loglikelihood(requests)
    contexts = [(load_image(d["image"]), d["question"]) for d in docs for _ in choices]
    expected = policy.text_logprob(contexts, [*choices] * len(docs))
    assert [loss for loss, _ in given] == pytest.approx([-value for value in expected.tolist()], abs=1e-5)
    greedy = [by_hand(policy, f"t/test/{i}", "understand", contexts[2 * i]).text for i in range(len(docs))]
    assert [same for _, same in given] == [text == c for text in greedy for c in choices]
    with pytest.raises(InputError, match="acc_mutual_info"):
        answers(policy, docs).loglikelihood([Request(("", "yes"))])


def test_rounds_go_on_until_the_task_says_so(policy: Policy, docs: list[dict[str, Any]]) -> None:
    seen: list[Any] = []

    def next_round(doc: Any, previous_output: Sequence[str], round_idx: int, previous_round_info: Any) -> Any:
        seen.append((list(previous_output), round_idx, previous_round_info))
        return visual(doc), doc["question"], round_idx == 2, [*previous_output, "end"], {"n": round_idx}

    request = Request((docs[0]["question"], {}, visual, next_round, 0, "t", "test"))
    (given,) = answers(policy, docs).generate_until_multi_round([request])
    text = by_hand(policy, "t/test/0/0", "understand", (load_image(docs[0]["image"]), docs[0]["question"])).text
    assert given == [text, text, "end"]
    assert seen == [([text], 1, None), ([text, text], 2, {"n": 1})]


@pytest.mark.parametrize("mode", ["generate", "edit"])
def test_drawings_are_files_that_the_json_names(
    policy: Policy, docs: list[dict[str, Any]], tmp_path: Path, mode: Any
) -> None:
    text = {"generate": "two red circles", "edit": "make the circle blue"}[mode]
    shown: Any = visual if mode == "edit" else None
    given = answers(policy, docs, mode=mode, num_steps=2, output_dir=tmp_path / "out").generate_until(
        [Request((text, {}, shown, 0, "t", "test"))]
    )
    found = json.loads(given[0])
    assert found["text"] == ""
    parts = (load_image(docs[0]["image"]), text) if mode == "edit" else (text,)
    output = by_hand(policy, "t/test/0", mode, parts, num_steps=2)
    assert Path(found["images"][0]).read_bytes() == png(output.image)


def test_a_image_is_drawn_before_the_answer(policy: Policy, docs: list[dict[str, Any]], tmp_path: Path) -> None:
    question = docs[0]["question"]
    context = f"[GEN_PROMPT]two red circles[/GEN_PROMPT] [QUESTION]{question}[/QUESTION]"
    made = answers(policy, docs, output_dir=tmp_path / "out", num_steps=2)
    (given,) = made.generate_visual_cot([Request((context, {}, None, 0, "t", "test"))])
    sketch = by_hand(policy, "t/test/0/sketch", "generate", ("two red circles",), num_steps=2).image
    answer = by_hand(policy, "t/test/0", "understand", (sketch, question)).text
    assert given == answer
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [png(sketch)]


def test_images_stand_where_the_text_has_places_for_them(policy: Policy, docs: list[dict[str, Any]]) -> None:
    made = answers(policy, docs)
    (image,) = visual(docs[0])
    parts = made._parts("first <image> then <image> ?", [[image], image])
    assert ["image" if isinstance(part, torch.Tensor) else part for part in parts] == [
        *("first", "image", "then", "image", "?")
    ]
    assert [type(part) for part in made._parts(" what ? ", image)] == [torch.Tensor, str]
    with pytest.raises(InputError, match="2 times <image> for 1 images"):
        made._parts("<image> <image>", [image])
    with pytest.raises(InputError, match="a dict: lvrpo reads images alone"):
        made._parts("x", [{"video": "a.mp4"}])


class Counts:
    """A policy that counts what it samples and stops at a chosen call."""

    def __init__(self, policy: Policy, last: int | None = None) -> None:
        self.policy, self.last, self.calls = policy, last, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def sample(self, *given: Any) -> Any:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        return self.policy.sample(*given)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("generate_until", "understand"),
        ("generate_until", "generate"),
        ("loglikelihood", "understand"),
        ("generate_until_multi_round", "understand"),
        ("generate_visual_cot", "understand"),
        ("generate_visual_cot", "generate"),
    ],
)
def test_answers_are_kept_and_an_interrupted_task_goes_on(
    policy: Policy, docs: list[dict[str, Any]], tmp_path: Path, kind: str, mode: Any
) -> None:
    def rounds(doc: Any, previous_output: Sequence[str], round_idx: int, previous_round_info: Any) -> Any:
        return visual(doc), doc["question"], round_idx == 2, [*previous_output], None

    more = {"generate_until": (), "loglikelihood": (), "generate_until_multi_round": (rounds,)}.get(kind, ())
    told = ("red",) if kind == "loglikelihood" else ({"max_new_tokens": 4},)
    shown = visual if mode == "understand" else None
    asked = "[GEN_PROMPT]two red circles[/GEN_PROMPT] [QUESTION]{}[/QUESTION]" if kind.endswith("cot") else "{}"
    asked = "two red circles" if mode == "generate" and kind == "generate_until" else asked
    requests = [Request((asked.format(d["question"]), *told, shown, *more, i, "t", "test")) for i, d in enumerate(docs)]
    if kind == "generate_until_multi_round":
        requests = [replace(r, args=(r.args[0], r.args[1], visual, *r.args[3:])) for r in requests]

    def ask(last: int | None, file: Path | None) -> tuple[Any, int]:
        counted: Any = Counts(policy, last)
        options = {"mode": mode, "num_steps": 1, "output_dir": tmp_path / "images", "answers": file}
        try:
            return getattr(answers(counted, docs, **options), kind)(requests), counted.calls
        except KeyboardInterrupt:
            return None, counted.calls

    whole, calls = ask(None, None)
    file, last = tmp_path / "answers.jsonl", random.Random(kind + mode).randrange(1, calls)
    assert ask(last, file) == (None, last)
    with file.open("a") as torn:
        torn.write('{"0')  # what a killed process leaves
    resumed, further = ask(None, file)
    assert resumed == whole
    assert further <= calls - last + 1  # a sketch is drawn again with its answer
    assert ask(0, file) == (whole, 0)
    for image in list(tmp_path.glob("images/*"))[:1]:
        image.unlink()
        assert ask(None, file)[1] == (kind == "generate_until")
    file.write_text("[]\n")
    with pytest.raises(InputError, match="delete the file"):
        ask(None, file)


def test_a_loss_that_is_infinite_is_kept(tmp_path: Path) -> None:
    for answers_now in ([[math.inf, True]], []):  # the second time they come from the file
        file = AnswerFile(tmp_path / "answers.jsonl")
        assert file.get(["likelihood"], lambda found=answers_now: found, bool) == [[math.inf, True]]


def test_options_that_do_not_fit_are_one_line(policy: Policy) -> None:
    with pytest.raises(InputError, match="mode='draw': must be one of understand, generate, edit"):
        Options(mode="draw")  # type: ignore[arg-type]  # what a user may write
    with pytest.raises(InputError, match="batch_size=0"):
        Options(batch_size=0)
    with pytest.raises(InputError, match="temperature=nan: must be a number >= 0"):
        Options(temperature=float("nan"))
    reads = types.SimpleNamespace(tasks=("understand", "reason"))
    with pytest.raises(InputError, match="mode=generate: this model does understand, reason alone"):
        Answers(reads, Options(mode="generate"))  # type: ignore[arg-type]  # what a policy that draws nothing says


def test_the_model_of_the_entry_point(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stubs of the two classes of lmms-eval that it needs."""

    class Base:
        def __init__(self) -> None:
            self._rank, self._world_size = 5, 7

    class Manifest:
        def __init__(self, model_id: str, simple_class_path: str) -> None:
            self.model_id, self.simple_class_path = model_id, simple_class_path

    class Result:
        def __init__(self, text: Any) -> None:
            self.text = text

    stubs = {"api.model": {"lmms": Base}, "api.instance": {"GenerationResult": Result}}
    stubs |= {"models.registry_v2": {"ModelManifest": Manifest}, "api": {}, "models": {}}
    monkeypatch.setitem(sys.modules, "lmms_eval", types.ModuleType("lmms_eval"))
    for name, content in stubs.items():
        module = types.ModuleType(f"lmms_eval.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)
    found = EntryPoint("lvrpo", "lvrpo.evaluation.benchmarks.lmms:manifest", "lmms_eval.models").load()()
    assert found.model_id == "lvrpo"
    module, _, name = found.simple_class_path.rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    cls = getattr(importlib.import_module(module), name)
    model = cls(pretrained=str(small_base), device="cpu", batch_size="2", num_steps="3", mode="generate")
    assert (model._rank, model._world_size, model.is_simple) == (0, 1, True)
    assert model.options == Options(mode="generate", batch_size=2, num_steps=3)
    with pytest.raises(TypeError, match="guidance: unknown: there are pretrained"):
        cls(pretrained=str(small_base), guidance=3)
    monkeypatch.delitem(sys.modules, module)


def test_the_entry_point_is_declared() -> None:
    import tomllib

    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"lvrpo": "lvrpo.evaluation.benchmarks.lmms:manifest"}
