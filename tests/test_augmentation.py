"""Augmentation, collation and unreadable images."""

import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, DeiTImageProcessor, ViTImageProcessor

from hf_tokenreduce.training.augmentation import (
    BatchTransform,
    Collator,
    EvalTransform,
    TrainTransform,
    random_box,
    random_crop,
    readable_rows,
)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size=SQUARE, **IMAGENET),
    "vit-lanczos": lambda: ViTImageProcessor(size={"height": 24, "width": 40}, resample=1),
    "vit-raw": lambda: ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False),
    "vit-factor": lambda: ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5, do_normalize=False),
    "deit": lambda: DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE),
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 28}),
}
SIZES = {"vit-lanczos": (24, 40), "clip": (32, 28)}
UNCHANGED = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}  # of a square image


def photograph(width=50, height=50, seed=0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def in_mode(mode: str) -> Image.Image:
    image = photograph()
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif mode == "P-transparent":
        image = image.convert("P")
        image.info["transparency"] = bytes(range(256))
    elif mode == "RGB-transparent":
        image.info["transparency"] = image.getpixel((3, 3))
    else:
        image = image.convert(mode)
    return image


MODES = ("1", "L", "LA", "P", "P-transparent", "RGB", "RGB-transparent", "RGBA", "CMYK", "YCbCr")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def image_dataset(num_rows=8, broken=(), decode=True) -> Dataset:
    files = [encoded(photograph(40 + i, 60, seed=i), "JPEG") for i in range(num_rows)]
    files = [file[: len(file) // 2] if i in broken else file for i, file in enumerate(files)]
    features = Features({"image": ImageFeature(decode=decode), "label": Value("int64")})
    rows = {"image": [{"bytes": file, "path": f"{i}.jpg"} for i, file in enumerate(files)], "label": range(num_rows)}
    return Dataset.from_dict({name: list(values) for name, values in rows.items()}, features=features)


def rows_of(num_rows: int, size=(20, 24)) -> list[dict]:
    """Image i is all i, so that a mix can be read off its pixels."""
    return [{"pixel_values": torch.full((3, *size), float(i)), "labels": i} for i in range(num_rows)]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_equals_the_processor(name, mode):
    processor, image = PROCESSORS[name](), in_mode(mode)
    if name == "clip":  # which converts by transformers' own code; that of 5.19 lets Pillow warn
        warnings.filterwarnings("ignore", "Palette images with Transparency")
    # One that converts by itself gets the image as it is, so that it may put transparency on white.
    given = image if name == "clip" else image.convert("RGBA").convert("RGB")
    expected = processor(given, return_tensors="pt").pixel_values[0].float()
    result = EvalTransform(processor)(image)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["vit", "vit-lanczos", "vit-raw", "vit-factor"])
@pytest.mark.parametrize("mode", MODES)
def test_training_on_the_whole_image_equals_evaluation(name, mode):
    processor, image = PROCESSORS[name](), in_mode(mode)
    assert torch.equal(TrainTransform(processor, **UNCHANGED)(image), EvalTransform(processor)(image))


@pytest.mark.parametrize("mode", MODES)
def test_transparency_is_rendered_as_the_processor_does(mode):
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    transform = TrainTransform(processor, **UNCHANGED)
    assert torch.equal(transform(in_mode(mode)), EvalTransform(processor)(in_mode(mode)))


@pytest.mark.parametrize("name", PROCESSORS)
def test_size_and_values(name):
    processor = PROCESSORS[name]()
    transform = TrainTransform(processor, color_jitter=0.4)
    lowest, highest = transform.table.min(1), transform.table.max(1)
    for width, height in ((50, 50), (200, 30), (9, 120), (1, 1)):
        result = transform(photograph(width, height))
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert (
            result.shape
            == (3, *SIZES.get(name, (32, 32)))
            == EvalTransform(processor)(photograph(width, height)).shape
        )
        flat = result.flatten(1)
        assert (flat.amin(1) >= torch.tensor(lowest)).all() and (flat.amax(1) <= torch.tensor(highest)).all()


def test_a_seed_repeats_and_calls_differ():
    transform = TrainTransform(PROCESSORS["vit"](), color_jitter=0.3, erasing=0.5)
    numpy_state, runs = np.random.get_state()[1].copy(), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([transform(photograph()) for _ in range(6)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert not any(torch.equal(runs[0][0], other) for other in runs[0][1:])
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_seed_repeats_through_workers_which_differ_from_one_another():
    same = [encoded(photograph())] * 8
    dataset = Dataset.from_dict(
        {"image": [{"bytes": file, "path": None} for file in same], "label": list(range(8))},
        features=Features({"image": ImageFeature(), "label": Value("int64")}),
    ).with_transform(BatchTransform(TrainTransform(PROCESSORS["vit"]())))
    collator = Collator(mixup=0.4, cutmix=1.0, num_labels=8)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collator)
        runs.append([batch for _ in range(2) for batch in loader])  # two epochs
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])
    assert not torch.equal(runs[0][0]["pixel_values"], runs[2][0]["pixel_values"])
    images = torch.cat([batch["pixel_values"] for batch in runs[0]]).flatten(1)
    assert len(images.unique(dim=0)) == 16


def test_flip():
    image = photograph()
    upright, mirrored = (TrainTransform(PROCESSORS["vit"](), **{**UNCHANGED, "flip": p})(image) for p in (0.0, 1.0))
    torch.testing.assert_close(mirrored, upright.flip(-1), atol=0.02, rtol=0)
    assert not torch.equal(mirrored, upright)
    transform = TrainTransform(PROCESSORS["vit"](), **{**UNCHANGED, "flip": 0.25})
    share = sum(torch.equal(transform(image), mirrored) for _ in range(400)) / 400
    assert 0.17 < share < 0.33


def test_colour_jitter():
    image, processor = photograph(), PROCESSORS["vit-raw"]()
    plain = TrainTransform(processor, **UNCHANGED)(image)
    jitter = TrainTransform(processor, **UNCHANGED, color_jitter=0.3)
    ratios = torch.tensor([(jitter(image).mean() / plain.mean()).item() for _ in range(100)])
    assert (
        0.68 < ratios.min() < 0.8 and 1.2 < ratios.max() < 1.32
    )  # contrast and saturation leave the mean almost alone
    grey = photograph().convert("L")
    results = jitter(grey), jitter(grey)
    assert not torch.equal(*results)
    assert torch.equal(results[0][0], results[0][1])  # grey stays grey


def test_crops_cover_the_ranges_and_stay_inside():
    width, height, scale, ratio = 400, 300, (0.35, 0.8), (3 / 4, 4 / 3)
    boxes = np.array([random_crop(width, height, scale, ratio) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert (boxes[:, :2] >= 0).all() and (right <= width).all() and (bottom <= height).all()
    areas, ratios = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert 0.345 < areas.min() < 0.37 and 0.75 < areas.max() < 0.805
    assert 0.745 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.34
    assert left.min() == 0 and top.min() == 0 and right.max() == width and bottom.max() == height
    assert random_crop(1000, 10, (0.5, 1.0), ratio) == (493, 0, 506, 10)
    assert random_crop(10, 1000, (0.5, 1.0), ratio) == (0, 493, 10, 506)
    assert random_crop(1, 1, scale, ratio) == (0, 0, 1, 1)
    assert random_box(1000, 10, (0.5, 1.0), ratio) is None


def test_erasing():
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    plain = TrainTransform(processor, **UNCHANGED)(photograph())
    transform = TrainTransform(processor, **UNCHANGED, erasing=0.5)
    shares, noise = [], []
    for _ in range(300):
        result = transform(photograph())
        erased = (result != plain).any(0)
        if not erased.any():
            continue
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert erased.sum() == rows * columns  # one full rectangle
        shares.append(rows * columns / 64**2)
        noise.append(result[:, erased].flatten())
    assert 110 < len(shares) < 190
    assert 0.017 < min(shares) < 0.05 and 0.29 < max(shares) < 0.345
    values = torch.cat(noise)
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_plain_collator():
    batch = Collator()(rows_of(3))
    assert batch["pixel_values"].shape == (3, 3, 20, 24)
    assert batch["labels"].dtype == torch.long and batch["labels"].tolist() == [0, 1, 2]
    assert set(Collator()([{"pixel_values": torch.zeros(3, 4, 4)}])) == {"pixel_values"}


def test_label_smoothing():
    labels = Collator(num_labels=4, label_smoothing=0.2)(rows_of(3))["labels"]
    torch.testing.assert_close(labels, torch.eye(4)[:3] * 0.8 + 0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_pixels_as_labels(smoothing):
    shares = []
    for _ in range(50):
        batch = Collator(mixup=1.0, num_labels=6, label_smoothing=smoothing)(rows_of(4))
        labels, pixel_values = batch["labels"], batch["pixel_values"]
        assert labels.shape == (4, 6) and labels.dtype == torch.float32
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        share = pixel_values[1, 0, 0, 0].item()  # of image 1 itself, for the other's pixels are 0
        own = torch.eye(4, 6)
        targets = share * own + (1 - share) * own.roll(1, 0)
        torch.testing.assert_close(labels, targets * (1 - smoothing) + smoothing / 6)
        values = targets @ torch.arange(6.0)
        torch.testing.assert_close(pixel_values, values.view(4, 1, 1, 1).expand(4, 3, 20, 24))
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.8


def test_cutmix_labels_are_the_pasted_area():
    pasted = []
    for _ in range(200):
        batch = Collator(cutmix=1.0, num_labels=4)(rows_of(4))
        for i in range(4):
            other = batch["pixel_values"][i] == (i - 1) % 4
            assert torch.equal(other, ~(batch["pixel_values"][i] == i))
            share = other[0].float().mean()
            expected = torch.zeros(4)
            expected[i], expected[i - 1] = 1 - share, share
            torch.testing.assert_close(batch["labels"][i], expected)
        rows, columns = other[0].any(1).sum(), other[0].any(0).sum()
        assert other[0].sum() == rows * columns
        pasted.append(share.item())
    assert min(pasted) < 0.05 and max(pasted) > 0.7


def test_both_take_turns():
    collator = Collator(mixup=1.0, cutmix=1.0, num_labels=2)
    kinds = [bool(((v := collator(rows_of(2))["pixel_values"]) == v.round()).all()) for _ in range(100)]
    assert 30 < sum(kinds) < 70


@pytest.mark.parametrize("settings", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 1.0}])
def test_a_batch_of_one_is_unchanged(settings):
    row = {"pixel_values": torch.randn(3, 8, 8), "labels": 1}
    for _ in range(20):
        batch = Collator(num_labels=3, **settings)([row])
        assert torch.equal(batch["pixel_values"][0], row["pixel_values"])
        assert batch["labels"].tolist() == [[0.0, 1.0, 0.0]]


def test_the_rows_are_not_touched():
    rows = rows_of(4)
    for _ in range(10):
        Collator(mixup=1.0, cutmix=1.0, num_labels=4)(rows)
    assert all((row["pixel_values"] == i).all() and row["labels"] == i for i, row in enumerate(rows))


def test_everything_pickles():
    processor = PROCESSORS["vit"]()
    for transform in (TrainTransform(processor, erasing=0.5), EvalTransform(processor)):
        batch = {"image": [photograph()], "label": [3]}
        given = BatchTransform(transform)
        results = []
        for each in (given, pickle.loads(pickle.dumps(given))):
            torch.manual_seed(0)
            results.append(each(batch))
        assert torch.equal(results[0]["pixel_values"][0], results[1]["pixel_values"][0])
        assert results[1]["labels"] == [3]
    collator = Collator(mixup=0.2, num_labels=4)
    assert pickle.loads(pickle.dumps(collator)) == collator


def test_broken_images_are_found():
    dataset = image_dataset(broken=(2, 5))
    with pytest.raises(OSError):
        dataset[2]
    assert readable_rows(dataset) == [0, 1, 3, 4, 6, 7]
    transform = BatchTransform(EvalTransform(PROCESSORS["vit"]()))
    # whatever order, decoding and transform the dataset has
    assert readable_rows(dataset.select([5, 4, 2]).with_transform(transform)) == [1]
    assert readable_rows(image_dataset(broken=(0,), decode=False)) == list(range(1, 8))
    readable = dataset.select(readable_rows(dataset)).with_transform(transform)
    assert readable[:]["labels"] == [0, 1, 3, 4, 6, 7]


def test_broken_files_of_every_kind(tmp_path):
    whole = encoded(photograph())
    (tmp_path / "whole.png").write_bytes(whole)
    (tmp_path / "text.jpg").write_text("this is no photograph")
    (tmp_path / "empty.png").touch()
    (tmp_path / "flipped.png").write_bytes(whole[:60] + b"\0\0\0\0" + whole[64:])
    paths = [str(tmp_path / name) for name in ("whole.png", "text.jpg", "empty.png", "flipped.png", "missing.png")]
    dataset = Dataset.from_dict({"photo": [*paths, None]}).cast_column("photo", ImageFeature())
    assert readable_rows(dataset, "photo") == [0]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_unreadable_images_stop_or_are_skipped(on_error):
    settings = {"on_error": on_error}
    dataset = image_dataset(broken=(2,), decode=False)
    dataset = dataset.with_transform(BatchTransform(EvalTransform(PROCESSORS["vit"]()), **settings))
    loader = DataLoader(dataset, batch_size=4, collate_fn=Collator())
    if on_error == "stop":
        with pytest.raises(ValueError, match=r"2\.jpg cannot be read: Truncated.*readable_rows"):
            list(loader)
    else:
        assert [batch["labels"].tolist() for batch in loader] == [[0, 1, 3], [4, 5, 6, 7]]
    lazy = Image.open(io.BytesIO(encoded(photograph(400, 400), "JPEG")[:-500]))
    for image in (lazy, None, Image.new("F", (40, 40), 0.5), Image.new("RGB", (1, 400))):
        transform = BatchTransform(EvalTransform(PROCESSORS["vit"]()), label_column_name=None, **settings)
        if on_error == "stop":
            with pytest.raises(ValueError, match="cannot be read"):
                transform({"image": [image]})
        else:
            assert len(transform({"image": [photograph(), image]})["pixel_values"]) == 1


def test_an_error_of_the_transform_is_not_an_unreadable_image():
    def transform(image):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        BatchTransform(transform, on_error="skip")({"image": [photograph()], "label": [0]})


class SwapsChannels(ViTImageProcessor):
    def normalize(self, image, *args, **kwargs):
        return super().normalize(image, *args, **kwargs)[::-1].copy()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrainTransform(PROCESSORS["vit"](), scale=(0.0, 1.0)), r"scale=\(0.0, 1.0\)"),
        (lambda: TrainTransform(PROCESSORS["vit"](), scale=(0.5, 1.1)), "scale"),
        (lambda: TrainTransform(PROCESSORS["vit"](), scale=(0.9, 0.5)), "smallest and the largest"),
        (lambda: TrainTransform(PROCESSORS["vit"](), ratio=(2.0, 1.0)), "ratio"),
        (lambda: TrainTransform(PROCESSORS["vit"](), ratio=(0.0, 1.0)), "ratio"),
        (lambda: TrainTransform(PROCESSORS["vit"](), flip=1.5), "flip=1.5: give a number from 0 to 1"),
        (lambda: TrainTransform(PROCESSORS["vit"](), erasing=-0.1), "erasing=-0.1"),
        (lambda: TrainTransform(PROCESSORS["vit"](), color_jitter=math.nan), "color_jitter=nan"),
        (lambda: TrainTransform(ViTImageProcessor(size={"shortest_edge": 32})), "do_center_crop and crop_size"),
        (lambda: TrainTransform(ViTImageProcessor(do_resize=False)), "set its size"),
        (lambda: TrainTransform(SwapsChannels()), "mixes or swaps channels"),
        (lambda: EvalTransform(PROCESSORS["vit"]())(Image.new("I", (8, 8), 70_000)), "no known range"),
        (lambda: TrainTransform(PROCESSORS["clip"]())(Image.new("F", (8, 8))), "no known range"),
        (lambda: BatchTransform(print, on_error="ignore"), 'use "stop" or "skip"'),
        (lambda: BatchTransform(print)({"img": [], "label": []}), "No \\['image'\\] among .*'img'"),
        (lambda: BatchTransform(print)({"image": []}), "No \\['label'\\]"),
        (lambda: BatchTransform(print)({"image": ["cat.jpg"], "label": [0]}), "cat.jpg cannot be read"),
        (lambda: readable_rows(DatasetDict(train=image_dataset(1))), "one split"),
        (lambda: readable_rows(image_dataset(1), "label"), "column 'label'"),
        (lambda: readable_rows(image_dataset(1), "img"), "column 'img'"),
        (lambda: Collator(mixup=0.2), "give num_labels"),
        (lambda: Collator(label_smoothing=0.1), "give num_labels"),
        (lambda: Collator(cutmix=-1.0, num_labels=3), "cutmix=-1.0"),
        (lambda: Collator(mixup=math.inf, num_labels=3), "mixup=inf"),
        (lambda: Collator(label_smoothing=1.5, num_labels=3), "label_smoothing=1.5"),
        (lambda: Collator(mixup=0.2, num_labels=3)(rows_of(4)), "below num_labels=3"),
        (lambda: Collator(mixup=0.2, num_labels=3)([{"pixel_values": torch.zeros(3, 4, 4)}]), "plain Collator"),
        (lambda: Collator()([]), "was skipped"),
        (lambda: Collator()(rows_of(1) + rows_of(1, (8, 8))), "one shape"),
    ],
)
def test_errors_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()
