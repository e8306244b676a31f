"""``lvrpo generate``, ``lvrpo ask`` and ``lvrpo edit``: inference with a policy."""

from __future__ import annotations

import json
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvrpo.commands.options import (
    Command,
    Options,
    Parser,
    add_base,
    add_force,
    add_model,
    add_seed,
    add_threads,
    guidance,
    max_new_tokens,
    num_steps,
    picture_size,
    refuse_existing,
    share,
    up_to,
)
from lvrpo.errors import InputError

if TYPE_CHECKING:
    from lvrpo.policies.base import Policy
    from lvrpo.types import Group, Part, Prompt


MOST_CHARACTERS = 1_000_000
"""Limit of a text on the command line; a model's own limit is lower and in tokens."""
CHUNK = 64
"""Prompts sampled at once."""
TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".yaml", ".yml")
"""Suffixes of files whose lines are no prompts."""
RENORMS = ("none", "global", "channel", "channel_match", "text_channel")


def _drawing_options(parser: Parser) -> None:
    add_seed(parser)
    add_force(parser)
    group = parser.group("sampling (default: the model's own settings)")
    group.add_argument("--num-steps", type=num_steps, metavar="N", help="sampling steps per image")
    group.add_argument(
        "--guidance", type=guidance, metavar="X", help="classifier-free guidance scale of the text (1: no guidance)"
    )
    group.add_argument(
        "--guidance-interval",
        type=share,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where LOW < t <= HIGH; t runs from 1 (noise) to 0 (image)",
    )
    group.add_argument(
        "--renorm",
        choices=RENORMS,
        help="rescale the guided velocity to the norm of the conditional one: per image (global), else per token",
    )
    group.add_argument(
        "--renorm-min", type=share, metavar="X", help="lower bound of that rescaling, from 0 to 1 (1: no rescaling)"
    )
    _thinking_options(parser)
    add_threads(parser)


def _thinking_options(parser: Parser) -> None:
    group = parser.group("sampling (default: the model's own settings)")
    group.add_argument("--think", action="store_true", help="let the model write its reasoning first")
    group.add_argument("--max-new-tokens", type=max_new_tokens, metavar="N", help="maximum length of a text, in tokens")


def _generate_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to generate")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt per line, or .jsonl rows with 'prompt'"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write 00000.png ... and index.jsonl"
    )
    parser.add_argument("--count", type=up_to(10_000), default=1, metavar="N", help="images per prompt (default: 1)")
    parser.add_argument(
        "--size", type=picture_size, metavar="WxH", help="image size in pixels (default: the model's own)"
    )
    _drawing_options(parser)


def generate(options: Options) -> None:
    from lvrpo.commands.inputs import write_file
    from lvrpo.pictures import png
    from lvrpo.reading import read_lines

    if (options.prompt is None) == (options.prompts is None):
        raise InputError("what to draw: give --prompt TEXT or --prompts FILE, one of the two")
    if options.prompt is not None:
        texts = [options.prompt]
    elif options.prompts.suffix == ".jsonl":
        texts = _generation_prompts(options.prompts)
    elif options.prompts.suffix in TABLES:
        kind = options.prompts.suffix
        raise InputError(
            f"{options.prompts}: {kind} is no list of prompts: give a text file, a prompt per line, or .jsonl"
        )
    else:
        texts = [line for _, line in read_lines(options.prompts, "write one line each")]
    numbers = range(len(texts) * options.count)
    refuse_existing([options.out / "index.jsonl", *(options.out / f"{n:05d}.png" for n in numbers)], options.force)
    prompts = [_drawing_prompt("generate", (text,), number, options) for number, text in enumerate(texts)]
    groups = sample(load(options), prompts, options, options.count)
    index = []
    for group, text in zip(groups, texts, strict=True):
        for trajectory in group.trajectories:
            assert trajectory.image is not None
            file = f"{len(index):05d}.png"
            write_file(options.out / file, png(trajectory.image), options.force)
            row = {"file": file, "prompt": text, "seed": options.seed}
            if options.think:
                row["thought"] = trajectory.text
            index.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_file(options.out / "index.jsonl", "".join(index).encode(), options.force)
    print(f"{len(index)} picture{'s' * (len(index) > 1)} in {options.out}")


def _generation_prompts(table: Path) -> list[str]:
    """The texts of a file in the one format of rows."""
    from lvrpo.commands.inputs import checked_row, read_rows

    texts = []
    for where, found in read_rows(table):
        row = checked_row(found, "generate", where)
        if row.task != "generate":
            raise InputError(f"{where}: task {row.task!r}: only rows of task 'generate' are drawn: leave it out")
        if row.images:
            raise InputError(f"{where}: field 'images': a drawing starts from its text alone: leave it out")
        texts.append(row.prompt)
    return texts


def _ask_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="a question about --image")
    parser.add_argument("--image", type=Path, metavar="FILE", help="the image that QUESTION is about")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE.jsonl",
        help="many questions: rows with 'images' and 'prompt', in the format of training rows",
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="the folder of the images of FILE.jsonl (default: its own)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the answers here (default: standard output)")
    add_force(parser)
    _thinking_options(parser)
    add_threads(parser)


def ask(options: Options) -> None:
    from lvrpo.commands.inputs import fitting_image, write_file
    from lvrpo.policies.loading import stored_image_size

    image, question, table = options.image, options.question, options.questions
    single = image is not None and question is not None
    if single == (table is not None) or (image is None) != (question is None):
        raise InputError("what to ask: give --image FILE QUESTION, or --questions FILE.jsonl")
    if options.out is not None:
        refuse_existing([options.out], options.force)
    if image is not None and question is not None:
        policy = load(options)
        assert image is not None
        assert question is not None
        prompts = [prompt(_question_task(options), (fitting_image(image, policy.image_size), question), ("text",), 0)]
        lines = [sample(policy, prompts, options)[0].trajectories[0].text or ""]
    else:
        rows = _question_rows(table, stored_image_size(options.model), options.root)
        policy = load(options)
        for row in rows:
            row.require_readable(policy)
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

    def require_readable(self, policy: Policy) -> None:
        """Raises InputError, with file and line, where the policy cannot read the question."""
        from lvrpo.policies.base import check_text

        try:
            check_text(policy, str(self.parts[-1]))
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


def _question_rows(table: Path, side: int | None, root: Path | None) -> list[QuestionRow]:
    """Reads rows; resizes their pictures to the model's size, with one message."""
    from lvrpo.commands.inputs import checked_row, read_rows
    from lvrpo.data.jsonl import picture_path
    from lvrpo.pictures import load_image, middle_square

    found, odd = [], []
    for where, row in read_rows(table):
        parsed = checked_row(row, "understand", where)
        if parsed.kinds != ("text",) or not parsed.images:
            raise InputError(f"{where}: task '{parsed.task}': only questions about pictures are asked: leave it out")
        paths = [picture_path(table.parent, name, where, root=root) for name in parsed.images]
        images = [load_image(path) for path in paths]
        if side is not None:
            odd += [path for path, image in zip(paths, images, strict=True) if image.shape[1:] != (side, side)]
            images = [middle_square(image, side) for image in images]
        found.append(QuestionRow(where, row, (*images, parsed.prompt)))
    if odd:
        which = f"picture {odd[0]} is" if len(odd) == 1 else f"{len(odd)} pictures, such as {odd[0]}, are"
        print(f"warning: {table}: {which} of another size: resized to {side} x {side}", file=sys.stderr)
    return found


def _edit_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("instruction", metavar="INSTRUCTION", help="how to change the image")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the image to edit")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the result, a PNG")
    _drawing_options(parser)
    parser.group("sampling (default: the model's own settings)").add_argument(
        "--image-guidance", type=guidance, metavar="X", help="classifier-free guidance scale of the image (1: none)"
    )


def edit(options: Options) -> None:
    from lvrpo.commands.inputs import fitting_image, require_png, write_file
    from lvrpo.pictures import png

    require_png(options.out)
    refuse_existing([options.out], options.force)
    policy = load(options)
    parts = (fitting_image(options.image, policy.image_size), options.instruction)
    group = sample(policy, [_drawing_prompt("edit", parts, 0, options)], options, task="edit")[0]
    image = group.trajectories[0].image
    assert image is not None
    write_file(options.out, png(image), options.force)
    print(options.out)


def load(options: Options) -> Policy:
    """The policy, on its device; before that, what no policy can do is refused."""
    import torch

    from lvrpo.policies.loading import load_policy

    low, high = vars(options).get("guidance_interval") or (0.0, 1.0)
    if low >= high:
        raise InputError(f"--guidance-interval {low:g} {high:g}: guides no step: write LOW < HIGH, or --guidance 1")
    torch.set_num_threads(options.threads)
    return load_policy(options.model, options.device, options.dtype, options.base)


def prompt(task: Any, parts: tuple[Part, ...], output: Any, number: int) -> Prompt:
    """A prompt of the command line. Any: the literals of ``Prompt``."""
    from lvrpo.types import Prompt

    for part in parts:
        if isinstance(part, str) and any(unicodedata.category(character) == "Cs" for character in part):
            raise InputError(f"the text {part!a} is not UTF-8: use a UTF-8 locale, such as LANG=C.UTF-8")
        if isinstance(part, str) and all(unicodedata.category(character)[0] in "PZC" for character in part):
            raise InputError("the text is blank: write what to draw, ask or change")
        if isinstance(part, str) and len(part) > MOST_CHARACTERS:
            raise InputError(f"the text has {len(part)} characters, more than {MOST_CHARACTERS}: shorten it")
    return Prompt(f"command line/{number}", task, parts, output)


def _drawing_prompt(task: Any, parts: tuple[Part, ...], number: int, options: Options) -> Prompt:
    """A prompt whose output is a picture, after a text with --think. Any: the literals of ``Prompt``."""
    if options.think:
        return prompt("reason", parts, ("text", "image"), number)
    return prompt(task, parts, ("image",), number)


def sample(policy: Policy, prompts: list[Prompt], options: Options, count: int = 1, task: Any = None) -> list[Group]:
    """``count`` outputs per prompt: drawings from the seed, text greedy. Any: a task, by default the prompts'."""
    from dataclasses import replace

    from lvrpo.sampling import derive_seed

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
    given = {field: value for name, field in names.items() if (value := vars(options).get(name)) is not None}
    if "guidance_interval" in given:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    sampling = replace(policy.default_sampling(task or prompts[0].task), group_size=count, temperature=0.0, **given)
    seed = options.seed if drawing else 0
    groups: list[Group] = []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        groups += policy.sample(chunk, sampling, [derive_seed(seed, p.id) for p in chunk])
    return groups


GENERATE = Command(
    "generate images from text",
    _generate_options,
    generate,
    "examples:\n"
    '  lvrpo generate tiny --prompt "two red circles" --count 8 --out drawings\n'
    "  lvrpo generate runs/quickstart --prompts prompts.txt --out drawings",
)
ASK = Command(
    "answer questions about images",
    _ask_options,
    ask,
    "examples:\n"
    '  lvrpo ask tiny --image drawings/00000.png "what color is the circle?"\n'
    "  lvrpo ask runs/quickstart --questions questions.jsonl --out answers.jsonl",
)
EDIT = Command(
    "edit an image by an instruction",
    _edit_options,
    edit,
    'examples:\n  lvrpo edit tiny --image drawings/00000.png "remove the circle" --out edited.png',
)
