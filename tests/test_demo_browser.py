"""The demo as a visitor sees it: a headless Chromium clicks through the page, at desktop and at phone width."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvrpo.policies.loading import load_policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs chromedriver (Debian: chromium-driver)"),
]
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a demo of two models."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    load_policy("tiny").save(folder / "other")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "lvrpo", "demo", "tiny", "--against", str(folder / "other")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: answers(address) or server.poll() is not None, 180)
        assert server.poll() is None, (folder / "log").read_text()
        yield address
        said = (folder / "log").read_text().splitlines()
        assert said == [f"{address}: the demo; Ctrl-C ends it"]  # nor do wrong requests print anything
    finally:
        server.terminate()
        server.wait(30)


def answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=30):
        return True
    return False


def until(done: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value; Any: what ``done`` returns."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if value := done():
            return value
        time.sleep(0.1)
    raise AssertionError("nothing came")


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, address: str) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(option)
    # a window of Chromium is at least 500 wide
    width, height = request.param
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1.0}}
    )
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(address)
        yield Page(driver, request.node.callspec.id)
    finally:
        driver.quit()


class Page:
    """A page in a browser. Any: of selenium, an optional package."""

    def __init__(self, driver: Any, name: str) -> None:
        self.driver, self.name = driver, name
        until(lambda: self.button("Draw"))

    def visible(self, selector: str) -> list[Any]:
        return [found for found in self.driver.find_elements("css selector", selector) if found.is_displayed()]

    def button(self, label: str) -> Any:
        return next((b for b in self.visible("button.primary") if b.text.strip() == label), None)

    def click(self, element: Any) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        self.driver.execute_script("arguments[0].click()", element)

    def open(self, label: str) -> None:
        """A tab; on a narrow screen it may stand in a menu."""
        named = [
            b
            for b in self.driver.find_elements("css selector", "[role=tab], .overflow-dropdown button")
            if (b.get_attribute("textContent") or "").strip() == label
        ]
        self.click(next((b for b in named if b.is_displayed()), named[0]))
        until(lambda: self.button(label))

    def images(self) -> list[Any]:
        """Loaded images of the galleries that are shown."""
        script = "return arguments[0].complete && arguments[0].naturalWidth > 0"
        found = self.visible(".grid-wrap img, .gallery img, [data-testid=detailed-image], .preview img")
        return [image for image in found if self.driver.execute_script(script, image)]

    def upload(self, file: Path) -> None:
        inputs = self.driver.find_elements("css selector", "input[type=file]")
        shown = [i for i in inputs if self.driver.execute_script(SHOWN, i)]
        shown[0].send_keys(str(file))
        until(lambda: [i for i in self.visible("[data-testid=image] img, .image-frame img") if i.size["width"] > 10])

    def write(self, text: str, place: int = 0) -> None:
        area = [a for a in self.visible("textarea, input[type=text]") if a.is_enabled()][place]
        area.clear()
        area.send_keys(text)

    def text(self) -> str:
        return self.driver.execute_script("return document.body.innerText")

    def message(self) -> str:
        """The first error that is shown."""
        return until(lambda: next((t.text for t in self.visible(".toast-body, .toast-text") if t.text), ""))

    def shot(self, what: str) -> None:
        """A screenshot of the whole page, where LVRPO_SCREENSHOTS names a folder; it has to fit the width."""
        folder = os.environ.get("LVRPO_SCREENSHOTS")
        if folder:
            height = self.driver.execute_script("return document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": self.width(), "height": height, "scale": 1}
            shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            Path(folder, f"{self.name}_{what}.png").write_bytes(base64.b64decode(shot["data"]))
        wide = self.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= self.width()

    def width(self) -> int:
        return self.driver.execute_script("return window.innerWidth")


SHOWN = """let e = arguments[0].parentElement;
while (e && e.getClientRects().length === 0) e = e.parentElement;
return e !== null && arguments[0].closest('[role=tabpanel]')?.getClientRects().length > 0"""


def test_every_tab_is_clicked_through(page: Page, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    Image.new("RGB", (48, 40), "red").save(image)

    started = time.monotonic()
    page.click(page.button("Draw"))
    until(lambda: len(page.images()) >= 8)  # four of each model
    assert time.monotonic() - started < 60
    until(lambda: "how many red circles" in page.text())
    page.shot("draw")

    page.open("Ask")
    page.click(page.button("Ask"))
    assert "no image: add one" in page.message()
    page.shot("error")
    page.upload(image)
    page.write("what color is the circle ?")
    page.click(page.button("Ask"))
    answers = until(lambda: [a for a in page.visible("textarea[disabled]") if a.get_attribute("value")])
    assert len(answers) == 2
    page.shot("ask")

    page.open("Edit")
    page.upload(image)
    page.write("add a blue star")
    page.click(page.button("Edit"))
    until(lambda: len(page.images()) >= 2)
    page.shot("edit")

    page.open("Think, then draw")
    page.click(page.button("Think, then draw"))
    until(lambda: len(page.images()) >= 2)
    assert len([a for a in page.visible("textarea[disabled]") if a.get_attribute("value")]) == 2
    page.shot("think")


def test_an_unknown_word_is_said_on_the_page(page: Page) -> None:
    page.write("two red circels")
    page.click(page.button("Draw"))
    assert "did you mean 'circles'?" in page.message()
    assert not page.images()
