"""Texts that were costly to get, on the disk: one file per key, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lvrpo.errors import InputError
from lvrpo.reading import read_json_object
from lvrpo.storing import write_whole


def cache_folder() -> Path:
    """``$LVRPO_CACHE``, else ``lvrpo`` in the user's folder of caches."""
    own = os.environ.get("LVRPO_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvrpo"


class TextCache:
    """Key -> text. Processes may share a folder: a file appears by one rename, and a damaged one counts as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, *key: str) -> str | None:
        """The text, or None where there is none that is whole."""
        try:
            found = read_json_object(self._path(key))
            text = found["text"]
            return text if found["sha256"] == _digest(text) else None
        except (InputError, KeyError, TypeError, AttributeError):
            return None

    def put(self, text: str, *key: str) -> None:
        """Writes the text under the key; the last of several writers wins. Raises InputError where it cannot."""
        path = self._path(key)
        content = json.dumps({"text": text, "sha256": _digest(text)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.encode())
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}): name another folder") from None

    def _path(self, key: tuple[str, ...]) -> Path:
        name = _digest(json.dumps(key))
        return self.folder / name[:2] / f"{name}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
