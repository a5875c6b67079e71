"""Pages in a browser: Chromium, without a window, reads what was written and finds nothing to complain about."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import METHODS, reduce_tiny, tiny_images, tiny_model
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenreduce import restore
from hf_tokenreduce.visualization import token_maps, write_page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(page, *options) -> what the browser printed, and what it logged."""
    profile = tmp_path_factory.mktemp("profile")

    def run(page, *options: str) -> tuple[str, str]:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
        command += ["--enable-logging=stderr", "--v=0", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return run


class Elements(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def write(tmp_path, name: str, count: int = 4, **options):
    model = reduce_tiny(tiny_model(), METHODS[name][0])
    pixels = tiny_images(count)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    path = write_page(model, pixels, processor, tmp_path / f"{name}.html", dense=restore(model), **options)
    return path, token_maps(model, pixels)


@pytest.mark.parametrize("name", ["tome", "ats", "sit"])
def test_the_browser_shows_the_page_as_written(browse, tmp_path, name):
    names = ["<i>slanted</i>", "<img src=http://example.invalid/x.png>", 'a "b" & c', "d"]
    path, maps = write(tmp_path, name, names=names)
    html, log = browse(path, "--dump-dom")
    assert "CONSOLE" not in log, log
    page = Elements(html)
    written = Elements(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.found if tag != "tbody"] == [tag for tag, _ in written.found]  # nothing to repair
    assert all(image["src"].startswith("data:image/jpeg;base64,") and image["alt"] for image in page.all("img"))
    assert not page.all("script") and not page.all("i")
    assert all(given in "".join(page.text) for given in names)
    assert len(page.all("polyline")) == 1 + (4 if maps.differ() else 0)
    assert len(page.all("article")) == 4 * (2 if name == "sit" else 1)


@pytest.mark.parametrize("width", [1280, 420])
def test_the_browser_draws_the_pictures(browse, tmp_path, width):
    path, _ = write(tmp_path, "ltmp", count=14)
    target = tmp_path / "page.png"
    _, log = browse(path, f"--screenshot={target}", f"--window-size={width},2400")
    assert "CONSOLE" not in log, log
    with Image.open(target) as shot:
        pixels = np.asarray(shot.convert("RGB")).astype(int)
    assert pixels.shape[:2] == (2400, width)
    colourful = (pixels.max(axis=-1) - pixels.min(axis=-1)) > 40
    assert colourful.mean() > 0.03  # the images are noise; the page itself is black on white but for thin lines
    assert (pixels[:, -4:] == 255).all()  # nothing reaches over the right edge


def test_a_broken_page_would_be_noticed(browse, tmp_path):
    path, _ = write(tmp_path, "tome")
    broken = tmp_path / "broken.html"
    html = path.read_text(encoding="utf-8")
    broken.write_text(html.replace("</header>", '<img src="http://example.invalid/x.png"></header>'), encoding="utf-8")
    _, log = browse(broken, "--dump-dom")
    assert re.search("CONSOLE.*Content Security Policy", log), log
