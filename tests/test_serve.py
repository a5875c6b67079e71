"""The page to try a checkpoint: what it computes, what it refuses, and itself over HTTP and in a browser."""

import base64
import json
import math
import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from huggingface_hub import RepoCard
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenreduce import EViTConfig, LTMPConfig, SiTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.multiply_adds import even_share
from hf_tokenreduce.serve import PUBLISHED, SideBySide, build_app, load_side_by_side, read_image, report, serve


SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"
UNTRAINED = [method.title for method in METHODS.values() if method.needs == "nothing"]
LABELS = ["cat, house cat", "crane", "crane", "<b>hen</b>", "fox"]


def labelled_model():
    model = tiny_model()
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: index for index, name in enumerate(LABELS)}
    return model


def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


def photo(width=60, height=45):
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return Image.fromarray(pixels.numpy())


def pixel_values(image):
    return processor()(image, return_tensors="pt").pixel_values


@pytest.mark.parametrize("method", UNTRAINED)
def test_both_sides_are_what_the_models_compute(method, monkeypatch):
    monkeypatch.setattr("hf_tokenreduce.serve.in_turns", lambda calls, *others: [[4.0] * 3, [2.0] * 3])
    model = labelled_model()
    answer = SideBySide(model, processor(), repeats=1)(photo(), method, 0.6)
    with torch.no_grad():
        pixels = pixel_values(photo())
        dense = model(pixels).logits.softmax(-1)[0]
        output = reduce_tokens(model, answer.reduction)(pixels, output_patch_map=True)
    for side, expected in ((answer.dense, dense), (answer.reduced, output.logits.softmax(-1)[0])):
        assert [p for _, p in side.predictions] == pytest.approx(
            expected.sort(descending=True).values.tolist(), abs=1e-5
        )
        assert {name for name, _ in side.predictions} == {"cat", "crane (1)", "crane (2)", "<b>hen</b>", "fox"}
    assert "4000.0 ms" in report(answer) and "2000.0 ms" in report(answer) and "2.00 times as fast" in report(answer)
    assert answer.dense.tokens == [65] * 4
    assert answer.reduced.tokens == output.token_counts[0].tolist()
    assert answer.share == pytest.approx(answer.reduced.multiply_adds / answer.dense.multiply_adds)
    assert 0.5 < answer.share <= 0.6
    if method != "ATS":
        assert answer.share == pytest.approx(even_share(answer.reduction, model.config))
    assert answer.seen.size == answer.token_map.size and answer.seen.width >= 300
    assert answer.seen.tobytes() != answer.token_map.tobytes()


@pytest.mark.parametrize("setting", [ToMeConfig(r=7), LTMPConfig(merge_threshold=0.5), SiTConfig(layers=(0, 2))])
def test_as_published(setting):
    published = reduce_tokens(labelled_model(), setting)
    comparison = SideBySide(published, processor(), repeats=1)
    assert comparison.methods() == [PUBLISHED, *UNTRAINED]
    answer = comparison(photo(), PUBLISHED)
    with torch.no_grad():
        expected = published(pixel_values(photo()), output_patch_map=True)
        dense = labelled_model()(pixel_values(photo())).logits.softmax(-1)[0]
    assert answer.reduction == setting and answer.reduced.tokens == expected.token_counts[0].tolist()
    best = expected.logits.softmax(-1).max().item()
    assert answer.reduced.predictions[0][1] == pytest.approx(best, abs=1e-5)
    assert answer.dense.predictions[0][1] == pytest.approx(dense.max().item(), abs=1e-5)
    other = comparison(photo(), "EViT", 0.7)
    assert other.reduction.method == "evit" and published.config.reduction == setting


def test_a_stock_checkpoint_was_not_published_reduced():
    comparison = SideBySide(tiny_model(), processor())
    assert comparison.methods() == UNTRAINED
    for method in (PUBLISHED, "LTMP"):
        with pytest.raises(ValueError, match=r"no method .* Pick one of \['ToMe'"):
            comparison(photo(), method)
    with pytest.raises(ValueError, match="cannot be reached"):
        comparison(photo(), "ToMe", 0.01)


def test_layers_that_fit_the_depth():
    twelve = SideBySide(tiny_model(num_hidden_layers=12), processor())
    pixels = pixel_values(photo())
    assert twelve.setting("EViT", 0.7, pixels).layers == EViTConfig().layers
    assert SideBySide(tiny_model(num_hidden_layers=1), processor()).setting("BAT", 0.9, pixels).layers == (0,)


def test_only_some_models_are_kept():
    comparison = SideBySide(tiny_model(), processor(), repeats=1, keep=3)
    for budget in (0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9000001):
        comparison(photo(), "ToMe", budget)
    info = comparison._reduced.cache_info()
    assert info.currsize == 3 and info.misses == 5 and info.hits == 2


def test_labels_and_settings_are_text_to_the_page():
    html = report(SideBySide(labelled_model(), processor(), repeats=1)(photo(), "ToMe", 0.6))
    assert "<b>hen</b>" not in html and "method=tome" in html and html.count("title='layer") == 4


def huge_png(file, width, height):
    """A file of a few bytes that claims to be large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_images_that_are_refused(tmp_path):
    for width, height in ((10_000, 5_001), (12_000, 9_000), (60_000, 60_000)):
        huge_png(tmp_path / "huge.png", width, height)
        with pytest.raises(ValueError, match="more than 50 megapixels"):
            read_image(tmp_path / "huge.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    photo().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    for name in ("text.png", "page.eps", "cut.png"):
        with pytest.raises(ValueError, match="not an image that can be read"):
            read_image(tmp_path / name)
    photo(400, 400).save(tmp_path / "large.bmp")
    with pytest.raises(ValueError, match=r"larger than 0\.1 MB"):
        read_image(tmp_path / "large.bmp", max_upload_mb=0.1)


def test_images_that_are_taken(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    photo(60, 45).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (45, 60)
    for mode in ("L", "P", "RGBA", "1"):
        photo().convert(mode).save(tmp_path / "mode.png")
        assert read_image(tmp_path / "mode.png").mode == "RGB"


@pytest.mark.parametrize("settings", [{"port": 0}, {"port": 70000}, {"max_upload_mb": 0}, {"max_upload_mb": math.inf}])
def test_wrong_settings(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        serve(tmp_path, **settings)


def test_an_address_of_ipv6_is_written_in_brackets(monkeypatch):
    """Gradio makes an address of the web from it, and listens on what is between the brackets."""
    pytest.importorskip("gradio")
    given = {}
    app = SimpleNamespace(launch=lambda **options: given.update(options))
    monkeypatch.setattr("hf_tokenreduce.serve.build_app", lambda *names, **options: app)
    for host, expected in (("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")):
        serve("folder", host=host)
        assert given["server_name"] == expected


def test_what_is_not_finite_is_told():
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        SideBySide(model, processor(), repeats=1)(photo(), "ToMe")


def test_a_page_says_that_dense_is_no_fair_comparison(tmp_path):
    """The model was trained with its reduction, and never without it."""
    pytest.importorskip("gradio")
    saved = tmp_path / "model"
    reduce_tokens(tiny_model(), ToMeConfig(r=4)).save_pretrained(saved)
    processor().save_pretrained(saved)
    texts = []
    for epochs in (0, 3):
        (saved / "record.json").write_text(json.dumps({"method": "tome", "epochs": epochs}))
        blocks = build_app(saved).blocks.values()
        texts.append(" ".join(str(getattr(block, "value", "")) for block in blocks))
    assert ["no fair comparison" in text for text in texts] == [False, True]


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_side_by_side(tmp_path)


def test_without_gradio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'pip install "hf-tokenreduce\[serve\]"'):
        serve(tmp_path)


def test_the_space(monkeypatch):
    calls = []
    monkeypatch.setattr("hf_tokenreduce.serve.serve", lambda *given, **settings: calls.append((given, settings)))
    for unset in (None, ""):
        monkeypatch.setenv("MODEL_ID", unset) if unset is not None else monkeypatch.delenv("MODEL_ID", raising=False)
        with pytest.raises(SystemExit, match="MODEL_ID is not set"):
            runpy.run_path(str(SPACE / "app.py"))
    monkeypatch.setenv("MODEL_ID", "someone/vit")
    for revision in ("abc123", ""):
        monkeypatch.setenv("REVISION", revision)
        runpy.run_path(str(SPACE / "app.py"))
    where = {"host": "0.0.0.0", "port": 7860}
    assert calls == [(("someone/vit",), {"revision": revision, **where}) for revision in ("abc123", None)]
    _, header, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    card = RepoCard((SPACE / "README.md").read_text()).data.to_dict()
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file() and "python_version" in header
    assert (SPACE / "requirements.txt").read_text().split() == ["hf-tokenreduce[serve]"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a page that `serve` shows in a process of its own."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("served") / "tiny_<model>"
    reduce_tokens(labelled_model(), ToMeConfig(r=7)).save_pretrained(folder)
    processor().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = f"from hf_tokenreduce.serve import serve; serve({str(folder)!r}, port={port}, max_upload_mb=1)"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder.parent / "uploads"), "OMP_NUM_THREADS": "1"}
    log = folder.parent / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", call], stdout=output, stderr=output, env=environment)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, log.read_text()
                time.sleep(0.25)
        else:
            pytest.fail("the page did not come up: " + log.read_text())
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def test_over_http(page, tmp_path):
    client_module = pytest.importorskip("gradio_client")
    client = client_module.Client(page, verbose=False, download_files=str(tmp_path))
    photo().save(tmp_path / "photo.png")
    given = client_module.handle_file(tmp_path / "photo.png")
    dense, reduced, seen, drawn, costs = client.predict(given, "EViT", 0.6, api_name="/compare")
    expected = SideBySide(labelled_model(), processor(), repeats=1)(photo(), "EViT", 0.6)
    for label, side in ((dense, expected.dense), (reduced, expected.reduced)):
        assert label["label"] == side.predictions[0][0]
        found = {entry["label"]: entry["confidence"] for entry in label["confidences"]}
        assert found == pytest.approx(dict(side.predictions), abs=1e-5)
    assert Image.open(seen).size == Image.open(drawn).size == expected.seen.size
    assert Image.open(drawn).convert("RGB").tobytes() == expected.token_map.tobytes()
    assert "method=evit" in costs
    huge_png(tmp_path / "huge.png", 9_000, 9_000)
    with pytest.raises(client_module.exceptions.AppError, match="more than 50 megapixels"):
        client.predict(client_module.handle_file(tmp_path / "huge.png"), "EViT", 0.6, api_name="/compare")


def test_an_upload_that_is_too_large(page):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"0" * 2**21 + b"\r\n--x--"
    )
    request = urllib.request.Request(
        page + "gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(request, timeout=20).close()
    assert getattr(caught.value, "code", 413) == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:7860"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost:1234"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_pages_of_the_web_are_not_answered(page, headers, status):
    """A name that is made to lead to this computer, and a page that asks from elsewhere."""
    request = urllib.request.Request(page + "config", headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert answer.status == status
        if status != 200:
            assert "evil" not in str(answer.headers)


def test_many_files_at_once_are_too_large(page):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"0" * 400_000 + b"\r\n"
    request = urllib.request.Request(
        page + "gradio_api/upload", 5 * part + b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(request, timeout=20).close()
    assert getattr(caught.value, "code", 413) == 413


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "The file is empty"), (b"no image at all", "not an image that can be read"), ("huge", "50 megapixels")],
)
def test_what_is_no_image_is_told(page, tmp_path, content, message):
    client_module = pytest.importorskip("gradio_client")
    client = client_module.Client(page, verbose=False)
    file = tmp_path / "given.png"
    if content == "huge":
        huge_png(file, 20_000, 20_000)
    else:
        file.write_bytes(content)
    with pytest.raises(client_module.exceptions.AppError, match=message):
        client.predict(client_module.handle_file(file), "EViT", 0.6, api_name="/compare")


def test_it_fetches_nothing_from_other_servers(page):
    """Gradio would download what lies at an address, whatever its size, and pass files of other servers on."""
    client_module = pytest.importorskip("gradio_client")
    client = client_module.Client(page, verbose=False)
    for address in ("https://example.com/a.png", "http://127.0.0.1:1/a.png"):
        with pytest.raises(client_module.exceptions.AppError, match="takes no addresses"):
            client.predict(client_module.handle_file(address), "EViT", 0.6, api_name="/compare")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page}gradio_api/file={address}", timeout=20).close()
        assert caught.value.code == 403 and b"other servers" in caught.value.read()


class Browser:
    """A page of headless Chromium, told what to do by its DevTools protocol."""

    def __init__(self, folder):
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        if binary is None:
            pytest.skip("no chromium to show the page in")
        self.connect = pytest.importorskip("websockets.sync.client").connect
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        options += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "about:blank"]
        self.process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.port_file, self.number, self.events = folder / "profile" / "DevToolsActivePort", 0, []

    def __enter__(self):
        self.until(lambda: self.port_file.is_file() and self.port_file.read_text().count("\n") >= 1)
        port = self.port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            target = next(entry for entry in json.load(answer) if entry["type"] == "page")
        self.connection = self.connect(target["webSocketDebuggerUrl"], max_size=2**26)
        self.socket = self.connection.__enter__()
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.connection.__exit__(*error)
        self.process.terminate()
        self.process.wait(20)

    def send(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, expression):
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the browser did not get there"
            assert self.process.poll() is None, "the browser has ended"
            time.sleep(0.1)

    def of(self, method):
        return [event["params"] for event in self.events if event["method"] == method]


def test_in_a_browser(page, tmp_path):
    photo(300, 200).save(tmp_path / "photo.png")
    with Browser(tmp_path) as browser:
        browser.send("Emulation.setDeviceMetricsOverride", width=1200, height=1000, deviceScaleFactor=1, mobile=False)
        browser.send("Page.navigate", url=page)
        browser.until(lambda: browser.value("!!document.querySelector('input[type=file]')"))
        text = "document.body.innerText"
        assert "tiny_<model>, with fewer tokens" in browser.value("document.title")
        assert "tiny_<model>" in browser.value(text)
        root = browser.send("DOM.getDocument")["root"]["nodeId"]
        chooser = browser.send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        browser.send("DOM.setFileInputFiles", nodeId=chooser, files=[str(tmp_path / "photo.png")])
        browser.until(lambda: "Tokens leaving each layer, of 65" in browser.value(text))
        shown = browser.value(text)
        assert "method=tome, r=7" in shown and "<b>hen</b>" in shown and "crane (1)" in shown
        time.sleep(0.5)  # for the pictures to be drawn
        picture = base64.b64decode(browser.send("Page.captureScreenshot")["data"])
        (tmp_path / "page.png").write_bytes(picture)
        asked = [request["request"]["url"] for request in browser.of("Network.requestWillBeSent")]
        elsewhere = {url for url in asked if not url.startswith((page, "data:", "blob:"))}
        problems = [entry["exceptionDetails"] for entry in browser.of("Runtime.exceptionThrown")]
    assert Image.open(tmp_path / "page.png").size == (1200, 1000)
    assert asked and not elsewhere
    assert not problems
