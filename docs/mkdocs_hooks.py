"""Hooks of mkdocs: pages of the site that are files outside ``docs`` or docstrings, and the links to them.

The Markdown in the repository stays readable where it is; ``make docs-site`` builds the site from it.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "docs/index.md": "contents.md",
    **{name: f"project/{name}" for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
    **{f"examples/notebooks/{name}.ipynb": f"project/notebooks/{name}.md" for name in ("tour", "own_data")},
    **{f"examples/{name}.py": f"project/examples/{name}.md" for name in ("grpo_loop", "use_the_parts")},
}
"""File of the repository to its page of the site."""
API = {
    "Train from Python": ("lvrpo.api", "lvrpo.rewards.function", "lvrpo.policies.loading"),
    "Data types": ("lvrpo.types",),
    "The policy contract": ("lvrpo.policies.base", "lvrpo.policies.defaults"),
    "Prompts and rewards": ("lvrpo.data.base", "lvrpo.rewards.base", "lvrpo.rewards.success"),
    "Evaluation": ("lvrpo.evaluation.suite", "lvrpo.records", "lvrpo.statistics"),
    "Distributed": ("lvrpo.distributed.collectives", "lvrpo.distributed.sharding", "lvrpo.distributed.checkpoint"),
}
"""Heading to the modules whose public names stand under it; the equations have a page of their own."""
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not files of ``docs``."""
    if (contents := files.get_file_from_path("index.md")) is not None:
        files.remove(contents)
    for path, page in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            text = f"# {Path(path).name}\n\n```python\n{text}```\n"
        elif path.endswith(".ipynb"):
            text = _notebook_page(text)
        files.append(File.generated(config, page, content=_relinked(text, path, page)))
    files.append(File.generated(config, "reference/api.md", content=_api_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links to files outside ``docs`` at their pages."""
    if page.file.generated_by is not None:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _relinked(markdown: str, path: str, page: str) -> str:
    """Links relative to ``path``, a file of the repository, become relative to ``page``."""

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        to = OUTSIDE.get(there, there.removeprefix("docs/"))
        return f"]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, markdown)


def _notebook_page(text: str) -> str:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells) + "\n"


def _api_page() -> str:
    sections = [
        f"## {heading}\n\n" + "\n\n".join(f"::: {module}\n    options:\n      heading_level: 3" for module in modules)
        for heading, modules in API.items()
    ]
    return "# Python API\n\n" + "\n\n".join(sections) + "\n"
