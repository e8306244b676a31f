"""The page in a real browser, at desktop and phone width, light and dark."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvrpo.report import build_report

MakeRun = Callable[..., Path]

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WIDE_PARTS = """
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  const seen = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre, .hidden"));
  const wide = seen.filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.tagName + "." + e.className);
  const {scrollWidth, scrollHeight} = page.documentElement;
  document.getElementById("out").textContent = `width ${scrollWidth} tall ${scrollHeight} wide ${wide.slice(0, 5)} end`;
};
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


def chromium(tmp_path: Path, page: Path, *options: str) -> str:
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(tmp_path: Path, width: int, make_run: MakeRun) -> None:
    text = build_report(make_run(tmp_path / "example")).read_text(encoding="utf-8")
    opened = text.replace("<details>", "<details open>")
    frame = tmp_path / "frame.html"
    style = f"width:{width}px;height:800px;border:0"
    frame.write_text(
        f'<iframe id="frame" style="{style}" srcdoc="{html.escape(opened)}"></iframe><p id="out"></p>'
        f"<script>{WIDE_PARTS}</script>",
        encoding="utf-8",
    )
    found = re.search(r"width (\d+) tall (\d+) wide (.*?) end</p>", chromium(tmp_path, frame, "--dump-dom"))
    assert found is not None
    assert int(found[1]) <= width
    assert int(found[2]) > 2000
    assert found[3] == ""


@pytest.mark.parametrize(("scheme", "is_dark"), [("1", False), ("0", True)])
def test_the_page_follows_the_color_scheme(tmp_path: Path, scheme: str, is_dark: bool, make_run: MakeRun) -> None:
    page = build_report(make_run(tmp_path / "example"))
    shot = tmp_path / "shot.png"
    options = [f"--screenshot={shot}", "--window-size=1280,1600", f"--blink-settings=preferredColorScheme={scheme}"]
    chromium(tmp_path, page, *options)
    with Image.open(shot) as image:
        assert image.size == (1280, 1600)
        corner = image.convert("L").getpixel((5, 5))
        darkest, lightest = np.asarray(image.convert("L")).min(), np.asarray(image.convert("L")).max()
    assert isinstance(corner, int)
    assert (corner < 80) == is_dark
    assert darkest < 60
    assert lightest > 200
