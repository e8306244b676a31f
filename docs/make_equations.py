"""Writes docs/reference/equations.md from the docstrings of lvrpo.algorithms and lvrpo.sampling.

python docs/make_equations.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "equations.md"
WIDTH = 120

CHAPTERS = {
    "algorithms": (
        "advantages",
        "selection",
        "objectives",
        "kl",
        "nft",
        "preferences",
        "representation",
        "gradients",
        "audit",
    ),
    "sampling": ("timesteps", "flow_sde", "solvers", "guidance", "tokens", "masked", "seeds"),
}
LABELS = ("Shapes", "Range", "Units", "Raises", "Differs from the paper")

HEAD = """# Equations

Every public function of `lvrpo.algorithms` and `lvrpo.sampling`: pure functions on tensors, each usable alone. This
page is made from their docstrings by `make docs`; a test holds the two together. Letters: P prompts, G members of a
group, B trajectories, K rewards (or draws, or tasks), L tokens, V vocabulary, N image tokens, C channels of one, T
steps, W trained steps. Time t: 1 is noise, 0 is data.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page as text."""
    contents, sections = ["| module | functions |", "|---|---|"], []
    for package, modules in CHAPTERS.items():
        folder = ROOT / "src" / "lvrpo" / package
        found = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        if found != set(modules):
            raise SystemExit(f"CHAPTERS and {folder} differ: {sorted(found ^ set(modules))}")
        for module in modules:
            tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
            public = public_names(tree)
            functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in public]
            links = ", ".join(f"[`{name}`](#{name.lower()})" for name in functions)
            contents.append(f"| [`{package}.{module}`](#{package}{module}) | {links} |")
            sections.append(f"## {package}.{module}\n\n{paragraphs(ast.get_docstring(tree) or '')}")
            for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
                if isinstance(node, ast.FunctionDef) and node.name in public:
                    sections.append(function(node))
                elif isinstance(node, ast.ClassDef) and node.name in public:
                    sections.append(record(node))
                elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in public:
                    sections.append(f"### {ast.unparse(node.target)}\n\n{wrap(inline(comment(following)))}")
    return HEAD + "\n" + "\n".join(contents) + "\n\n" + "\n\n".join(sections) + "\n"


def public_names(tree: ast.Module) -> set[str]:
    """The names in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise SystemExit("a module without __all__")


def function(node: ast.FunctionDef) -> str:
    """A function: its call, what it computes, and its labelled lines as a list."""
    text, labelled = split_labels(ast.get_docstring(node) or "")
    lines = [f"### {node.name}", "", f"```text\n{call(node)}\n```", "", paragraphs(text), ""]
    lines += [listed(label, body) for label, body in labelled]
    return "\n".join(lines)


def record(node: ast.ClassDef) -> str:
    """A class: its fields and what they hold."""
    lines = [f"### {node.name}", "", paragraphs(ast.get_docstring(node) or ""), ""]
    for field, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            lines.append(wrap(f"- `{ast.unparse(field.target)}` {inline(comment(following))}".rstrip(), "  "))
    return "\n".join(lines).rstrip()


def comment(node: ast.stmt | None) -> str:
    """The string under a field or a constant."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return str(node.value.value) if is_text else ""


def call(node: ast.FunctionDef) -> str:
    """name(argument, *, option=default), without types."""
    arguments = node.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [with_default(a, d) for a, d in zip(arguments.args, defaults, strict=True)]
    if arguments.kwonlyargs:
        parts.append("*")
        parts += [with_default(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    indent = " " * (len(node.name) + 1)
    return textwrap.fill(f"{node.name}({', '.join(parts)})", WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def with_default(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def split_labels(docstring: str) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the sentences behind "Shapes:" and the other labels."""
    pattern = re.compile(rf"(?:^|(?<=[.)] ))({'|'.join(LABELS)}):\s", re.MULTILINE)
    starts = list(pattern.finditer(docstring))
    if not starts:
        return docstring, []
    ends = [match.start() for match in starts[1:]] + [len(docstring)]
    labelled = [(m.group(1), docstring[m.end() : end].strip()) for m, end in zip(starts, ends, strict=True)]
    return docstring[: starts[0].start()].strip(), labelled


def listed(label: str, body: str) -> str:
    return wrap(f"- **{label}:** {inline(' '.join(body.split()))}", "  ")


def paragraphs(text: str) -> str:
    """Paragraphs, wrapped; indented ones are code."""
    out = []
    for block in text.split("\n\n"):
        if block.startswith("    "):
            out.append(f"```python\n{textwrap.dedent(block)}\n```")
        else:
            out.append(wrap(inline(" ".join(block.split()))))
    return "\n\n".join(out)


def inline(text: str) -> str:
    """Docstring markup as Markdown; papers as links."""
    text = " ".join(text.split()).replace("``", "`").replace("*", r"\*").replace(r"\*\*", "**")
    text = re.sub(r"(?<!\S)\\\*([A-Za-z][^*]*?)\\\*", r"*\1*", text)  # emphasis, not a product
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def wrap(text: str, indent: str = "") -> str:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    # a line that begins with a minus would be a list
    return "\n".join([lines[0], *(re.sub(r"^(\s*)([-+#]|\d+\.)(\s)", r"\1\\\2\3", line) for line in lines[1:])])


if __name__ == "__main__":
    main()
