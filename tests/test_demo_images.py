"""The generated data set: the same at every call, resumable, and with the class in a small part of each image."""

import json

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from hf_tokenreduce.demo.images import CLASSES, SHAPES, draw, make_images


def pixels(folder):
    return {str(file.relative_to(folder)): np.asarray(Image.open(file)) for file in folder.rglob("*.png")}


def test_a_folder_that_datasets_reads(tmp_path):
    assert make_images(tmp_path / "images", train=20, validation=8, size=48) == {"train": 20, "validation": 8}
    data = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 20, "validation": 8}
    assert tuple(data["train"].features["label"].names) == CLASSES == tuple(sorted(SHAPES))
    counts = np.bincount(data["train"]["label"])
    assert counts.tolist() == [4, 4, 3, 3, 3, 3]
    assert data["validation"][0]["image"].size == (48, 48)
    assert not list((tmp_path / "images").rglob("*.part"))


def test_the_same_at_every_call_and_in_a_larger_set(tmp_path):
    make_images(tmp_path / "a", train=8, validation=8, size=32)
    make_images(tmp_path / "b", train=16, validation=8, size=32)
    make_images(tmp_path / "c", train=8, validation=8, size=32, seed=1)
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert len(a) == 16 and len(b) == 24 and a.keys() < b.keys()
    assert all(np.array_equal(image, b[name]) for name, image in a.items())
    assert all(not np.array_equal(image, c[name]) for name, image in a.items())
    different = {image.tobytes() for image in b.values()}
    assert len(different) == len(b)


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    from hf_tokenreduce.demo import images

    drawn = []

    def counted(*arguments, **settings):
        if len(drawn) == 10:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw(*arguments, **settings)

    monkeypatch.setattr(images, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        make_images(tmp_path / "a", train=16, validation=8, size=32)
    assert len(pixels(tmp_path / "a")) == 10
    stopped = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").rglob("*.png")}
    monkeypatch.setattr(images, "draw", draw)
    make_images(tmp_path / "a", train=16, validation=8, size=32)
    assert all(file.stat().st_mtime_ns == time for file, time in stopped.items())
    make_images(tmp_path / "b", train=16, validation=8, size=32)
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert a.keys() == b.keys() and all(np.array_equal(image, b[name]) for name, image in a.items())


@pytest.mark.parametrize("name", CLASSES)
def test_the_shape_is_whole_and_small(name):
    covered = []
    for index in range(12):
        image, mask = draw("train", name, index)
        assert image.size == (96, 96) and mask.shape == (96, 96) and image.mode == "RGB"
        assert mask.max() == 1 and mask[[0, -1]].max() == 0 and mask[:, [0, -1]].max() == 0
        down, across = np.nonzero(mask > 0.5)
        assert 0.12 * 96 < max(np.ptp(down), np.ptp(across)) < 0.45 * 96
        covered.append((mask.reshape(12, 8, 12, 8).max(axis=(1, 3)) > 0).mean())
    assert np.mean(covered) < 0.15  # of 144 patches


def test_the_shape_stands_out():
    for name in CLASSES:
        for index in range(6):
            image, mask = draw("validation", name, index)
            values = np.asarray(image, float) / 255
            inside, around = values[mask > 0.9].mean(axis=0), values[mask == 0].mean(axis=0)
            assert np.abs(inside - around).max() > 0.1, (name, index)


def test_neither_colour_nor_place_tells_the_class():
    """Means over many images of a class are those of all images, within what chance allows."""
    colours, places = {}, {}
    for name in CLASSES:
        drawings = [draw("train", name, index, size=32) for index in range(60)]
        where = [mask > 0.9 if (mask > 0.9).any() else mask > 0.5 for _, mask in drawings]
        colours[name] = [
            np.asarray(d.image, float)[w].mean(axis=0) / 255 for d, w in zip(drawings, where, strict=True)
        ]
        places[name] = [np.argwhere(w).mean(axis=0) / 32 for w in where]
    for values in (colours, places):
        everything = np.concatenate(list(values.values()))
        middle, spread = everything.mean(axis=0), everything.std(axis=0)
        for name, mine in values.items():
            off = np.abs(np.mean(mine, axis=0) - middle) / (spread / np.sqrt(len(mine)))
            assert (off < 4).all(), (name, off)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 5}, "at least 6, one per class, got 5"),
        ({"validation": True}, "validation counts images"),
        ({"size": 31}, "at least 32, got 31"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_images(tmp_path / "images", **settings)
    assert not (tmp_path / "images").exists()


def test_folders_of_something_else(tmp_path):
    make_images(tmp_path / "images", train=12, validation=8, size=32)
    with pytest.raises(ValueError, match="seed was 0, now 2"):
        make_images(tmp_path / "images", train=16, validation=8, size=32, seed=2)
    with pytest.raises(ValueError, match=r"00001\.png.*at least as many"):
        make_images(tmp_path / "images", train=6, validation=8, size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds other files and no manifest\.json"):
        make_images(tmp_path / "mine", train=8, validation=8, size=32)
    (tmp_path / "images" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="made with other settings: version was None"):
        make_images(tmp_path / "images", train=16, validation=8, size=32)
    (tmp_path / "images" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .*give another one"):
        make_images(tmp_path / "images", train=16, validation=8, size=32)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["photo.png"]


def test_the_manifest_says_how_to_draw_it_again(tmp_path):
    make_images(tmp_path / "images", train=8, validation=8, size=40, seed=3)
    manifest = json.loads((tmp_path / "images" / "manifest.json").read_text())
    assert manifest == {"version": 2, "size": 40, "seed": 3, "classes": list(CLASSES)}
    found = np.asarray(Image.open(tmp_path / "images" / "train" / "star" / "00000.png"))
    assert np.array_equal(found, np.asarray(draw("train", "star", 0, size=40, seed=3).image))
