"""Every code block of the README, the pages and the notebooks runs, on tiny data under the names that they use."""

import json
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from task_models import CASES
from transformers import ViTImageProcessor

from hf_tokenreduce import reduce_tokens
from hf_tokenreduce.evaluation import benchmark, compare
from hf_tokenreduce.families import families_table
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.methods.table import _meanings, method_page, methods_page
from hf_tokenreduce_cli import main


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
WITHOUT_CODE = ("methods", "faq", "glossary", "results", "add-a-method", "add-an-encoder")
# What makes a command of a page quick enough for a test.
QUICKER = {
    "train": ["--use_cpu", "True"],
    "tune": ["--minutes", "0.02", "--no-speed"],
    "benchmark": ["--no-suggest"],
}
# Pages that export, train or compare models, which takes longer the more layers there are. Other pages need the
# layers that methods reduce by default.
SHALLOW = ("README", "choosing", "deploy", "training")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    save_stock(folder, layers=12)
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
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def save_stock(folder, layers):
    model = tiny_model(num_hidden_layers=layers)
    model.config.id2label = {index: str(index) for index in range(5)}
    model.config.label2id = {str(index): index for index in range(5)}
    for name in ("facebook/deit-small-patch16-224", "google/vit-base-patch16-224"):
        model.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)


# What the commands of a page need besides the package itself. Without them the page is skipped.
PACKAGES_OF_PAGES = {
    "README": ("onnxruntime", "onnxscript"),
    "deploy": ("onnxruntime", "onnxscript", "openvino", "nncf"),
}


def timed_once(*given, **settings):
    return benchmark(*given, **{**settings, "repeats": 1})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, place, monkeypatch, tmp_path):
    for package in PACKAGES_OF_PAGES.get(page.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    if page.stem in SHALLOW:
        save_stock(Path(), layers=2 if page.stem == "deploy" else 4)
    # Each model would start a process that imports torch; test_evaluation_speed.py measures memory.
    monkeypatch.setattr("hf_tokenreduce.evaluation.speed.peak_memory", lambda model, images: 1.0)
    # A tiny model is hardly ever faster reduced, and a search of a setting that is takes long. So does timing often.
    monkeypatch.setattr("hf_tokenreduce.evaluation.speed.nearest_that_pays", lambda *given: None)
    monkeypatch.setattr(sys.modules[compare.__module__], "benchmark", timed_once)
    names = {"labels": torch.tensor([0, 1])}
    if page.parent.name == "methods":  # which take up where the README begins
        names["pixel_values"] = torch.randn(2, 3, 32, 32)
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
    assert ran or page.stem in WITHOUT_CODE or page.parent.name == "api"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook, place, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    names: dict = {}
    for number, text in enumerate(code):
        exec(compile(text, f"{notebook.name}, code cell {number}", "exec"), names)


def test_the_page_on_adding_a_method_shows_the_example():
    page, example = ROOT / "docs" / "add-a-method.md", ROOT / "examples" / "add_a_method.py"
    shown = [code for language, code in BLOCK.findall(page.read_text()) if language == "py"]
    assert shown
    for code in shown:
        assert code in example.read_text(), f"docs/add-a-method.md shows what is not in the example:\n{code}"


def test_the_reference_names_what_exists():
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(names) > 50
    for name in names:
        assert pkgutil.resolve_name(name), name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_lists_that_people_write(name):
    method, docs = METHODS[name], ROOT / "docs"
    assert f"::: hf_tokenreduce.{method.config_class.__name__}\n" in (docs / "api" / "settings.md").read_text() + "\n"
    trained = (docs / "training.md").read_text().split("## What each method trains")[1].split("##")[0]
    named = {title for row in trained.splitlines() if row.startswith("|") for title in row.split("|")[1].split(",")}
    assert method.title in {title.strip() for title in named}


def test_every_page_is_in_the_site():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert pages <= listed, pages - listed


def run_line(words):
    if not words:
        return
    if words[0] == "tokenreduce":
        with pytest.raises(SystemExit) as stopped:
            main([*words[1:], *QUICKER.get(words[1], []), "--debug"])
        assert stopped.value.code == 0, words
    else:
        assert words[0] == "python" and words[1].startswith("examples/"), words
        runpy.run_path(str(ROOT / words[1]))["main"](words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_results_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["page"]
    how = "Run python benchmarks/results_page.py."
    assert (page() == (ROOT / "docs" / "results.md").read_text()) is True, how


def test_the_readme_is_short_and_has_the_table_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    text = (ROOT / "README.md").read_text()
    with_table = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["with_table"]
    assert (with_table(text) == text) is True, "Run python benchmarks/readme_table.py."
    assert len(text.split()) <= 700


def test_cards_are_those_of_the_records(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks" / "make_cards.py"))
    script["main"](cards=tmp_path)
    made, there = ({file.name: file.read_text() for file in folder.glob("*.md")}
                   for folder in (tmp_path, ROOT / "model_cards"))  # fmt: skip
    table = made.pop("README.md").split("<!-- tokenreduce:begin table -->")[1]
    how = "Run python benchmarks/make_cards.py."
    assert (table in there.pop("README.md") and made == there) is True, how
    lines = [
        {"share": 0.65, "difference": 0.3},
        {"share": 0.45, "difference": -1.0},
        {"share": 0.3, "difference": -2.0},
    ]
    assert script["best_share"](lines) == 0.45 and script["best_share"](lines[2:]) == 0.3


def test_results_have_a_section_for_training_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["page"]
    assert "##" not in page(tmp_path)
    setting = {"model": "deit-tiny", "train": "flowers", "eval": ["test"], "epochs": 3, "bf16": True}
    folder = tmp_path / "train-flowers-deit-tiny"
    folder.mkdir()
    for name, share, right in (("dense", None, "1110"), ("tome", 0.65, "1111")):
        row = {"name": name, "share": share, "seed": 0, "right": right, "top1": 25.0 * right.count("1")}
        row |= {"mult_adds_ratio": share or 1.0, "setting": setting, "seconds": 60, "machine": "GPU, 1"}
        (folder / f"{name}.json").write_text(json.dumps(row))
    text = page(tmp_path)
    assert "## After training: deit-tiny trained on flowers" in text and "| ToMe | 0.65 | 0.65 | 100.0 | +25.0" in text


def test_pictures_of_methods_are_drawn(place, tmp_path):
    main_of_script = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))["main"]
    model, photos = str(place / "facebook" / "deit-small-patch16-224"), place / "photos"
    options = ["--images", str(photos), "--output_dir", str(tmp_path), "--methods", "tome", "ltmp", "dlvit"]
    main_of_script([model, str(photos / "0" / "0.png"), *options])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dlvit.webp", "ltmp.webp", "tome.webp"]
    assert Image.open(tmp_path / "tome.webp").width > 2 * 250


@pytest.mark.parametrize(
    "docstring",
    [
        "Merge.\n\nr, s: how many, and\n    no more\nflag: whether",
        "Merge.\n\nArgs:\n    r, s (`int`, *optional*, defaults to `(3, 6)`): how many, and\n        no more\n"
        "    flag: whether\n",
    ],
)
def test_pages_show_what_docstrings_say_of_fields(docstring):
    assert _meanings(docstring) == {"r": "how many, and no more", "s": "how many, and no more", "flag": "whether"}


def test_tables_are_those_that_their_commands_print():
    how = "Run python -m hf_tokenreduce.methods docs."
    assert (methods_page() == (ROOT / "docs" / "methods.md").read_text()) is True, how
    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "methods").iterdir()}
    assert (pages == {name: method_page(method) for name, method in METHODS.items()}) is True, how
    how = "Run python -m hf_tokenreduce.families, and copy the table that it prints into docs/encoders.md."
    assert (families_table() in (ROOT / "docs" / "encoders.md").read_text()) is True, how
