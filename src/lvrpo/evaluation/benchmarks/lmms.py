"""Answers of a policy to the requests of lmms-eval 0.7 (``lmms_eval.models``), without importing that package.

``lmms_model`` makes the model class of it. Requests are those of its "simple" models, which alone know likelihoods.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from lvrpo.atomic_io import sync, write_atomic
from lvrpo.errors import InputError
from lvrpo.evaluation.items import file_name, whole_lines
from lvrpo.images import load_image, middle_square, png
from lvrpo.policies.base import Policy, Sampling, require_method
from lvrpo.reading import parse_typed_json
from lvrpo.sampling import derive_seed
from lvrpo.types import TASKS, Image, OutputKind, Part, Prompt, TaskKind, Trajectory

Mode = Literal["understand", "generate", "edit"]
"""What ``generate_until`` produces: a text, an image from a text, or an image from an image and a text."""
Row = tuple[Prompt, Sampling, Sequence[str]]
"""What is asked, how it is sampled, and the strings that end a text."""
PLACEHOLDER = "<image>"
_SKETCH = re.compile(r"\[GEN_PROMPT\](.*?)\[/GEN_PROMPT\]\s*\[QUESTION\](.*?)\[/QUESTION\]", re.DOTALL)
DRAW_FIRST = "Draw a picture that helps to answer: {question}"


def manifest() -> Any:
    """The entry point ``lvrpo`` of the group ``lmms_eval.models``. Any: a ``ModelManifest`` of lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[reportMissingImports]  # its environment

    return ModelManifest("lvrpo", simple_class_path="lvrpo.evaluation.benchmarks.lmms_model.Lvrpo")


@dataclass(frozen=True)
class Options:
    """Generation settings; None selects the model's own default."""

    mode: Mode = "understand"
    think: bool = False
    """Whether a text is written before an image."""
    output_dir: Path = Path("lmms_images")
    """Where images are written: TASK_DOC.png."""
    batch_size: int = 1
    seed: int = 0
    num_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    max_new_tokens: int | None = None
    """Also of tasks that name another number."""
    temperature: float | None = None
    """Of texts, also of tasks that name another one; None: greedy unless the task samples."""
    answers: Path | None = None
    """File of the answers of this task and these weights, which a repeated run takes from there."""

    def __post_init__(self) -> None:
        """Raises InputError for an unknown mode."""
        if self.mode not in get_args(Mode):
            raise InputError(f"mode={self.mode!r}: must be one of {', '.join(get_args(Mode))}")
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: must be >= 1")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: must be a number >= 0")


class AnswerFile:
    """The answers of an evaluation by a digest of what was asked, appended as they are given."""

    def __init__(self, path: Path | None) -> None:
        """``path``: None keeps nothing. Raises InputError for a damaged file; a line that is not whole is cut off."""
        self.path, self._known = path, dict[str, Any]()
        if path is None or not path.exists():
            return
        text = whole_lines(path)
        write_atomic(path, text.encode())
        for number, line in enumerate(text.splitlines(), start=1):
            remedy = "delete the file to ask everything again"
            self._known |= parse_typed_json(line, dict[str, list[Any]], f"{path}:{number}", remedy, finite=False)

    def get(self, asked: Sequence[Any], answer: Callable[[], list[Any]], keep: Callable[[Any], bool]) -> list[Any]:
        """What was answered before, where ``keep`` holds of all of it, else ``answer()``.

        Any: texts, images, settings; JSON values.
        """
        if self.path is None:
            return answer()
        digest = hashlib.sha256()
        for each in _flat(asked):
            digest.update(each.numpy().tobytes() if isinstance(each, torch.Tensor) else f"{each!r}\n".encode())
        key = digest.hexdigest()
        known = self._known.get(key)
        if known is not None and all(map(keep, known)):
            return known
        found = answer()
        with self.path.open("ab") as file:
            file.write((json.dumps({key: found}) + "\n").encode())
        sync(self.path)
        return found


class Answers:
    """The requests of lmms-eval, answered by a policy. Any in signatures: its request objects and documents."""

    def __init__(self, policy: Policy, options: Options) -> None:
        """Raises InputError for a mode that the policy cannot do, and for a damaged file of answers."""
        able = getattr(policy, "tasks", TASKS)  # optional in anybody's class
        if options.mode not in able:
            raise InputError(f"mode={options.mode}: this model does {', '.join(able)} alone")
        self.policy, self.options, self.file = policy, options, AnswerFile(options.answers)
        self.task_dict: Mapping[str, Any] = {}  # set by lmms-eval: task -> split -> documents

    # --- what lmms-eval calls ---

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Texts; or, where images are drawn, JSON with "text" and "images" (paths)."""
        rows: list[tuple[Prompt, Sampling, Sequence[str]]] = []
        for request in requests:
            context, generation, doc_to_visual, doc_id, task, split = request.args
            parts = self._parts(context, doc_to_visual(self._doc(task, split, doc_id)) if doc_to_visual else ())
            prompt = self._prompt(parts, f"{task}/{split}/{doc_id}")
            rows.append((prompt, self._sampling(prompt.task, generation), _stops(generation)))
        found = []
        for batch in self._batches(rows):
            found += self._kept("until", batch, partial(self._texts, batch))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(loss, whether it is the greedy answer) of each continuation.

        The loss is minus the mean log-prob per token, end token included: tasks of multiple choice take the smallest.
        """
        documents: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            if len(request.args) == 2:
                raise InputError("acc_mutual_info: needs likelihoods without a context: choose the metric acc")
            context, _, _, doc_id, task, split = request.args
            documents.setdefault((task, split, doc_id, context), []).append(place)
        found: dict[int, tuple[float, bool]] = {}
        for (task, split, doc_id, context), places in documents.items():
            doc, (_, _, doc_to_visual, *_) = self._doc(task, split, doc_id), requests[places[0]].args
            parts = self._parts(context, doc_to_visual(doc) if doc_to_visual else ())
            targets = [requests[place].args[1] for place in places]
            texts = [(target if isinstance(target, str) else target(doc)).strip() for target in targets]
            prompt = Prompt(f"{task}/{split}/{doc_id}", "understand", parts, ("text",))
            # no token is shorter than a character, and a longer answer is another one
            sampling = self._sampling("understand", {"max_new_tokens": max(map(len, texts)) + 1})
            sampling = replace(sampling, temperature=0.0)
            pairs = self._kept(
                "likelihood", [(prompt, sampling, texts)], partial(self._losses, prompt, sampling, texts)
            )
            found |= {place: (loss, same) for place, (loss, same) in zip(places, pairs, strict=True)}
        return [found[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The texts of every round; a task's ``doc_to_text`` says what is asked next and when it is over."""
        return [self._rounds(*request.args) for request in requests]

    def generate_visual_cot(self, requests: Sequence[Any]) -> list[str]:
        """Draws an image (from the task's own, where it has one), then answers with both."""
        found = []
        for request in requests:
            context, generation, doc_to_visual, doc_id, task, split = request.args
            shown = doc_to_visual(self._doc(task, split, doc_id)) if doc_to_visual else ()
            tagged = _SKETCH.search(context)
            draw, question = (tagged[1].strip(), tagged[2].strip()) if tagged else (DRAW_FIRST, context)
            own = [part for part in self._parts("", shown) if not isinstance(part, str)]
            kind: TaskKind = "edit" if own else "generate"
            sketch = Prompt(
                f"{task}/{split}/{doc_id}/sketch", kind, (*own[:1], draw.replace("{question}", question)), ("image",)
            )
            found += self._kept(
                "cot",
                [(sketch, self._sampling(kind, {}), (question, str(generation)))],
                partial(self._after_sketch, sketch, own, question, generation),
            )
        return found

    # --- inside ---

    def _rounds(
        self, context: str, generation: Any, to_visual: Any, to_text: Any, doc_id: Any, task: str, split: str
    ) -> list[str]:
        doc = self._doc(task, split, doc_id)
        visuals = to_visual(doc) if to_visual else ()
        said: list[str] = []
        info = None
        while True:
            prompt = Prompt(
                f"{task}/{split}/{doc_id}/{len(said)}", "understand", self._parts(context, visuals), ("text",)
            )
            row = (prompt, self._sampling("understand", generation), _stops(generation))
            said += self._kept("round", [row], partial(self._texts, [row]))
            visuals, context, over, previous, info = to_text(
                doc, previous_output=said, round_idx=len(said), previous_round_info=info
            )
            if over:
                return list(previous)

    def _kept(self, kind: str, rows: Sequence[Row], answer: Callable[[], list[Any]]) -> list[Any]:
        """What the file of answers holds, where the images that it names are there, else ``answer()``."""
        asked = [(p.id, p.task, p.output, p.parts, repr(sampling), more) for p, sampling, more in rows]
        drawn = any("image" in prompt.output for prompt, _, _ in rows) and kind == "until"
        keep = _has_images if drawn else lambda found: True
        return self.file.get([kind, self.options.seed, asked], answer, keep)

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        outputs = zip(rows, self._sample(rows), strict=True)
        return [
            self._drawn(prompt, output) if "image" in prompt.output else _cut(output.text or "", stops)
            for (prompt, _, stops), output in outputs
        ]

    def _losses(self, prompt: Prompt, sampling: Sampling, texts: Sequence[str]) -> list[tuple[float, bool]]:
        greedy = (self._sample([(prompt, sampling, ())])[0].text or "").strip()
        scores = require_method(self.policy, "text_logprob").text_logprob([prompt.parts] * len(texts), texts)
        return [(-score, greedy == text) for score, text in zip(scores.tolist(), texts, strict=True)]

    def _after_sketch(self, sketch: Prompt, own: Sequence[Image], question: str, generation: Any) -> list[str]:
        output = self._sample([(sketch, self._sampling(sketch.task, {}), ())])[0]
        self._drawn(sketch, output)
        assert output.image is not None
        parts = (*own, self._fitted(output.image), question)
        prompt = Prompt(sketch.id.removesuffix("/sketch"), "understand", parts, ("text",))
        return self._texts([(prompt, self._sampling("understand", generation), _stops(generation))])

    def _doc(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _parts(self, context: str, visuals: Any) -> tuple[Part, ...]:
        """Images before the text, or in the places of ``PLACEHOLDER`` where there are as many."""
        images = [self._fitted(_image(each)) for each in _flat(visuals)]
        texts = context.split(PLACEHOLDER)
        if len(texts) == 1:
            return (*images, context.strip())
        if len(texts) != len(images) + 1:
            raise InputError(f"{len(texts) - 1} times {PLACEHOLDER} for {len(images)} images: {context[:80]!r}")
        parts: list[Part] = []
        for text, image in zip(texts, [*images, None], strict=True):
            parts += [text.strip()] if text.strip() else []
            parts += [image] if image is not None else []
        return tuple(parts)

    def _fitted(self, image: Image) -> Image:
        side = self.policy.image_size
        return image if side is None else middle_square(image, side)

    def _prompt(self, parts: tuple[Part, ...], key: str) -> Prompt:
        mode, think = self.options.mode, self.options.think
        if mode == "understand":
            return Prompt(key, "reason" if think else "understand", parts, ("text",))
        output: tuple[OutputKind, ...] = ("text", "image") if think else ("image",)
        return Prompt(key, "reason" if think else mode, parts, output)

    def _sampling(self, task: TaskKind, generation: Mapping[str, Any]) -> Sampling:
        """The model's defaults with what the task's ``generation_kwargs`` and the options say."""
        options = self.options
        given = {name: getattr(options, name) for name in ("num_steps", "guidance_scale", "image_guidance_scale")}
        given["max_new_tokens"] = options.max_new_tokens or generation.get("max_new_tokens")
        own = replace(self.policy.default_sampling(task), group_size=1, temperature=0.0)
        if options.temperature is not None:
            own = replace(own, temperature=options.temperature)
        elif generation.get("do_sample") and generation.get("temperature"):
            own = replace(own, temperature=float(generation["temperature"]))
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def _batches(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Neighbors with equal settings, which are sampled together."""
        start = 0
        while start < len(rows):
            end = start + 1
            while end < min(len(rows), start + self.options.batch_size) and rows[end][1] == rows[start][1]:
                end += 1
            yield rows[start:end]
            start = end

    def _sample(self, rows: Sequence[Row]) -> list[Trajectory]:
        """One output per row, all of the same settings."""
        prompts = [prompt for prompt, _, _ in rows]
        seeds = [derive_seed(self.options.seed, "lmms-eval", prompt.id) for prompt in prompts]
        return [group.trajectories[0] for group in self.policy.sample(prompts, rows[0][1], seeds)]

    def _drawn(self, prompt: Prompt, output: Trajectory) -> str:
        """The image as a file, and what lmms-eval reads of it."""
        if output.image is None:
            return json.dumps({"text": output.text or "", "images": []})
        path = self.options.output_dir / f"{file_name(prompt.id)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(output.image))
        return json.dumps({"text": output.text or "", "images": [str(path.resolve())]}, ensure_ascii=False)


def _has_images(drawn: str) -> bool:
    return all(Path(path).is_file() for path in json.loads(drawn)["images"])


def _flat(visuals: Any) -> list[Any]:
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [each for visual in visuals for each in _flat(visual)]
    return [visuals]


def _image(visual: Any) -> Image:
    """Any: a PIL image or a path; raises InputError for videos and sounds."""
    if isinstance(visual, str | Path):
        return load_image(Path(visual))
    convert: Callable[[str], Any] | None = getattr(visual, "convert", None)  # of a PIL image
    if convert is None:
        raise InputError(f"a {type(visual).__name__}: lvrpo reads images alone: choose a task of images")
    pixels = np.array(convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _stops(generation: Mapping[str, Any]) -> list[str]:
    until = generation.get("until") or ()
    return [each for each in ([until] if isinstance(until, str) else until) if each]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))].strip()
