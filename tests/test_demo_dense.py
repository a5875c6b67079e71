"""The demonstration's dense model: it trains, goes on after an interruption, and is a folder of transformers."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_tokenreduce.demo import dense
from hf_tokenreduce.demo.dense import train_dense
from hf_tokenreduce.demo.images import CLASSES, draw, make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, train=32, validation=16, size=48)
    return folder


def test_a_folder_that_loads_anywhere(images, tmp_path):
    record = train_dense(images, tmp_path / "dense", steps=12)
    model, loading = AutoModelForImageClassification.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(loading.values()) and type(model).__name__ == "ViTForImageClassification"
    assert list(model.config.id2label.values()) == list(CLASSES) and model.config.label2id["star"] == 4
    assert sorted(file.name for file in (tmp_path / "dense").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
    ]
    classify = pipeline("image-classification", model=str(tmp_path / "dense"))
    files = sorted((images / "validation").glob("*/*.png"))
    correct = sum(classify(str(file), top_k=1)[0]["label"] == file.parent.name for file in files)
    assert record["top1"] == 100 * correct / len(files) and record["eval_images"] == 16


def test_pixel_values_are_those_of_the_processor(images, tmp_path):
    train_dense(images, tmp_path / "dense", steps=1)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "dense")
    split = dense._load(images / "validation")
    file = sorted((images / "validation" / CLASSES[0]).glob("*.png"))[0]
    expected = processor(Image.open(file), return_tensors="pt").pixel_values
    torch.testing.assert_close(dense._pixel_values(split.pixels[:1]), expected, rtol=0, atol=1e-6)


def test_an_interrupted_training_ends_with_the_same_weights(images, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "SAVE_EVERY", 4)
    lines = []

    def stop_in_the_middle(line):
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    train_dense(images, tmp_path / "whole", steps=14, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train_dense(images, tmp_path / "parts", steps=14, seed=3, progress=stop_in_the_middle)
    assert not (tmp_path / "parts" / "model.safetensors").exists() and lines[1].startswith("step 8 of 14, loss ")
    record = train_dense(images, tmp_path / "parts", steps=14, seed=3, progress=lines.append)
    assert [line.split(",")[0] for line in lines[2:]] == ["step 12 of 14", "step 14 of 14"]
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    assert train_dense(images, tmp_path / "parts", steps=14, seed=3, progress=lines.append) == record
    assert len(lines) == 4
    with pytest.raises(ValueError, match="made with other settings: seed was 3, now 4"):
        train_dense(images, tmp_path / "parts", steps=14, seed=4)


def test_the_loss_falls(images, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "SAVE_EVERY", 30)
    lines = []
    train_dense(images, tmp_path / "dense", steps=120, progress=lines.append)
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1


def test_the_window_holds_the_shape(images):
    split = dense._load(images / "train")
    border = 4
    padded = dense.Images(dense._padded(split.pixels, border), split.boxes, split.labels)
    whole = 0
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        pixels, boxes, _ = dense._batch(padded, 48, border, generator)
        window = dense._window(boxes, 6, generator)
        assert window.shape == (16, 36) and window.min() >= 0 and window.max() < 36
        # the box moved with the image: what it holds is brighter than the rest
        for image, (left, top, right, bottom) in zip(pixels, boxes.clamp(0, 48).tolist(), strict=True):
            bright = image.amax(0)
            whole += bool(bright[top:bottom, left:right].mean() > bright.mean() + 0.1)
    assert whole > 0.95 * 320
    for boxes, corner in (([[0, 0, 16, 16]], 0), ([[80, 80, 96, 96]], 6 * 12 + 6)):
        window = dense._window(torch.tensor(boxes), 12, torch.Generator().manual_seed(0))
        assert window[0, 0] == corner and window.shape == (1, 36)


def test_all_patches_in_the_window_are_the_model_itself(images):
    model = dense._new_model(48, 0).eval()
    pixels = dense._pixel_values(dense._load(images / "train").pixels[:3])
    with torch.no_grad():
        everything = torch.arange(36).expand(3, -1)
        torch.testing.assert_close(dense._logits(model, pixels, everything), model(pixels).logits)


def test_a_file_knows_where_its_shape_is(images):
    with Image.open(images / "train" / "ring" / "00001.png") as image:
        assert tuple(json.loads(image.info["box"])) == draw("train", "ring", 1, size=48).box()


def test_folders_and_settings_that_do_not_do(images, tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest\.json\. Draw the images first"):
        train_dense(tmp_path, tmp_path / "dense")
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        train_dense(images, tmp_path / "dense", steps=0)
    make_images(tmp_path / "odd", train=8, validation=8, size=44)
    with pytest.raises(ValueError, match="44 pixels wide, which patches of 8 do not cover"):
        train_dense(tmp_path / "odd", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.slow
def test_it_learns_the_shapes(tmp_path):
    make_images(tmp_path / "images")
    assert train_dense(tmp_path / "images", tmp_path / "dense")["top1"] >= 93  # 95.5 when measured; threads move it
