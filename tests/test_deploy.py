"""Exported graphs compute what the models compute, on any number of images, in the runtime that serves them."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from families import FAMILIES, family_model
from helpers import BASES, METHODS, NEWER, reduce_tiny, tiny_images, tiny_model
from PIL import Image
from transformers import ASTFeatureExtractor, AutoConfig, AutoImageProcessor, ViTImageProcessor

from hf_tokenreduce import DLViTConfig, EViTConfig, LTMPConfig, ToMeConfig, deploy, export, reduce_tokens
from hf_tokenreduce.files import model_folder
from hf_tokenreduce.loading import load_pictures
from hf_tokenreduce_cli import main


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run_onnx(folder, images):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def run_openvino(folder, images):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())[0]


RUN = {"onnx": run_onnx, "openvino": run_openvino}


NEWER_GRAPHS = [("onnx", "protected"), ("openvino", "mctf")]
OTHERS = [(format, name) for name in NEWER for format in RUN if (format, name) not in NEWER_GRAPHS]


@pytest.mark.parametrize(
    ("format", "method"),
    [
        *[("onnx", name) for name in ("tome", "evit", "topk", "sit", "dlvit-share", None)],
        ("openvino", "bat"),
        *NEWER_GRAPHS,
        *[pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS],
    ],
)
def test_a_graph_computes_what_the_model_computes(tmp_path, format, method):
    stock = tiny_model()
    model = stock if method is None else reduce_tiny(stock, METHODS[method][0])
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    found = export(model, tmp_path / "graph", image_processor=processor, format=format)
    assert found["largest_difference"] < 1e-5 and found["output"] == "logits" and found["batch_sizes"] == [1, 2, 5]
    flat = torch.full((1, 3, 32, 32), 0.3)  # where all patches are alike, ties decide
    for images in (tiny_images(1), tiny_images(7, seed=9), flat):
        with torch.no_grad():
            expected = model(images).logits.numpy()
        np.testing.assert_allclose(RUN[format](tmp_path / "graph", images), expected, atol=2e-5)
    assert json.loads((tmp_path / "graph" / "export.json").read_text()) == found
    config = AutoConfig.from_pretrained(tmp_path / "graph")
    assert config.model_type == "vit" and config.num_labels == 5 and config.architectures == [type(stock).__name__]
    assert AutoImageProcessor.from_pretrained(tmp_path / "graph").size["height"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family, reduced):
    model = family_model(family)
    model = reduce_tokens(model, EViTConfig(keep_rate=0.6, layers=(1,))) if reduced else model
    if "backbone" in family or family.startswith("llava") or (family == "mae" and not reduced):
        with pytest.raises(ValueError, match=f"A {type(model).__name__} cannot be exported: "):
            export(model, tmp_path / "graph")
        return
    assert export(model, tmp_path / "graph")["largest_difference"] < 1e-5


def test_features_of_an_encoder_and_a_half_type(tmp_path):
    model = reduce_tokens(tiny_model("vit", BASES), ToMeConfig(r=7)).to(torch.bfloat16)
    found = export(model, tmp_path / "graph")
    assert model.dtype == torch.bfloat16 and found["output"] == "features"
    images = tiny_images(3)
    with torch.no_grad():
        expected = deploy.main_output(model.float()(images)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "graph", images), expected, atol=2e-5)


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    model.config.id2label = dict(enumerate(["cat", "dog", "owl", "hen", "fox"]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save("photo.jpg")
    with pytest.raises(SystemExit) as stopped:
        main(["export", "model", "-o", "graph", "--images", ".", "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] < 1e-5
    code = (tmp_path / "graph" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    pixels = processor(load_pictures(["photo.jpg"], 1)[0], return_tensors="pt").pixel_values
    assert capsys.readouterr().out.strip() == model.config.id2label[model(pixels).logits.argmax().item()]


def test_the_readme_of_sounds_runs(tmp_path, capsys):
    model = reduce_tokens(family_model("ast"), ToMeConfig(r=7))
    processor = ASTFeatureExtractor(num_mel_bins=64, max_length=64)
    export(model, tmp_path / "graph", image_processor=processor, format="openvino")
    exec((tmp_path / "graph" / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    heard = processor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt").input_values
    assert capsys.readouterr().out.strip() == model.config.id2label[model(heard).logits.argmax().item()]


def test_no_graph_of_another_model_stays(tmp_path):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    with model_folder(tmp_path) as place:
        for name in ("config.json", "model.onnx", "model.onnx.data", "openvino_model.xml", "openvino_model.bin"):
            (place / name).write_text("{}")
    export(model, tmp_path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "export.json",
        "model.onnx",
    ]


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    with pytest.raises(ValueError, match=r"no format 'tflite' .*onnx, openvino"):
        export(model, tmp_path / "a", format="tflite")
    with pytest.raises(ValueError, match="LTMP keeps another number of tokens of every image"):
        export(reduce_tokens(model, LTMPConfig(merge_threshold=0.5)), tmp_path / "a")
    with pytest.raises(ValueError, match="Linear cannot be exported"):
        export(torch.nn.Linear(2, 2), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        export(model, tmp_path / "full")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'hf-tokenreduce\[onnx\]'"):
        export(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_numbers_that_are_not_finite_are_no_agreement(tmp_path):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="differs from the model by nan"):
        export(model, tmp_path / "graph")
    with pytest.raises(ValueError, match="DL-ViT cannot be exported yet: its filter is not trained"):
        export(reduce_tokens(tiny_model(), DLViTConfig(keep_rate=0.5)), tmp_path / "graph")


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="Nothing was written"):
        export(reduce_tokens(tiny_model(), ToMeConfig(r=7)), tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
