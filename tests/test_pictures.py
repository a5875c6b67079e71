"""Reading pictures: one reader for all rooms, right for 16 bits a pixel, and clear about what cannot be read."""

import os
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from helpers import tiny_model
from PIL import EpsImagePlugin, Image, ImageOps
from transformers import ViTImageProcessor

from hf_tokenreduce.calibration import load_pixel_values
from hf_tokenreduce.evaluation.reading import sample_pixels
from hf_tokenreduce.image_folders import load_image_folder
from hf_tokenreduce.loading import load_pictures, undecoded
from hf_tokenreduce.pictures import IMAGE_SUFFIXES, as_rgb, find_in, read_picture, spread
from hf_tokenreduce.serve import read_image
from hf_tokenreduce.training.augmentation import EvalTransform, TrainTransform, decoded
from hf_tokenreduce.training.labels import read_image as read_labelled
from hf_tokenreduce.visualization.composing import prepare_images


@pytest.fixture
def grey(tmp_path):
    """A folder with a ramp of 8 bits, and the same of 16 bits."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    for name, picture in (("8", Image.fromarray(ramp)), ("16", Image.fromarray(ramp.astype(np.uint16) * 257))):
        (tmp_path / name / "class").mkdir(parents=True)
        picture.save(tmp_path / name / "class" / "ramp.png")
    assert Image.open(tmp_path / "16" / "class" / "ramp.png").mode.startswith("I")
    return tmp_path


def test_sixteen_bits_are_scaled_in_every_room(grey):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    rooms = {
        "show": lambda folder: load_pictures([str(folder)], 9)[0][0],
        "calibrate": lambda folder: load_pixel_values(_OnCpu(), folder, processor, 9),
        "evaluate": lambda folder: sample_pixels(load_image_folder(folder)["train"], processor, "image", 9),
        "page": lambda folder: read_image(folder / "class" / "ramp.png"),
        "draw": lambda folder: prepare_images([Image.open(folder / "class" / "ramp.png")], processor, None)[0],
        "validate": lambda folder: EvalTransform(processor)(Image.open(folder / "class" / "ramp.png")),
        "train": lambda folder: seeded(TrainTransform(processor), Image.open(folder / "class" / "ramp.png")),
    }
    for name, read in rooms.items():
        eight, sixteen = (np.asarray(read(grey / bits)) for bits in ("8", "16"))
        assert np.array_equal(eight, sixteen) and len(np.unique(eight)) > 8, name


def test_every_room_counts_the_same_files(tmp_path):
    """Also an animation, of which the first picture is read."""
    (tmp_path / "class").mkdir()
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    for suffix in IMAGE_SUFFIXES - {".gif"}:
        red.save(tmp_path / "class" / f"still{suffix}")
    red.save(tmp_path / "class" / "moving.gif", save_all=True, append_images=[blue])
    assert all(read_picture(file).size == (8, 8) for file in find_in(tmp_path))
    assert len(list(find_in(tmp_path))) == len(load_image_folder(tmp_path)["train"]) == len(IMAGE_SUFFIXES)
    assert np.asarray(read_picture(tmp_path / "class" / "moving.gif"))[0, 0].tolist() == [255, 0, 0]


class _OnCpu:
    device = torch.device("cpu")


def seeded(transform, picture):
    torch.manual_seed(0)
    return transform(picture)


@pytest.mark.parametrize("resolution", [b"\x01\x00\x00\x05", b"\x01\x1a\x00\x01"], ids=["struct.error", "TypeError"])
def test_damaged_exif_is_told(tmp_path, resolution):
    """Pillow raises these from exif_transpose, for a tag whose number or type is damaged. Older ones: ValueError."""
    tags = [
        b"\x01\x0f\x00\x02\x00\x00\x00\x06\x00\x00\x00J",  # the maker
        b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00",  # the orientation: turned
        resolution + b"\x00\x00\x00\x01\x00\x00\x00P",
        b"\x87i\x00\x04\x00\x00\x00\x01\x00\x00\x00X",  # where more tags are
        b"\x92\x86\x00\x02\x00\x00\x00\x03hi\x00\x00",  # a comment
    ]
    values = (
        bytes(4)
        + b"Canon\x00"
        + b"\x00\x00\x00H\x00\x00\x00\x01"
        + b"\x00\x01\x90\x00\x00\x07\x00\x00\x00\x040230"
        + bytes(4)
    )
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + struct.pack(">H", len(tags)) + b"".join(tags) + values
    Image.new("RGB", (24, 20)).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as picture, pytest.raises((struct.error, TypeError, ValueError)):
        ImageOps.exif_transpose(picture)
    with pytest.raises(ValueError, match=r"photo\.jpg cannot be read as an image"):
        read_picture(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="not an image that can be read"):
        read_image(tmp_path / "photo.jpg")


def test_only_formats_that_start_no_program_are_read(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "photo.jpg")
    assert Image.open(tmp_path / "photo.jpg").format == "EPS"
    with pytest.raises(ValueError, match="cannot identify image file"):
        read_picture(tmp_path / "photo.jpg")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_usual_modes_are_pillows(mode):
    picture = Image.effect_noise((9, 7), 90).convert("RGB").convert(mode)
    assert as_rgb(picture).tobytes() == picture.convert("RGB").tobytes() != bytes(9 * 7 * 3)
    assert as_rgb(picture).mode == "RGB" and as_rgb(picture).size == (9, 7)


@pytest.mark.parametrize(
    "picture",
    [Image.new("F", (4, 4), 0.5), *(Image.new("I", (4, 4), value) for value in (70_000, -1, 255))],
    ids=["float", "large", "negative", "of 8 bits"],
)
def test_values_without_a_known_range_are_refused(tmp_path, picture):
    with pytest.raises(ValueError, match="no known range of values"):
        as_rgb(picture)
    picture.save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=r"odd\.tif cannot be read"):
        read_picture(tmp_path / "odd.tif")


def test_a_dark_picture_of_16_bits_is_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 100, dtype=np.uint16)).save(tmp_path / "night.png")
    assert read_picture(tmp_path / "night.png").getextrema() == ((0, 0),) * 3


def test_at_most_so_many_images_are_that_many():
    assert [len(spread(count, 300)) for count in (299, 300, 301, 1000)] == [299, 300, 300, 300]
    pixels = torch.randn(7, 3, 32, 32)
    found = load_pixel_values(tiny_model(), pixels, None, 5)
    assert torch.equal(found, pixels[[0, 1, 2, 4, 5]])


def test_images_of_several_sizes_cannot_be_fitted_together(tmp_path):
    for number, size in enumerate(((40, 40), (40, 60))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")

    class KeepsTheirShape:
        def __call__(self, picture, return_tensors):
            return {"pixel_values": torch.zeros(1, 3, picture.height, picture.width)}

    with pytest.raises(ValueError, match=r"makes images of 2 sizes, such as \(40, 40\) and \(60, 40\)"):
        load_pixel_values(_OnCpu(), tmp_path, KeepsTheirShape(), 9)

    class StacksThem(KeepsTheirShape):
        def __call__(self, pictures, return_tensors):
            single = [pictures] if isinstance(pictures, Image.Image) else pictures
            found = [super(StacksThem, self).__call__(one, return_tensors)["pixel_values"] for one in single]
            if len({one.shape for one in found}) > 1:
                raise ValueError("Unable to stack")
            return {"pixel_values": torch.cat(found)}

    images = Dataset.from_dict({"image": [Image.new("RGB", (40, 40)), Image.new("RGB", (40, 60))]})
    with pytest.raises(ValueError, match=r"2 sizes, such as .* and the images go through the model together"):
        prepare_images([tmp_path / "0.png", tmp_path / "1.png"], KeepsTheirShape(), None)
    with pytest.raises(ValueError, match=r"2 sizes, such as .* and the images of a batch need one"):
        sample_pixels(images, StacksThem(), "image", 9)


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """The name of a file and the data set that holds it do not matter."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: pytest.fail("Ghostscript was started"))
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "cat" / "0.jpg", "EPS")
    dataset, processor = load_image_folder(tmp_path)["train"], ViTImageProcessor(size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match=r"Row 0 .* Repair or remove the file .*0\.jpg"):
        sample_pixels(dataset, processor, "image", 1)
    with pytest.raises(ValueError, match="Row 0 of the data set holds no readable image"):
        read_labelled(undecoded(dataset, "image"), 0, "image")
    (row,) = dataset.cast_column("image", ImageFeature(decode=False))["image"]
    with pytest.raises(ValueError, match=r"The image .*0\.jpg cannot be read"):
        decoded(row)
    with pytest.raises(ValueError, match="cannot be read"):
        decoded({"bytes": (tmp_path / "cat" / "0.jpg").read_bytes(), "path": "0.jpg"})


def test_names_that_other_programs_give_to_pictures():
    assert {name for name, kind in Image.registered_extensions().items() if kind in ("JPEG", "BMP", "DIB")} <= (
        IMAGE_SUFFIXES
    )
    assert {".pgm", ".pbm"} <= IMAGE_SUFFIXES


def test_opened_pictures_are_turned_upright_too(tmp_path):
    """A phone writes the sensor's rows, and beside them how the phone was held."""
    wide = Image.fromarray(np.arange(8 * 4 * 3, dtype=np.uint8).reshape(4, 8, 3))
    held = Image.Exif()
    held[0x0112] = 6
    wide.save(tmp_path / "phone.png", exif=held)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "phone.png")))
    assert upright.shape == (8, 4, 3)
    for picture in (as_rgb(Image.open(tmp_path / "phone.png")), read_picture(tmp_path / "phone.png")):
        assert np.array_equal(np.asarray(picture), upright)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    trained = EvalTransform(processor)
    assert torch.equal(trained(Image.open(tmp_path / "phone.png")), trained(Image.fromarray(upright)))
    opened, read = (
        prepare_images([one], processor, None)[0]
        for one in (Image.open(tmp_path / "phone.png"), tmp_path / "phone.png")
    )
    assert torch.equal(opened, read)


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    really = os.scandir

    def refused(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(folder)
        return really(folder)

    (tmp_path / "locked").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("hf_tokenreduce.pictures.os.scandir", refused)
    said = []
    monkeypatch.setattr("hf_tokenreduce.pictures.logger.warning", said.append)
    assert [file.name for file in find_in(tmp_path)] == ["a.png"]
    assert len(said) == 1 and "locked may not be read, so its images are left out" in said[0]


@pytest.mark.parametrize("name", ["round", "round.png"])
def test_a_link_that_cannot_be_followed_is_told(tmp_path, monkeypatch, name):
    """It once stopped the commands before their first image."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).symlink_to(name)
    said = []
    monkeypatch.setattr("hf_tokenreduce.pictures.logger.warning", said.append)
    assert [file.name for file in find_in(tmp_path)] == ["a.png"]
    assert len(said) == 1 and f"{name} cannot be followed, so it is left out" in said[0]
    load_image_folder(tmp_path)


@pytest.mark.parametrize("size", [(1, 201), (2000, 9)])
def test_a_narrow_picture_is_refused(tmp_path, size):
    """A processor that makes the shorter side 224 pixels long would need gigabytes for the longer one."""
    Image.new("RGB", size).save(tmp_path / "line.png")
    for read in (read_picture, read_image):
        with pytest.raises(ValueError, match=f"a picture of {size[0]} x {size[1]} pixels is too narrow"):
            read(tmp_path / "line.png")
    with Image.open(tmp_path / "line.png") as line, pytest.raises(ValueError, match="is too narrow"):
        EvalTransform(ViTImageProcessor(size={"height": 32, "width": 32}))(line)
    Image.new("RGB", (200, 1)).save(tmp_path / "panorama.png")
    assert read_picture(tmp_path / "panorama.png").size == (200, 1)
