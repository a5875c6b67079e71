"""The tuner: it is deterministic and goes on after a kill, and its report is honest."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import tiny_images, tiny_model
from PIL import Image
from task_models import save_case
from transformers import AutoModelForImageClassification, AutoProcessor, ViTImageProcessor, ViTModel

from hf_tokenreduce import LTMPConfig, ToMeConfig, TopKConfig, reduce_tokens, tune
from hf_tokenreduce.hub import check_folder
from hf_tokenreduce.loading import contents
from hf_tokenreduce.modeling.encoders import facts_of
from hf_tokenreduce.modeling.multiply_adds import even_counts, even_share
from hf_tokenreduce.tuning import held_out_from, read_tuned, search, space, tuner
from hf_tokenreduce.tuning.parts import split_rows
from hf_tokenreduce.tuning.trials import POINTS_OF_DISTANCE, Quality, Trials


QUICK = {"batch_size": 16, "repeats": 2, "progress": False, "speed": False, "methods": ["tome", "topk"]}


@pytest.fixture(scope="module", autouse=True)
def short_search():
    """As long searches as real ones would only take longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MOST_MOVES", 8)
        patch.setattr(search, "FRONT", (0.8, 0.6))
        patch.setattr(space, "SCHEDULES", space.SCHEDULES[:4])
        yield


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures in four classes, the names of which begin with an index of the model's."""
    place = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        inside = place / f"{number % 4:04}_class"
        inside.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (36, 32, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(inside / f"{number:02}.png")
    return place


@pytest.fixture(scope="module")
def photos(folder):
    return load_dataset("imagefolder", data_dir=str(folder), split="train")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def first(model, photos, processor, tmp_path_factory):
    place = tmp_path_factory.mktemp("first") / "tuned"
    return tune(model, photos, processor, share=0.65, output_dir=place, **QUICK)


def told(report):
    """All that a report says but for the time it took."""
    return {name: value for name, value in report.to_dict().items() if name != "seconds"}


def order(row):
    """What decides between settings: the drop on the images of the search, and what the distance says of it."""
    return row["search"]["drop"] + POINTS_OF_DISTANCE * row["search"]["distance"]


def test_the_same_again_by_its_seed(first, model, photos, processor, tmp_path):
    again = tune(model, photos, processor, share=0.65, output_dir=tmp_path / "again", **QUICK)
    assert told(again) == told(first)


def test_the_target_is_met_and_the_best_is_chosen(first, model, photos, processor):
    row = first.chosen
    assert row["mult_adds_ratio"] <= 0.65 and row["method"] in ("tome", "topk")
    (default,) = [one for one in first.rows if "default" in one["roles"]]
    assert order(row) <= order(default) and all(
        order(row) <= order(one) for one in first.rows if "runner-up" in one["roles"]
    )
    assert [one["settings"] for one in first.rows if "chosen" in one["roles"]] == [row["settings"]]
    assert {one["method"] for one in first.rows} == {None, "tome", "topk"}  # the best of the other is shown too
    front = [one["search"] for one in first.rows if "front" in one["roles"]]
    front.sort(key=lambda found: found["share"])
    points = [order({"search": found}) for found in front]
    assert len(front) > 2 and all(cheap > mild for cheap, mild in pairwise(points))
    assert first.images == {"search": 20, "report": 20} and first.tried > 15
    lowest = min(first.rows, key=lambda row: row["mult_adds_ratio"])
    assert lowest["mult_adds_ratio"] < 0.62  # the front leads past the target


def test_only_a_method_whose_cost_depends_on_the_images_may_exceed_a_share():
    """A setting of the front, such as one for 0.7, is not within 0.69."""
    above = Quality(images=20, distance=0.1, agreement=90.0, drop=1.0, share=0.6992)
    target = search.Target("share", 0.69)
    assert not search.meets(None, target, TopKConfig(), above) and search.meets(None, target, LTMPConfig(), above)
    assert search.meets(None, target, TopKConfig(), replace(above, share=0.69))
    assert not search.meets(None, target, LTMPConfig(), replace(above, share=0.706))


def test_what_is_written(first):
    folder = first.folder
    names = {file.name for file in folder.iterdir()}
    assert names == {"report.md", "tuning.json", "pareto.png", "pareto.svg", "model", "search"}
    assert read_tuned(folder) == json.loads(json.dumps(first.to_dict()))
    text = (folder / "report.md").read_text()
    assert text.startswith("# ViTForImageClassification, tuned for at most 0.65 of the encoder's multiply-adds")
    assert f"{first.tried} settings of 2 methods (ToMe, Top-K) were tried on 20 images" in text
    assert "On 20 other images, which the search did not use, the accuracy drops by" in text
    assert text.count("(chosen") == 1 and "best single default" in text
    assert str(folder) not in (folder / "tuning.json").read_text()
    with pytest.raises(ValueError, match=r"has no tuning\.json. Give the folder that tokenreduce tune wrote"):
        read_tuned(folder / "model")


def test_the_model_loads_anywhere_and_its_card_says_how_it_was_found(first, model):
    folder = first.folder / "model"
    check_folder(folder).raise_for_errors()  # in a process that cannot import this package
    loaded = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert loaded.config.reduction.to_dict() == first.chosen["settings"]
    images = tiny_images()
    with torch.no_grad():
        expected = reduce_tokens(model, first.chosen["settings"])(images).logits
        assert torch.allclose(loaded(images).logits, expected, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "The setting was found by tokenreduce tune for at most 0.65" in card and "seed 0" in card
    assert f"{first.tried} settings of 2 methods were tried on 20 images" in card
    assert "Not trained after the reduction" in card


def test_methods_without_time_are_named(model, photos, processor, tmp_path):
    report = tune(model, photos, processor, share=0.7, minutes=1e-6, output_dir=tmp_path / "out", **QUICK)
    assert report.methods == ["ToMe"] and report.untried == ["Top-K"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "settings of 1 method (ToMe)" in text and "Not tried: Top-K. With more minutes" in text


def test_no_image_is_in_both_parts(monkeypatch, model, photos, processor, tmp_path):
    seen = {}

    def watched(model, dataset, *arguments, calibration_dataset, **options):
        seen["report"], seen["search"] = contents(dataset), contents(calibration_dataset)
        return compare(model, dataset, *arguments, calibration_dataset=calibration_dataset, **options)

    compare = tuner.compare
    monkeypatch.setattr(tuner, "compare", watched)
    report = tune(model, photos, processor, max_drop=10, output_dir=tmp_path / "out", **{**QUICK, "methods": ["ltmp"]})
    assert not set(seen["search"]) & set(seen["report"])
    assert sorted(seen["search"] + seen["report"]) == sorted(contents(photos))
    assert report.images == {"search": len(seen["search"]), "report": len(seen["report"])}


def test_what_was_found_beside_single_settings(first, model, photos, processor, tmp_path):
    images, found = held_out_from(first.folder, photos)
    searched = set(json.loads((first.folder / "search" / "images.json").read_text()))
    assert len(images) == len(searched) == 20 and not searched & set(contents(images))
    # Images are known by what is in them: a data set in memory has no names, and rows have other numbers in a part.
    unnamed = Dataset.from_dict({"image": list(photos["image"])[10:20]})
    some, _ = held_out_from(first.folder, photos.select(range(10)))
    assert 0 < len(some) < 10 and not searched & set(contents(some))
    assert len(contents(unnamed)) == len(set(contents(unnamed))) == 10
    seen = [row for row, name in enumerate(contents(photos)) if name in searched]
    with pytest.raises(ValueError, match="used all of these 20 images"):
        held_out_from(first.folder, photos.select(seen))
    options = {"output_dir": tmp_path / "out", "speed": False, "progress": False}
    comparison = tuner.compare(model, images, processor, ["tome"], shares=[0.93], tuned=found, **options)
    named = {row["name"]: row for row in comparison.rows}
    chosen = named[f"{first.chosen['name']}, tuned"]
    assert chosen["top1"] == first.chosen["top1"] and chosen["label"].endswith(", tuned")
    assert sum("tuned" not in name for name in named) == 2 and len(named) > 4  # dense, and ToMe as it is
    assert chosen["label"] in (tmp_path / "out" / "pareto.svg").read_text()


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 12])
def test_a_killed_search_goes_on(monkeypatch, first, model, photos, processor, tmp_path, after):
    keep, measured = Trials._keep, []

    def keep_or_die(self, line):
        if len(measured) == after:
            raise Killed
        measured.append(line)
        keep(self, line)

    monkeypatch.setattr(Trials, "_keep", keep_or_die)
    with pytest.raises(Killed):
        tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    file = tmp_path / "out" / "search" / "trials.jsonl"
    assert len(file.read_text().splitlines()) == after and not (tmp_path / "out" / "tuning.json").exists()
    file.write_text(file.read_text() + '{"quality": "tome-')  # what a kill leaves unfinished
    monkeypatch.setattr(Trials, "_keep", lambda self, line: (measured.append(line), keep(self, line)))
    resumed = tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    assert told(resumed) == told(first)
    names = [(line["quality"], line["begin"]) for line in measured]
    assert len(names) == len(set(names))  # nothing was measured twice


def test_a_report_that_was_killed_goes_on(monkeypatch, first, model, photos, processor, tmp_path):
    module = sys.modules[tuner.compare.__module__]
    evaluate, done = module.evaluate_model, []

    def evaluate_or_die(reduced, *arguments, **options):
        if len(done) == 2:
            raise Killed
        done.append(reduced)
        return evaluate(reduced, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_model", evaluate_or_die)
        with pytest.raises(Killed):
            tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    monkeypatch.setattr(Trials, "_measured", lambda *arguments: pytest.fail("the search was over"))
    assert told(tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)) == told(first)


def test_corrected_labels_of_a_model_are_other_labels(monkeypatch, photos, processor, tmp_path):
    """A search of the same model is not continued: other predictions are right."""

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(tuner, "search", die)
    model = tiny_model()
    with pytest.raises(Killed):
        tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    model.config.label2id = {"0001_class": 0, "0000_class": 1, "0002_class": 2, "0003_class": 3, "cat": 4}
    with pytest.raises(ValueError, match=r"made with other settings: data was [^;]+\. Give the same"):
        tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)


def test_broken_images_are_told_before_the_search(monkeypatch, model, folder, processor, tmp_path):
    """Also those that only the report needs. When the image is repaired, the same command begins anew."""

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(tuner, "search", die)
    shutil.copytree(folder, tmp_path / "photos")
    photos = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train")
    files = sorted((tmp_path / "photos").rglob("*.png"))
    labels = list(photos["label"])
    broken = files[split_rows(labels, len(labels), 0).report[0]]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"Repair or remove the file .*{broken.name}"):
        tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    broken.write_bytes(whole)
    with pytest.raises(Killed):
        tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)


def test_within_a_drop_the_cheapest(monkeypatch, model, photos, processor, tmp_path):
    report = tune(model, photos, processor, max_drop=40, output_dir=tmp_path / "out", **QUICK)
    assert report.chosen["search"]["drop"] <= 40  # this model's accuracy on noise is hardly more than chance
    assert report.chosen["search"]["share"] < 0.5
    monkeypatch.setattr(tuner, "choose", lambda trials, target: None)  # as if none were within it
    options = {**QUICK, "minutes": 1e-4}
    report = tune(model, photos, processor, max_drop=0, output_dir=tmp_path / "none", **options)
    assert report.chosen["method"] is None
    assert "No setting that was tried keeps the drop within 0 points: the smallest drop was" in report.why


def timed_as(speed_of):
    """Times of a device on which a reduction is so many times as fast as dense."""

    def timed(reduced, dense, images, batch_size, repeats, runtime):
        reduction = reduced.config.reduction
        speed = 1.0 if reduction is None else speed_of(reduction, reduced.config)
        return {
            "images_per_second": 100 * speed, "dense_images_per_second": 100.0, "speedup": speed,
            "speedup_interval": (speed, speed), "speed_batch_size": batch_size,
            "speed_settings": {"device": "a drawn one", "threads": 1, "attention": "sdpa", "torch": "2"},
        }  # fmt: skip

    return timed


@pytest.fixture
def device(monkeypatch):
    def take(speed_of):
        for place in (sys.modules[tuner.compare.__module__], sys.modules[Trials.__module__]):
            monkeypatch.setattr(place, "timed", timed_as(speed_of))

    return take


def test_dense_is_chosen_where_nothing_pays(device, model, photos, processor, tmp_path):
    device(lambda reduction, config: 0.9)
    report = tune(model, photos, processor, share=0.7, output_dir=tmp_path / "share", **{**QUICK, "speed": True})
    assert report.chosen["method"] is None and "pays on this device at batch 16: " in report.why
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "share" / "model", trust_remote_code=True)
    assert loaded.config.reduction is None
    text = (tmp_path / "share" / "report.md").read_text()
    assert "Chosen: **dense**. No setting that meets the target pays on this device" in text
    report = tune(model, photos, processor, speedup=1.5, output_dir=tmp_path / "fast", **{**QUICK, "speed": True})
    assert report.chosen["method"] is None and "No setting that was tried is faster than the dense model" in report.why


def test_the_own_reduction_is_timed_too(device, model, photos, processor, tmp_path):
    own = ToMeConfig(r=9)
    device(lambda reduction, config: 2.0 if reduction == own else 0.9)
    options = {**QUICK, "speed": True, "methods": ["topk"]}
    report = tune(reduce_tokens(model, own), photos, processor, speedup=1.5, output_dir=tmp_path / "own", **options)
    assert report.chosen["settings"] == own.to_dict()


def test_what_does_not_pay_gives_way_to_what_does(device, first, model, photos, processor, tmp_path):
    slow = first.chosen["method"]
    device(lambda reduction, config: 0.8 if reduction.method == slow else 1.3)
    report = tune(model, photos, processor, share=0.65, output_dir=tmp_path / "out", **{**QUICK, "speed": True})
    assert report.chosen["method"] not in (None, slow) and "which does not pay" in report.why
    assert report.chosen["mult_adds_ratio"] <= 0.65


def test_a_speed_is_reached_by_the_clock(device, model, photos, processor, tmp_path):
    """On a device where each layer that reduces costs a twentieth of the dense model's time."""

    def speed(reduction, config):
        facts = facts_of(config)
        counts = [facts.num_patches + 1, *even_counts(reduction, facts)]
        layers = sum(new < old for old, new in pairwise(counts))
        return 1 / (even_share(reduction, facts) + 0.05 * layers)

    device(speed)
    options = {**QUICK, "speed": True}
    report = tune(model, photos, processor, speedup=1.5, output_dir=tmp_path / "out", **options)
    assert 1.5 <= report.chosen["speedup"] < 1.7 and report.chosen["mult_adds_ratio"] < 0.63
    device(lambda reduction, config: 1.2)
    with pytest.raises(ValueError, match=r"speedup=4 cannot be reached .* the highest speed-up was 1\.20"):
        tune(model, photos, processor, speedup=4, output_dir=tmp_path / "far", **options)


def test_times_are_measured_on_this_device(model, photos, processor, tmp_path):
    options = {**QUICK, "speed": True, "methods": ["topk"]}
    report = tune(model, photos, processor, share=0.5, output_dir=tmp_path / "out", **options)
    assert all(row["speedup"] > 0 for row in report.rows) and report.rows[0]["speed_batch_size"] == 16


def test_images_without_labels(model, photos, processor, tmp_path):
    report = tune(model, photos.remove_columns("label"), processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    assert not report.labelled and report.chosen["top1"] is None
    assert report.chosen["agreement"] == pytest.approx(100 - report.chosen["drop"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "top-1" not in text and "keep the dense model's class." in text and "| same as dense % |" in text
    assert "Top-1" not in (tmp_path / "out" / "model" / "README.md").read_text()


def test_features_of_a_model_without_classes(photos, processor, tmp_path):
    encoder = tiny_model(classes={"vit": (ViTModel, type(tiny_model().config))})
    report = tune(encoder, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    assert 0 < report.chosen["pooled_cosine"] < 1 and report.chosen["search"]["agreement"] is None
    assert report.chosen["search"]["distance"] == pytest.approx(1 - report.chosen["pooled_cosine"], abs=0.05)
    assert "the cosine to the dense model's features is" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(
        ValueError, match="max_drop=1 is about accuracy or agreement, but a ViTModel predicts no classes"
    ):
        tune(encoder, photos, processor, max_drop=1, output_dir=tmp_path / "drop", **QUICK)


def test_a_reduced_model_is_tuned_from_its_dense_form(first, model, photos, processor, tmp_path):
    reduced = reduce_tokens(model, ToMeConfig(r=20))
    report = tune(reduced, photos, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)
    assert report.begun_from == "ToMe r=20" and report.chosen["settings"] == first.chosen["settings"]
    assert "already reduced by ToMe r=20. The search began with its dense form" in report.to_markdown()


def test_a_search_ends_with_its_time(model, photos, processor, tmp_path):
    report = tune(model, photos, processor, share=0.65, minutes=1e-4, output_dir=tmp_path / "out", **QUICK)
    assert report.chosen["method"] in ("tome", "topk") and report.tried < 6


BAD = [
    ({}, "Give one target: share, such as 0.65 .* Got none of them"),
    ({"share": 0.5, "max_drop": 1}, "Give one target: .* Got share=0.5 and max_drop=1"),
    ({"share": 1.5}, "share must be the share of multiply-adds to keep, above 0 and at most 1, got 1.5"),
    ({"speedup": 0.9}, "It must be above 1, got 0.9"),
    ({"max_drop": -1}, "It must be from 0 to below 100, got -1"),
    ({"speedup": 1.5, "speed": False}, "For speedup=1.5 time must be measured"),
    ({"share": 0.5, "minutes": 0}, "minutes must be above 0, got 0"),
    ({"share": 0.5, "methods": ["tomme"]}, "There is no method 'tomme'"),
    ({"share": 0.01}, "share=0.01 cannot be reached: the lowest share that a setting keeps of this model is 0.[0-9]+"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_targets_that_make_no_sense(model, photos, processor, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tune(model, photos, processor, output_dir=tmp_path / "out", **{**QUICK, "speed": True, **arguments})


def test_images_that_say_too_little(model, photos, processor, tmp_path):
    def on(data):
        tune(model, data, processor, share=0.65, output_dir=tmp_path / "out", **QUICK)

    with pytest.raises(ValueError, match=r"There are 3 images.* take at least 20"):
        on(photos.select(range(3)))
    one_class = photos.remove_columns("label").add_column("label", [2] * len(photos))
    with pytest.raises(ValueError, match="All 40 images are of one class"):
        on(one_class)
    same = photos.remove_columns("label").select([0] * 30)
    with pytest.raises(ValueError, match="The dense model gives all 15 images one class"):
        on(same)


def test_folders_that_hold_something_else(first, model, photos, processor, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, but it holds no search"):
        tune(model, photos, processor, share=0.65, output_dir=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="made with other settings: target was"):
        tune(model, photos, processor, share=0.6, output_dir=first.folder, **QUICK)


def test_from_a_terminal(call, folder, model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["tune", tmp_path / "model", folder, "-r", "topk", "--no-speed", "--batch-size", 16]
    code, printed, errors = call(*arguments, "--share", 0.65, "-o", tmp_path / "out", "--no-labels")
    assert code == 0 and "same as dense %" in printed and "top-1" not in printed, errors
    assert f"Chosen: **{read_tuned(tmp_path / 'out')['chosen']['name']}**" in " ".join(printed.split())
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "The setting was found by tokenreduce tune" in card and str(tmp_path) not in card
    code, _, errors = call(*arguments, "--share", 0.65, "--speedup", 2, "-o", tmp_path / "none")
    assert code == 2 and errors.count("\n") == 1 and "Give one target" in errors and not (tmp_path / "none").exists()


def test_a_tuned_model_of_texts_keeps_its_tokenizer(call, folder, tmp_path):
    save_case("clip", tmp_path / "clip")
    arguments = ["tune", tmp_path / "clip", folder, "-r", "topk", "--no-speed", "--batch-size", 16, "--share", 0.65]
    code, _, errors = call(*arguments, "-o", tmp_path / "out")
    assert code == 0, errors
    assert AutoProcessor.from_pretrained(tmp_path / "out" / "model").tokenizer("a cat")["input_ids"]
