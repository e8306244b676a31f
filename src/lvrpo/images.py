"""Reads image files: only safe formats, with bounded size; the only caller of ``PIL.Image.open``.

Pillow passes some formats to other programs (EPS and PostScript to Ghostscript); they are refused by content, not by
file name.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PilImage
from torch.nn import functional

from lvrpo.errors import InputError
from lvrpo.reading import MIB, open_regular
from lvrpo.types import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Accepted formats; MPO, written by phones, is a JPEG."""
MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded."""
MAX_BYTES = 512 * MIB
REMEDY = "save it as PNG or JPEG"
DECODE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, AttributeError),
    *(ArithmeticError, NotImplementedError, struct.error),
)
"""Exceptions of Pillow's decoders for invalid bytes."""


@contextmanager
def open_image(source: Path | bytes, name: Path | str) -> Iterator[PilImage.Image]:
    """An open image, pixels not yet decoded; ``name`` is used in error messages.

    Raises InputError if the source is not a regular file, is not an image of ``FORMATS``, is damaged or animated, or
    has more than 64 megapixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)  # _open checks the size itself
        warnings.filterwarnings("ignore", module="PIL")  # warnings about metadata
        if isinstance(source, bytes):
            with _open(io.BytesIO(source), name) as image:
                yield image
            return
        if not os.path.lexists(source):
            raise InputError(f"{name}: no such image file: correct the path or add the file")
        with open_regular(source, "give an image file", MAX_BYTES) as file, _open(file, name) as image:
            yield image


def damage_error(name: Path | str, error: BaseException) -> InputError:
    """The error for bytes that cannot be decoded."""
    message = " ".join(str(error).split())[:100] or type(error).__name__
    return InputError(f"{name}: damaged image ({message}): save it again")


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to contiguous uint8 (H, W, 3), rounded; nan is 0."""
    pixels = (image.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte()
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def to_pil(image: torch.Tensor) -> PilImage.Image:
    """An image (3, H, W) in [0, 1], rounded to 8 bits."""
    return PilImage.fromarray(to_uint8(image))


def png(image: torch.Tensor | PilImage.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    (to_pil(image) if isinstance(image, torch.Tensor) else image).save(buffer, "PNG")
    return buffer.getvalue()


def _open(file: IO[bytes], name: Path | str) -> PilImage.Image:
    try:
        image = PilImage.open(file, formats=FORMATS)
    except PilImage.DecompressionBombError:
        raise InputError(f"{name}: more than {MAX_PIXELS // 10**6} megapixels: make it smaller") from None
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise InputError(f"{name}: not an image that can be read ({kinds}): use PNG or JPEG") from None
    except DECODE_ERRORS as error:
        raise damage_error(name, error) from None
    width, height = image.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels: make it smaller"
    elif image.format != "MPO" and _animated(image, name):
        problem = "animated, or of several pages: save one of them as PNG"
    if problem:
        image.close()
        raise InputError(f"{name}: {problem}")
    return image


def _animated(image: PilImage.Image, name: Path | str) -> bool:
    try:
        return getattr(image, "is_animated", False)  # formats without frames lack it
    except DECODE_ERRORS as error:
        raise damage_error(name, error) from None


# --- pixels ---

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of images that are stored on their side."""


@dataclass(frozen=True)
class StoredImage:
    """The bytes of an image file inside a table or an archive."""

    name: str
    """The location of the image, unique."""
    content: bytes = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


ImageFile = Path | StoredImage


def check_image(file: ImageFile) -> tuple[int, int]:
    """Width and height from the file's header. Raises InputError as ``load_image`` does, without decoding pixels."""
    with open_image(*_opened(file)) as image:
        return image.size


def upright_size(file: ImageFile) -> tuple[int, int]:
    """Height and width that ``load_image`` gives, from the file's header. Raises InputError as it does."""
    path = str(file)
    with open_image(*_opened(file)) as image:
        width, height = image.size
        try:
            sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        except DECODE_ERRORS as error:
            raise damage_error(path, error) from None
        return (width, height) if sideways else (height, width)


def load_mask(file: ImageFile) -> torch.Tensor:
    """An image as bool (height, width), True where it is brighter than half; raises InputError as ``load_image``."""
    return load_image(file).mean(dim=0) > 0.5


def load_image(file: ImageFile) -> Image:
    """Reads an image: float32 (3, height, width) in [0, 1].

    Any mode is taken: transparency is composited on white, the EXIF orientation applied, gray and palette and CMYK
    images converted, gray of 9 to 16 bits scaled by its own range. Raises InputError, one line, for a file that is
    missing, no image, damaged, animated, of float or 32-bit pixels, or of more than 64 megapixels.
    """
    with open_image(*_opened(file)) as opened:
        return _pixels(opened, str(file))


def decode_image(content: bytes, name: str) -> Image:
    """An image from the bytes of a file, as ``load_image``; its errors show ``name`` for the path."""
    with open_image(content, name) as opened:
        return _pixels(opened, name)


def _opened(file: ImageFile) -> tuple[Path | bytes, Path | str]:
    """Opens any source that ``open_image`` accepts."""
    return (file, file) if isinstance(file, Path) else (file.content, file.name)


def middle_square(image: Image, side: int) -> Image:
    """The middle square of an image resized to (3, side, side); itself if it has that size."""
    height, width = image.shape[1:]
    if (height, width) == (side, side):
        return image
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    middle = image[:, top : top + square, left : left + square]
    resized = functional.interpolate(middle[None], size=(side, side), mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 1).to(torch.float32)


def _pixels(opened: PilImage.Image, name: Path | str) -> Image:
    try:
        deep = _deep_gray(opened, name)
        image = ImageOps.exif_transpose(opened)
        if deep is not None:
            low, high = deep
            gray = (np.asarray(image).astype(np.float32) - low) / (high - low)
            return torch.from_numpy(np.repeat(gray.clip(0, 1)[None], 3, axis=0))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = PilImage.new("RGBA", image.size, "white")
            image = PilImage.alpha_composite(white, image)
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except DECODE_ERRORS as error:
        raise damage_error(name, error) from None
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _deep_gray(image: PilImage.Image, name: Path | str) -> tuple[float, float] | None:
    """The values of black and white in a gray image of more than 8 bits, as its file declares them; None without them.

    Raises InputError if the file does not declare the values of black and white.
    """
    if image.mode == "F":
        raise InputError(f"{name}: float pixels have no fixed range: save it as 8-bit PNG")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    tags = getattr(image, "tag_v2", {})  # of a TIFF alone
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    if (image.mode == "I" and image.format != "PNG") or bits > 16:
        raise InputError(f"{name}: 32-bit or signed pixels have no fixed range: save it as 8-bit or 16-bit PNG")
    white = 2.0**bits - 1
    return (white, 0.0) if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else (0.0, white)


CACHED_BYTES = 1 << 30
"""Maximum size of the decoded images that an ``ImageCache`` keeps."""


class ImageCache:
    """The images that ``load`` decoded last, up to ``CACHED_BYTES`` of them."""

    def __init__(self, load: Callable[[ImageFile], torch.Tensor]) -> None:
        self._load = load
        self._kept: dict[ImageFile, torch.Tensor] = {}
        """In the order of their last use."""
        self._bytes = 0
        self._lock = Lock()

    def __call__(self, file: ImageFile) -> torch.Tensor:
        image = self._kept.get(file)
        image = self._load(file) if image is None else image
        with self._lock:
            before = self._kept.pop(file, None)
            self._kept[file] = image
            self._bytes += image.nbytes - (0 if before is None else before.nbytes)
            while self._bytes > CACHED_BYTES:
                self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return image
