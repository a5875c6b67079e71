"""The demonstration, on few images and few steps."""

import json
import re
import shutil

import pytest
from PIL import Image

from hf_tokenreduce.demo import run
from hf_tokenreduce.evaluation import benchmark
from hf_tokenreduce.methods import METHODS


FEW = {"batch_sizes": [4], "repeats": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo [1]") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LEARNED_FROM", 48)
        patch.setattr(run, "LABELLED", 6)
        patch.setattr(run, "TUNED_MINUTES", 0.02)
        patch.setattr(run, "benchmark", lambda *given, **settings: benchmark(*given, **{**settings, **FEW}))
        yield folder, run.run_demo(folder, steps=12, train=60)


def without_speeds(table):
    return [line.split("|")[1:7] for line in table.splitlines()]


def test_the_table_has_every_method(first):
    folder, table = first
    rows = json.loads((folder / "results.json").read_text())
    assert [row["method"] for row in rows] == [None, *METHODS]
    assert (folder / "table.md").read_text() == table + "\n" and len(table.splitlines()) == 3 + len(METHODS)
    shares = {row["method"]: row["mult_adds_ratio"] for row in rows}
    for method in ("tome", "topk", "evit", "bat", "sit", "dlvit"):
        assert 0.5 < shares[method] <= run.SHARE, method
    assert [row["method"] for row in rows if row["trained"]] == [
        name for name, method in METHODS.items() if "demo" in method.recipes
    ]


def test_each_folder_is_whole(first):
    folder, _ = first
    for method in METHODS:
        names = {file.name for file in (folder / method).iterdir()}
        wanted = {
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "record.json",
            "README.md",
            "token_map.png",
        }
        assert wanted <= names and "layers.py" in names
        assert "tokenreduce:begin" in (folder / method / "README.md").read_text()


def test_the_report_is_one_file_with_links_that_lead_somewhere(first):
    folder, _ = first
    page = (folder / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="https?:', page) and page.count("data:image/png;base64,") == 5
    assert sorted(re.findall(r'href="([^"]+)"', page)) == sorted(f"{method}.html" for method in METHODS)
    assert all((folder / f"{method}.html").is_file() for method in METHODS)
    tuned = json.loads((folder / "tuned" / "tuning.json").read_text())
    assert f"The tuner chose <b>{tuned['chosen']['name']}</b>" in page
    assert tuned["images"] == {"search": 30, "report": 30}
    assert (folder / "tuned" / "model" / "config.json").is_file()
    assert Image.open(folder / "pareto.png").width > 500


def test_interrupted_it_goes_on_to_the_same_table(first):
    folder, table = first
    before = {method: (folder / method / "model.safetensors").stat().st_mtime_ns for method in METHODS}
    for gone in (folder / "ltmp", folder / "work" / "accuracy" / "ltmp"):
        shutil.rmtree(gone)
    again = run.run_demo(folder, steps=12, train=60)
    assert without_speeds(again) == without_speeds(table)
    after = {method: (folder / method / "model.safetensors").stat().st_mtime_ns for method in METHODS}
    assert [method for method in METHODS if after[method] != before[method]] == ["ltmp"]


def test_files_of_others_stay(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"holds index\.html of something else\. Give a new or empty folder"):
        run.run_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]
