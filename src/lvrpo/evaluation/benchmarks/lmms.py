"""Answers of a policy to the requests of lmms-eval 0.7 (``lmms_eval.models``), without importing that package.

``lmms_model`` makes the model class of it. Requests are those of its "simple" models, which alone know likelihoods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from lvrpo.data.images import load_image, middle_square, png
from lvrpo.errors import InputError
from lvrpo.evaluation.items import file_name
from lvrpo.policies.base import Policy, Sampling, require_method
from lvrpo.sampling import derive_seed
from lvrpo.types import TASKS, Image, OutputKind, Part, Prompt, TaskKind, Trajectory

Mode = Literal["understand", "generate", "edit"]
"""What ``generate_until`` produces: a text, a picture from a text, or a picture from a picture and a text."""
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
    """Whether a text is written before a picture."""
    output_dir: Path = Path("lmms_pictures")
    """Where pictures are written: TASK_DOC.png."""
    batch_size: int = 1
    seed: int = 0
    num_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    max_new_tokens: int | None = None
    """Also of tasks that name another number."""

    def __post_init__(self) -> None:
        """Raises InputError for an unknown mode."""
        if self.mode not in get_args(Mode):
            raise InputError(f"mode={self.mode!r}: must be one of {', '.join(get_args(Mode))}")
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: must be >= 1")


class Answers:
    """The requests of lmms-eval, answered by a policy. Any in signatures: its request objects and documents."""

    def __init__(self, policy: Policy, options: Options) -> None:
        """Raises InputError for a mode that the policy cannot do."""
        able = getattr(policy, "tasks", TASKS)  # optional in anybody's class
        if options.mode not in able:
            raise InputError(f"mode={options.mode}: this model does {', '.join(able)} alone")
        self.policy, self.options = policy, options
        self.task_dict: Mapping[str, Any] = {}  # set by lmms-eval: task -> split -> documents

    # --- what lmms-eval calls ---

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Texts; or, where pictures are drawn, JSON with "text" and "images" (paths)."""
        rows: list[tuple[Prompt, Sampling, Sequence[str]]] = []
        for request in requests:
            context, generation, doc_to_visual, doc_id, task, split = request.args
            parts = self._parts(context, doc_to_visual(self._doc(task, split, doc_id)) if doc_to_visual else ())
            prompt = self._prompt(parts, f"{task}/{split}/{doc_id}")
            rows.append((prompt, self._sampling(prompt.task, generation), _stops(generation)))
        found = []
        for prompt, output, stops in self._sampled(rows):
            found.append(self._drawn(prompt, output) if "image" in prompt.output else _cut(output.text or "", stops))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(loss, whether it is the greedy answer) of each continuation.

        The loss is minus the mean log-prob per token, end token included: tasks of multiple choice take the smallest.
        """
        contexts: list[tuple[Part, ...]] = []
        texts: list[str] = []
        keys: list[tuple[Any, ...]] = []
        for request in requests:
            if len(request.args) == 2:
                raise InputError("acc_mutual_info: needs likelihoods without a context: choose the metric acc")
            context, target, doc_to_visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            contexts.append(self._parts(context, doc_to_visual(doc) if doc_to_visual else ()))
            texts.append((target if isinstance(target, str) else target(doc)).strip())
            keys.append((task, split, doc_id, context))
        greedy: dict[tuple[Any, ...], str] = {}
        for key, parts in dict(zip(keys, contexts, strict=True)).items():
            # no token is shorter than a character, and a longer answer is another one
            longest = max(len(text) for text, other in zip(texts, keys, strict=True) if other == key)
            prompt = Prompt("/".join(map(str, key[:3])), "understand", parts, ("text",))
            sampling = self._sampling("understand", {"max_new_tokens": longest + 1})
            greedy[key] = next(self._sampled([(prompt, sampling, ())]))[1].text or ""
        scores = require_method(self.policy, "text_logprob").text_logprob(contexts, texts)
        rows = zip(scores.tolist(), texts, keys, strict=True)
        return [(-score, greedy[key].strip() == text) for score, text, key in rows]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The texts of every round; a task's ``doc_to_text`` says what is asked next and when it is over."""
        return [self._rounds(*request.args) for request in requests]

    def generate_visual_cot(self, requests: Sequence[Any]) -> list[str]:
        """Draws a picture (from the task's own, where it has one), then answers with both."""
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
            output = next(self._sampled([(sketch, self._sampling(kind, {}), ())]))[1]
            self._drawn(sketch, output)
            assert output.image is not None
            parts = (*own, self._fitted(output.image), question)
            prompt = Prompt(f"{task}/{split}/{doc_id}", "understand", parts, ("text",))
            answer = next(self._sampled([(prompt, self._sampling("understand", generation), ())]))[1]
            found.append(_cut(answer.text or "", _stops(generation)))
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
            output = next(self._sampled([(prompt, self._sampling("understand", generation), ())]))[1]
            said.append(_cut(output.text or "", _stops(generation)))
            visuals, context, over, previous, info = to_text(
                doc, previous_output=said, round_idx=len(said), previous_round_info=info
            )
            if over:
                return list(previous)

    def _doc(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _parts(self, context: str, visuals: Any) -> tuple[Part, ...]:
        """Pictures before the text, or in the places of ``PLACEHOLDER`` where there are as many."""
        images = [self._fitted(_image(each)) for each in _flat(visuals)]
        texts = context.split(PLACEHOLDER)
        if len(texts) == 1:
            return (*images, context.strip())
        if len(texts) != len(images) + 1:
            raise InputError(f"{len(texts) - 1} times {PLACEHOLDER} for {len(images)} pictures: {context[:80]!r}")
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
        if generation.get("do_sample") and generation.get("temperature"):
            own = replace(own, temperature=float(generation["temperature"]))
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def _sampled(
        self, rows: Sequence[tuple[Prompt, Sampling, Sequence[str]]]
    ) -> Iterator[tuple[Prompt, Trajectory, Sequence[str]]]:
        """One output per row; neighbors with equal settings are sampled together."""
        start = 0
        while start < len(rows):
            end = start + 1
            while end < min(len(rows), start + self.options.batch_size) and rows[end][1] == rows[start][1]:
                end += 1
            prompts = [prompt for prompt, _, _ in rows[start:end]]
            seeds = [derive_seed(self.options.seed, "lmms-eval", prompt.id) for prompt in prompts]
            for row, group in zip(rows[start:end], self.policy.sample(prompts, rows[start][1], seeds), strict=True):
                yield row[0], group.trajectories[0], row[2]
            start = end

    def _drawn(self, prompt: Prompt, output: Trajectory) -> str:
        """The picture as a file, and what lmms-eval reads of it."""
        if output.image is None:
            return json.dumps({"text": output.text or "", "images": []})
        path = self.options.output_dir / f"{file_name(prompt.id)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(output.image))
        return json.dumps({"text": output.text or "", "images": [str(path.resolve())]}, ensure_ascii=False)


def _flat(visuals: Any) -> list[Any]:
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [each for visual in visuals for each in _flat(visual)]
    return [visuals]


def _image(visual: Any) -> Image:
    """Any: a PIL picture or a path; raises InputError for videos and sounds."""
    if isinstance(visual, str | Path):
        return load_image(Path(visual))
    convert: Callable[[str], Any] | None = getattr(visual, "convert", None)  # of a PIL picture
    if convert is None:
        raise InputError(f"a {type(visual).__name__}: lvrpo reads pictures alone: choose a task of pictures")
    pixels = np.array(convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _stops(generation: Mapping[str, Any]) -> list[str]:
    until = generation.get("until") or ()
    return [each for each in ([until] if isinstance(until, str) else until) if each]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))].strip()
