"""The description of a published benchmark, and its inputs: data folder, detector, VLM judge."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvrpo.data.table_reading import datasets_library, open_table, reading
from lvrpo.data.tables import DatasetConfig
from lvrpo.errors import InputError
from lvrpo.types import Prompt

if TYPE_CHECKING:
    from lvrpo.evaluation.suite import Benchmark

KEYWORD = "hub"
"""In place of a folder: every benchmark from its own data set."""
Rows = Sequence[Mapping[str, Any]]
"""Any: what the columns hold."""


@dataclass(frozen=True)
class HubData:
    """A data set with the rows of a benchmark, of which its official files can be made."""

    id: str
    tables: tuple[str, ...]
    """Its configurations, each of which has one split; (): it has one configuration."""
    columns: tuple[str, ...]
    """What each row must hold."""
    files: Callable[[Mapping[str, Rows]], Mapping[str, str]]
    """The official files by name, from the rows of each configuration ("" where there is one)."""


def hub_id(data: Path, own: HubData | None) -> str | None:
    """The id that ``data`` stands for: the benchmark's own, or ORG/NAME; None for a folder, which may be missing."""
    if data.exists():
        return None
    if str(data) == KEYWORD:
        return None if own is None else own.id
    return str(data) if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(data)) and not data.parent.is_dir() else None


def holds_tables(folder: Path) -> bool:
    """Whether a folder is a copy of a data set of the Hub."""
    return folder.is_dir() and any(folder.rglob("*.parquet"))


@contextmanager
def official_files(data: HubData, path: str, name: str) -> Iterator[Path]:
    """A folder with the official files of a benchmark, made of a data set (an id, or a folder in its layout).

    Raises InputError for a data set of another form.
    """
    rows = {table: read_table(path, table or None, data.columns, name) for table in data.tables or ("",)}
    with tempfile.TemporaryDirectory(prefix="lvrpo-benchmark-") as made:
        for file, text in data.files(rows).items():
            (Path(made) / file).write_text(text, encoding="utf-8")
        yield Path(made)


def read_table(path: str, table: str | None, columns: Sequence[str], name: str) -> list[dict[str, Any]]:
    """The rows of the only split of a configuration; raises InputError. Any: what the columns hold."""
    library = datasets_library()
    where = f"benchmark {name}: {path}" + (f" ({table})" if table else "")
    with reading(where, quiet=Path(path).exists()):
        builder = library.load_dataset_builder(path=path, name=table)
        splits = [str(split) for split in builder.config.data_files or {}]
    if len(splits) != 1:
        raise InputError(
            f"{where}: has the splits {', '.join(splits)}: a data set with one split is read: name another"
        )
    config = DatasetConfig(path=path, name=table, test=splits[0])
    found = open_table(config, "test", splits[0], where)[0]
    lost = next((column for column in columns if column not in found.column_names), None)
    if lost is not None:
        raise InputError(f"{where}: has no column {lost!r}: name the benchmark's own data set (--data {KEYWORD})")
    return found.select_columns(list(columns)).to_list()


@dataclass(frozen=True)
class BenchmarkInputs:
    """What published benchmarks are opened with."""

    data: Path | None = None
    """The folder that holds one folder per benchmark, or the files of the only one; or "hub", or the id of a data set
    of the Hub."""
    detector: str | None = None
    """A detector of ``transformers``: a local folder, or an id in the local Hub cache."""
    color_classifier: str | None = None
    """A CLIP or SigLIP, likewise."""
    thresholds: tuple[float, float] | None = None
    """Scores of the detector that count: of all prompts, and of those about numbers."""
    vlm: Path | None = None
    """The judge of questions about images: a local folder of ``transformers``, or a YAML file of an endpoint."""
    device: str = "auto"


NO_INPUTS = BenchmarkInputs()
SHOWN = 3
"""Files that a message names."""


@dataclass(frozen=True)
class PublishedBenchmark:
    """A benchmark of a paper, whose prompts the user has in a folder."""

    name: str
    source: str
    """Paper and address."""
    files: tuple[str, ...]
    """What its folder holds, in the official layout."""
    prompts: int
    """How many the official files hold."""
    needs: str
    """Who judges, and the options that name it."""
    license: str
    """Of the prompts."""
    build: Callable[[Path, BenchmarkInputs], list[Benchmark]]
    """Of its folder."""
    read: Callable[[Path], Sequence[Prompt]]
    """The prompts of a file in its format, official or not, with their facts."""
    samples: int = 1
    """Images per prompt."""
    digest: str = ""
    """Of the official prompts, as in ``Benchmark.details``; "": they are counted alone."""
    folder: str = ""
    """Name of its folder; "": that of the benchmark."""
    hub: HubData | None = None
    """A data set of the Hub with the same rows; None: lvrpo knows none."""

    def open(self, inputs: BenchmarkInputs) -> list[Benchmark]:
        """The benchmark of the files in ``inputs.data``, or of a data set.

        Raises InputError where neither is there, and for prompts that are not the official ones.
        """
        needed = (
            " and ".join(self.files) if len(self.files) <= SHOWN else f"{self.files[0]} and {len(self.files) - 1} more"
        )
        if inputs.data is None:
            hub = f", or take {self.hub.id} of the Hub (--data {KEYWORD})" if self.hub else ""
            raise InputError(
                f"benchmark {self.name}: needs {needed} of {self.source}: name the folder that holds it (--data "
                f"DIR){hub}; lvrpo benchmarks says more"
            )
        folder = self.folder or self.name
        tried = (inputs.data / folder, inputs.data)
        found = next((each for each in tried if all((each / file).exists() for file in self.files)), None)
        if found is not None:
            return self._official(self.build(found, inputs), str(found))
        name = hub_id(inputs.data, self.hub) or next((str(each) for each in tried if holds_tables(each)), None)
        if name is not None and self.hub is not None:
            with official_files(self.hub, name, self.name) as made:
                return self._official(self.build(made, inputs), name)
        if not inputs.data.exists() and str(inputs.data) == KEYWORD:
            raise InputError(
                f"benchmark {self.name}: lvrpo knows no data set of the Hub for it: get {needed} from {self.source} "
                "and name the folder (--data DIR)"
            )
        raise InputError(
            f"benchmark {self.name}: {inputs.data}: holds no {needed}, nor {folder}/ with it: get it from {self.source}"
        )

    def minutes(self, seconds: float) -> int:
        """Minutes that all images take at so many seconds each."""
        return round(self.prompts * self.samples * seconds / 60)

    def _official(self, built: list[Benchmark], where: str) -> list[Benchmark]:
        expected = f"{self.prompts} prompts, {self.digest}"
        for benchmark in built:
            held = benchmark.details["data"]
            if benchmark.n != self.prompts or expected not in held:
                raise InputError(
                    f"benchmark {self.name}: {where}: holds {held}, the official version {expected.rstrip(', ')}: get "
                    f"all of it from {self.source}; prompts of your own: lvrpo data benchmark"
                )
        return built
