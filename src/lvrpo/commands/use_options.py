"""The commands that use a model: their options and help, without what they run."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

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
    image_size,
    max_new_tokens,
    num_steps,
    port,
    share,
    up_to,
)
from lvrpo.errors import InputError

REPO_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""A repository of the Hugging Face Hub."""
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
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to generate; can be repeated")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt per line, or .jsonl rows with 'prompt'"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write 00000.png ... and index.jsonl"
    )
    parser.add_argument("--count", type=up_to(10_000), default=1, metavar="N", help="images per prompt (default: 1)")
    parser.add_argument(
        "--size", type=image_size, metavar="WxH", help="image size in pixels (default: the model's own)"
    )
    _drawing_options(parser)


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


GENERATE = Command(
    "generate images from text",
    _generate_options,
    "lvrpo.commands.infer:generate",
    "examples:\n"
    '  lvrpo generate tiny --prompt "two red circles" --count 8 --out drawings\n'
    "  lvrpo generate runs/quickstart --prompts prompts.txt --out drawings",
)
ASK = Command(
    "answer questions about images",
    _ask_options,
    "lvrpo.commands.infer:ask",
    "examples:\n"
    '  lvrpo ask tiny --image drawings/00000.png "what color is the circle?"\n'
    "  lvrpo ask runs/quickstart --questions questions.jsonl --out answers.jsonl",
)
EDIT = Command(
    "edit an image by an instruction",
    _edit_options,
    "lvrpo.commands.infer:edit",
    'examples:\n  lvrpo edit tiny --image drawings/00000.png "remove the circle" --out edited.png',
)


LOOPBACK = "127.0.0.1"


def _demo_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("--against", metavar="MODEL", help="a second model to show side by side, with the same seeds")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        metavar="ADDRESS",
        help=f"address to listen on (default: {LOOPBACK}, this machine only)",
    )
    parser.add_argument("--port", type=port, default=7860, metavar="N", help="port to listen on (default: 7860)")
    add_threads(parser)


DEMO = Command(
    "generate, ask and edit in the browser, with one model or two side by side",
    _demo_options,
    "lvrpo.commands.demo:demo",
    "examples:\n  lvrpo demo tiny\n  lvrpo demo runs/quickstart --against tiny",
)


def export_options(parser: Parser) -> None:
    add_model(parser)
    add_base(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")


EXPORT = Command(
    "write a complete model folder, merging an adapter into its base",
    export_options,
    "lvrpo.commands.models:export",
    "examples:\n  lvrpo export runs/bagel_lvrpo_lora models/aligned --dtype bfloat16",
)


def _push_options(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run directory, or a model or adapter folder")
    parser.add_argument("repo", metavar="ORG/NAME", help="the Hub repository; created as private if it does not exist")
    parser.add_argument(
        "--license", metavar="ID", help="license of the weights, such as apache-2.0 (default: that of the base)"
    )
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--force", action="store_true", help="commit to a repository that already has files")
    parser.add_argument("--card", action="store_true", help="print the model card and the file list, upload nothing")


def _pull_options(parser: Parser) -> None:
    parser.add_argument("repo", metavar="ORG/NAME", help="the Hub repository")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit (default: main)")


def _check_repo(options: Options) -> None:
    if not re.fullmatch(REPO_ID, options.repo):
        raise InputError(f"{options.repo!r}: is not the name of a repository: write ORG/NAME")


PUSH = Command(
    "upload a model or an adapter to the Hugging Face Hub, with a model card",
    _push_options,
    "lvrpo.commands.hub:push",
    textwrap.dedent("""\
        examples:
          lvrpo push runs/mine me/my-model --card    # look at the card first
          lvrpo push runs/mine me/my-model

        The card states the results and the recipe of the run, its known limits, and the license of the base."""),
    _check_repo,
)
PULL = Command(
    "download a model from the Hugging Face Hub: weights, configuration and tokenizer, no code",
    _pull_options,
    "lvrpo.commands.hub:pull",
    "examples:\n  lvrpo pull me/my-model models/my-model",
    _check_repo,
)
