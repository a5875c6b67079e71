"""A saved folder loads anywhere: in a fresh process, where this package cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import BACKBONES, METHODS, ONE_OF_EACH, SIZES, saved, tiny_images, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    ViTImageProcessor,
)

import hf_tokenreduce
from hf_tokenreduce import EViTConfig, ToMeConfig, reduce_tokens, restore
from hf_tokenreduce.hub import check, check_folder
from hf_tokenreduce.loading import load_model


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

EACH = 'import os\nfor folder, work in json.loads(os.environ["PLACES"]):\n' + textwrap.indent(LOAD, "    ")

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


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


PAIRS = [
    ("vit", "evit"),
    ("vit", "ats"),
    ("vit", "bat"),
    ("vit", "dlvit"),
    ("deit", "topk"),
    ("deit", "ltmp"),
    ("deit", "sit"),
    ("deit-teacher", "tome"),
    ("vit", "protected"),
]


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """A folder per pair, and what a fresh process saw of it; then what another one saw of the folder that it saved."""
    root = tmp_path_factory.mktemp("visited")
    models = {}
    for backbone, method in PAIRS:
        (root / f"{backbone}-{method}").mkdir()
        models[backbone, method], _ = saved(root / f"{backbone}-{method}", backbone, method)
    # All folders have one name, so transformers takes those of one family for one code, with a teacher or without.
    works = [root / f"{backbone}-{method}" for backbone, method in PAIRS]
    for folder, results in (("published", "first"), ("again", "second")):
        in_fresh_process(EACH, "", root, PLACES=json.dumps([[str(work / folder), str(work)] for work in works]))
        for work in works:
            (work / "results.safetensors").rename(work / f"{results}.safetensors")
    return root, models


@pytest.mark.parametrize(("backbone", "method"), PAIRS)
def test_loads_without_the_package_and_survives_another_save(visited, backbone, method):
    root, models = visited
    model, work = models[backbone, method], root / f"{backbone}-{method}"
    results = load_file(work / "first.safetensors")
    output = model(tiny_images())
    same(results["logits"], output.logits)
    same(results["again"], output.logits)
    same(results["hidden"], model.base_model(tiny_images()).last_hidden_state)
    assert torch.equal(results["counts"], output.token_counts)
    same(load_file(work / "second.safetensors")["again"], output.logits)


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
        "grid",
        "hooks",
        "layers",
        "matching",
        "packed",
        "received",
        "kernels",
        "recording",
    }
    modeling |= {"modeling_tokenreduce", "multiply_adds", "tokens", "methods", "extra_methods", "version"}
    modeling |= set(ONE_OF_EACH)
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


# As the first version wrote it, when each backbone had a file of its own.
EARLIER = {
    "vit": ("ViT", "ViTForImageClassification", "modeling_tokenreduce_vit"),
    "deit": ("DeiT", "DeiTForImageClassification", "modeling_tokenreduce_deit"),
    "deit-teacher": ("DeiT", "DeiTForImageClassificationWithTeacher", "modeling_tokenreduce_deit"),
}


def saved_earlier(folder, backbone, reduction, learned):
    """config.json and weights by hand, and the code files that lay beside them."""
    family, architecture, file = EARLIER[backbone]
    config = {
        "architectures": [f"TokenReduce{architecture}"],
        "attention_probs_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": f"configuration_tokenreduce.TokenReduce{family}Config",
            "AutoModel": f"{file}.TokenReduce{family}Model",
            "AutoModelForImageClassification": f"{file}.TokenReduce{architecture}",
        },
        "dtype": "float32",
        "encoder_stride": 16,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 48,
        "id2label": {str(index): f"LABEL_{index}" for index in range(5)},
        "image_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "label2id": {f"LABEL_{index}": index for index in range(5)},
        "layer_norm_eps": 1e-12,
        "model_type": f"tokenreduce_{family.lower()}",
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": 4,
        "pooler_act": "tanh",
        "pooler_output_size": 48,
        "qkv_bias": True,
        "reduction": reduction,
        "transformers_version": "5.23.0",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stock = tiny_model(backbone).state_dict()
    assert f"{family.lower()}.layers.3.attention.q_proj.weight" in stock  # as it was then
    save_file({**stock, **learned}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in (file, "backbone", "configuration_tokenreduce"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the code of the folder ran')\n")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


THRESHOLDS = {
    f"vit.layers.{layer}.reducer.{kind}_threshold": torch.tensor([value + 0.01 * layer])
    for layer in range(4)
    for kind, value in (("merge", 0.5), ("prune", 0.007))
}


@pytest.mark.parametrize(
    ("backbone", "reduction", "learned"),
    [
        ("vit", {"method": "tome", "r": 7, "prop_attn": True, "inflect": 0.0}, {}),
        ("deit", {"method": "topk", "keep_rate": 0.5, "layers": [1, 3]}, {}),
        ("deit-teacher", {"method": "evit", "keep_rate": 0.6, "layers": [0, 2], "fuse": True}, {}),
        ("vit", {**METHODS["ltmp"][0].to_dict()}, THRESHOLDS),
    ],
    ids=["tome", "topk", "teacher", "ltmp"],
)
def test_folders_of_the_first_version_stay_valid(tmp_path, backbone, reduction, learned):
    """They load by what is installed, compute what they did, and are whole when they are saved again."""
    folder = tmp_path / "earlier"
    saved_earlier(folder, backbone, reduction, learned)
    expected = reduce_tokens(tiny_model(backbone), reduction)
    with torch.no_grad():
        for name, value in learned.items():
            expected.get_parameter(name).copy_(value)
    loaded, found = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert type(loaded) is type(expected)
    output = loaded.eval()(tiny_images())
    same(output.logits, expected(tiny_images()).logits)
    assert torch.equal(output.token_counts, expected(tiny_images()).token_counts)
    assert not check_folder(folder, load=False).ok

    loaded.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "again")
    files = {file.name for file in (tmp_path / "again").glob("*.py")}
    assert {"modeling_tokenreduce.py", "encoders.py", "layers.py"} < files
    assert not files & {"backbone.py", "modeling_tokenreduce_vit.py", "modeling_tokenreduce_deit.py"}
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert {f"{reference.split('.')[0]}.py" for reference in auto_map.values()} <= files
    report = check_folder(tmp_path / "again", load=False)
    assert report.ok, report.errors
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_model_of_a_folders_own_code_is_reduced_again_and_saved(tmp_path, monkeypatch):
    """Its configuration is then a class of another module than ours, with the same values."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, folder = saved(tmp_path)
    theirs = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    again = reduce_tokens(theirs, theirs.config.reduction)
    again.save_pretrained(tmp_path / "again")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    same(loaded(tiny_images()).logits, model(tiny_images()).logits)


def test_a_backbone_is_loaded_from_a_folder(tmp_path):
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")}
    stock = Dinov2Backbone(Dinov2Config(**sizes, patch_size=4, mlp_ratio=2, out_indices=[2, 4])).eval()
    for name, model in (("stock", stock), ("reduced", reduce_tokens(stock, ToMeConfig(r=3)))):
        model.save_pretrained(tmp_path / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
        loaded, _ = load_model(str(tmp_path / name), any_task=True)
        same(loaded(tiny_images()).feature_maps[-1], model(tiny_images()).feature_maps[-1])


def test_a_fresh_process_finds_packages_of_the_user(tmp_path, monkeypatch):
    """Those of `pip install --user` lie in the home directory, which the process does not have."""
    seen = {}

    def run(command, env, **options):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(check.subprocess, "run", run)
    for enabled in (True, False):
        seen.clear()
        monkeypatch.setattr(check.site, "ENABLE_USER_SITE", enabled)
        check._run_fresh(tmp_path, str(tmp_path), {}, 1.0)
        assert seen["HOME"] == str(tmp_path)
        assert seen.get("PYTHONUSERBASE") == (check.site.getuserbase() if enabled else None)
