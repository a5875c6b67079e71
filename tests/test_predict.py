"""What `predict` does with images, models and processors that fail, and where it goes on."""

import errno
import inspect
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from transformers import BitImageProcessor, ImageClassificationPipeline, ViTImageProcessor, pipeline

from hf_tokenreduce import ToMeConfig, reduce_tokens
from hf_tokenreduce.predict import count_unlabelled, predict
from hf_tokenreduce.serve import SideBySide
from hf_tokenreduce.tasks import labelled
from hf_tokenreduce.tuning import tune


PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with four photographs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return some_photos(Path("photos"), 0)


def some_photos(folder, seed, sizes=((40, 36),) * 4):
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def model():
    return reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))


def rows_of(model, folder, processor=PROCESSOR, **options):
    return list(predict(model, [folder], processor, progress=False, **options))


def test_names_are_relative_to_where_the_folder_was_made(model, photos, monkeypatch):
    out = Path("out").resolve()
    first = rows_of(model, "photos", output_dir=out)
    some_photos(Path("elsewhere/photos"), 1)
    monkeypatch.chdir("elsewhere")
    second = rows_of(model, "photos", output_dir=out)
    assert [row["file"] for row in second] == [row["file"] for row in first]
    assert [row["score"] for row in second] != [row["score"] for row in first]
    assert not rows_of(model, "photos", output_dir=out) and not rows_of(model, "../photos", output_dir=out)
    kept = [json.loads(line)["file"] for line in (out / "part-0.jsonl").read_text().splitlines()]
    assert kept == [*(row["file"] for row in first), *(os.path.abspath(row["file"]) for row in second)]


def test_images_with_errors_are_tried_again(model, photos):
    whole = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(whole[:60])  # as a download that has not finished

    def fails(module, given):
        raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fails)
    found = rows_of(model, photos, output_dir="out", batch_size=1)
    assert sum("the model failed: out of memory" in row["error"] for row in found) == 3
    handle.remove()
    again = rows_of(model, photos, output_dir="out")
    assert len(again) == 3 and all("label" in row for row in again)  # the other is as unreadable as it was
    assert not rows_of(model, photos, output_dir="out")
    (photos / "2.png").write_bytes(whole)
    later = Path("out/part-0.jsonl").stat().st_mtime + 5
    os.utime(photos / "2.png", (later, later))
    (repaired,) = rows_of(model, photos, output_dir="out")
    assert repaired["file"] == "photos/2.png" and "label" in repaired


def test_images_without_a_label_are_counted_after_another_run(model, photos):
    whole = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(whole[:60])
    (photos / "3.png").write_bytes(whole[:60])
    assert len(rows_of(model, photos, output_dir="out")) == 4 and count_unlabelled("out") == 2
    assert not rows_of(model, photos, output_dir="out") and count_unlabelled("out") == 2
    time.sleep(0.05)
    (photos / "2.png").write_bytes(whole)
    assert len(rows_of(model, photos, output_dir="out")) == 1 and count_unlabelled("out") == 1
    (photos / "3.png").unlink()
    assert not rows_of(model, photos, output_dir="out") and count_unlabelled("out") == 0


def test_one_folder_needs_no_list(model, photos):
    for one in (str(photos), photos):
        assert len(list(predict(model, one, PROCESSOR, progress=False))) == 4


def test_a_repaired_image_may_be_older_than_the_broken_one(model, photos):
    """As `mv`, `cp -p` and `rsync -a` leave it."""
    whole = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(whole[:60])
    assert sum("error" in row for row in rows_of(model, photos, output_dir="out")) == 1
    Path("good.png").write_bytes(whole)
    os.utime("good.png", (1.6e9, 1.6e9))
    time.sleep(0.05)
    os.replace("good.png", photos / "2.png")
    assert (photos / "2.png").stat().st_mtime == 1.6e9
    (repaired,) = rows_of(model, photos, output_dir="out")
    assert repaired["file"] == "photos/2.png" and "label" in repaired


def test_numbers_that_are_not_finite_are_no_label(model, photos):
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    found = rows_of(model, photos, batch_size=1)
    assert all(set(row) == {"file", "error"} and "not finite" in row["error"] for row in found) and len(found) == 4
    with pytest.raises(ValueError, match=r"fails on every image.*not finite"):
        rows_of(model, photos)


def test_images_that_cannot_be_prepared_together(model, tmp_path):
    shapes = BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    folder = some_photos(tmp_path / "photos", 0, [(40, 40), (40, 80), (32, 32)])
    found = {Path(row["file"]).name: row for row in rows_of(model, folder, shapes)}
    assert "the model failed" in found.pop("1.png")["error"]  # its size is not that of the model
    alone = {Path(row["file"]).name: row for row in rows_of(model, folder, shapes, batch_size=1)}
    assert set(found) == {"0.png", "2.png"} and all(
        alone[name]["score"] == row["score"] for name, row in found.items()
    )


def test_a_processor_that_fails_on_one_image(model, photos):
    class Fails(ViTImageProcessor):
        def preprocess(self, images, *args, **kwargs):
            pictures = images if isinstance(images, list) else [images]
            if any(picture.size == (9, 9) for picture in pictures):
                raise AssertionError
            return super().preprocess(images, *args, **kwargs)

    Image.new("RGB", (9, 9)).save(photos / "1.png")
    found = rows_of(model, photos, Fails(size={"height": 32, "width": 32}))
    (error,) = [row for row in found if "error" in row]
    assert error == {"file": "photos/1.png", "error": "the image processor failed: AssertionError"} and len(found) == 4


def test_a_last_batch_that_fails_takes_no_answers_with_it(model, photos):
    last = [photos / "2.png", photos / "3.png"]
    broken = torch.cat([PROCESSOR(Image.open(file), return_tensors="pt").pixel_values for file in last])

    def fails_on_the_last(module, given):
        if any(torch.equal(one, bad) for one in given[0] for bad in broken):
            raise MemoryError

    model.register_forward_pre_hook(fails_on_the_last)
    found = rows_of(model, photos, batch_size=2, output_dir="out")
    assert [row.get("error") for row in found] == [None, None, *["the model failed: MemoryError"] * 2]
    again = rows_of(model, photos, batch_size=2, output_dir="out")  # the others worked, in the run before
    assert again == found[2:]


def test_a_batch_that_is_too_large_is_told(model, photos, monkeypatch):
    """Image by image it would run, but many times as slowly."""

    def forward(pixel_values, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match=r"A batch of 2 images does not fit .* smaller batch_size"):
        rows_of(model, "photos", batch_size=2)
    assert all("the model failed" in row["error"] for row in rows_of(model, "photos", batch_size=1))


def test_images_that_fail_first_do_not_end_a_run(model, photos):
    """Whatever the size of a batch."""
    asked, calls = model.forward, []

    def forward(pixel_values, **options):
        calls.append(len(pixel_values))
        if pixel_values.std() < 0.05:
            raise RuntimeError("nothing to see")
        if len(pixel_values) > 1 and pixel_values.flatten(1).std(dim=1).min() < 0.05:
            raise RuntimeError("nothing to see in one of them")
        return asked(pixel_values, **options)

    model.forward = forward
    for name in ("00.png", "01.png"):
        Image.new("RGB", (40, 40), "grey").save(photos / name)
    for batch_size in (1, 2, 3, 32):
        found = {Path(row["file"]).name: row for row in rows_of(model, photos, batch_size=batch_size)}
        assert sum("label" in row for row in found.values()) == 4
        assert all("the model failed" in found.pop(name)["error"] for name in ("00.png", "01.png"))


def test_a_model_that_always_fails_ends_a_run_early(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tokenreduce.predict.ENOUGH_FAILURES", 4)
    folder = some_photos(tmp_path / "photos", 0, [(32, 32)] * 10)
    model.forward = lambda *given, **options: 1 / 0
    found = []
    with pytest.raises(ValueError, match=r"fails on the first 4 images. On .*0.png: the model failed: division"):
        found.extend(predict(model, [folder], PROCESSOR, batch_size=2, progress=False))


def test_a_model_that_always_fails_is_told_after_files_that_cannot_be_read(model, photos):
    """The last batch holds no image on which the model could fail."""
    model.forward = lambda *given, **options: 1 / 0
    for name in ("8.png", "9.png"):
        (photos / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"fails on every image. On .*0.png: the model failed: division"):
        rows_of(model, photos, batch_size=2)


def test_a_model_that_always_fails_is_told_after_a_run_without_labels(model, tmp_path, monkeypatch):
    """Files that cannot be read say nothing about the model."""
    monkeypatch.setattr("hf_tokenreduce.predict.ENOUGH_FAILURES", 4)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    assert "error" in rows_of(model, folder, output_dir=tmp_path / "out")[0]
    some_photos(folder / "more", 0, [(32, 32)] * 10)
    model.forward = lambda *given, **options: 1 / 0
    with pytest.raises(ValueError, match="fails on the first 4 images"):
        rows_of(model, folder, batch_size=2, output_dir=tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_errors_of_the_system_are_tried_again(model, photos, monkeypatch, error):
    """A network drive or a full memory may be well again, and the picture was never broken."""

    def fail(*given, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", fail)
        rows = rows_of(model, photos, output_dir="out")
    assert all("could not be opened" in row["error"] and "Try again" in row["error"] for row in rows)
    assert [row["label"] for row in rows_of(model, photos, output_dir="out")] == [
        row["label"] for row in rows_of(model, photos)
    ]


def test_classes_without_a_name_have_their_number(model, photos):
    model.config.id2label = {index + 1: f"class {index + 1}" for index in range(model.config.num_labels)}
    model.classifier.bias.data[0] = 100.0
    assert {row["label"] for row in rows_of(model, photos)} == {"0"}
    side = SideBySide(model, PROCESSOR, repeats=1)(Image.open(photos / "0.png"), "ToMe").dense
    assert side.predictions[0][0] == "0"


@pytest.mark.parametrize("several", [False, True])
def test_scores_are_those_of_a_pipeline(photos, several):
    """Each class has a score of its own if there is one logit, or if an image has several labels."""
    model = tiny_model(num_labels=4 if several else 1)
    model.config.problem_type = "multi_label_classification" if several else None
    classify = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    for row in rows_of(model, photos, top_k=1):
        expected = classify(row["file"], top_k=1)[0]
        assert row["label"] == expected["label"] and row["score"] == pytest.approx(expected["score"], abs=1e-4)
    side = SideBySide(model, PROCESSOR, repeats=1)(Image.open(row["file"]), "ToMe")
    assert side.dense.predictions[0][1] == pytest.approx(expected["score"], abs=1e-4)


def test_a_regression_head_tells_its_numbers(photos):
    if "regression" not in inspect.getsource(ImageClassificationPipeline):
        pytest.skip("the pipeline of this version of transformers takes numbers for scores of classes")
    model = tiny_model(num_labels=2)
    model.config.problem_type = "regression"
    classify = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    rows = rows_of(model, photos)
    for row in rows:
        expected = classify(row["file"], top_k=1)[0]
        assert row["label"] == expected["label"] and row["score"] == pytest.approx(expected["score"], abs=1e-4)
    model.classifier.weight.data.mul_(1e-6)
    model.classifier.bias.data.mul_(1e-6)
    small = [row["score"] for row in rows_of(model, photos)]
    assert small == pytest.approx([1e-6 * row["score"] for row in rows], rel=1e-3)
    model.classifier.weight.data.mul_(1e6)
    model.classifier.bias.data.mul_(1e6)
    side = SideBySide(model, PROCESSOR, repeats=1)(Image.open(row["file"]), "ToMe").dense
    assert side.predictions[0][1] == pytest.approx(expected["score"], abs=1e-4)
    assert labelled(side.predictions, model.config).startswith(f"{expected['label']}: {expected['score']:.4g}, ")
    with pytest.raises(ValueError, match="tune compares classes, but the head of this model computes numbers"):
        tune(model, None, PROCESSOR, share=0.7, output_dir="tuned")


def test_scores_of_two_kinds_do_not_mix(model, photos):
    rows_of(model, photos, output_dir="out")
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type"):
        rows_of(model, photos, output_dir="out")


def test_predictions_do_not_go_into_the_folder_of_a_model(model, photos, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model holds a model. Give another folder for the predictions"):
        rows_of(model, photos, output_dir=tmp_path / "model")
