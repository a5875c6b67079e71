"""Every task round-trips: a reduced model of any family, saved, is a folder that loads anywhere and does its task."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import slow
from safetensors.torch import load_file, save_file
from task_models import CASES, inputs_of, save_case

from hf_tokenreduce.hub import check_folder, write_card
from hf_tokenreduce.hub.configuration import CLASSES, pipeline_of
from hf_tokenreduce.modeling.encoders import MODELS
from hf_tokenreduce.tasks import MAIN_OUTPUTS, main_output, task_of


# What AutoProcessor finds beside a model, if it is not an image processor.
PROCESSORS = {
    "clip": "CLIPProcessor",
    "siglip": "SiglipProcessor",
    "llava": "LlavaProcessor",
    "audio": "ASTFeatureExtractor",
    "audio-features": "ASTFeatureExtractor",
}

# What each Auto class finds in a folder, besides the configuration.
FOUND = {
    "dinov2": {"AutoModel": "Dinov2Model", "AutoModelForImageClassification": "Dinov2ForImageClassification"},
    "clip-classifier": {"AutoModelForImageClassification": "CLIPForImageClassification"},
    "clip": {"AutoModel": "CLIPModel", "AutoModelForZeroShotImageClassification": "CLIPModel"},
    "clip-projection": {"AutoModel": "CLIPVisionModelWithProjection"},
    "mae": {"AutoModel": "ViTMAEModel"},
    "backbone": {"AutoModel": "Dinov2Model", "AutoBackbone": "Dinov2Backbone"},
    "depth": {"AutoModelForDepthEstimation": "DepthAnythingForDepthEstimation"},
    "audio": {"AutoModel": "ASTModel", "AutoModelForAudioClassification": "ASTForAudioClassification"},
    "llava": {"AutoModelForImageTextToText": "LlavaForConditionalGeneration"},
}


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """Every folder, and what a stranger saw of it. One process visits all: starting it is what takes the time."""
    work = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)  # of some photographs the tiny LLaVA says the same word again and again
    shared = {"photo": torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8), "sound": torch.randn(16000)}
    save_file(shared, work / "shared.safetensors")
    models, cases = {}, {}
    for name, case in CASES.items():
        models[name] = model = save_case(name, work / name)
        write_card(work / name)
        inputs = inputs_of(name)
        save_file(inputs, work / f"{name}.inputs.safetensors")
        output = model(**inputs)
        stock = type(model).__name__.removeprefix("TokenReduce")
        assert task_of(stock).name == case.task
        cases[name] = {
            "task": case.task,
            "auto_class": task_of(stock).auto_class,
            "pipeline": pipeline_of(stock),
            "output": next(key for key in MAIN_OUTPUTS if output.get(key) is not None),
        }
    (work / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stranger.py")), str(work)],
        env={**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(work / "modules")},
        cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(work=work, models=models, found=json.loads((work / "found.json").read_text()))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_nothing_runs_without_trust(visited, name):
    """Not even the stock model, which would be dense in silence."""
    for message in visited.found[name]["refused"]:
        assert "trust_remote_code=True" in message, message


@pytest.mark.parametrize("name", CASES)
def test_loads_without_the_package(visited, name):
    found, model = visited.found[name], visited.models[name]
    assert "error" not in found, found["error"]
    assert (found["module"], found["class"]) == ("transformers_modules", type(model).__name__)
    assert found["config"] == type(model.config).__name__
    assert found["reduction"] == model.config.reduction.to_dict()
    seen = load_file(visited.work / f"{name}.seen.safetensors")
    output = model(**inputs_of(name))
    same(seen["output"], main_output(output))
    assert torch.equal(seen["counts"], output.token_counts)


@pytest.mark.parametrize("name", CASES)
def test_pipelines_agree_with_the_model(visited, name):
    found = visited.found[name]
    if CASES[name].task == "backbone" or name == "audio-features":
        assert "answer" not in found  # there is no such pipeline
        return
    if CASES[name].task == "image-text-to-text":
        asked, answer = "<image> what?", found["answer"].removeprefix("<image> what?")
        assert found["answer"].startswith(asked) and len(set(answer.split())) > 1
        assert found["expected"].endswith(f"what?{answer}")
        return
    seen = load_file(visited.work / f"{name}.seen.safetensors")
    assert seen["answer"].numel() >= 2
    same(seen["answer"], seen["expected"])


@pytest.mark.parametrize("name", CASES)
def test_saved_again_the_folder_is_whole(visited, name):
    folder, again = visited.work / name, visited.work / f"{name}-again"
    same(
        load_file(visited.work / f"{name}.seen.safetensors")["again"],
        main_output(visited.models[name](**inputs_of(name))),
    )
    assert {file.name: file.read_bytes() for file in folder.glob("*.py")} == {
        file.name: file.read_bytes() for file in again.glob("*.py")
    }
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, again))
    assert second["auto_map"] == first["auto_map"]
    assert second["architectures"] == first["architectures"]
    assert second["reduction"] == first["reduction"]


@pytest.mark.parametrize("name", CASES)
def test_what_prepares_inputs_is_found(visited, name):
    assert visited.found[name]["processor"] == PROCESSORS.get(name, type(CASES[name].processor()).__name__)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.task == "image-feature-extraction"])
def test_features_by_the_code_of_the_card(visited, name):
    """A row for every patch, behind the prefix tokens where the model has put them back itself."""
    if name == "audio-features":
        assert visited.found[name]["features"] is None
        return
    prefix = {"vit-features": 0, "siglip-vision": 0, "dinov3": 5}.get(name, 1)
    assert visited.found[name]["features"] == [1, prefix + 64, 48]


@pytest.mark.parametrize("name", CASES)
def test_with_the_package_no_trust_is_needed(visited, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *args, **kwargs: True)  # of AutoBackbone
    model, folder = visited.models[name], str(visited.work / name)
    stock = type(model).__name__.removeprefix("TokenReduce")
    loaded = getattr(transformers, task_of(stock).auto_class).from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    same(main_output(loaded(**inputs_of(name))), main_output(model(**inputs_of(name))))
    assert type(transformers.AutoConfig.from_pretrained(folder)) is type(model.config)
    if pipeline_of(stock) is not None:
        assert type(transformers.pipeline(pipeline_of(stock), model=folder).model) is type(model)


@pytest.mark.parametrize("name", CASES)
def test_auto_map_names_what_is_in_the_folder(visited, name):
    folder = visited.work / name
    config = json.loads((folder / "config.json").read_text())
    references = dict(config["auto_map"])
    assert references.pop("AutoConfig") == f"configuration_tokenreduce.{type(visited.models[name].config).__name__}"
    assert all((folder / f"{reference.split('.')[0]}.py").is_file() for reference in references.values())
    classes = {auto_class: reference.split(".")[1] for auto_class, reference in references.items()}
    assert set(classes.values()) <= CLASSES.keys()
    assert config["architectures"][0] in classes.values()
    if name in FOUND:
        assert classes == {auto_class: f"TokenReduce{stock}" for auto_class, stock in FOUND[name].items()}


def test_generated_tokens_are_the_same(visited):
    inputs = inputs_of("llava")
    folder = visited.work / "llava"
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = visited.models["llava"].generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


def test_every_model_has_a_task_that_is_tried():
    tried = {task_of(stock).name for stock in MODELS}
    assert tried == {case.task for case in CASES.values()}


@pytest.mark.parametrize(
    "name", ["clip", "llava", *map(slow, ("dinov3", "siglip", "depth", "audio", "backbone", "audio-features"))]
)
def test_folders_are_checked_by_their_task(visited, name):
    """In a process each, so that no family lives on what another has brought along."""
    report = check_folder(visited.work / name)
    assert report.ok, report.errors
    assert not report.warnings
    assert report.max_difference <= 1e-5
    assert report.task.name == CASES[name].task
    assert report.files.keys() == {file.name for file in (visited.work / name).iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_every_folder_may_be_published(visited, name):
    assert not check_folder(visited.work / name, load=False).errors
