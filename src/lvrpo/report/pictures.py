"""Pictures of a run as data URIs, small enough for one page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lvrpo.errors import InputError
from lvrpo.pictures import DAMAGE, open_picture

PIXEL_ART = 64
"""Pictures up to this side are enlarged with hard pixel edges."""
LOSSLESS = 128


@dataclass(frozen=True)
class Picture:
    """A picture ready for ``<img>``."""

    uri: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= PIXEL_ART


class PictureStore:
    """Reads pictures below one run directory; each file once."""

    def __init__(self, run: Path) -> None:
        self.root = run.resolve()
        self._read: dict[tuple[str, int], Picture | None] = {}

    def picture(self, path: str | Path | None, most_side: int = 320) -> Picture | None:
        """None for a picture that is missing, broken, or outside the run directory."""
        if not path:
            return None
        key = (str(path), most_side)
        if key not in self._read:
            self._read[key] = self._load(self.root / path, most_side)
        return self._read[key]

    def _load(self, path: Path, most_side: int) -> Picture | None:
        try:
            path = path.resolve()
            if not path.is_relative_to(self.root):
                return None
            with open_picture(path, path) as opened:
                image = opened.convert("RGB")
        except (InputError, RuntimeError, *DAMAGE):  # RuntimeError: a link that leads to itself
            return None
        if max(image.size) > most_side:
            image.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
        return Picture(_uri(image), *image.size)


def _uri(image: Image.Image) -> str:
    """PNG, or JPEG where that is smaller and the picture is no pixel art."""
    choices = [("png", _encoded(image, "PNG", optimize=True))]
    if max(image.size) > LOSSLESS:
        choices.append(("jpeg", _encoded(image, "JPEG", quality=88)))
    kind, content = min(choices, key=lambda choice: len(choice[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
