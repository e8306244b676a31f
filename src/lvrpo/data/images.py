"""Picture files -> ``Image``."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PilImage
from torch.nn import functional

from lvrpo.errors import InputError
from lvrpo.types import Image

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of pictures that are stored on their side."""


def check_image(path: Path) -> tuple[int, int]:
    """Width and height from the file's header. Raises InputError as ``load_image`` does, without decoding pixels."""
    with _open_file(path) as picture:
        return picture.size


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width that ``load_image`` gives, from the file's header. Raises InputError as it does."""
    with _open_file(path) as picture:
        width, height = picture.size
        return (width, height) if picture.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS else (height, width)


def load_mask(path: Path) -> torch.Tensor:
    """A picture as bool (height, width), True where it is brighter than half; raises InputError as ``load_image``."""
    return load_image(path).mean(dim=0) > 0.5


def load_image(path: Path) -> Image:
    """Reads a picture: float32 (3, height, width) in [0, 1].

    Any mode is taken: transparency is composited on white, the EXIF orientation applied, gray and palette and CMYK
    pictures converted. Raises InputError, one line, for a file that is missing, no picture, damaged, animated, of
    float pixels, or of more than 64 megapixels.
    """
    with _open_file(path) as opened:
        return _pixels(opened, path)


def decode_image(content: bytes, name: str) -> Image:
    """A picture from the bytes of a file, as ``load_image``; ``name`` stands in its errors for the path."""
    with _open(io.BytesIO(content), name) as opened:
        return _pixels(opened, name)


def middle_square(image: Image, side: int) -> Image:
    """The middle square of a picture resized to (3, side, side); itself if it has that size."""
    height, width = image.shape[1:]
    if (height, width) == (side, side):
        return image
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    middle = image[:, top : top + square, left : left + square]
    resized = functional.interpolate(middle[None], size=(side, side), mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 1).to(torch.float32)


def _pixels(opened: PilImage.Image, path: Path | str) -> Image:
    try:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
            gray = np.asarray(picture).astype(np.float32) / 65535
            return torch.from_numpy(np.repeat(gray.clip(0, 1)[None], 3, axis=0))
        if picture.mode == "F":
            raise InputError(f"{path}: float pixels have no fixed range: save it as 8-bit PNG")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = PilImage.new("RGBA", picture.size, "white")
            picture = PilImage.alpha_composite(white, picture)
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{path}: damaged picture ({_line(error)}): save it again") from None
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _open_file(path: Path) -> PilImage.Image:
    if not path.is_file():
        raise InputError(f"{path}: no such picture file: correct the path or add the file")
    return _open(path, path)


def _open(source: Path | io.BytesIO, path: Path | str) -> PilImage.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)
            picture = PilImage.open(source)
    except PilImage.DecompressionBombError:
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels: make it smaller") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture that can be read: use PNG or JPEG") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{path}: damaged picture ({_line(error)}): save it again") from None
    width, height = picture.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels: make it smaller"
    elif picture.format != "MPO" and getattr(picture, "is_animated", False):  # formats without frames lack it
        problem = "animated: save one frame as PNG"
    if problem:
        picture.close()
        raise InputError(f"{path}: {problem}")
    return picture


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
