"""Opens picture files: only safe formats, with bounded size; the only caller of ``PIL.Image.open``.

Pillow passes some formats to other programs (EPS and PostScript to Ghostscript); they are refused by content, not by
file name.
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

import torch
from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from lvrpo.errors import InputError
from lvrpo.reading import MIB, open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Accepted formats; MPO, written by phones, is a JPEG."""
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""
MAX_BYTES = 512 * MIB
REMEDY = "save it as PNG or JPEG"
DECODE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, AttributeError),
    *(ArithmeticError, NotImplementedError, struct.error),
)
"""Exceptions of Pillow's decoders for invalid bytes."""


@contextmanager
def open_picture(source: Path | bytes, name: Path | str) -> Iterator[PilImage.Image]:
    """An open picture, pixels not yet decoded; ``name`` is used in error messages.

    Raises InputError if the source is not a regular file, is not a picture of ``FORMATS``, is damaged or animated, or
    has more than 64 megapixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)  # _open checks the size itself
        warnings.filterwarnings("ignore", module="PIL")  # warnings about metadata
        if isinstance(source, bytes):
            with _open(io.BytesIO(source), name) as picture:
                yield picture
            return
        if not os.path.lexists(source):
            raise InputError(f"{name}: no such picture file: correct the path or add the file")
        with open_regular(source, "give a picture file", MAX_BYTES) as file, _open(file, name) as picture:
            yield picture


def damage_error(name: Path | str, error: BaseException) -> InputError:
    """The error for bytes that cannot be decoded."""
    message = " ".join(str(error).split())[:100] or type(error).__name__
    return InputError(f"{name}: damaged picture ({message}): save it again")


def to_pil(image: torch.Tensor) -> PilImage.Image:
    """A picture (3, H, W) in [0, 1], rounded to 8 bits."""
    pixels = (image.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return PilImage.fromarray(pixels)


def png(image: torch.Tensor | PilImage.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    (to_pil(image) if isinstance(image, torch.Tensor) else image).save(buffer, "PNG")
    return buffer.getvalue()


def _open(file: IO[bytes], name: Path | str) -> PilImage.Image:
    try:
        picture = PilImage.open(file, formats=FORMATS)
    except PilImage.DecompressionBombError:
        raise InputError(f"{name}: more than {MAX_PIXELS // 10**6} megapixels: make it smaller") from None
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise InputError(f"{name}: not a picture that can be read ({kinds}): use PNG or JPEG") from None
    except DECODE_ERRORS as error:
        raise damage_error(name, error) from None
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
    except DECODE_ERRORS as error:
        raise damage_error(name, error) from None
