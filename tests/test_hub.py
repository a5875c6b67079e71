"""A saved folder loads anywhere: in a fresh process, where this package cannot be imported."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import BACKBONES, METHODS, tiny_images, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTImageProcessor

import hf_tokenreduce
from hf_tokenreduce import EViTConfig, ToMeConfig, reduce_tokens, restore


FRESH = """
import json, sys
sys.modules["hf_tokenreduce"] = None  # importing it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
folder, work = sys.argv[1:3]
inputs = load_file(work + "/inputs.safetensors")
"""

LOAD = """
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModelForImageClassification.from_pretrained(folder, **trust).eval()
base = AutoModel.from_pretrained(folder, **trust).eval()
model.save_pretrained(work + "/again")
again = AutoModelForImageClassification.from_pretrained(work + "/again", **trust).eval()
with torch.no_grad():
    outputs = [m(inputs["pixels"]) for m in (model, again)]
    results = {
        "logits": outputs[0].logits,
        "again": outputs[1].logits,
        "hidden": base(inputs["pixels"]).last_hidden_state,
        "counts": outputs[0].token_counts,
    }
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert config.reduction.to_dict() == model.config.reduction.to_dict()
save_file(results, work + "/results.safetensors")
"""

PIPELINE = """
import numpy
from PIL import Image
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
image = Image.fromarray((inputs["photo"].numpy() * 255).astype(numpy.uint8))
print(json.dumps(classify(image, top_k=5)))
"""


def in_fresh_process(script, folder, work, **environment):
    save_file({"pixels": tiny_images(), "photo": torch.rand(32, 32, 3)}, work / "inputs.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH + script, str(folder), str(work)],
        env={**os.environ, "HF_MODULES_CACHE": str(work / "modules"), **environment},
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved(tmp_path, backbone="vit", method="tome"):
    model = reduce_tokens(tiny_model(backbone), METHODS[method][0])
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model, folder


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("vit", "evit"),
        ("vit", "ats"),
        ("vit", "bat"),
        ("vit", "dlvit"),
        ("deit", "topk"),
        ("deit", "ltmp"),
        ("deit", "sit"),
        ("deit-teacher", "tome"),
    ],
)
def test_loads_without_the_package_and_survives_another_save(tmp_path, backbone, method):
    model, folder = saved(tmp_path, backbone, method)
    in_fresh_process(LOAD, folder, tmp_path)
    results = load_file(tmp_path / "results.safetensors")
    output = model(tiny_images())
    same(results["logits"], output.logits)
    same(results["again"], output.logits)
    same(results["hidden"], model.base_model(tiny_images()).last_hidden_state)
    assert torch.equal(results["counts"], output.token_counts)
    # and what the fresh process saved loads in another one
    in_fresh_process(LOAD, tmp_path / "again", tmp_path)
    same(load_file(tmp_path / "results.safetensors")["again"], output.logits)


def test_pipeline_without_the_package(tmp_path):
    model, folder = saved(tmp_path)
    answer = json.loads(in_fresh_process(PIPELINE, folder, tmp_path).splitlines()[-1])
    processor = ViTImageProcessor.from_pretrained(folder)
    photo = load_file(tmp_path / "inputs.safetensors")["photo"]
    pixels = processor((photo.numpy() * 255).astype("uint8"), return_tensors="pt").pixel_values
    expected = model(pixels).logits[0].softmax(dim=-1)
    for row in answer:
        assert row["score"] == pytest.approx(expected[model.config.label2id[row["label"]]].item(), abs=1e-4)
    assert len(answer) == 5


def test_from_a_hub_cache(tmp_path):
    """As it lies after a download: snapshots of links into blobs. A model loaded from there saves a whole folder."""
    model, folder = saved(tmp_path)
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--someone--reduced"
    snapshot = cache / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    script = LOAD.replace('trust = {"', f'trust = {{"revision": "{revision}", "')
    script = script.replace('work + "/again", **trust', 'work + "/again", trust_remote_code=True')
    in_fresh_process(script, "someone/reduced", tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    results = load_file(tmp_path / "results.safetensors")
    same(results["logits"], model(tiny_images()).logits)
    same(results["again"], model(tiny_images()).logits)
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert not [reference for reference in auto_map.values() if "--" in reference]
    shutil.rmtree(tmp_path / "hub")
    in_fresh_process(LOAD, tmp_path / "again", tmp_path)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_with_the_package_no_trust_is_needed(tmp_path, backbone):
    model, folder = saved(tmp_path, backbone)
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    same(loaded(tiny_images()).logits, model(tiny_images()).logits)
    loaded = type(model).from_pretrained(folder).eval()
    same(loaded(tiny_images()).logits, model(tiny_images()).logits)
    assert AutoConfig.from_pretrained(folder).reduction == METHODS["tome"][0]
    same(AutoModel.from_pretrained(folder).eval()(tiny_images())[0], model.base_model(tiny_images())[0])


def test_the_folder_holds_what_it_needs_and_nothing_else(tmp_path):
    _, folder = saved(tmp_path)
    modeling = {
        "attention",
        "checks",
        "configuration_base",
        "configuration_tokenreduce",
        "encoders",
        "hooks",
        "layers",
    }
    modeling |= {"modeling_tokenreduce", "multiply_adds", "tokens", "methods"}
    modeling |= {"ats", "bat", "dlvit", "evit", "ltmp", "sit", "tome", "topk"}
    assert {f.name for f in folder.iterdir()} == {f"{name}.py" for name in modeling} | {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["reduction"] == {"method": "tome", "r": 7, "prop_attn": True, "inflect": 0.0}
    assert config["architectures"] == ["TokenReduceViTForImageClassification"]


@pytest.mark.parametrize("backbone", ["vit", "deit-teacher"])
def test_a_model_loaded_as_remote_code_can_be_swapped_and_restored(tmp_path, backbone):
    """It is our class by another module, in a process that has the package too."""
    model, folder = saved(tmp_path, backbone)
    script = f"""
del sys.modules["hf_tokenreduce"]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
from hf_tokenreduce import EViTConfig, reduce_tokens, restore
setting = EViTConfig({METHODS["evit"][0].keep_rate}, {METHODS["evit"][0].layers})
model.set_reduction(setting)
with torch.no_grad():
    results = {{
        "set": model(inputs["pixels"]).logits,
        "swapped": reduce_tokens(model, setting)(inputs["pixels"]).logits,
        "restored": restore(model)(inputs["pixels"]).logits,
    }}
save_file(results, work + "/results.safetensors")
"""
    in_fresh_process(script, folder, tmp_path)
    results = load_file(tmp_path / "results.safetensors")
    expected = reduce_tokens(model, METHODS["evit"][0])(tiny_images()).logits
    same(results["set"], expected)
    same(results["swapped"], expected)
    same(results["restored"], restore(model)(tiny_images()).logits)


def test_another_reduction_at_load_time(tmp_path):
    model, folder = saved(tmp_path)
    setting = EViTConfig(keep_rate=0.6, layers=(0, 2))
    expected = reduce_tokens(model, setting)(tiny_images()).logits
    for reduction in (setting, setting.to_dict()):
        loaded = hf_tokenreduce.TokenReduceViTForImageClassification.from_pretrained(folder, reduction=reduction)
        same(loaded.eval()(tiny_images()).logits, expected)
    loaded = AutoModelForImageClassification.from_pretrained(folder, reduction=None)
    assert loaded.config.reduction is None
    with pytest.raises(ValueError, match="one value per layer"):
        AutoModelForImageClassification.from_pretrained(folder, reduction=ToMeConfig(r=[1, 2, 3]))


def test_dtype_and_attention_of_the_folder_are_kept(tmp_path):
    model = reduce_tokens(tiny_model(attn_implementation="eager").to(torch.bfloat16), ToMeConfig(r=5))
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "half", attn_implementation="eager").eval()
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(tiny_images()).logits, model(tiny_images()).logits)


def test_what_is_saved_is_what_runs(tmp_path):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=5))
    model.config.reduction = EViTConfig(layers=(1,))
    for part in (model, model.vit):
        with pytest.raises(ValueError, match="set_reduction"):
            part.save_pretrained(tmp_path / "wrong")
    model.set_reduction(model.config.reduction)
    model.save_pretrained(tmp_path / "right")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "right").eval()
    assert torch.equal(loaded(tiny_images()).logits, model(tiny_images()).logits)
