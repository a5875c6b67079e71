"""What an import brings along, seen from a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_tokenreduce


HEAVY = [
    "accelerate", "datasets", "evaluate", "gradio", "jinja2", "matplotlib", "onnx", "onnxruntime", "openvino",
    "pandas", "peft", "PIL", "rich", "typer",
]  # fmt: skip

STOCK = """
import json, sys, torch
from transformers import AutoModel, ViTConfig, ViTForImageClassification
sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
model = ViTForImageClassification(ViTConfig(num_hidden_layers=2, **sizes))
"""

OURS = """
import hf_tokenreduce
from hf_tokenreduce import ToMeConfig, reduce_tokens
reduce_tokens(model, ToMeConfig())
"""

REGISTERED = """
import sys, hf_tokenreduce
from transformers import AutoConfig, AutoModelForImageClassification
print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1])).__module__)
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(hf_tokenreduce.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reducing_a_model_loads_torch_and_transformers_alone():
    loaded = "\nprint(json.dumps(sorted(sys.modules)))"
    stock, ours = (set(json.loads(run(script + loaded))) for script in (STOCK, STOCK + OURS))
    assert "hf_tokenreduce.convert" in ours - stock
    assert not {name for name in HEAVY if name in ours - stock}  # transformers itself loads some of them
    parts = {name.split(".")[1] for name in ours if name.startswith("hf_tokenreduce.")}
    assert parts == {"convert", "modeling"}


def test_folders_load_where_the_package_is_imported(tmp_path):
    from helpers import tiny_model

    hf_tokenreduce.reduce_tokens(tiny_model(), hf_tokenreduce.ToMeConfig(r=2)).save_pretrained(tmp_path)
    assert run(REGISTERED, str(tmp_path)).strip() == "hf_tokenreduce.modeling.modeling_tokenreduce"


def test_names_that_are_imported_when_they_are_asked_for():
    script = """
import hf_tokenreduce, json
before = sorted(set(hf_tokenreduce.__all__) - set(dir(hf_tokenreduce)))
from hf_tokenreduce import *
missing = [name for name in hf_tokenreduce.__all__ if name not in globals()]
try:
    hf_tokenreduce.nothing
except AttributeError as error:
    print(json.dumps([before, missing, str(error), hf_tokenreduce.TokenReduceCLIPModel.__name__]))
"""
    before, missing, error, made = json.loads(run(script))
    assert before == missing == []
    assert error == "module 'hf_tokenreduce' has no attribute 'nothing'"
    assert made == "TokenReduceCLIPModel"
