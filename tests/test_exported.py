"""Exported models in use: by several threads, with numpy arrays, in 8 bits, and what is beside their graphs."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BASES, tiny_images, tiny_model
from PIL import Image
from task_models import save_case
from transformers import ViTForImageClassification, ViTImageProcessor

from hf_tokenreduce import ToMeConfig, export, load_exported, reduce_tokens
from hf_tokenreduce.deploy import quantize
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.pictures import read_picture
from hf_tokenreduce.predict import predict


pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
TOME = ToMeConfig(r=7)


@pytest.fixture(scope="module")
def model():
    return reduce_tokens(tiny_model(num_hidden_layers=2), TOME)


@pytest.fixture(scope="module")
def openvino_folder(model, tmp_path_factory):
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("exported") / "graph"
    export(model, folder, image_processor=PROCESSOR, format="openvino")
    return folder


def test_a_number_of_nearly_nothing_is_compared_by_the_others(tmp_path):
    """A head with one number can give one that is as small as the rounding of the others."""
    model = reduce_tokens(tiny_model(num_hidden_layers=2, num_labels=1), TOME)
    inputs = tiny_images(5)
    with torch.no_grad():
        model.classifier.bias.sub_(model(inputs[:1]).logits[0] - 1e-9)
    export(model, tmp_path / "graph", images=inputs)
    assert (tmp_path / "graph" / "model.onnx").is_file()


def test_threads_get_their_own_logits(model, openvino_folder):
    loaded = load_exported(openvino_folder, threads=1)
    batches = [tiny_images(2, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [model(images).logits for images in batches]

    def largest_error(which):
        return max((loaded(batches[which]) - expected[which]).abs().max().item() for _ in range(200))

    with ThreadPoolExecutor(2) as threads:
        assert max(threads.map(largest_error, range(2))) < 2e-5


def test_numpy_arrays(model, openvino_folder):
    images = tiny_images(2)
    logits = load_exported(openvino_folder)(images.double().numpy())
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images).logits, atol=2e-5, rtol=0)


def test_memory_in_another_order(model, openvino_folder, monkeypatch):
    """A program that was compiled reads the memory as it is."""
    loaded, seen = load_exported(openvino_folder), []

    def run(inputs, really=loaded._run):
        seen.append(inputs.is_contiguous())
        return really(inputs)

    monkeypatch.setattr(loaded, "_run", run)
    images = tiny_images(2)
    logits = loaded(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images).logits, atol=2e-5, rtol=0)
    assert all(seen) and seen


def test_8_bits_of_features_are_no_classes(tmp_path, monkeypatch):
    pytest.importorskip("nncf")
    still_read = []

    def replace(new, old, really=os.replace):
        maps = Path("/proc/self/maps")  # which files this process reads from, on Linux
        still_read.append(maps.exists() and str(old) in maps.read_text())
        really(new, old)

    monkeypatch.setattr(quantize.os, "replace", replace)
    model = reduce_tokens(tiny_model("vit", BASES, num_hidden_layers=2), TOME)
    found = export(model, tmp_path / "graph", format="openvino", int8=True, images=tiny_images(6))
    assert found["output"] == "features" and "same_class" not in found and 0.9 < found["cosine"] < 1
    text = (tmp_path / "graph" / "README.md").read_text(encoding="utf-8")
    assert "mean cosine between the features" in text and "predicted classes" not in text
    assert still_read and not any(still_read)  # Windows would refuse to replace such a file


def test_photographs_are_turned_upright(openvino_folder, monkeypatch):
    """By the README, as by `predict`. And the README asks OpenVINO for float32, as its numbers are of it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    monkeypatch.chdir(openvino_folder)
    picture.save("photo.jpg", exif=turned)
    names: dict = {}
    code = Path("README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(code, names)
    upright = PROCESSOR(read_picture("photo.jpg"), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(names["inputs"], upright, atol=1e-6)
    assert str(names["compiled"].get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"
    assert '{"INFERENCE_PRECISION_HINT": "f32"}' in code  # the default is float32 on some processors
    for page in ("deploy", "start"):
        text = (Path(__file__).resolve().parents[1] / "docs" / f"{page}.md").read_text()
        assert text.count("Image.open") == text.count("ImageOps.exif_transpose(Image.open") == 1


def test_all_texts_say_how_many_images_check_a_graph(call):
    page = (Path(__file__).resolve().parents[1] / "docs" / "deploy.md").read_text()
    _, help_text, _ = call("export", "--help")
    for text in (page, export.__doc__, help_text):
        assert "at most 5" in " ".join(text.replace("│", " ").split())


def test_files_are_written_in_utf_8(model, tmp_path, monkeypatch):
    write = Path.write_text
    # As on a machine whose own encoding has no ü.
    monkeypatch.setattr(Path, "write_text", lambda file, text, encoding="ascii": write(file, text, encoding=encoding))
    export(model, tmp_path / "Küken", format="torch")
    assert (tmp_path / "Küken" / "README.md").read_bytes().startswith("# Küken\n".encode())


def test_a_record_without_an_entry(openvino_folder, tmp_path):
    record = json.loads((openvino_folder / "export.json").read_text())
    for text, message in (
        (json.dumps({key: value for key, value in record.items() if key not in ("shape", "tokens")}),
         r"export\.json has no entry shape, tokens\. Export the model again"),
        ("{", r"export\.json cannot be read \(.*Export the model again"),
        ("7", r"export\.json cannot be read \(.*Export the model again"),
    ):  # fmt: skip
        (tmp_path / "export.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_exported(tmp_path)


def test_a_folder_of_predictions_is_of_one_dtype(openvino_folder, tmp_path):
    Image.effect_noise((40, 36), 80).convert("RGB").save(tmp_path / "a.png")
    first, other = (load_exported(openvino_folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    options = {"output_dir": tmp_path / "out", "progress": False}
    assert len(list(predict(first, [tmp_path / "a.png"], **options))) == 1
    assert not list(predict(first, [tmp_path / "a.png"], **options))
    with pytest.raises(ValueError, match="dtype was 'float32', now 'bfloat16'"):
        predict(other, [tmp_path / "a.png"], **options)


def test_a_model_is_not_replaced_by_its_own_graph(model, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    PROCESSOR.save_pretrained("model")
    before = sorted(os.listdir("model"))
    Path("link").symlink_to("model")
    for folder in ("model", "link", str(tmp_path / "model")):
        code, _, errors = call("export", "model", "-o", folder, "--overwrite")
        assert code == 2 and "holds the model that is exported" in errors and sorted(os.listdir("model")) == before
    # One that was loaded and reduced later came from there, too.
    tiny_model(num_hidden_layers=2).save_pretrained("stock")
    loaded = reduce_tokens(ViTForImageClassification.from_pretrained("stock"), TOME)
    with pytest.raises(ValueError, match="stock holds the model that is exported"):
        export(loaded, "stock", format="torch", overwrite=True)
    export(loaded, "graph", format="torch")
    export(loaded, "graph", format="torch", overwrite=True)


@pytest.mark.parametrize(
    ("name", "told"),
    [("clip", "It is the image side of the model alone"), ("depth", "It returns a depth for each pixel.")],
)
def test_the_readme_says_what_a_graph_returns(tmp_path, name, told):
    save_case(name, tmp_path / "model")
    loaded, processor = load_model(str(tmp_path / "model"), any_task=True)
    export(loaded, tmp_path / "graph", image_processor=processor, format="torch")
    assert told in (tmp_path / "graph" / "README.md").read_text()
