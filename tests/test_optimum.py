"""optimum loads exported folders, in environments without this package, because it needs older transformers."""

import os
import subprocess

import pytest
import torch
from helpers import reduce_tiny, tiny_images, tiny_model
from transformers import ViTImageProcessor

from hf_tokenreduce import ToMeConfig, export


LOAD = """
import importlib, sys, torch
module, name, folder, images, logits = sys.argv[1:6]
options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}} if name.startswith("OV") else {}
model = getattr(importlib.import_module(module), name).from_pretrained(folder, **options)
torch.save(model(pixel_values=torch.load(images)).logits, logits)
"""


@pytest.mark.parametrize(
    ("format", "module", "name"),
    [
        ("onnx", "optimum.onnxruntime", "ORTModelForImageClassification"),
        ("openvino", "optimum.intel", "OVModelForImageClassification"),
    ],
)
def test_a_folder_loads(tmp_path, format, module, name):
    python = os.environ.get(f"OPTIMUM_{format.upper()}")
    if python is None:
        pytest.skip("make test-optimum runs these tests")
    model, images = reduce_tiny(tiny_model(), ToMeConfig(r=7)), tiny_images(3)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    export(model, tmp_path / "graph", image_processor=processor, format=format)
    torch.save(images, tmp_path / "images.pt")
    arguments = [module, name, tmp_path / "graph", tmp_path / "images.pt", tmp_path / "logits.pt"]
    done = subprocess.run([python, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images).logits.detach(), rtol=0, atol=1e-5)
