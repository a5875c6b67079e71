"""The comparison of SiT's layers: it resumes, and puts the best choice first."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from PIL import Image
from transformers import ViTImageProcessor


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sit_layers")


@pytest.fixture
def given(tmp_path):
    """The arguments: a model of 12 layers, and photographs."""
    tiny_model(num_hidden_layers=12).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number in range(20):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return [str(tmp_path / "model"), str(tmp_path / "photos"), "--output_dir", str(tmp_path), "--shares", "0.65"]


def test_layers_are_compared_once(table, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(table.CHOICES, 0.65, ((5, 8, 9), (4,)))
    table.main(given)
    file = tmp_path / "sit-layers-model.json"
    found = json.loads(file.read_text())
    assert found["images"] == 17 and [row["layers"] for row in found["rows"]] == [[5, 8, 9], [4]]
    assert all(0 <= row["same_class"] <= 100 and row["divergence"] > 0 for row in found["rows"])
    lines = capsys.readouterr().out.splitlines()
    best = min(found["rows"], key=lambda row: row["divergence"])
    assert lines[-2].split(" | ")[1] == ", ".join(map(str, best["layers"]))
    found["rows"].pop()
    file.write_text(json.dumps(found))
    table.main(given)
    assert capsys.readouterr().out.splitlines()[0].startswith("0.65 (4,)")
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_nothing_lost_is_no_divergence(table):
    logits = torch.randn(6, 4)
    assert table.compared(logits, logits.clone()) == {"same_class": 100.0, "divergence": 0.0}
    other = logits.roll(1, dims=1)
    assert table.compared(logits, other)["divergence"] > 0
