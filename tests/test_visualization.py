"""Token maps as pictures, and the page."""

import re

import numpy as np
import pytest
import torch
from families import family_inputs, family_model
from helpers import METHODS, NUM_PATCHES, ONE_OF_EACH, reduce_tiny, tiny_images, tiny_model
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenreduce import ATSConfig, EViTConfig, LTMPConfig, SiTConfig, ToMeConfig, TopKConfig, reduce_tokens, restore
from hf_tokenreduce.visualization import (
    draw_token_map,
    draw_token_weights,
    method_comparison,
    seen_images,
    token_map_grid,
    token_maps,
    write_page,
)
from hf_tokenreduce.visualization.drawing import PALE, resized_to_cells
from hf_tokenreduce.visualization.page import _dense_logits


SHOWN = [*ONE_OF_EACH, "dlvit-share"]


def processor(height: int = 32, width: int = 32, **changes) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": height, "width": width}, **changes)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cell(picture: Image.Image, patch: int, grid: tuple[int, int], inside: int = 0) -> np.ndarray:
    """The pixels of one patch, without the outermost `inside` of them."""
    height, width = picture.height // grid[0], picture.width // grid[1]
    row, column = divmod(patch, grid[1])
    pixels = np.asarray(picture.crop((column * width, row * height, (column + 1) * width, (row + 1) * height)))
    return pixels.astype(int)[inside : height - inside, inside : width - inside]


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("backbone", ["vit", "deit"])
def test_maps_of_the_last_layer_are_those_of_the_model(name, backbone):
    model = reduce_tiny(tiny_model(backbone), METHODS[name][0])
    pixels = tiny_images(5)
    expected = model(pixels, output_patch_map=True)
    maps = token_maps(model, pixels, batch_size=2)
    torch.testing.assert_close(maps.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(maps.counts, expected.token_counts)
    assert maps.grid == (8, 8)
    prefix = model.config.num_prefix_tokens
    for layer, (patch_map, weights) in enumerate(zip(maps.patch_maps, maps.patch_weights, strict=True)):
        assert (patch_map is None) != (weights is None)
        if weights is not None:
            assert weights.shape[1] == maps.counts[0, layer] - prefix
            torch.testing.assert_close(weights.sum(dim=2), torch.ones(weights.shape[:2]))
            continue
        assert patch_map.shape == (5, NUM_PATCHES)
        for image, count in zip(patch_map, maps.counts[:, layer] - prefix, strict=True):
            held = set(image.tolist()) - {-1}
            assert held == set(range(count))
    if expected.patch_map is None:
        torch.testing.assert_close(maps.patch_weights[-1], expected.patch_weights)
    else:
        last = maps.patch_maps[-1]
        assert torch.equal(torch.where(last < 0, last, last + prefix), expected.patch_map)


def test_a_patch_once_dropped_or_merged_stays_so():
    model = reduce_tiny(tiny_model(), METHODS["ltmp"][0])
    maps = token_maps(model, tiny_images(4))
    for earlier, later in zip(maps.patch_maps, maps.patch_maps[1:], strict=False):
        assert (later[earlier < 0] == -1).all()
        for before, after in zip(earlier, later, strict=True):
            for token in before.unique():
                assert len(after[before == token].unique()) == 1


def test_the_model_is_left_as_it_was():
    model = reduce_tokens(tiny_model(), LTMPConfig(merge_threshold=0.5)).train()
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    maps = token_maps(model, tiny_images())
    assert (maps.counts < 65).any()  # really removed, not masked as in training
    assert modes == [module.training for module in model.modules()]
    assert not any(layer._forward_hooks for layer in model.base_model.layers)
    with pytest.raises(ValueError, match="pixel_values"):
        token_maps(model, tiny_images()[0])
    with pytest.raises(ValueError, match="channel"):
        token_maps(model, torch.randn(1, 4, 32, 32))
    assert not any(layer._forward_hooks for layer in model.base_model.layers)
    assert modes == [module.training for module in model.modules()]
    dense = tiny_model().train()
    dense.base_model.eval()
    modes = [module.training for module in dense.modules()]
    assert _dense_logits(dense, tiny_images()).shape == (3, 5)
    assert modes == [module.training for module in dense.modules()]


def test_shares_are_what_the_layers_compute():
    model = reduce_tokens(tiny_model(), None)
    assert token_maps(model, tiny_images(2)).shares.tolist() == [1.0, 1.0]
    setting = ToMeConfig.for_budget(model.config, 0.6)
    maps = token_maps(reduce_tokens(model, setting), tiny_images(2))
    assert 0.5 < maps.shares[0] <= 0.6 and not maps.differ()
    assert maps.reducing_layers() == [0, 1, 2, 3]
    assert token_maps(reduce_tokens(model, TopKConfig(layers=(1, 3))), tiny_images(2)).reducing_layers() == [1, 3]


def test_a_base_model_has_maps_but_no_logits():
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    base, whole = token_maps(model.base_model, tiny_images()), token_maps(model, tiny_images())
    assert base.logits is None
    assert all(torch.equal(*pair) for pair in zip(base.patch_maps, whole.patch_maps, strict=True))


@pytest.mark.parametrize("size", [(48, 32), (24, 40), (34, 33)])
@pytest.mark.parametrize("name", ["tome", "ats", "bat"])
def test_other_sizes_and_shapes(name, size):
    model = reduce_tiny(tiny_model(), METHODS[name][0])
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    expected = model(pixels, interpolate_pos_encoding=True, output_patch_map=True).patch_map
    maps = token_maps(model, pixels)
    assert maps.grid == (size[0] // 4, size[1] // 4)
    assert torch.equal(torch.where(maps.patch_maps[-1] < 0, -1, maps.patch_maps[-1] + 1), expected)
    sheet = token_map_grid(model, pixels, processor(), layers=[1, 3], size=60)
    assert sheet.width > 3 * 60 * min(1, size[1] / size[0])


@pytest.mark.parametrize(
    "changes",
    [{}, {"do_normalize": False}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}],
)
def test_seen_images_are_what_went_in(changes):
    image = noise(32, 32)
    ours = processor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **changes)
    seen = seen_images(ours(image, return_tensors="pt")["pixel_values"], ours)
    assert np.array_equal(np.asarray(seen[0]), np.asarray(image))


def test_one_channel_is_drawn_grey():
    grey = processor(image_mean=[0.5], image_std=[0.5])
    seen = np.asarray(seen_images(torch.linspace(-1, 1, 64).view(1, 1, 8, 8), grey)[0])
    assert seen.shape == (8, 8, 3) and (seen == seen[..., :1]).all() and seen[0, 0, 0] == 0 and seen[-1, -1, 0] == 255
    with pytest.raises(ValueError, match="1 or 3 channels"):
        seen_images(torch.zeros(1, 2, 8, 8), grey)


@pytest.mark.parametrize("side", [224, 384])
def test_what_a_drawn_patch_looks_like(side):
    grid = (side // 16, side // 16)
    image = noise(side, side)
    patch_map = np.arange(grid[0] * grid[1])
    dropped, merged = [0, 5, 40], [20, 21, 20 + grid[1], 20 + grid[1] + 1]
    patch_map[dropped] = -1
    patch_map[merged] = 20
    drawn = draw_token_map(image, patch_map, grid, fade=0.8)
    assert drawn.size == image.size
    for patch in range(len(patch_map)):
        before, after = cell(image, patch, grid), cell(drawn, patch, grid)
        if patch in dropped:
            assert np.abs(after - (0.2 * before + 0.8 * 255)).max() <= 1
        elif patch not in merged:
            assert np.array_equal(after, before)
    mean = np.mean([cell(image, patch, grid) for patch in merged], axis=(0, 1, 2))
    inner = [cell(drawn, patch, grid, inside=2) for patch in merged]
    assert all(np.abs(pixels - mean).max() <= 1 for pixels in inner)


def test_pale_tokens_are_nearer_to_white():
    image, patch_map = noise(64, 64), [0, 0, 1, 2]
    plain, pale = (draw_token_map(image, patch_map, (2, 2), pale=pale) for pale in (0.0, 0.5))
    for patch in (0, 1):
        before, after = cell(plain, patch, (2, 2), inside=4), cell(pale, patch, (2, 2), inside=4)
        assert np.abs(after - (before + 255) / 2).max() <= 1
    assert np.array_equal(cell(plain, 3, (2, 2)), cell(pale, 3, (2, 2)))


def test_outlines_run_along_the_borders_of_merged_regions_only():
    grid, image = (4, 4), Image.new("RGB", (64, 64), (200, 120, 60))
    patch_map = np.arange(16)
    patch_map[[5, 6]] = 5
    drawn = np.asarray(draw_token_map(image, patch_map, grid)).astype(int)
    outline = (drawn != (200, 120, 60)).any(axis=-1)
    region = np.zeros((64, 64), dtype=bool)
    region[16:32, 16:48] = True
    inner = np.zeros_like(region)
    inner[17:31, 17:47] = True
    assert np.array_equal(outline, region & ~inner)  # one pixel wide, and none between the two patches
    apart = np.arange(16)
    apart[[0, 15]] = 0
    outline = (np.asarray(draw_token_map(image, apart, grid)) != (200, 120, 60)).any(axis=-1)
    assert outline.sum() == 2 * (16 + 15)  # of both parts, and not along the edge of the picture


def test_outlines_can_be_told_from_any_colour():
    for colour in [(0, 0, 0), (40, 40, 40), (128, 128, 128), (235, 230, 225), (255, 255, 255), (10, 20, 200)]:
        image = Image.new("RGB", (64, 64), colour)
        drawn = np.asarray(draw_token_map(image, [0, 0, 1, 1], (2, 2))).astype(int)
        assert np.abs(drawn[31, 32] - colour).max() >= 30, colour


def test_without_a_map_nothing_is_drawn():
    image = noise(32, 48)
    assert np.array_equal(np.asarray(draw_token_map(image, np.arange(24), (4, 6))), np.asarray(image))


def test_heat_rises_with_weight():
    weights = torch.tensor([[0.0, 0.1], [0.4, 0.5]])
    drawn = draw_token_weights(Image.new("RGB", (32, 32), "grey"), weights.flatten(), (2, 2))
    brightness = [np.asarray(cell(drawn, patch, (2, 2))).sum(axis=-1).mean() for patch in range(4)]
    assert brightness == sorted(brightness) and len(set(brightness)) == 4
    halved = draw_token_weights(Image.new("RGB", (32, 32), "grey"), weights.flatten(), (2, 2), most=1.0)
    assert np.asarray(halved).sum() < np.asarray(drawn).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_token_map(noise(32, 32), np.arange(15), (4, 4)), "15 values for a grid of 4 x 4"),
        (lambda: draw_token_map(noise(32, 32), np.arange(16), (4, 4), fade=2), "fade"),
        (lambda: draw_token_map(noise(3, 3), np.arange(16), (4, 4)), "3 x 3 pixels"),
        (lambda: draw_token_weights(noise(32, 32), np.zeros(16), (4, 4)), "most"),
        (lambda: token_maps(tiny_model(), tiny_images()), "reduce_tokens"),
        (lambda: token_maps(reduce_tokens(tiny_model(), None), tiny_images(), batch_size=0), "batch_size"),
        (lambda: method_comparison({}, noise(32, 32), processor()), "models is empty"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_wrong_with_images_is_said(tmp_path):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    (tmp_path / "broken.png").write_text("no image")
    for images, options, message in [
        ([], {}, "images is empty"),
        ([noise(32, 32)], {"names": ["a", "b"]}, "2 for 1 images"),
        ([noise(32, 32)], {"layers": [4]}, "0 to 3"),
        ([noise(32, 32)], {"layers": []}, "0 to 3"),
        ([noise(32, 32)], {"size": 8}, "at least 32"),
        ([tmp_path / "broken.png"], {}, "broken.png cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_map_grid(model, images, processor(), **options)
    with pytest.raises(ValueError, match="is a folder"):
        write_page(model, [noise(32, 32)], processor(), tmp_path)


@pytest.mark.parametrize("name", SHOWN)
def test_a_grid_has_a_row_per_image_and_a_column_per_layer(name):
    model = reduce_tiny(tiny_model(), METHODS[name][0])
    images = [noise(40, 60, seed) for seed in range(3)]
    two = token_map_grid(model, images[:2], processor(), layers=[0, 3], size=64)
    three = token_map_grid(model, images, processor(), layers=[0, 2, 3], size=64)
    assert three.width - two.width == 64 + 5 and three.height * 2 - two.height * 3 < 30
    assert two.width == 5 + 3 * (64 + 5)
    # The first column shows the images as the model saw them, the last its last map.
    seen = seen_images(processor()(images[1], return_tensors="pt")["pixel_values"], processor())[0]
    top = 5 + (three.height - 5 + 2) // 3
    assert np.array_equal(np.asarray(three.crop((5, top, 69, top + 64))), np.asarray(resized(seen)))
    maps = token_maps(model, processor()(images[1], return_tensors="pt")["pixel_values"])
    if maps.patch_maps[3] is not None:
        expected = draw_token_map(resized(seen), maps.patch_maps[3][0], (8, 8), pale=PALE if name == "evit" else 0)
        left = 5 + 3 * (64 + 5)
        assert np.array_equal(np.asarray(three.crop((left, top, left + 64, top + 64))), np.asarray(expected))


def resized(image: Image.Image) -> Image.Image:
    return resized_to_cells(image, (8, 8), 64, (4, 4))


def test_a_grid_is_saved(tmp_path):
    (tmp_path / "a.png").parent.mkdir(exist_ok=True)
    noise(30, 30).save(tmp_path / "a.png")
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    token_map_grid(model, [tmp_path / "a.png"], processor(), size=64).save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as saved:
        assert saved.width == 5 + 5 * (64 + 5)  # the image and four layers that merge


def test_methods_side_by_side():
    stock = tiny_model()
    models = {"ToMe": reduce_tokens(stock, ToMeConfig(r=7)), "EViT": reduce_tokens(stock, EViTConfig(layers=(0, 2)))}
    models |= {"ATS": reduce_tokens(stock, ATSConfig(layers=(1, 2)))}
    row = method_comparison(models, noise(50, 30), processor(), size=96)
    assert row.width == 5 + 4 * (96 + 5)
    square = method_comparison(models, noise(50, 30), processor(), size=96, columns=2)
    assert square.width == 5 + 2 * (96 + 5) and square.height > 1.9 * (row.height - 10)
    parts = [np.asarray(row.crop((5 + 101 * n, 5, 101 + 101 * n, 101))) for n in range(4)]
    assert all((parts[0] != part).any() for part in parts[1:])


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_stands_alone(tmp_path, name):
    stock = tiny_model(id2label={index: f"class <{index}>, a & b" for index in range(5)})
    model = reduce_tiny(stock, METHODS[name][0])
    names = ["<script>alert(1)</script>", 'a "quoted" & name', "third"]
    path = write_page(
        model, [noise(40, 50, seed) for seed in range(3)], processor(), tmp_path / "new" / "page.html",
        dense=restore(model), names=names,
    )  # fmt: skip
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html and "class <" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "class &lt;" in html
    references = re.findall(r'(?:src|href|url|action)\s*[=(]\s*["\']?([^"\'>)]*)', html)
    assert references and all(reference.startswith("data:") for reference in references)
    images = re.findall(r"<img [^>]*>", html)
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
    maps = token_maps(
        model, torch.cat([processor()(noise(40, 50, s), return_tensors="pt").pixel_values for s in range(3)])
    )
    heats = 3 * 7 if name == "sit" else 0
    ranking = 3 if maps.differ() else 0
    assert len(images) == 3 * (1 + len(maps.reducing_layers())) + heats + ranking
    assert ('id="ranking"' in html) == maps.differ() and ('id="mixtures"' in html) == (name == "sit")
    assert ("Pale, flat" in html) == (name == "evit") and ("merges above" in html) == (name == "ltmp")
    assert f"{100 * maps.shares.mean():.1f} %" in html
    for count in maps.counts[:, -1].tolist():
        assert f"<br>{count} tokens" in html
    assert " of 3</dd>" in html  # predictions that agree with the dense model's


def test_the_ranking_is_by_cost(tmp_path):
    model = reduce_tiny(tiny_model(), ATSConfig(layers=(0, 1, 2)))
    pixels = torch.cat([tiny_images(10, seed=3) * 0.2, tiny_images(10, seed=4)])
    maps = token_maps(model, pixels)
    order = maps.shares.argsort(stable=True).tolist()
    html = write_page(model, pixels, processor(), tmp_path / "page.html").read_text(encoding="utf-8")
    ranking = html[html.index('id="ranking"') : html.index('id="images"')]
    listed = [int(index) for index in re.findall(r'title="image (\d+)"', ranking)]
    assert listed == order[:6] + order[-6:] and "Easiest" in ranking and "Hardest" in ranking
    assert html.count('<polyline class="one"') == 20 and html.count('<polyline class="mean"') == 1


def test_a_page_without_dense_layers_or_reduction(tmp_path):
    model = reduce_tokens(tiny_model(), None)
    html = write_page(model, tiny_images(1), processor(), tmp_path / "page.html", title="A <title>").read_text("utf-8")
    assert "<title>A &lt;title&gt;</title>" in html and "<dt>dense</dt>" not in html and "100.0 %" in html
    base = reduce_tokens(tiny_model(), SiTConfig(layers=(0,))).base_model
    html = write_page(base, tiny_images(1), processor(), tmp_path / "base.html", layers=[0]).read_text("utf-8")
    assert "<dt>reduced</dt>" not in html and "layer 0<br>33 tokens" in html


def test_a_page_of_photographs_is_small(shared, tmp_path):
    folder = shared / "models" / "deit-tiny-patch16-224"
    files = sorted((shared / "data" / "nips17_1000" / "val").glob("*/*.jpg"))[::250]
    if not folder.is_dir() or not files:
        pytest.skip(f"no photographs or weights in {shared}")
    from transformers import ViTForImageClassification

    model = reduce_tokens(ViTForImageClassification.from_pretrained(folder).eval(), ToMeConfig(r=11))
    path = write_page(model, files, ViTImageProcessor.from_pretrained(folder), tmp_path / "page.html")
    assert path.stat().st_size < 190_000 * len(files)
    assert files[0].stem in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_a_page_of_a_model_without_classes_has_no_guesses(tmp_path, family):
    model = reduce_tokens(family_model(family), ToMeConfig(r=2))
    encoder = getattr(model, "dinov2", model)
    pixels = family_inputs(family)["pixel_values"]
    page = write_page(encoder, pixels, processor(), tmp_path / "page.html", dense=restore(encoder))
    assert page.is_file() and "dense model" not in page.read_text("utf-8")


def test_evit_without_its_extra_token_drops_patches(tmp_path):
    for fuse in (True, False):
        model = reduce_tokens(tiny_model(), EViTConfig(keep_rate=0.5, layers=(1,), fuse=fuse))
        write_page(model, noise(32, 32), processor(), tmp_path / "page.html")  # one picture needs no list
        page = (tmp_path / "page.html").read_text()
        assert ("Pale, flat areas show patches" in page) is fuse and ("Faded patches were dropped" in page) is not fuse
