"""Features of encoders without a classifier: cosines, nearest neighbours, comparisons of both, with naive loops."""

import csv
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import load_dataset
from helpers import BASES, METHODS, ONE_OF_EACH, SIZES, reduce_tiny, slow, tiny_model
from PIL import Image
from test_evaluation_neighbours import naive_votes
from torch.nn import functional as F
from transformers import ViTImageProcessor

from hf_tokenreduce import DLViTConfig, EViTConfig, LTMPConfig, SiTConfig, ToMeConfig, reduce_tokens, tune
from hf_tokenreduce.evaluation import (
    compare,
    default_reductions,
    evaluate_features,
    evaluate_model,
    facts_for,
    pareto_plot,
)
from hf_tokenreduce.evaluation.compute import measured_multiply_adds
from hf_tokenreduce.loading import load_bank, load_images, load_model
from hf_tokenreduce.modeling.multiply_adds import even_share
from hf_tokenreduce.tasks import image_side


QUICK = {"batch_size": 4, "progress": False}
VISION = {name: size for name, size in SIZES.items() if name != "num_labels"}
RATIO = {**{name: size for name, size in VISION.items() if name != "intermediate_size"}, "mlp_ratio": 2}
TEXT = {**VISION, "num_hidden_layers": 2, "vocab_size": 99, "max_position_embeddings": 16, "projection_dim": 32}
TEXT = {name: size for name, size in TEXT.items() if name not in ("image_size", "patch_size")}


def encoder(model, config, fields, **options):
    return lambda **changes: getattr(transformers, model)(
        getattr(transformers, config)(**{**fields, **changes}), **options
    )


def pair(model, config, **text):
    return lambda: getattr(transformers, model)(
        getattr(transformers, config)(vision_config={**VISION, "projection_dim": 32}, text_config={**TEXT, **text})
    )


# name -> (makes the model, what is pooled: "output", "class" token or "mean" of patches)
ENCODERS = {
    "vit": (encoder("ViTModel", "ViTConfig", VISION, add_pooling_layer=False), "class"),
    "deit": (encoder("DeiTModel", "DeiTConfig", VISION), "output"),
    "mae": (encoder("ViTMAEModel", "ViTMAEConfig", VISION), "mean"),
    "ijepa": (encoder("IJepaModel", "IJepaConfig", VISION), "mean"),
    "dinov2": (encoder("Dinov2Model", "Dinov2Config", RATIO), "output"),
    "dinov3": (encoder("DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, "num_register_tokens": 4}), "output"),
    "beit": (encoder("BeitModel", "BeitConfig", {**VISION, "use_relative_position_bias": True}), "output"),
    "clip": (pair("CLIPModel", "CLIPConfig"), "output"),
    "clip-projection": (encoder("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION), "embeds"),
    "siglip": (pair("SiglipModel", "SiglipConfig", projection_size=48), "output"),
}


def tiny_encoder(name, **changes):
    """With weights large enough that every token matters."""
    torch.manual_seed(1)
    model = ENCODERS[name][0](**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            center = float(parameter.ndim == 1 and key.endswith("weight") and "norm" in key)
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


def image_files(folder, classes=("cat", "dog", "owl"), count=11, seed=0):
    """Photographs of noise on a colour that leans to the class."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        place = folder / classes[number % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 30, 3))
        pixels[..., number % 3] = (pixels[..., number % 3] + 3 * 255) // 4
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{seed}-{number:02}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    return load_dataset("imagefolder", data_dir=str(image_files(tmp_path / "photos")), split="train")


def naive_features(name, model, image):
    """Pooled, and a row for each patch, of one image."""
    output = image_side(model)(image, output_patch_map=True)
    hidden, pooled = output.last_hidden_state[0], ENCODERS[name][1]
    if name in ("vit", "deit"):
        rows = []
        if output.patch_map is None:
            mixtures = hidden[len(hidden) - output.patch_weights.shape[1] :]
            for patch in range(64):
                weights = output.patch_weights[0, :, patch]
                rows.append(sum(w * row for w, row in zip(weights, mixtures, strict=True)) / weights.sum())
        else:
            held = output.patch_map[0].tolist()
            mean = torch.stack([hidden[row] for row in held if row >= 0]).mean(dim=0)
            rows = [mean if row < 0 else hidden[row] for row in held]
        patches = torch.stack(rows)
    else:
        patches = hidden[len(hidden) - 64 :]
    if pooled == "mean":
        return patches.mean(dim=0), patches
    return {"output": output.get("pooler_output"), "embeds": output.get("image_embeds")}.get(pooled, hidden[:1])[
        0
    ], patches


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", "sit"), ("vit", "ats"), ("deit", "ltmp"), ("mae", "bat"), ("dinov2", "tome"), ("dinov3", "evit"),
        ("clip-projection", "topk"), ("siglip", "ltmp"),
        *(slow(*case) for case in (("vit", "evit-no-fuse"), ("ijepa", "tome"), ("beit", "ats"), ("clip", "tome"))),
    ],
)  # fmt: skip
def test_everything_is_that_of_a_plain_loop(photos, processor, name, method):
    model = reduce_tiny(tiny_encoder(name), METHODS[method][0])
    dense = reduce_tokens(model, None)
    report = evaluate_features(model, photos, processor, **QUICK)
    pixels = [processor(photo.convert("RGB"), return_tensors="pt").pixel_values for photo in photos["image"]]
    with torch.no_grad():
        ours, theirs = ([naive_features(name, one, image) for image in pixels] for one in (model, dense))
        counts = torch.cat([image_side(model)(image).token_counts for image in pixels])
    pooled = [F.cosine_similarity(a, b, dim=0).item() for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    patches = [
        np.mean([F.cosine_similarity(p, q, dim=0).item() for p, q in zip(a, b, strict=True)])
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    ]
    assert report.per_image["pooled_cosine"].tolist() == pytest.approx(pooled, abs=1e-5)
    assert report.per_image["patch_cosine"].tolist() == pytest.approx(patches, abs=1e-5)
    assert report.pooled_cosine == pytest.approx(np.mean(pooled), abs=1e-5) and report.pooled_cosine < 1
    assert report.patch_cosine == pytest.approx(np.mean(patches), abs=1e-5) and report.patch_cosine < 0.999
    truth = photos["label"]
    voted, dense_voted = (
        naive_votes(torch.stack([one for one, _ in found]).double(), torch.stack([one for one, _ in found]).double(),
                    torch.tensor(truth), 20, True)
        for found in (ours, theirs)
    )  # fmt: skip
    assert report.per_image["predictions"].tolist() == voted
    right, was_right = np.array(voted) == truth, np.array(dense_voted) == truth
    assert report.knn == pytest.approx(100 * right.mean()) and report.baseline_knn == pytest.approx(
        100 * was_right.mean()
    )
    assert report.drop == report.baseline_knn - report.knn and report.drop_interval[0] <= report.drop_interval[1]
    assert report.agreement == pytest.approx(100 * np.mean(np.array(voted) == dense_voted))
    assert (report.neighbours, report.bank_images, report.alone) == (10, 10, 0)
    assert report.tokens_per_layer == pytest.approx(counts.double().mean(dim=0).tolist())
    measured = measured_multiply_adds(model, torch.cat(pixels)).mean().item()
    assert report.multiply_adds["mean"] == pytest.approx(measured)
    json.dumps(report.to_dict())


def test_what_reduces_nothing_changes_nothing(photos, processor):
    stock = tiny_encoder("dinov2")
    alone = evaluate_features(stock, photos, processor, **QUICK)
    assert alone.pooled_cosine is None and alone.drop is None and alone.mult_adds_ratio == 1 and alone.knn is not None
    same = evaluate_features(reduce_tokens(stock, ToMeConfig(r=0)), photos, processor, baseline=alone, **QUICK)
    assert same.pooled_cosine == pytest.approx(1) and same.patch_cosine == pytest.approx(1)
    assert same.drop == 0 and same.agreement == 100 and same.knn == alone.knn
    fewer = evaluate_features(stock, photos.select(range(4)), processor, **QUICK)
    with pytest.raises(ValueError, match="baseline is a report on 4 images, and the data set has 11"):
        evaluate_features(reduce_tokens(stock, ToMeConfig(r=5)), photos, processor, baseline=fewer, **QUICK)


def test_what_was_measured_can_be_trained(photos, processor):
    """BEiT keeps an index of pairs for all its models: made in inference mode, no model could learn with it."""
    stock = tiny_encoder("beit")
    bias = next(part for name, part in stock.named_modules() if name.endswith("relative_position_bias"))
    for cell in bias.generate_relative_position_index.__closure__:
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    evaluate_features(reduce_tokens(stock, ToMeConfig(r=5)), photos, processor, **QUICK)
    stock(torch.randn(1, 3, 32, 32)).last_hidden_state.sum().backward()
    assert bias.relative_position_bias_table.grad.abs().sum() > 0


def test_a_bank_of_other_images_votes(tmp_path, photos, processor):
    other = image_files(tmp_path / "bank", count=25, seed=1)
    bank = load_dataset("imagefolder", data_dir=str(other), split="train")
    model = reduce_tokens(tiny_encoder("dinov2"), EViTConfig(keep_rate=0.5, layers=(1, 2)))
    report = evaluate_features(model, photos, processor, bank=bank, **QUICK)
    theirs = evaluate_features(model, bank, processor, **QUICK).per_image["pooled"]
    labels = torch.tensor(bank["label"])
    voted = naive_votes(report.per_image["pooled"].double(), theirs.double(), labels, 20, False)
    assert report.per_image["predictions"].tolist() == voted
    assert (report.neighbours, report.bank_images) == (20, 25)
    only = bank.filter(lambda label: label == 1, input_columns="label")
    assert evaluate_features(model, photos, processor, bank=only, **QUICK).alone == 7
    for wrong, options, message in (
        (load_dataset("imagefolder", data_dir=str(image_files(tmp_path / "a", ("ox", "pig"), 4)), split="train"), {},
         "classes of bank differ"),
        (bank.remove_columns("label"), {}, "the columns image_column='image', label_column='label'"),
        (bank.to_dict(), {}, "must be one split of a data set"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate_features(model, photos, processor, bank=wrong, **QUICK, **options)
    with pytest.raises(ValueError, match="the data set has no labels"):
        evaluate_features(model, photos.remove_columns("label"), processor, bank=bank, **QUICK)
    with pytest.raises(ValueError, match="must hold a class, from 0, of each image"):
        evaluate_features(model, photos.map(lambda row: {"label": -1}), processor, **QUICK)


def test_only_what_has_features(photos, processor):
    with pytest.raises(ValueError, match="is for image-classification: its features cannot be compared"):
        evaluate_features(tiny_model(), photos, processor)
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**RATIO, out_indices=[4]))
    with pytest.raises(ValueError, match="is for backbone: its features cannot be compared"):
        compare(backbone, photos, processor, output_dir="nowhere")
    with pytest.raises(ValueError, match="use tokenreduce compare"):
        evaluate_model(tiny_encoder("dinov2"), photos, processor)
    with pytest.raises(ValueError, match="bank is for comparing features"):
        compare(tiny_model(), photos, processor, output_dir="nowhere", bank=photos)
    with pytest.raises(ValueError, match="the columns image_column='image', label_column='label'"):
        compare(tiny_model(), photos.remove_columns("label"), processor, output_dir="nowhere")
    with pytest.raises(ValueError, match="has 0 rows"):
        compare(tiny_encoder("vit"), photos.select([]), processor, output_dir="nowhere")
    assert not Path("nowhere").exists()


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_does_nothing_twice(tmp_path, photos, processor):
    model = reduce_tokens(tiny_encoder("clip"), ToMeConfig(r=5))
    whole = evaluate_features(model, photos, processor, **QUICK)
    seen = []

    def count_and_die(module, arguments, options, output):
        seen.append(len(output.pooler_output))
        if len(seen) == 2:
            raise Killed

    handle = model.vision_model.register_forward_hook(count_and_die, with_kwargs=True)
    options = {"output_dir": tmp_path / "out", "baseline": whole, **QUICK}
    model.vision_model.eval()
    with pytest.raises(Killed):
        evaluate_features(model, photos, processor, **options)
    again = evaluate_features(model, photos, processor, **options)
    assert seen == [4, 4, 4, 3]
    once_more = evaluate_features(model, photos, processor, **options)
    assert len(seen) == 4
    handle.remove()
    for report in (again, once_more):
        assert torch.equal(report.per_image["pooled"], whole.per_image["pooled"])
        assert report.pooled_cosine == whole.pooled_cosine and report.knn == whole.knn
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pooled_cosine"] == whole.pooled_cosine
    with pytest.raises(ValueError, match="made with other settings: data was"):
        evaluate_features(model, photos.select(range(9)), processor, output_dir=tmp_path / "out", **QUICK)


def test_every_setting_in_every_file(tmp_path, photos, processor):
    model = tiny_encoder("dinov2")
    settings = [ToMeConfig(r=5), LTMPConfig(target=0.7), SiTConfig(layers=(1, 2)), DLViTConfig()]
    options = {"output_dir": tmp_path / "out", "calibration_images": 6, "repeats": 2, **QUICK}
    found = compare(model, photos, processor, settings, **options)
    assert [row["method"] for row in found.rows] == [None, "tome", "ltmp", "sit", "dlvit"]
    dense, tome, ltmp, _, dlvit = found.rows
    expected = evaluate_features(reduce_tokens(model, ToMeConfig(r=5)), photos, processor, **QUICK)
    assert {name: tome[name] for name in expected.to_dict()} == json.loads(json.dumps(expected.to_dict()))
    assert dense["pooled_cosine"] == dense["mult_adds_ratio"] == 1 and dense["drop"] is None
    assert dense["knn"] == dense["baseline_knn"] == tome["baseline_knn"]
    assert ltmp["mult_adds_ratio"] == pytest.approx(0.7, abs=0.03) and "its filter is not trained" in dlvit["skipped"]
    assert tome["speedup"] > 0 and tome["speed_batch_size"] == 4
    folder = tmp_path / "out"
    assert json.loads((folder / "results.json").read_text()) == found.rows
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert float(lines[1]["knn"]) == tome["knn"] and float(lines[1]["knn_low"]) == tome["knn_interval"][0]
    assert float(lines[2]["patch_cosine"]) == ltmp["patch_cosine"] and lines[4]["skipped"]
    table = (folder / "table.md").read_text()
    assert "| kNN % |" in table and "kNN: the 10 nearest of 10 images vote" in table and "- DL-ViT: " in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    words = {text.text for text in ElementTree.parse(folder / "pareto.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {"ToMe", "LTMP", "dense", "accuracy of nearest neighbours, %"} <= words
    assert compare(model, photos, processor, settings[:1], **options).rows == found.rows[:2]


def test_a_killed_comparison_goes_on(monkeypatch, tmp_path, photos, processor):
    module = sys.modules[compare.__module__]
    model, settings = tiny_encoder("siglip"), [ToMeConfig(r=5), EViTConfig(layers=(1,))]
    measured, dying = [], ["evit"]
    measure = module.evaluate_features

    def measure_or_die(reduced, *arguments, **options):
        method = reduced.config.reduction and reduced.config.reduction.method
        if method in dying:
            raise Killed
        measured.append(method)
        return measure(reduced, *arguments, **options)

    monkeypatch.setattr(module, "evaluate_features", measure_or_die)
    options = {"output_dir": tmp_path / "out", "speed": False, "bank": photos, **QUICK}
    with pytest.raises(Killed):
        compare(model, photos, processor, settings, **options)
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == [None, "tome"]
    dying.clear()
    measured.clear()
    found = compare(model, photos, processor, settings, **options)
    assert measured == [None, "evit"] and [row["method"] for row in found.rows] == [None, "tome", "evit"]
    with pytest.raises(ValueError, match="made with other settings: bank was"):
        compare(model, photos, processor, settings, **{**options, "bank": photos.select(range(9))})
    with pytest.raises(ValueError, match="made with other settings: bank was"):
        compare(model, photos, processor, settings, **{**options, "bank": None})


def test_without_labels(tmp_path, photos, processor):
    model = tiny_encoder("vit")
    found = compare(model, photos.remove_columns("label"), processor, [ToMeConfig(r=5), ToMeConfig(r=9)],
                    output_dir=tmp_path / "out", speed=False, **QUICK)  # fmt: skip
    assert [row["knn"] for row in found.rows] == [None] * 3
    cosines = [row["patch_cosine"] for row in found.rows]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] == 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "kNN" not in table and "| cosine, pooled | cosine, patches |" in table
    assert "cosine to the dense model" in (tmp_path / "out" / "pareto.svg").read_text()
    pareto_plot(tmp_path / "out" / "results.json", tmp_path / "again.svg")
    assert "cosine to the dense model" in (tmp_path / "again.svg").read_text()


@pytest.mark.parametrize("name", ["dinov3", "beit"])
def test_what_cannot_run_is_left_out_by_default(caplog, name):
    found = default_reductions(tiny_encoder(name).config)
    assert {setting.method for setting in found} == set(ONE_OF_EACH) - {"sit", "dlvit"}
    assert "SiT makes tokens that are mixtures" in caplog.text and "is left out" in caplog.text


@pytest.mark.slow
def test_images_of_another_size_than_the_models_own(tmp_path, photos, processor):
    """As those of DINOv2 are: its configuration says 518 pixels, its processor makes 224."""
    model = tiny_encoder("dinov2", image_size=56)
    facts = facts_for(model, photos, processor)
    assert facts.grid == (8, 8) and facts.num_tokens == 65
    settings = default_reductions(facts, [0.7])
    found = compare(model, photos, processor, [*settings, SiTConfig(layers=(1, 2))], output_dir=tmp_path, speed=False,
                    calibration_images=6, **QUICK)  # fmt: skip
    pixels = torch.cat([processor(p.convert("RGB"), return_tensors="pt").pixel_values for p in photos["image"]])
    for row, setting in zip(found.rows[1:], settings, strict=False):
        if row.get("skipped"):
            assert setting.method == "sit"
        elif setting.method == "ltmp":
            assert row["mult_adds_ratio"] == pytest.approx(0.7, abs=0.03)
        elif setting.method != "ats":
            assert row["mult_adds_ratio"] == pytest.approx(even_share(setting, facts))
            cost = measured_multiply_adds(reduce_tokens(model, setting), pixels).mean().item()
            assert row["multiply_adds"]["mean"] == pytest.approx(cost)
    assert "images of the model's own size" in found.rows[-1]["skipped"]
    config = transformers.Dinov2Config(**RATIO | {"image_size": 56}, num_labels=3)
    classifier = transformers.Dinov2ForImageClassification(config).eval()
    config.label2id = {"cat": 0, "dog": 1, "owl": 2}
    report = evaluate_model(classifier, photos, processor, **QUICK)
    assert report.tokens["mean"] == 65 and report.mult_adds_ratio == 1
    assert report.multiply_adds["mean"] == pytest.approx(measured_multiply_adds(classifier, pixels[:1]).item())


def test_the_command(call, tmp_path, processor):
    model = tiny_encoder("dinov2")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image_files(tmp_path / "data" / "val", count=8)
    image_files(tmp_path / "data" / "train", count=12, seed=1)
    image_files(tmp_path / "flat", classes=(), count=5)
    arguments = ["compare", tmp_path / "model", tmp_path / "data", "-o", tmp_path / "out", "-r", "tome", "--no-speed"]
    code, printed, errors = call(*arguments, "--share", 0.7, "--json")
    assert code == 0, errors
    rows = json.loads(printed)
    assert [row["method"] for row in rows] == [None, "tome"]
    images = load_images(str(tmp_path / "data"))
    bank = load_bank(str(tmp_path / "data"), images)
    assert (len(images), len(bank)) == (8, 12) and load_bank(str(tmp_path / "data"), bank) is None
    reduced = reduce_tokens(model, rows[1]["settings"])
    expected = evaluate_features(reduced, images, processor, bank=bank, **QUICK)
    assert (rows[1]["knn"], rows[1]["bank_images"]) == (expected.knn, 12)
    assert rows[1]["patch_cosine"] == pytest.approx(expected.patch_cosine, abs=1e-6)
    arguments[2], arguments[4] = tmp_path / "flat", tmp_path / "out-flat"
    code, printed, errors = call(*arguments, "--limit", 4)
    assert code == 0 and "cosine, patches" in printed and "kNN" not in printed, errors
    code, _, errors = call(*arguments, "--prompt", "a {}")
    assert code == 2 and "A Dinov2Model reads no texts" in errors
    code, _, errors = call("evaluate", tmp_path / "model", tmp_path / "data")
    assert code == 2 and "predicts no classes" in errors and "tokenreduce compare" in errors


def test_an_encoder_trained_without_a_pooler_has_none(tmp_path, processor):
    tiny_encoder("vit").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), any_task=True)[0].pooler is None
    with pytest.raises(ValueError, match="its classifier would be random"):
        load_model(str(tmp_path))


def test_labels_that_cannot_vote_are_refused_before_a_search(tmp_path, photos, processor):
    texts = photos.remove_columns("label").add_column("label", ["a class"] * len(photos))
    with pytest.raises(ValueError, match=r"must hold a class, from 0, of each image.*--no-labels"):
        tune(tiny_model("vit", BASES), texts, processor, share=0.65, output_dir=tmp_path / "tuned", progress=False)
    assert not (tmp_path / "tuned").exists()
