"""``lvrpo push`` and ``lvrpo pull``: policies on the Hugging Face Hub, with a model card made from the run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lvrpo import __version__
from lvrpo.commands.inputs import require_new
from lvrpo.commands.options import Options
from lvrpo.commands.use_options import REPO_ID
from lvrpo.distributed.peers import first_line
from lvrpo.errors import ContractError, InputError, optional_package
from lvrpo.policies import BUILT_IN
from lvrpo.policies.adapter import has_adapter, read_base
from lvrpo.policies.loading import policy_folder, possible_tasks
from lvrpo.report.formatting import interval
from lvrpo.report.run import MARKERS, load_run
from lvrpo.report.tables import TextTable
from lvrpo.strict_yaml import parse_yaml

NOT_PUSHED = ("state", "checkpoint.json", "README.md")
"""Entries of a checkpoint that are not uploaded: those of the run, and the card, which is rewritten."""
SENT = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a model that are sent and fetched; none of them runs code when it is read."""
PIPELINE_TAGS = {
    frozenset(("understand", "generate")): "any-to-any",
    frozenset(("generate",)): "text-to-image",
    frozenset(("understand",)): "image-text-to-text",
}


def push(options: Options) -> None:
    folder = policy_folder(options.model)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if _is_sent(path.relative_to(folder))]
    if not any(path.suffix == ".safetensors" for path in files):
        raise InputError(f"{folder}: holds no weights of its own: make one model of it with `lvrpo export`, push that")
    card = _model_card(options.repo, Path(options.model), folder, options.license)
    if options.card:
        print(card, *(f"{path.relative_to(folder)}  {path.stat().st_size:,} bytes" for path in files), sep="\n")
        return
    url = _send(options.repo, folder, files, card, options.public, options.force)
    print(f"{url}: {len(files) + 1} files, {'public' if options.public else 'private'}")


def _is_sent(path: Path) -> bool:
    """Whether a file of a model's folder, by its path in it, is sent to the Hub."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.parts[0] not in NOT_PUSHED and any(map(path.match, SENT))


def _send(repo: str, folder: Path, files: list[Path], card: str, public: bool, force: bool) -> str:
    """One commit with all files, after every check that needs no writing."""
    hub = _library()
    api, token = hub.HfApi(), hub.get_token()
    if token is None:
        raise InputError(f"push {repo}: no token: run `hf auth login`, or set HF_TOKEN")
    with _hub_errors(repo):
        who = api.whoami(token)
    names = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
    owner = repo.partition("/")[0]
    if owner not in names:
        raise InputError(
            f"push {repo}: the token is of {who['name']}, which cannot write there: use {', '.join(names)}"
        )
    with _hub_errors(repo):
        if api.repo_exists(repo, token=token):
            info = api.model_info(repo, token=token)
            held = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
            if held and not force:
                raise InputError(f"push {repo}: holds {len(held)} files: choose another name, or add --force")
            if info.private == public:
                what = "private: leave out --public" if public else "public: add --public"
                raise InputError(f"push {repo}: is {what}, or choose another name")
        else:
            api.create_repo(repo, token=token, private=not public)
        operations = [hub.CommitOperationAdd("README.md", card.encode())]
        operations += [hub.CommitOperationAdd(str(path.relative_to(folder)), path) for path in files]
        api.create_commit(repo, operations, commit_message=f"lvrpo {__version__}", token=token)
    return f"{api.endpoint}/{repo}"


def _model_card(repo: str, model: Path, folder: Path, license_id: str | None) -> str:
    """The README.md of a policy: metadata of the Hub, results of the run, its recipe, and what was not measured.

    ``model``: a run, whose results are shown, or a folder. Raises InputError without a license.
    """
    run = load_run(model) if model.is_dir() and any((model / name).is_file() for name in MARKERS) else None
    config: Any = parse_yaml(run.config, "config.yaml") if run is not None and run.config else {}
    base = read_base(folder) if has_adapter(folder) else str(config.get("policy") or model)
    license_id = license_id or _license_of(base)
    if license_id is None:
        raise InputError(f"push {model}: the license of its base {base or '(unknown)'} is unknown: add --license ID")
    tasks = possible_tasks(folder)
    is_hub_id = re.fullmatch(REPO_ID, base) is not None and not Path(base).exists()
    public_base = is_hub_id or base in BUILT_IN  # a path of this machine says nothing to others
    drawn = frozenset(task for task in ("understand", "generate") if task in tasks)
    fields: dict[str, Any] = {
        "license": license_id,
        "library_name": "peft" if has_adapter(folder) else "lvrpo",
        "pipeline_tag": PIPELINE_TAGS.get(drawn),
        "tags": ["lvrpo", "reinforcement-learning", "grpo", "unified-multimodal"],
        "base_model": base if is_hub_id else None,
    }
    data = _library().ModelCardData(**{name: value for name, value in fields.items() if value is not None})
    title = run.name if run is not None else folder.resolve().name
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {title}",
        f"A policy for {', '.join(tasks)}, post-trained{f' from `{base}`' if public_base else ''} with lvrpo "
        f"{__version__}: "
        "group-relative policy optimization of a unified multimodal model (arXiv:2603.27693).",
        f"```\nlvrpo pull {repo} FOLDER\nlvrpo evaluate FOLDER --benchmark FILE.jsonl\n```",
    ]
    if run is not None:
        parts += _results(run)
        parts.append(f"## Recipe\n```yaml\n{run.config.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _results(run: Any) -> Iterator[str]:
    """The table of a run's benchmarks, and whether the run was healthy. Any: a RunRecord."""
    summary = run.summary
    if summary is None or not summary.after:
        yield "## Results\nThis run was not evaluated."
        return
    rows = []
    for name, before in summary.before.items():
        if name in summary.after:
            change = interval(summary.difference.get(name), signed=True)
            rows.append((name, interval(before), interval(summary.after[name]), change, str(before.n or "")))
    table = TextTable("", ("benchmark", "before", "after", "difference [95 %]", "prompts"), tuple(rows))
    yield f"## Results\n{table.markdown().rstrip()}"
    health = summary.raw.get("health") or {}
    found = [f"- {finding['words']}" for finding in health.get("findings", ())]
    seed = summary.raw.get("seed")
    yield "## Limits\n" + "\n".join(
        [f"- One run{'' if seed is None else f', seed {seed}'}: another seed gives other numbers.", *found]
    )


def _license_of(base: str) -> str | None:
    """The license in the card of a base that lies on this machine; None where it names none."""
    if base in BUILT_IN:
        return "apache-2.0"
    try:
        card = policy_folder(base) / "README.md"
    except InputError:
        return None
    if not card.is_file():
        return None
    return (_library().metadata_load(card) or {}).get("license")


def pull(options: Options) -> None:
    hub, folder = _library(), options.folder
    require_new(folder)
    part = folder.with_name(f"{folder.name}.part")
    with _hub_errors(options.repo):
        hub.snapshot_download(
            options.repo, revision=options.revision, local_dir=part, allow_patterns=[*SENT, "README.md"]
        )
    shutil.rmtree(part / ".cache", ignore_errors=True)  # of the download
    part.replace(folder)
    print(folder)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns errors of the Hub's library into one line; it has removed the token from them."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{repo}: asks for its terms to be accepted: do so on its page, then `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise InputError(
            f"{repo}: not on the Hub, or not for this token: see the spelling, or `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise InputError(f"{repo}: the token is not allowed to do that: make one that can write") from None
        raise ContractError(f"{repo}: the Hub answered {code}: {first_line(error)}") from None
    except errors.HFValidationError as error:
        raise InputError(f"{repo}: {first_line(error)}") from None
    except Exception as error:  # errors of the HTTP client, which huggingface_hub chooses, have no other base
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        raise ContractError(f"{repo}: the Hub cannot be reached: {first_line(error)}: try again") from None


def _library() -> Any:
    """huggingface_hub. Any: an optional package."""
    return optional_package("huggingface_hub", "the Hub needs huggingface_hub", "hub")
