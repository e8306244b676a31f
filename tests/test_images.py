"""Images are data: formats that start programs are not read, and pixels mean what the file says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from lvrpo import images
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.errors import InputError
from lvrpo.images import FORMATS, check_image, decode_image, load_image, load_mask, upright_size
from lvrpo.report.samples import ImageStore

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{ } loop\nshowpage\n",
    b"\xc5\xd0\xd3\xc6" + b"\0" * 28,
)


def encoded(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4), 128 if mode == "L" else "red").save(buffer, format)
    return buffer.getvalue()


def other_formats() -> dict[str, bytes]:
    """Whatever else Pillow writes."""
    found = {
        "eps": EPS[0],
        "dos eps": EPS[1],
        "wmf": b"\xd7\xcd\xc6\x9a" + b"\0" * 80,
        "fits": b"SIMPLE  =" + b" " * 71,
    }
    for format in ("PDF", "ICO", "TGA", "PCX", "SGI", "ICNS", "JPEG2000", "DDS", "MSP", "XBM", "PPM", "SPIDER"):
        try:
            found[format] = encoded(format)
        except (OSError, KeyError, ValueError):
            continue
    return found


@pytest.mark.parametrize("format", other_formats())
def test_other_formats_are_refused_everywhere(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", never)
    content, path = other_formats()[format], Path("innocent.png")
    path.write_bytes(content)
    for read in (load_image, load_mask, check_image, upright_size):
        with pytest.raises(InputError, match=r"innocent\.png: not an image that can be read"):
            read(path)
    with pytest.raises(InputError, match="not an image that can be read"):
        decode_image(content, "row 0")
    assert ImageStore(Path()).image("innocent.png") is None
    Path("rows.jsonl").write_text(
        json.dumps({"task": "understand", "prompt": "x", "images": [str(path)], "answer": "y"})
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*not an image"):
        JsonlPrompts(JsonlConfig(train=Path("rows.jsonl")))


@pytest.mark.parametrize("format", FORMATS)
def test_the_formats_that_are_read(format: str) -> None:
    image = decode_image(encoded(format), "x")
    assert image.shape == (3, 4, 4)
    assert image[0].min() > 0.9
    assert image[1:].max() < 0.1


def test_gray_of_sixteen_bits() -> None:
    values = np.array([[0, 65535], [32768, 257]], dtype=np.uint16)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(values).save(name)
        assert np.allclose(load_image(Path(name))[0], values / 65535, atol=1e-6)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0  # white is zero
    Image.fromarray(values).save("white.tiff", tiffinfo=tags)
    assert np.allclose(load_image(Path("white.tiff"))[0], 1 - values / 65535, atol=1e-6)


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_pixels_without_a_range_are_refused(kind: str) -> None:
    Image.fromarray(np.arange(1024).reshape(32, 32).astype(kind)).save("x.tiff")
    with pytest.raises(InputError, match=r"x\.tiff: (32-bit or signed|float) pixels have no fixed range"):
        load_image(Path("x.tiff"))


def test_palettes_and_transparency() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    clear.save("clear.png")
    assert load_image(Path("clear.png"))[:, 0].T.tolist() == [[1, 0, 0], [1, 1, 1]]
    clear.convert("P").save("palette.png", transparency=clear.convert("P").getpixel((1, 0)))
    assert load_image(Path("palette.png"))[:, 0, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_one_line_wherever_it_lies(format: str) -> None:
    """Every cut, and every tenth byte changed."""
    whole = encoded(format)
    damaged = [whole[:cut] for cut in range(0, len(whole), max(1, len(whole) // 40))]
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    problems = [problem for content in damaged if (problem := fault(content)) is not None]
    assert problems
    assert all(problem.startswith("x: ") and len(problem.splitlines()) == 1 for problem in problems)


def fault(content: bytes) -> str | None:
    """The message, where the image cannot be read."""
    try:
        decode_image(content, "x")
    except InputError as error:
        return str(error)
    return None


def test_the_images_used_last_stay_in_memory_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CACHED_BYTES", 100)
    read: list[str] = []

    def load(file: images.ImageFile) -> torch.Tensor:
        read.append(str(file))
        return torch.zeros(int(str(file)), dtype=torch.uint8)

    cache = images.ImageCache(load)
    assert [len(cache(Path(name))) for name in ("40", "30", "40", "50", "40", "30", "101", "40")] == [
        *(40, 30, 40, 50, 40, 30, 101, 40)
    ]
    assert read == ["40", "30", "50", "30", "101", "40"]
