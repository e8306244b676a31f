"""The only place that opens pictures: formats that are data and nothing else, of a bounded size.

Pillow knows formats that it hands to other programs (EPS and PostScript to Ghostscript); they are refused by their
content, whatever their name is.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from lvrpo.errors import InputError
from lvrpo.reading import MIB, open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is read; a phone's MPO is a JPEG."""
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""
MAX_BYTES = 512 * MIB
REMEDY = "save it as PNG or JPEG"
DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, AttributeError),
    *(ArithmeticError, NotImplementedError, struct.error),
)
"""What decoders raise at bytes that are not what they say."""


@contextmanager
def open_picture(source: Path | bytes, name: Path | str) -> Iterator[PilImage.Image]:
    """A picture, open, its pixels not yet decoded; ``name`` stands in messages.

    Raises InputError, one line, for what is no regular file, no picture of ``FORMATS``, damaged, animated, or of more
    than 64 megapixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)  # what it warns of is looked for
        warnings.filterwarnings("ignore", module="PIL")  # of metadata that nobody reads
        if isinstance(source, bytes):
            with _opened(io.BytesIO(source), name) as picture:
                yield picture
        else:
            with _open_file(source, name) as picture:
                yield picture


@contextmanager
def _open_file(source: Path, name: Path | str) -> Iterator[PilImage.Image]:
    if not os.path.lexists(source):
        raise InputError(f"{name}: no such picture file: correct the path or add the file")
    with open_regular(source, "give a picture file", MAX_BYTES) as file, _opened(file, name) as picture:
        yield picture


def damaged(name: Path | str, error: BaseException) -> InputError:
    """The error for bytes that cannot be decoded."""
    return InputError(f"{name}: damaged picture ({_line(error)}): save it again")


def _opened(file: IO[bytes], name: Path | str) -> PilImage.Image:
    try:
        picture = PilImage.open(file, formats=FORMATS)
    except PilImage.DecompressionBombError:
        raise InputError(f"{name}: more than {MAX_PIXELS // 10**6} megapixels: make it smaller") from None
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise InputError(f"{name}: not a picture that can be read ({kinds}): use PNG or JPEG") from None
    except DAMAGE as error:
        raise damaged(name, error) from None
    width, height = picture.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels: make it smaller"
    elif picture.format != "MPO" and _animated(picture, name):
        problem = "animated, or of several pages: save one of them as PNG"
    if problem:
        picture.close()
        raise InputError(f"{name}: {problem}")
    return picture


def _animated(picture: PilImage.Image, name: Path | str) -> bool:
    try:
        return getattr(picture, "is_animated", False)  # formats without frames lack it
    except DAMAGE as error:
        raise damaged(name, error) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
