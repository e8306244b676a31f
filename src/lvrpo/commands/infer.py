"""``lvrpo generate``, ``lvrpo ask`` and ``lvrpo edit``: inference with a policy."""

from __future__ import annotations

import json
import sys
import unicodedata
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lvrpo.commands.inputs import checked_row, fitting_image, read_rows, require_png, require_used, write_file
from lvrpo.commands.options import Options, refuse_existing, refuse_given
from lvrpo.data.jsonl import image_path
from lvrpo.data.rows import require_texts
from lvrpo.errors import InputError
from lvrpo.images import load_image, middle_square, png
from lvrpo.policies.base import Policy, abilities, can_draw, check_text
from lvrpo.policies.loading import load_policy, possible_tasks, stored_image_size
from lvrpo.reading import read_lines
from lvrpo.sampling import derive_seed
from lvrpo.types import Group, Part, Prompt, TaskKind

MOST_CHARACTERS = 1_000_000
"""Limit of a text on the command line; a model's own limit is lower and in tokens."""
CHUNK = 64
"""Prompts sampled at once."""
TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".yaml", ".yml")
"""Suffixes of files whose lines are no prompts."""
OF_GUIDANCE = ("guidance_interval", "renorm", "renorm_min")
"""Options that change guided steps alone."""


def generate(options: Options) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("what to draw: give --prompt TEXT or --prompts FILE, one of the two")
    if options.prompt is not None:
        texts = [("--prompt", text) for text in options.prompt]
    elif options.prompts.suffix == ".jsonl":
        texts = _generation_prompts(options.prompts)
    elif options.prompts.suffix in TABLES:
        kind = options.prompts.suffix
        raise InputError(
            f"{options.prompts}: {kind} is no list of prompts: give a text file, a prompt per line, or .jsonl"
        )
    else:
        lines = read_lines(options.prompts, "write one prompt per line")
        texts = [(f"{options.prompts}:{number}", line) for number, line in lines]
    for where, text in texts:
        require_texts(require_written, where, [text], None)
    numbers = range(len(texts) * options.count)
    refuse_existing([options.out / "index.jsonl", *(options.out / f"{n:05d}.png" for n in numbers)], options.force)
    prompts = [_drawing_prompt("generate", (text,), number, options) for number, (_, text) in enumerate(texts)]
    policy = load(options, prompts[0].task)
    for where, text in texts:
        require_texts(partial(check_text, policy), where, [text], None)
    groups = sample(policy, prompts, options, options.count)
    index = []
    for group, (_, text) in zip(groups, texts, strict=True):
        for trajectory in group.trajectories:
            assert trajectory.image is not None
            file = f"{len(index):05d}.png"
            write_file(options.out / file, png(trajectory.image), options.force)
            row = {"file": file, "prompt": text, "seed": options.seed}
            if options.think:
                row["thought"] = trajectory.text
            index.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_file(options.out / "index.jsonl", "".join(index).encode(), options.force)
    print(f"{len(index)} image{'s' * (len(index) > 1)} in {options.out}")


def _generation_prompts(table: Path) -> list[tuple[str, str]]:
    """(file:line, text) of a file in the one format of rows."""
    texts = []
    for where, found in read_rows(table):
        row = checked_row(found, "generate", where)
        if row.task != "generate":
            raise InputError(f"{where}: task {row.task!r}: only rows of task 'generate' are drawn: leave it out")
        if row.images:
            raise InputError(f"{where}: field 'images': an image starts from its text alone: leave it out")
        texts.append((where, row.prompt))
    return texts


def ask(options: Options) -> None:
    image, question, table = options.image, options.question, options.questions
    single = image is not None and question is not None
    if single == (table is not None) or (image is None) != (question is None):
        raise InputError("what to ask: give --image FILE QUESTION, or --questions FILE.jsonl")
    if table is None:
        refuse_given(options, ("root",), "finds the images of --questions: leave it out")
    if options.out is not None:
        refuse_existing([options.out], options.force)
    if image is not None and question is not None:
        policy = load(options, _question_task(options))
        prompts = [prompt(_question_task(options), (fitting_image(image, policy.image_size), question), ("text",), 0)]
        lines = [sample(policy, prompts, options)[0].trajectories[0].text or ""]
    else:
        assert table is not None
        rows = _question_rows(table, stored_image_size(options.model), options.root)
        policy = load(options, _question_task(options))
        for row in rows:
            require_texts(partial(check_text, policy), row.where, [str(row.parts[-1])], None)
        prompts = [prompt(_question_task(options), row.parts, ("text",), number) for number, row in enumerate(rows)]
        answers = [group.trajectories[0].text or "" for group in sample(policy, prompts, options)]
        lines = [
            json.dumps({**row.row, "output": answer}, ensure_ascii=False)  # "answer" may hold the right one
            for row, answer in zip(rows, answers, strict=True)
        ]
    text = "".join(line + "\n" for line in lines)
    if options.out is not None:
        write_file(options.out, text.encode(), options.force)
    else:
        print(text, end="")


def _question_task(options: Options) -> Any:
    """The task of a question. Any: the literals of ``Prompt``."""
    return "reason" if options.think else "understand"


@dataclass(frozen=True)
class QuestionRow:
    """One row of a file of questions."""

    where: str
    """file:line"""
    row: dict[str, Any]
    parts: tuple[Part, ...]


def _question_rows(table: Path, side: int | None, root: Path | None) -> list[QuestionRow]:
    """Reads rows; resizes their images to the model's size, with one message."""
    found, odd = [], []
    for where, row in read_rows(table):
        parsed = checked_row(row, "understand", where)
        if parsed.kinds != ("text",) or not parsed.images:
            raise InputError(f"{where}: task '{parsed.task}': only questions about images are asked: leave it out")
        require_texts(require_written, where, [parsed.prompt], None)
        paths = [image_path(table.parent, name, where, root=root) for name in parsed.images]
        images = [load_image(path) for path in paths]
        if side is not None:
            odd += [path for path, image in zip(paths, images, strict=True) if image.shape[1:] != (side, side)]
            images = [middle_square(image, side) for image in images]
        found.append(QuestionRow(where, row, (*images, parsed.prompt)))
    if odd:
        which = f"image {odd[0]} is" if len(odd) == 1 else f"{len(odd)} images, such as {odd[0]}, are"
        print(f"warning: {table}: {which} of another size: resized to {side} x {side}", file=sys.stderr)
    return found


def edit(options: Options) -> None:
    require_png(options.out)
    refuse_existing([options.out], options.force)
    policy = load(options, "edit")
    parts = (fitting_image(options.image, policy.image_size), options.instruction)
    group = sample(policy, [_drawing_prompt("edit", parts, 0, options)], options, task="edit")[0]
    image = group.trajectories[0].image
    assert image is not None
    write_file(options.out, png(image), options.force)
    print(options.out)


def load(options: Options, task: TaskKind) -> Policy:
    """The policy, on its device; before that, what no policy can do is refused, and what this one cannot."""
    low, high = vars(options).get("guidance_interval") or (0.0, 1.0)
    if low >= high:
        raise InputError(f"--guidance-interval {low:g} {high:g}: guides no step: write LOW < HIGH, or --guidance 1")
    if can_draw((task,)) and not options.think:
        refuse_given(options, ("max_new_tokens",), "limits the text of --think: add it, or leave this out")
    tasks = possible_tasks(options.model)
    if task not in tasks:
        raise InputError(f"{options.model}: {abilities(tasks)}: name a model of the task {task!r}")
    torch.set_num_threads(options.threads)
    return load_policy(options.model, options.device, options.dtype, options.base)


def prompt(task: Any, parts: tuple[Part, ...], output: Any, number: int) -> Prompt:
    """A prompt of the command line. Any: the literals of ``Prompt``."""
    for part in parts:
        if isinstance(part, str):
            require_written(part)
    return Prompt(f"command line/{number}", task, parts, output)


def require_written(text: str) -> None:
    """Raises InputError for a text that is not UTF-8, blank or too long."""
    categories = {unicodedata.category(character) for character in text}
    if "Cs" in categories:
        raise InputError(f"the text {text!a} is not UTF-8: use a UTF-8 locale, such as LANG=C.UTF-8")
    if all(category[0] in "PZC" for category in categories):
        raise InputError("the text is blank: write what to draw, ask or change")
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"the text has {len(text)} characters, more than {MOST_CHARACTERS}: shorten it")


def _drawing_prompt(task: Any, parts: tuple[Part, ...], number: int, options: Options) -> Prompt:
    """A prompt whose output is an image, after a text with --think. Any: the literals of ``Prompt``."""
    if options.think:
        return prompt("reason", parts, ("text", "image"), number)
    return prompt(task, parts, ("image",), number)


def sample(policy: Policy, prompts: list[Prompt], options: Options, count: int = 1, task: Any = None) -> list[Group]:
    """``count`` outputs per prompt: images from the seed, text greedy. Any: a task, by default the prompts'.

    Raises InputError for an option that the policy does not use.
    """
    drawing = prompts[0].output[-1] == "image"
    names = {
        "guidance": "guidance_scale",
        "image_guidance": "image_guidance_scale",
        "renorm": "guidance_renorm",
        "renorm_min": "guidance_renorm_min",
        "guidance_interval": "guidance_interval",
        "num_steps": "num_steps",
        "max_new_tokens": "max_new_tokens",
        "size": "image_size",
    }
    given: dict[str, Any] = {}
    for name, field in names.items():
        if (value := vars(options).get(name)) is not None:
            setting = "guidance_renorm" if name == "renorm_min" else field
            require_used(f"--{name.replace('_', '-')}", setting, [policy])
            given[field] = value
    if "guidance_interval" in given:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    sampling = replace(policy.default_sampling(task or prompts[0].task), group_size=count, temperature=0.0, **given)
    if sampling.guidance_scale == sampling.image_guidance_scale == 1:
        refuse_given(
            options, OF_GUIDANCE, "changes guidance, of which there is none: add --guidance X, or leave it out"
        )
    if sampling.guidance_renorm == "none":
        refuse_given(
            options, ("renorm_min",), "limits rescaling, of which there is none: add --renorm, or leave it out"
        )
    seed = options.seed if drawing else 0
    groups: list[Group] = []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        groups += policy.sample(chunk, sampling, [derive_seed(seed, p.id) for p in chunk])
    return groups
