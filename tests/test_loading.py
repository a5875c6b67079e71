"""What a user types: folders of images whatever they are called, models that are whole, settings."""

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from helpers import SIZES, tiny_model
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_tokenreduce import ToMeConfig, loading, reduce_tokens
from hf_tokenreduce.calibration import load_pixel_values
from hf_tokenreduce.image_folders import folder_split, load_image_folder
from hf_tokenreduce.loading import (
    contents,
    load_hub_data,
    load_images,
    load_model,
    load_pictures,
    of_dataset,
    spread,
)
from hf_tokenreduce.pictures import find_in, read_picture
from hf_tokenreduce.training.data import load_data
from hf_tokenreduce.training.streaming import folder_stream, load_streams


PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def draw(path, size=(24, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def test_no_class_or_file_is_taken_for_a_split(tmp_path):
    """By its own rules `datasets` would keep 2 of these 12 images, or 4, silently."""
    for name in ("cat", "test tube", "bullet train [old]", "val"):
        for number in range(2):
            draw(tmp_path / "photos" / name / f"{number}.png")
        draw(tmp_path / "photos" / name / "holiday_test_1.png")
    images = load_images(str(tmp_path / "photos"))
    assert len(images) == 12 and images.features["label"].names == ["bullet train [old]", "cat", "test tube", "val"]
    assert load_images(str(tmp_path / "photos"), limit=4)["label"] == [0, 1, 2, 3]
    for number in range(2):
        draw(tmp_path / "[root]" / "val" / "test tube" / f"{number}.png")
        draw(tmp_path / "[root]" / "val" / "cat" / f"{number}.png")
        draw(tmp_path / "[root]" / "train" / "cat" / f"{number}.png")
        draw(tmp_path / "[root]" / "train" / "test tube" / f"{number}.png")
    assert {name: len(part) for name, part in load_image_folder(tmp_path / "[root]").items()} == {
        "train": 4,
        "validation": 4,
    }
    assert len(load_images(str(tmp_path / "[root]"))) == 4
    assert len(folder_split(tmp_path / "[root]" / "val", "validation", "train")) == 4
    with pytest.raises(ValueError, match="has no test folder, only train, validation"):
        folder_split(tmp_path / "[root]", "test")


def test_a_folder_beside_the_splits_is_one_too(tmp_path):
    """Nor do training images get among those that a model is evaluated on."""
    for part, count in (("train", 3), ("tune", 2), ("val", 1), ("valid", 1)):
        for name in ("cat", "dog"):
            for number in range(count):
                draw(tmp_path / "data" / part / name / f"{part}{number}.png")
    found = load_image_folder(tmp_path / "data")
    assert {name: len(part) for name, part in found.items()} == {"train": 6, "tune": 4, "validation": 4}
    assert len(load_images(str(tmp_path / "data"))) == 4 and len(load_images(str(tmp_path / "data"), "tune")) == 4
    for path in ("animals/cat", "animals/dog", "things/car"):  # folders of classes, but of no split
        draw(tmp_path / "nested" / path / "0.png")
    assert len(load_images(str(tmp_path / "nested"))) == 3


def test_folders_without_images_beside_the_splits_are_none(tmp_path):
    """Else training images would silently get among those that a model is evaluated on."""
    for part in ("Train", "VAL"):
        for name in ("cat", "dog"):
            draw(tmp_path / "data" / part / name / f"{part}.png")
    (tmp_path / "data" / "annotations").mkdir()
    (tmp_path / "data" / "annotations" / "all.json").write_text("{}")
    (tmp_path / "data" / "empty").mkdir()
    found = load_image_folder(tmp_path / "data")
    assert {name: part["label"] for name, part in found.items()} == {"train": [0, 1], "validation": [0, 1]}
    (tmp_path / "data" / "test").mkdir()
    with pytest.raises(ValueError, match="holds no images for test"):
        load_image_folder(tmp_path / "data")


@pytest.mark.parametrize("name", ["photos.zip", "more/photos.tar.gz"])
def test_archives_beside_class_folders_are_refused(tmp_path, name):
    """Their pictures may be what the user means."""
    for label in ("cat", "dog"):
        draw(tmp_path / label / "0.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is an archive, and its pictures are not read"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("name", ["favicon.ICO", "cat/film.mpg"])
def test_other_kinds_of_pictures_are_refused(tmp_path, name):
    """They would be left out without a word."""
    for label in ("cat", "dog"):
        draw(tmp_path / label / "0.png")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is of a kind that is not read.*Convert it or move it away"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("labels", [[1, 0, 1], ["dog", "cat", "dog"]])
def test_labels_may_have_no_list_of_classes(tmp_path, monkeypatch, labels):
    dataset = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 3, "label": labels})
    monkeypatch.setattr(loading, "load_dataset", lambda name: DatasetDict({"test": dataset}))
    assert load_images("someone/photos")["label"] == labels
    floats = Dataset.from_dict({"image": [1], "label": [0.5]})
    monkeypatch.setattr(loading, "load_dataset", lambda name: DatasetDict({"test": floats}))
    with pytest.raises(ValueError, match="has no classes"):
        load_images("someone/photos")


def test_class_folders_may_be_links(tmp_path, monkeypatch):
    """`datasets` does not look into them. A link to a folder above ends nowhere."""
    for name in ("cat", "dog"):
        for number in range(3):
            draw(tmp_path / "all" / name / f"{number}.png")
    some = tmp_path / "some"
    draw(some / "owl" / "0.png")
    (some / ".cache").mkdir()
    links = {
        "dog": "all/dog",
        "hen": "all/cat",
        "owl/again": "some",
        "up": ".",
        ".hidden": "all/cat",
        ".cache/x": "all/cat",
    }
    for name, target in links.items():
        (some / name).symlink_to(tmp_path / target)
    (tmp_path / "linked").symlink_to(some)
    monkeypatch.chdir(tmp_path / "all")
    for folder in (some, "../some", tmp_path / "linked", "../linked"):  # labels need paths of one depth
        images = load_images(str(folder))
        assert images.features["label"].names == ["dog", "hen", "owl"]
        assert sorted(images["label"]) == [0, 0, 0, 1, 1, 1, 2]
        assert len(load_pictures([str(folder)], 20)[0]) == 7
        assert load_pixel_values(tiny_model(), folder, PROCESSOR, 20).shape[0] == 7
        stream = folder_stream(folder)
        assert sorted(row["label"] for row in stream) == [0, 0, 0, 1, 1, 1, 2]
    (tmp_path / "all" / "dog" / "back").symlink_to(some)  # from one tree to the other, and back
    assert len(load_pictures([str(some)], 20)[0]) == 7
    (tmp_path / "all" / "dog" / "back").unlink()
    (some / "tree").mkdir()
    for name in ("cat", "dog"):  # one folder under two names is there twice
        (some / "tree" / name).symlink_to(tmp_path / "all")
    assert sorted(file.relative_to(some / "tree").parts[:2] for file in find_in(some / "tree")) == sorted(
        (name, inner) for name in ("cat", "dog") for inner in ("cat", "dog") for _ in range(3)
    )


def test_links_brackets_and_files_beside_images(tmp_path):
    """Each once made `datasets` lose images or classes without a word."""
    for name in ("cat", "dog [old]"):
        draw(tmp_path / "store" / "far" / "away" / name / "0.png")
        draw(tmp_path / "photos [2024]" / "train" / name / "0.png")
        (tmp_path / "photos [2024]" / "train" / name / "0.png.json").write_text("{}")
    (tmp_path / "photos [2024]" / "val").symlink_to(tmp_path / "store" / "far" / "away")
    (tmp_path / "photos [2024]" / "train" / "owl").symlink_to(tmp_path / "store" / "far" / "away" / "cat")
    draw(tmp_path / "photos [2024]" / "test" / "cat" / "0.png")  # the first split by name has one class only
    found = load_image_folder(tmp_path / "photos [2024]")
    assert {split: part["label"] for split, part in found.items()} == {
        "test": [0], "train": [0, 1, 2], "validation": [0, 1],
    }  # fmt: skip
    assert found["train"].features["label"].names == ["cat", "dog [old]", "owl"]
    assert sorted(row["label"] for row in folder_stream(tmp_path / "photos [2024]" / "train")) == [0, 1, 2]


def test_images_in_archives_of_the_hub_have_contents(tmp_path):
    draw(tmp_path / "0.png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "cat/0.png")
    paths = [str(tmp_path / "0.png"), f"zip://cat/0.png::{tmp_path / 'photos.zip'}"]
    first, second = contents(Dataset.from_dict({"image": paths}, features=Features({"image": ImageFeature()})))
    assert first == second


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), DatasetGenerationError()])
def test_data_sets_that_cannot_be_loaded(monkeypatch, error):
    def fails(name, **options):
        raise error

    monkeypatch.setattr(loading, "load_dataset", fails)
    given = SimpleNamespace(dataset_name="someone/photos")
    for load in (load_images, load_hub_data, lambda name: load_data(given, 0), lambda name: load_streams(given)):
        with pytest.raises(ValueError, match="The data set 'someone/photos' cannot be loaded"):
            load("someone/photos")


def test_encoders_without_a_classifier(tmp_path):
    config = ViTMAEConfig(**SIZES, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), any_task=True)[0]
    assert type(model) is ViTMAEModel and isinstance(reduce_tokens(model, ToMeConfig()), ViTMAEModel)
    ViTMAEModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a ViTMAEModel, for image-feature-extraction\. It does not predict"):
        load_model(str(tmp_path))


def test_classes_are_not_lost_to_a_stray_image(tmp_path):
    """Without classes nothing can be measured."""
    photos = tmp_path / "photos"
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        draw(photos / f"{name}.png")
    draw(photos / "stray.png")
    message = r"photos has class folders, but .* not in one of them: stray\.png\. Move"
    with pytest.raises(ValueError, match=message):
        load_image_folder(photos)
    with pytest.raises(ValueError, match=message):
        load_images(str(photos), labelled=False)
    assert load_images(str(photos), labelled=None).column_names == ["image"]  # where classes do not matter
    lines = [json.dumps({"file_name": str(file.relative_to(photos))}) for file in find_in(photos)]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    assert load_image_folder(photos)["train"].column_names == ["image"]
    (photos / "metadata.jsonl").unlink()
    (photos / "stray.png").unlink()
    draw(photos / "dog" / "more" / "2.png")
    with pytest.raises(ValueError, match=r"dog.more.2\.png"):
        load_image_folder(photos)
    draw(tmp_path / "flat" / "0.png")
    draw(tmp_path / "flat" / "more" / "1.png")  # one folder makes no classes
    assert load_image_folder(tmp_path / "flat")["train"].column_names == ["image"]


def test_class_folders_that_would_be_left_out(tmp_path):
    """`datasets` skips folders of such names, as if they were __pycache__."""
    for name in ("cat", "dog", "__other"):
        draw(tmp_path / "photos" / name / "0.png")
    (tmp_path / "photos" / "__pycache__").mkdir()
    assert load_image_folder(tmp_path / "photos")["train"].features["label"].names == ["__other", "cat", "dog"]
    (tmp_path / "photos" / "metadata.csv").write_text("file_name\ncat/0.png\ndog/0.png\n")
    with pytest.raises(ValueError, match=r"photos.__other would be left out, .* Rename it"):
        load_image_folder(tmp_path / "photos")
    (tmp_path / "photos" / "__other").rename(tmp_path / "photos" / "other")
    (tmp_path / "photos" / "metadata.csv").unlink()
    (tmp_path / "photos").rename(tmp_path / "__photos")
    assert load_images(str(tmp_path / "__photos")).features["label"].names == ["cat", "dog", "other"]


def test_splits_of_the_hub_have_other_names(monkeypatch, caplog):
    parts = DatasetDict({name: Dataset.from_dict({"image": [0] * n}) for name, n in (("train", 9), ("valid", 3))})
    monkeypatch.setattr(loading, "load_dataset", lambda name: parts)
    for split in (None, "valid", "val", "validation"):
        assert len(load_images("a/b", split, labelled=False)) == 3
    assert [len(part) for part in of_dataset(parts, "a/b")] == [9, 3]
    assert of_dataset({"train": 1, "test": 2}, "a/b") == (1, 2)
    assert of_dataset({"train": 1, "extra": 2}, "a/b") == (1, None)
    with pytest.raises(ValueError, match="a/b has no split train, only images"):
        of_dataset({"images": 1}, "a/b")
    parts["spare"] = parts.pop("valid")
    assert len(load_images("a/b", labelled=False)) == 9
    assert "its training images are used" in caplog.text


def test_spread():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 5) == [0, 1, 2]


def test_pictures_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    draw(tmp_path / "phone.jpg", exif=exif)
    assert read_picture(tmp_path / "phone.jpg").size == (16, 24)
    assert load_pictures([str(tmp_path)], 5)[0][0].size == (16, 24)
    (tmp_path / "broken.png").write_bytes((tmp_path / "phone.jpg").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        read_picture(tmp_path / "broken.png")


def saved(folder, model):
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


def test_models_that_are_taken(tmp_path):
    stock = saved(tmp_path / "stock", tiny_model())
    reduced = saved(tmp_path / "reduced", reduce_tokens(tiny_model(), ToMeConfig(r=3)))
    assert type(load_model(stock)[0]) is type(AutoModelForImageClassification.from_pretrained(stock))
    assert load_model(reduced)[0].config.reduction == ToMeConfig(r=3)


def test_models_that_are_refused(tmp_path):
    headless = saved(tmp_path / "headless", ViTModel(ViTConfig(**SIZES)))
    other = saved(
        tmp_path / "other",
        ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        ),
    )
    cut = saved(tmp_path / "cut", tiny_model())
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for name, words in (
        (headless, r"no trained classifier\.bias, classifier\.weight, so its classifier would be random"),
        (other, "is a ResNetForImageClassification. These can be reduced: ViT, DeiT, .*encoders.md"),
        (cut, "could not be loaded"),
        ("no-such-model", "There is no folder 'no-such-model' here"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(name)
    saved(tmp_path / "bare", tiny_model())
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no usable preprocessor_config\.json.*Save the image processor"):
        load_model(str(tmp_path / "bare"))
