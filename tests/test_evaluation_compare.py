"""Comparisons: every setting once, resumed after a kill, in tables and in a picture that can be read."""

import csv
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from datasets import ClassLabel, load_dataset
from families import family_model
from helpers import tiny_model
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    DTEMConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    TokenReduceViTConfig,
    ToMeConfig,
    TopKConfig,
    calibrate,
    reduce_tokens,
    tune,
)
from hf_tokenreduce.evaluation import (
    compare,
    default_reductions,
    evaluate_model,
    measured_multiply_adds,
    pareto_plot,
)
from hf_tokenreduce.evaluation.compare import timed
from hf_tokenreduce.evaluation.pareto import OTHERS, STYLES, spread_apart
from hf_tokenreduce.evaluation.settings import describe
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.multiply_adds import even_share


QUICK = {"batch_size": 4, "progress": False, "repeats": 2}


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture
def photos(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        folder = tmp_path / "photos" / f"{number % 4:04}_class"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    return load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train")


def test_every_setting_in_every_file(tmp_path, photos, processor):
    model = tiny_model()
    settings = [
        ToMeConfig(r=5),
        {"method": "tome", "r": 9},
        None,
        LTMPConfig(target=0.7),
        DLViTConfig(),
        ToMeConfig(r=5),
        LTMPConfig(target=0.01),
    ]
    found = compare(model, photos, processor, settings, output_dir=tmp_path / "out", **QUICK)
    assert [row["method"] for row in found.rows] == [None, "tome", "tome", "ltmp", "dlvit", "ltmp"]
    dense, tome, _, ltmp, dlvit, unreachable = found.rows
    expected = evaluate_model(reduce_tokens(model, ToMeConfig(r=5)), photos, processor, progress=False)
    assert {name: tome[name] for name in expected.to_dict()} == json.loads(json.dumps(expected.to_dict()))
    assert dense["mult_adds_ratio"] == dense["speedup"] == 1.0 and dense["drop"] is None
    assert ltmp["mult_adds_ratio"] == pytest.approx(0.7, abs=0.02)
    assert "its filter is not trained" in dlvit["skipped"] and dlvit["top1"] is None
    assert "target=0.01 cannot be reached" in unreachable["skipped"]
    for row in (tome, ltmp):
        assert row["speedup"] > 0 and row["images_per_second"] > 0 and row["speed_batch_size"] == 4
    folder = tmp_path / "out"
    assert json.loads((folder / "results.json").read_text()) == found.rows
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["top1"]) for line in lines[:4]] == [row["top1"] for row in found.rows[:4]]
    assert json.loads(lines[1]["settings"]) == ToMeConfig(r=5).to_dict() and lines[4]["skipped"]
    table = (folder / "table.md").read_text()
    assert "| ToMe r=5 |" in table and "- DL-ViT: its filter is not trained" in table
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {11}
    with Image.open(folder / "pareto.png") as picture:
        assert picture.width > 1000
    names = {text.text for text in ElementTree.parse(folder / "pareto.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {"ToMe", "LTMP", "dense", "top-1 accuracy, %"} <= names


class Killed(Exception):
    pass


def test_classes_are_checked_first(monkeypatch, tmp_path, photos, processor):
    """Nothing is computed, and the folder does not stand in the way of a corrected call."""
    model = tiny_model()
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", None)
        patched.setattr(model.config, "label2id", {"ox": 0, "hen": 1})
        with pytest.raises(ValueError, match="are new to the model, train it on them first"):
            compare(model, photos, processor, [], output_dir=tmp_path / "out", **QUICK)
    (tmp_path / "out" / "settings").mkdir(parents=True)
    (tmp_path / "out" / "settings.json").write_text('{"model": "another"}')  # of a run that failed before any result
    assert len(compare(model, photos, processor, [], output_dir=tmp_path / "out", **QUICK).rows) == 1
    with pytest.raises(ValueError, match="was made with other settings"):
        compare(model, photos.select(range(3)), processor, [], output_dir=tmp_path / "out", **QUICK)


def test_a_killed_comparison_goes_on(monkeypatch, tmp_path, photos, processor):
    module = sys.modules[compare.__module__]
    model, settings = tiny_model(), [SiTConfig(layers=(1, 2)), ToMeConfig(r=5), EViTConfig(layers=(1,))]
    evaluated, calibrated, dying = [], [], []
    evaluate, calibrate = module.evaluate_model, module.calibrate

    def evaluate_or_die(reduced, *arguments, **options):
        reduction = reduced.config.reduction
        if reduction is not None and reduction.method in dying:
            raise Killed
        evaluated.append(reduction and reduction.method)
        return evaluate(reduced, *arguments, **options)

    def count(reduced, pixels, target, max_images):
        calibrated.append(len(pixels))
        return calibrate(reduced, pixels, target, max_images=max_images, steps=2)

    monkeypatch.setattr(module, "evaluate_model", evaluate_or_die)
    monkeypatch.setattr(module, "calibrate", count)
    options = {"output_dir": tmp_path / "out", "speed": False, "calibration_images": 6, **QUICK}
    for method in ("sit", "tome"):
        dying[:] = [method]
        with pytest.raises(Killed):
            compare(model, photos, processor, settings, **options)
    assert calibrated == [6]  # what was learned before the first kill is not learned again
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    assert [json.loads(line)["method"] for line in lines.splitlines()] == [None, "sit"]
    (tmp_path / "out" / "results.jsonl").write_text(lines + '{"key": "tome')
    dying.clear()
    evaluated.clear()
    found = compare(model, photos, processor, settings, **options)
    assert evaluated == [None, "tome", "evit"]  # of the dense model, what is known is read
    assert [row["method"] for row in found.rows] == [None, "sit", "tome", "evit"]
    assert found.rows[1]["speedup"] is None
    evaluated.clear()
    again = compare(model, photos, processor, [*settings, ToMeConfig(r=6)], **options)
    assert evaluated == [None, "tome"] and again.rows[:-1] == found.rows
    with pytest.raises(ValueError, match="made with other settings: data was"):
        compare(model, photos.select(range(9)), processor, settings, **options)
    with pytest.raises(ValueError, match="made with other settings: speed was"):
        compare(model, photos, processor, settings, **{**options, "speed": True})


def test_what_a_model_has_learned_counts(tmp_path, photos, processor):
    stock = tiny_model()
    setting = LTMPConfig(merge_threshold=1.0, prune_threshold=0.0)
    learned = reduce_tokens(stock, setting)
    for layer in learned.base_model.layers:
        layer.reducer.prune_threshold.data.fill_(0.012)
    options = {"output_dir": tmp_path / "out", "speed": False, **QUICK}
    row = compare(learned, photos, processor, [setting], **options).rows[1]
    expected = evaluate_model(learned, photos, processor, progress=False)
    assert row["tokens_per_layer"] == expected.tokens_per_layer and row["mult_adds_ratio"] < 0.7
    # Thresholds learned since are another model's result.
    learned.base_model.layers[0].reducer.prune_threshold.data.fill_(0.02)
    assert (
        compare(learned, photos, processor, [setting], **options).rows[1]["tokens_per_layer"]
        != row["tokens_per_layer"]
    )


def test_what_serves_every_setting_counts_for_every_setting(tmp_path, photos, processor):
    """What DTEM has learned decides under other settings too, and the dense model says nothing about it."""
    learned = reduce_tokens(tiny_model(num_hidden_layers=2), DTEMConfig(r=4))
    options = {"output_dir": tmp_path / "out", "speed": False, **QUICK}
    key = compare(learned, photos, processor, [DTEMConfig(r=9)], **options).rows[1]["key"]
    assert compare(learned, photos, processor, [DTEMConfig(r=9)], **options).rows[1]["key"] == key
    with torch.no_grad():
        for parameter in learned.base_model.layers[0].reducer.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert compare(learned, photos, processor, [DTEMConfig(r=9)], **options).rows[1]["key"] != key


def test_a_reduced_model_is_in_its_own_comparison(tmp_path, photos, processor):
    own = ToMeConfig(r=5)
    rows = compare(
        reduce_tokens(tiny_model(), own), photos, processor, shares=[0.7], output_dir=tmp_path, speed=False, **QUICK
    ).rows
    assert rows[1]["settings"] == own.to_dict() and {row["method"] for row in rows} > {"tome", "bat", "ats"}


def test_images_get_the_type_of_the_model(tmp_path, photos, processor):
    """The embeddings of BEiT do not cast them. The same line takes them to the device of the model."""
    model = family_model("beit").to(torch.bfloat16).eval()
    model.config.id2label, model.config.label2id = tiny_model().config.id2label, tiny_model().config.label2id
    rows = compare(model, photos, processor, ["tome", "ats"], shares=[0.7], output_dir=tmp_path, **QUICK).rows
    assert [row["method"] for row in rows] == [None, "tome", "ats"]
    assert all(row["top1"] is not None and row["speedup"] for row in rows)
    pixels = processor([photo.convert("RGB") for photo in photos["image"]], return_tensors="pt")["pixel_values"]
    assert calibrate(reduce_tokens(model, LTMPConfig()), pixels, 0.9) < 1
    assert measured_multiply_adds(model, pixels).shape == (len(photos),)


def test_folders_of_another_release_are_refused(tmp_path, photos, processor):
    """It may fit and compute something else."""
    options = {"output_dir": tmp_path, "speed": False, **QUICK}
    compare(tiny_model(), photos, processor, [], **options)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": "0.1.0"}))
    with pytest.raises(ValueError, match=r"made with other settings: version was '0\.1\.0'"):
        compare(tiny_model(), photos, processor, [], **options)


def test_corrected_labels_of_a_model_are_other_labels(tmp_path, photos, processor):
    """The model computes the same, but other predictions are right."""
    model = tiny_model()
    photos = photos.cast_column("label", ClassLabel(names=["hen", "ox", "owl", "fox"]))
    model.config.label2id = {"hen": 0, "ox": 1, "owl": 2, "fox": 3, "cat": 4}
    compare(model, photos, processor, [], output_dir=tmp_path / "out", speed=False, **QUICK)
    model.config.label2id = {"ox": 0, "hen": 1, "owl": 2, "fox": 3, "cat": 4}
    with pytest.raises(ValueError, match=r"made with other settings: data was [^;]+\. Give the same"):
        compare(model, photos, processor, [], output_dir=tmp_path / "out", speed=False, **QUICK)


@pytest.mark.parametrize(
    "left", ["part-0.jsonl", "report.json", "tuning.json", "search/settings.json", "settings.json"]
)
def test_results_of_another_command_stay(tmp_path, photos, processor, left):
    """Such as those of an evaluation that was interrupted, and the pictures of a tuner."""
    for name in (left, "settings.json", "pareto.png"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("another's")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"out holds the results of another command\. Name another folder"):
        compare(tiny_model(), photos, processor, [], output_dir=tmp_path / "out", speed=False, **QUICK)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "out" / "settings.json").read_text() == "another's"


def test_it_runs_in_one_process(monkeypatch, tmp_path, photos, processor):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="compare runs in one process, but 2 were launched"):
        compare(tiny_model(), photos, processor, output_dir=tmp_path)
    with pytest.raises(ValueError, match="tune runs in one process, but 2 were launched"):
        tune(tiny_model(), photos, processor, share=0.65, output_dir=tmp_path)


@pytest.mark.parametrize("depth", [4, 12, 24])
def test_settings_at_given_shares(depth):
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=depth)
    found = default_reductions(config)
    assert len(set(map(str, found))) == len(found)
    for method in (ToMeConfig, TopKConfig, EViTConfig, BATConfig, SiTConfig):
        shares = [even_share(setting, config) for setting in found if type(setting) is method]
        wanted = (0.8, 0.65, 0.5)[: len(shares)]
        assert len(shares) >= 2 and all(share <= want for share, want in zip(shares, wanted, strict=True))
        assert shares == pytest.approx(wanted, abs=0.03)
    assert [setting.target for setting in found if type(setting) is LTMPConfig] == [0.8, 0.65, 0.5]
    assert [setting.num_tokens for setting in found if type(setting) is ATSConfig] == [None, 98, 49]
    for setting in found:
        setting.check_fit(TokenReduceViTConfig(**config.to_dict()))
    assert [type(setting) for setting in default_reductions(config, [0.9])].count(ToMeConfig) == 1
    with pytest.raises(ValueError, match="share must be the share of multiply-adds"):
        default_reductions(config, [1.5])
    with pytest.raises(ValueError, match=r"ATS is fitted on images\. Give pixel_values"):
        default_reductions(config, model=tiny_model(), names=["ats"])


def test_methods_are_compared_by_name_at_shares(tmp_path, photos, processor):
    """Also one whose cost depends on the images: it is fitted to the share on them."""
    found = compare(
        tiny_model(), photos, processor, ["ats", ToMeConfig(r=4), "bat"], shares=[0.7], output_dir=tmp_path / "out",
        calibration_images=len(photos), **QUICK,
    )  # fmt: skip
    assert [row["method"] for row in found.rows] == [None, "ats", "tome", "bat"]
    for row in found.rows[1::2]:
        assert 0.6 < row["mult_adds_ratio"] <= 0.7
    for names, message in ((["dlvit"], "no untrained setting for the shares"), (["tomme"], "no method 'tomme'")):
        with pytest.raises(ValueError, match=message):
            compare(tiny_model(), photos, processor, names, output_dir=tmp_path / "out", **QUICK)


def test_names_of_settings():
    assert describe(None) == "dense"
    assert describe(ToMeConfig(r=8)) == "ToMe r=8"
    assert describe(ToMeConfig(r=[9, 9, 8, 8], prop_attn=False)) == "ToMe r=8 to 9, prop_attn=False"
    assert describe(EViTConfig(keep_rate=0.65432, layers=(1, 2))) == "EViT keep_rate=0.6543, layers=(1, 2)"
    assert describe(ATSConfig()) == "ATS" and describe(LTMPConfig()) == "LTMP target=0.75"


def records():
    return [
        {
            "method": method,
            "top1": 80.0 - place,
            "mult_adds_ratio": share,
            "speedup": 0.9 / share,
            "baseline_top1": 82.0,
        }
        for place, method in enumerate(["tome", "bat", "another"])
        for share in (0.8, 0.5)
    ]


def test_a_picture_of_records_alone(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(records()))
    pareto_plot(tmp_path / "records.json", tmp_path / "a.svg", "trained")
    pareto_plot(records(), tmp_path / "b.svg", "trained")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert text.count(">dense<") == 2 and text.count(">another<") == 2 and "speed-up over dense" in text
    rates = [{**row, "dense_images_per_second": 60.0, "speed_batch_size": 16} for row in records()]
    pareto_plot(rates, tmp_path / "c.svg")
    assert "images/s, batch 16" in (tmp_path / "c.svg").read_text()
    pareto_plot([{**row, "speedup": None, "label": f"{row['method']} tuned"} for row in records()], tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    assert "speed-up" not in text and text.count(">tome tuned<") == 1


def test_pictures_that_cannot_be(tmp_path):
    for rows in ([], [{"method": None, "top1": 80.0}], [{"method": "tome", "top1": None}]):
        with pytest.raises(ValueError, match="nothing to draw"):
            pareto_plot(rows, tmp_path / "a.png")
    with pytest.raises(ValueError, match="neither mult_adds_ratio nor speedup"):
        pareto_plot([{"method": "tome", "top1": 80.0}], tmp_path / "a.png")


def test_no_two_methods_look_alike():
    assert len(STYLES) >= len(METHODS)
    shapes = [style[:3] for style in (*STYLES, *OTHERS)]  # also in print without colour
    assert len(set(shapes)) == len(shapes)


def test_labels_stand_apart():
    assert spread_apart([1.0, 5.0, 9.0], 1.0, 0.0, 10.0) == [1.0, 5.0, 9.0]
    assert spread_apart([4.9, 5.0, 5.1], 1.0, 0.0, 10.0) == pytest.approx([4.0, 5.0, 6.0])
    assert spread_apart([0.0, 0.1, 9.9, 10.0], 1.0, 0.0, 10.0) == pytest.approx([0.0, 1.0, 9.0, 10.0])


def test_speed_may_be_that_of_a_runtime(tmp_path, photos, processor):
    pytest.importorskip("onnxruntime")
    model, wanted = tiny_model(num_hidden_layers=2), [ToMeConfig(r=7), ATSConfig(layers=(1,))]
    with pytest.raises(ValueError, match="There is no runtime onyx"):
        compare(model, photos, processor, wanted, output_dir=tmp_path / "out", runtime="onyx", **QUICK)
    assert not (tmp_path / "out").exists()
    found = compare(model, photos, processor, wanted, output_dir=tmp_path / "out", runtime="onnx", **QUICK)
    by_name = {row["method"]: row for row in found.rows}
    assert by_name["tome"]["speed_settings"]["runtimes"].keys() == {"onnx"} and by_name["tome"]["speedup"] > 0
    assert by_name["ats"]["speedup"] is None and by_name["ats"]["top1"] is not None  # one image at a time
    assert found.to_markdown().count("| ATS") == 1
    assert re.search(r"threads, onnx [\d.]+, float32, batch 4$", found.to_markdown()), found.to_markdown()
    with pytest.raises(ValueError, match=r"was made with other settings: speed\.runtime was 'onnx', now None"):
        compare(model, photos, processor, wanted, output_dir=tmp_path / "out", **QUICK)


@pytest.mark.parametrize("theirs", ["config.json", "results.csv", "table.md", "pareto.png"])
def test_files_of_others_stay(tmp_path, photos, processor, theirs):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / theirs).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {theirs} of something else. Name another folder"):
        compare(tiny_model(), photos, processor, [], output_dir=tmp_path / "out", speed=False, **QUICK)
    if theirs == "config.json":
        with pytest.raises(ValueError, match=r"holds config\.json, which is not of this work"):
            evaluate_model(tiny_model(), photos, processor, output_dir=tmp_path / "out")
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_is_left_is_told(tmp_path, photos, processor, capsys):
    """Settings of an earlier comparison in the same folder are not counted. One setting needs no list."""
    options = {**QUICK, "progress": True, "speed": False, "output_dir": tmp_path / "out"}
    told = []
    for wanted in ([ToMeConfig(r=r) for r in (3, 4, 5)], EViTConfig(layers=(1,)), EViTConfig(layers=(1,))):
        compare(tiny_model(), photos, processor, wanted, **options)
        told.append(re.findall(r"(\d+) settings on 10 images take about", capsys.readouterr().err))
    assert told == [["4"], ["1"], []]


def test_what_is_not_compiled_has_no_compiled_speed():
    """A compiled dense model beside it would be no fair comparison."""
    dense, sampler = (reduce_tokens(tiny_model(num_hidden_layers=2), one) for one in (None, ATSConfig(layers=(1,))))
    torch._dynamo.reset()
    found = timed(sampler, dense, torch.randn(4, 3, 32, 32), 2, 1, "compiled")
    torch._dynamo.reset()
    assert set(found.values()) == {None}
