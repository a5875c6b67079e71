"""Training on streams: class folders and WebDataset shards, resumed in the midst of an epoch."""

import json
import runpy
import tarfile
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset, load_from_disk
from helpers import save_cat_and_dog, slow
from PIL import Image
from safetensors.torch import load_file

from hf_tokenreduce.loading import load_model
from hf_tokenreduce.training import make_labels
from hf_tokenreduce.training.run import main
from hf_tokenreduce.training.streaming import first_images, folder_stream, kept_images


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def start(tmp_path):
    """A model of two classes, class folders with images, and the same images as WebDataset shards."""
    save_cat_and_dog(tmp_path / "model")
    for split, count in (("train", 12), ("val", 6)):
        (tmp_path / "shards" / split).mkdir(parents=True)
        shards = [
            tarfile.open(tmp_path / "shards" / split / f"{number}.tar", "w")  # noqa: SIM115
            for number in range(2)
        ]
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "folders" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{number}.png")
                (tmp_path / "label").write_text(str(index))
                shards[number % 2].add(folder / f"{number}.png", f"{name}{number}.png")
                shards[number % 2].add(tmp_path / "label", f"{name}{number}.cls")
        for shard in shards:
            shard.close()
    return tmp_path


def train(start, output, source, *more):
    data = start / source
    command = ["--model_name_or_path", start / "model", "--train_dir", data / "train", "--validation_dir"]
    command += [data / "val", "--output_dir", start / output, "--reduction", "tome", "--use_cpu", "True"]
    command += ["--disable_tqdm", "True", "--per_device_train_batch_size", 4, "--streaming", "True"]
    if source == "shards":
        command += ["--image_column_name", "png", "--label_column_name", "cls"]
    main([str(word) for word in (*command, *more)])
    record = json.loads((start / output / "record.json").read_text())
    return record, load_file(start / output / "model.safetensors")


@pytest.mark.parametrize(
    ("source", "more"),
    [slow("folders", []), ("shards", ["--dataloader_num_workers", 1, "--augmentation", "strong"])],
)
def test_resumed_in_the_midst_of_an_epoch_is_uninterrupted(start, source, more):
    settings = ["--max_steps", 9, "--save_steps", 4, "--save_total_limit", 3, *more]
    record, whole = train(start, "whole", source, *settings)
    assert record["eval_images"] == 12 and record["epochs"] == 1
    assert record["streamed_images"] == 9 * 4
    # Step 4 is in the first pass over the 24 images, step 8 in the second.
    for step in (4, 8):
        again, resumed = train(
            start,
            f"resumed-{step}",
            source,
            *settings,
            "--resume_from_checkpoint",
            start / "whole" / f"checkpoint-{step}",
        )
        assert again["top1"] == record["top1"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = train(start, "other", source, *settings, "--seed", 5)[1]
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())


def test_class_folders_are_streamed_in_mixed_order(start):
    stream = folder_stream(start / "folders" / "train")
    labels = [row["label"] for row in stream]
    assert stream.features["label"].names == ["cat", "dog"] and labels != sorted(labels) == [0] * 12 + [1] * 12


def test_names_of_files_and_folders_are_no_patterns(start, tmp_path):
    pixels = Image.new("RGB", (8, 8))
    for place in ("pool/monday", "pool/tuesday", "links/cat", "links/dog [red]"):
        (tmp_path / place).mkdir(parents=True)
    for number, name in enumerate(("1*.png", "1x.png", "photo[1].png")):
        pixels.save(tmp_path / "pool" / "monday" / name)
        (tmp_path / "links" / "cat" / name).symlink_to(tmp_path / "pool" / "monday" / name)
        (tmp_path / "links" / "dog [red]" / f"{number}.png").symlink_to(tmp_path / "pool" / "monday" / name)
    stream = folder_stream(tmp_path / "links")
    assert stream.features["label"].names == ["cat", "dog [red]"]  # a link's own folder, not that of its file
    assert sorted(row["label"] for row in stream) == [0, 0, 0, 1, 1, 1]


def test_the_first_images_that_can_be_read():
    rows = [{"image": {"bytes": b"no image", "path": None}}, {"image": Image.new("L", (3, 2))}]
    assert [image.size for image in first_images(rows, 5, "image", "skip")] == [(3, 2)]
    with pytest.raises(ValueError, match="cannot be read"):
        first_images(rows, 5, "image")


def test_wrong_streams(start):
    with pytest.raises(ValueError, match=r"holds neither \.tar shards nor images"):
        folder_stream(start / "model")
    with pytest.raises(ValueError, match="Give --max_steps"):
        train(start, "no", "folders")
    with pytest.raises(ValueError, match=r"needs the columns 'image' and 'label'.*such as jpg and cls"):
        train(start, "no", "shards", "--max_steps", 1, "--image_column_name", "image", "--label_column_name", "label")
    with pytest.raises(ValueError, match="A stream cannot be split"):
        main(["--model_name_or_path", str(start / "model"), "--train_dir", str(start / "folders" / "train"),
              "--output_dir", str(start / "no"), "--streaming", "True", "--max_steps", "1"])  # fmt: skip


@pytest.mark.parametrize("source", ["folders", "shards"])
def test_labels_and_filter_of_a_stream(start, source):
    example = runpy.run_path(str(EXAMPLES / "run_delta_loss.py"))["main"]
    command = ["--model_name_or_path", start / "model", "--train_dir", start / source / "train", "--output_dir"]
    command += [start / "filter", "--labeller", "groups", "--keep_share", 0.5, "--num_train_epochs", 1, "--streaming"]
    if source == "shards":
        command += ["--image_column_name", "png", "--label_column_name", "cls"]
    command = [str(word) for word in command]
    with pytest.raises(ValueError, match="Give --max_train_samples"):
        example(command)
    with pytest.raises(ValueError, match="not a stream"):
        model, processor = load_model(start / "model")
        make_labels(model, folder_stream(start / source / "train"), start / "no", image_processor=processor)
    example([*command, "--max_train_samples", "6"])
    labels = load_from_disk(start / "filter" / "labels" / "labels")
    assert labels["index"][:] == list(range(6)) and set(labels["label"]) == {0, 1}
    assert json.loads((start / "filter" / "results.json").read_text())["labels"]["computed"] == 6
    for file in (start / source / "train").rglob("*.tar"):  # the images are kept: the stream is not read again
        file.unlink()
    example([*command, "--max_train_samples", "6"])
    assert json.loads((start / "filter" / "results.json").read_text())["labels"]["computed"] == 0
    command[command.index("--train_dir") + 1] = str(start / "folders" / "val")
    with pytest.raises(ValueError, match="made with other settings: train_dir was"):
        example([*command, "--max_train_samples", "6"])


def test_images_of_a_stream_that_does_not_know_its_columns(tmp_path):
    """A filter cannot learn from the stream again, so some of its images are copied."""

    def rows():
        for number in range(6):
            yield {"image": Image.new("RGB", (8, 8), (number, 0, 0)), "label": number}

    stream = IterableDataset.from_generator(rows)
    assert stream.features is None
    kept = kept_images(stream, 4, 0, ["image", "label"], tmp_path / "kept")
    assert len(kept) == 4 and all(row["image"].getpixel((0, 0)) == (row["label"], 0, 0) for row in kept)
    with pytest.raises(ValueError, match="The stream has no column 'jpg', only image, label"):
        kept_images(IterableDataset.from_generator(rows), 4, 0, ["jpg", "cls"], tmp_path / "none")
