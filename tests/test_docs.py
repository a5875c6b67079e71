"""Every code block of the README and the pages runs, on tiny data under the names that the pages use."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from task_models import CASES
from transformers import ViTImageProcessor

from hf_tokenreduce import reduce_tokens
from hf_tokenreduce.families import families_table
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.methods.table import method_page, methods_page, methods_table
from hf_tokenreduce_cli import main


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    model = tiny_model(num_hidden_layers=12)
    model.config.id2label = {index: str(index) for index in range(5)}
    model.config.label2id = {str(index): index for index in range(5)}
    for name in ("facebook/deit-small-patch16-224", "google/vit-base-patch16-224"):
        model.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    for name, case in (("openai/clip-vit-base-patch16", "clip"), ("facebook/dinov2-base", "dinov2-features")):
        CASES[case].make().save_pretrained(folder / name)
        CASES[case].processor().save_pretrained(folder / name)
    generator = np.random.default_rng(0)
    classes = [("photos", name) for name in "01234"]
    classes += [(f"data/{split}", name) for split in ("train", "val") for name in ("glass", "paper")]
    for where, name in classes:
        (folder / where / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / where / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, place, monkeypatch, tmp_path):
    if page.stem == "deploy":
        for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
            pytest.importorskip(package)
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    names = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    if page.parent.name == "methods":  # which take up where the README begins
        model, processor = load_model("google/vit-base-patch16-224")
        names |= {"model": model, "processor": processor, "reduce_tokens": reduce_tokens}
    ran = 0
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            ran += 1
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                run_line(shlex.split(line, comments=True))
                ran += 1
    assert ran or page.stem in ("methods", "faq")


def run_line(words):
    if not words:
        return
    if words[0] == "tokenreduce":
        with pytest.raises(SystemExit) as stopped:
            more = {"train": ["--use_cpu", "True"], "tune": ["--minutes", "0.02", "--no-speed"]}.get(words[1], [])
            main([*words[1:], *more, "--debug"])
        assert stopped.value.code == 0, words
    else:
        assert words[0] == "python" and words[1].startswith("examples/"), words
        runpy.run_path(str(ROOT / words[1]))["main"](words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_tables_are_those_that_their_commands_print():
    how = "Run python -m hf_tokenreduce.methods docs, and copy the table that it prints into README.md."
    assert (methods_table() in (ROOT / "README.md").read_text()) is True, how
    assert (methods_page() == (ROOT / "docs" / "methods.md").read_text()) is True, how
    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "methods").iterdir()}
    assert (pages == {name: method_page(method) for name, method in METHODS.items()}) is True, how
    how = "Run python -m hf_tokenreduce.families, and copy the table that it prints into docs/encoders.md."
    assert (families_table() in (ROOT / "docs" / "encoders.md").read_text()) is True, how
