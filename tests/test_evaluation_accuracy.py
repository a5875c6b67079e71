"""Accuracy: what is counted, intervals, resuming, several processes, and the metrics that ship."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from helpers import METHODS, NUM_PATCHES, reduce_tiny, tiny_model
from PIL import Image as PILImage
from transformers import ViTForImageClassification, ViTImageProcessor, pipeline

from hf_tokenreduce import EViTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation import AccuracyReport, evaluate_model, metric_path
from hf_tokenreduce.evaluation.accuracy import class_index, paired_bootstrap, wilson_interval
from hf_tokenreduce.evaluation.compute import dense_multiply_adds, measured_multiply_adds, total_multiply_adds
from hf_tokenreduce.evaluation.resume import digest_of_model
from hf_tokenreduce.tasks import all_layers_act


NAMES = ["cat", "dog", "owl", "hen", "fox"]
QUICK = {"batch_size": 4, "progress": False}


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


def named_model(**changes):
    model = tiny_model(**changes)
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: index for index, name in enumerate(NAMES)}
    return model


def image_files(folder, count=14):
    """Class folders that name some classes by label, some by index, in an order that is not the model's."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        place = folder / ["owl", "0001_dog", "cat", "0003"][number % 4]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8, generator=generator)
        PILImage.fromarray(pixels.numpy()).save(place / f"{number:02}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    return load_dataset("imagefolder", data_dir=str(image_files(tmp_path / "photos")), split="train")


def plainly(model, dataset, processor):
    """Logits and tokens of each image, one by one."""
    outputs = []
    with torch.no_grad():
        for row in dataset:
            pixels = processor(row["image"].convert("RGB"), return_tensors="pt").pixel_values
            outputs.append(model(pixels, **all_layers_act(model)))
    return outputs


@pytest.mark.parametrize("method", ["tome", "sit", "ats", "ltmp", "dlvit"])
def test_everything_is_that_of_a_plain_loop(photos, processor, method):
    stock = named_model()
    model = reduce_tiny(stock, METHODS[method][0])
    report = evaluate_model(model, photos, processor, **QUICK)
    truth = torch.tensor([{"0001_dog": 1, "0003": 3, "cat": 0, "owl": 2}[photos.features["label"].names[label]]
                          for label in photos["label"]])  # fmt: skip
    outputs, theirs = plainly(model, photos, processor), plainly(stock, photos, processor)
    ours = torch.cat([output.logits.argmax(dim=-1) for output in outputs])
    dense = torch.cat([output.logits.argmax(dim=-1) for output in theirs])
    counts = torch.cat([output.token_counts for output in outputs])
    assert report.images == 14 and report.method == METHODS[method][0].method
    assert report.top1 == pytest.approx(100 * (ours == truth).double().mean().item())
    assert report.top5 == 100.0  # of five classes
    assert report.baseline_top1 == pytest.approx(100 * (dense == truth).double().mean().item())
    assert report.agreement == pytest.approx(100 * (ours == dense).double().mean().item())
    assert report.drop == report.baseline_top1 - report.top1
    right, was = ours == truth, dense == truth
    assert report.became_right == (right & ~was).nonzero().flatten().tolist()
    assert report.became_wrong == (~right & was).nonzero().flatten().tolist()
    assert len(report.became_right) - len(report.became_wrong) == round(-report.drop * 14 / 100)
    assert report.tokens_per_layer == pytest.approx(counts.double().mean(dim=0).tolist())
    assert report.tokens["p95"] == pytest.approx(counts[:, -1].double().quantile(0.95).item())
    pixels = torch.cat([processor(p.convert("RGB"), return_tensors="pt").pixel_values for p in photos["image"]])
    assert report.multiply_adds["mean"] == pytest.approx(measured_multiply_adds(model, pixels).mean().item())
    outside = NUM_PATCHES * 3 * 16 * 48 + 48 * 5
    papers = total_multiply_adds(model, counts, as_in_papers=True).mean().item()
    assert report.mult_adds_ratio == pytest.approx((papers - outside) / (dense_multiply_adds(stock) - outside))
    json.dumps(report.to_dict())


def test_what_it_is_compared_with(photos, processor):
    stock = named_model()
    model = reduce_tokens(stock, EViTConfig(keep_rate=0.2, layers=(0, 1)))
    alone = evaluate_model(stock, photos, processor, **QUICK)
    assert alone.drop is None and alone.agreement is None and alone.mult_adds_ratio == 1.0
    report = evaluate_model(model, photos, processor, dense=alone, **QUICK)
    assert report.to_dict() == evaluate_model(model, photos, processor, **QUICK).to_dict()
    assert report.to_dict() == evaluate_model(model, photos, processor, dense=stock, num_workers=1, **QUICK).to_dict()
    assert report.agreement < 100
    itself = evaluate_model(reduce_tokens(stock, ToMeConfig(r=0)), photos, processor, **QUICK)
    assert (
        itself.drop == 0 and itself.drop_interval == pytest.approx((-23.2, 23.2), abs=0.1) and itself.agreement == 100
    )
    fewer = evaluate_model(stock, photos.select(range(3)), processor, **QUICK)
    for wrong in (fewer, AccuracyReport(**alone.to_dict())):
        with pytest.raises(ValueError, match="dense is a report on"):
            evaluate_model(model, photos, processor, dense=wrong, **QUICK)
    stock.config.id2label = dict(enumerate(reversed(stock.config.id2label.values())))
    with pytest.raises(ValueError, match="classes of dense differ"):
        evaluate_model(model, photos, processor, dense=stock, **QUICK)


def test_equal_logits_in_half_precision_are_ranked_alike(photos, processor):
    model = named_model().to(torch.bfloat16)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    assert evaluate_model(model, photos, processor, dense=model, **QUICK).agreement == 100


def test_intervals():
    assert wilson_interval(876, 1000) == pytest.approx((85.41, 89.50), abs=0.01)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(100)
    right = np.zeros(1000, dtype=bool)
    was_right = right.copy()
    right[:830], was_right[:800], was_right[900:950] = True, True, True  # 30 gained, 50 lost
    low, high = paired_bootstrap(right, was_right)
    assert (low, high) == paired_bootstrap(right, was_right)
    half = 1.96 * 100 * math.sqrt((80 - 20**2 / 1000) / 1000**2)  # of the mean of differences that are -1, 0 or 1
    assert (low, high) == pytest.approx((2 - half, 2 + half), abs=0.2)
    assert paired_bootstrap(right, right) == pytest.approx((-0.368, 0.368), abs=1e-3)  # "rule of three" and a bit
    # the same drop with nothing else changed is known better
    assert paired_bootstrap(np.arange(1000) < 830, np.arange(1000) < 850)[0] > low


class Killed(Exception):
    pass


@pytest.mark.parametrize("dying_write", [False, True])
def test_a_killed_run_goes_on_and_does_nothing_twice(tmp_path, photos, processor, dying_write):
    model = reduce_tokens(named_model(), ToMeConfig(r=5))
    whole = evaluate_model(model, photos, processor, **QUICK)
    seen = []

    def count_and_die(module, args, output):
        seen.append(len(args[0]))
        if len(seen) == 3:
            raise Killed

    handle = model.register_forward_hook(count_and_die)
    with pytest.raises(Killed):
        evaluate_model(model, photos, processor, output_dir=tmp_path / "out", **QUICK)
    assert seen == [4, 4, 4] and not (tmp_path / "out" / "report.json").exists()
    part = tmp_path / "out" / "part-0.jsonl"
    if dying_write:
        part.write_bytes(part.read_bytes()[:-20])
    again = evaluate_model(model, photos, processor, output_dir=tmp_path / "out", **QUICK)
    assert seen[3:] == ([4, 4, 2] if dying_write else [4, 2])
    assert again.to_dict() == whole.to_dict()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["top1"] == whole.top1
    seen.clear()
    once_more = evaluate_model(model, photos, processor, output_dir=tmp_path / "out", **QUICK)
    assert not seen and once_more.to_dict() == whole.to_dict()
    assert torch.equal(once_more.per_image["predictions"], whole.per_image["predictions"])
    handle.remove()


def test_what_others_left_is_refused(tmp_path, photos, processor):
    model = reduce_tokens(named_model(), ToMeConfig(r=5))
    folder = tmp_path / "out"
    evaluate_model(model, photos, processor, output_dir=folder, **QUICK)
    other = reduce_tokens(named_model(), ToMeConfig(r=6))
    changed = reduce_tokens(named_model(), ToMeConfig(r=5))
    changed.classifier.bias.data += 1
    grey = ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    for arguments, name in (
        ((other, photos, processor), "model"),
        ((changed, photos, processor), "model dense"),
        ((model, photos.select(range(10)), processor), "data"),
        ((model, photos.shuffle(seed=1), processor), "data"),
        ((model, photos, grey), "processor.do_normalize"),
    ):
        told = "; ".join(f"{re.escape(one)} was [^;]+" for one in name.split())  # these, and no others
        with pytest.raises(ValueError, match=rf"made with other settings: {told}\. Give the same settings as before"):
            evaluate_model(*arguments, output_dir=folder, **QUICK)


def test_other_images_of_the_same_names_are_refused(tmp_path, photos, processor):
    model = reduce_tokens(named_model(), ToMeConfig(r=5))
    evaluate_model(model, photos, processor, output_dir=tmp_path / "out", **QUICK)
    other = tmp_path / "other" / "photos"
    shutil.copytree(tmp_path / "photos", other)
    same = load_dataset("imagefolder", data_dir=str(other), split="train")
    evaluate_model(model, same, processor, output_dir=tmp_path / "out", **QUICK)  # a copy, elsewhere
    content = bytearray((other / "owl" / "00.png").read_bytes())
    content[len(content) // 2] ^= 1  # of the same size
    (other / "owl" / "00.png").write_bytes(content)
    with pytest.raises(ValueError, match="made with other settings: data was"):
        evaluate_model(model, same, processor, output_dir=tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("value", "computes"),
    [({"hidden_act": "relu"}, True), ({"layer_norm_eps": 1e-3}, True), ({"_name_or_path": "x"}, False),
     ({"id2label": dict(enumerate("abcde"))}, False), ({"calibrated_share": 0.6}, False)],
)  # fmt: skip
def test_a_digest_of_a_model_tells_what_it_computes(value, computes):
    model = reduce_tokens(named_model(), ToMeConfig(r=5))
    before = digest_of_model(model)
    for name, setting in value.items():
        setattr(model.config, name, setting)
    assert (digest_of_model(model) != before) is computes


def test_images_within_the_data_set(tmp_path, photos, processor):
    """Where images have no files, their sizes tell two data sets apart."""
    features = Features({"picture": Image(), "class": Value("int64")})

    def of(rows):
        encoded = [(tmp_path / "photos" / name).read_bytes() for name in rows]
        return Dataset.from_dict(
            {"picture": [{"bytes": content, "path": None} for content in encoded], "class": [2] * len(rows)},
            features=features,
        )

    columns = {"image_column": "picture", "label_column": "class"}
    model = reduce_tokens(named_model(), ToMeConfig(r=5))
    data = of(["owl/00.png", "cat/02.png"])
    assert evaluate_model(model, data, processor, output_dir=tmp_path / "out", **columns, **QUICK).images == 2
    short = of(["owl/00.png", "cat/02.png"]).map(
        lambda row: {"picture": {"bytes": b"no image", "path": None}, "class": 2}, features=features
    )
    with pytest.raises(ValueError, match="made with other settings: data was"):
        evaluate_model(model, short, processor, output_dir=tmp_path / "out", **columns, **QUICK)
    with pytest.raises(ValueError, match=r"Row 0 of the data set holds no readable image in its column 'picture'"):
        evaluate_model(model, short, processor, **columns, **QUICK)


def test_bad_input(photos, processor):
    model = named_model()
    labelled = photos.cast_column("label", ClassLabel(names=["owl", "ox", "cat", "pig"]))
    high = photos.cast_column("label", Value("int64")).map(lambda row: {"label": 5})
    for data, options, message in (
        (photos.to_dict(), {}, "must be one split of a data set"),
        (photos.select([]), {}, "has 0 rows"),
        (photos, {"image_column": "photo"}, "image_column='photo'"),
        (photos, {"batch_size": 0}, "batch_size must be at least 1"),
        (labelled, {}, "'ox' is not a label of the model"),
        (high, {}, "must be classes of the model, which are 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_model(model, data, processor, **{**QUICK, **options})
    assert class_index("0004_fox", {"a": 0, "0004_fox": 1, **{str(i): i for i in range(2, 9)}}) == 1
    with pytest.raises(ValueError, match="does not begin with the index"):
        class_index("9_hen", {"hen": 0})
    # Two classes of ImageNet have the same label.
    assert class_index("2_n03710637", {"crane": 1, "maillot": 2}) == 2
    for missing in (-1, None):  # the classes of the data set have names, and the last would be taken for -1
        unlabelled = photos.select(range(3)).map(lambda row, missing=missing: {"label": missing})
        with pytest.raises(ValueError, match="Leave out images without a class"):
            evaluate_model(model, unlabelled, processor, **QUICK)


def test_a_class_is_found_by_its_label_or_its_index():
    labels = {"cat": 0, "dog": 1, "bird": 2}
    assert [class_index(name, labels) for name in ("dog", "1_dog", "0001_pooch", "2")] == [1, 1, 1, 2]
    with pytest.raises(ValueError, match=r"'0_dog' begins with the index 0, which is 'cat' .* 'dog' is the label of"):
        class_index("0_dog", labels)
    # Two classes of ImageNet have the label "crane", and `label2id` names the last one.
    cranes = {"cat": 0, "crane": 3, "dog": 2}
    assert class_index("1_crane", cranes) == 1 and class_index("3_crane", cranes) == 3
    # Folders of macOS can have names whose accents are characters of their own.
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert class_index(decomposed, {"cat": 0, composed: 1}) == class_index(composed, {"cat": 0, decomposed: 1}) == 1
    with pytest.raises(ValueError, match="begins with the index 0, which is 'cat'"):
        class_index(f"0_{decomposed}", {"cat": 0, composed: 1})


def test_classes_may_be_texts(photos, processor):
    """As a metadata file or a data set of the Hub can have them."""
    model = named_model()
    names = photos.features["label"].names
    texts = [names[label] for label in photos["label"]]
    named = photos.remove_columns("label").add_column("label", texts)
    assert evaluate_model(model, named, processor, **QUICK).to_dict() == (
        evaluate_model(model, photos, processor, **QUICK).to_dict()
    )
    for label, message in (("ox", "The class 'ox' is not a label of the model"), (None, "Leave out images without")):
        wrong = photos.remove_columns("label").add_column("label", [label, *texts[1:]])
        with pytest.raises(ValueError, match=message):
            evaluate_model(model, wrong, processor, **QUICK)
    several = photos.remove_columns("label").add_column("label", [[0, 1]] * len(photos))
    with pytest.raises(ValueError, match=r"The labels must be classes of the model, .* got \[0, 1\]"):
        evaluate_model(model, several, processor, **QUICK)


def test_metrics_load_offline_by_path():
    accuracy = evaluate.load(str(metric_path("accuracy")), keep_in_memory=True)
    assert accuracy.compute(predictions=[1, 2, 3, 0], references=[1, 2, 0, 0]) == {"accuracy": 0.75}
    ranked = [[1, 0, 2], [0, 1, 2], [2, 1, 0]]
    found = accuracy.compute(predictions=ranked, references=[1, 1, 0], top_k=(1, 2, 3))
    assert found == {"accuracy": 1 / 3, "top_2_accuracy": 2 / 3, "top_3_accuracy": 1.0}
    with pytest.raises(ValueError, match="k=4 is not possible: there are 3 predictions"):
        accuracy.compute(predictions=ranked, references=[1, 1, 0], top_k=(4,))
    agreement = evaluate.load(str(metric_path("agreement")), keep_in_memory=True)
    assert agreement.compute(predictions=[1, 2, 3], references=[1, 0, 0]) == {"agreement": 1 / 3}
    assert agreement.compute(predictions=[1, 2, 3], references=[1, 0, 0], labels=[1, 2, 0]) == {
        "agreement": 1 / 3, "became_right": 1, "became_wrong": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="The metrics are: accuracy, agreement"):
        metric_path("f1")


def test_evaluates_own_evaluator_takes_our_pipelines_and_metric(monkeypatch, photos, processor):
    pytest.importorskip("scipy", reason="evaluate's evaluator wants scipy: pip install evaluate[evaluator]")
    # evaluate 0.4.6 asks whether a pipeline is a model of this class, which transformers 5 no longer has.
    monkeypatch.setattr(transformers, "TFPreTrainedModel", (), raising=False)
    model = reduce_tokens(named_model(), ToMeConfig(r=7))
    pipe = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    data = photos.cast_column("label", ClassLabel(names=["cat", "dog", "hen", "owl"]))
    accuracy = evaluate.load(str(metric_path("accuracy")), keep_in_memory=True)
    theirs = evaluate.evaluator("image-classification").compute(
        pipe, data, metric=accuracy, label_mapping={name: NAMES.index(name) for name in NAMES}
    )
    plain = data.cast_column("label", Value("int64"))
    ours = evaluate_model(model, plain, processor, **QUICK)
    assert theirs["accuracy"] == pytest.approx(ours.top1 / 100)


LAUNCHED = """
import json, sys
from accelerate import Accelerator
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification
import hf_tokenreduce
from hf_tokenreduce.evaluation import evaluate_model

model_dir, images, output_dir, reports = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = AutoModelForImageClassification.from_pretrained(model_dir)
data = load_dataset("imagefolder", data_dir=images, split="train")
report = evaluate_model(model, data, AutoImageProcessor.from_pretrained(model_dir), batch_size=4,
                        output_dir=output_dir, progress=False)
with open(f"{reports}-{accelerator.process_index}-{accelerator.num_processes}.json", "w") as file:
    json.dump(report.to_dict(), file)
"""


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, photos, processor):
    model = reduce_tiny(named_model(), METHODS["ats"][0])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(LAUNCHED)
    arguments = ["run.py", "model", "photos", "out", "report"]
    # On CPUs without MPI, this flag is what makes `accelerate launch` start processes that find each other.
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        two += ["--main_process_port", str(free.getsockname()[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*two, *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    both = [json.loads((tmp_path / f"report-{rank}-2.json").read_text()) for rank in (0, 1)]
    whole = json.loads(json.dumps(evaluate_model(model, photos, processor, **QUICK).to_dict()))
    assert both[0] == both[1]
    assert both[0].keys() == whole.keys()
    for name in (
        "images",
        "top1",
        "baseline_top1",
        "became_right",
        "became_wrong",
        "tokens_per_layer",
        "drop_interval",
    ):
        assert both[0][name] == whole[name], name
    rows = [sorted(row for line in (tmp_path / "out" / f"part-{rank}.jsonl").read_text().splitlines()
                   for row in json.loads(line)["rows"]) for rank in (0, 1)]  # fmt: skip
    assert rows == [list(range(0, 14, 2)), list(range(1, 14, 2))]
    # What two wrote, one reads; a row that both had computed counts once.
    lines = (tmp_path / "out" / "part-0.jsonl").read_text()
    (tmp_path / "out" / "part-1.jsonl").open("a").write(lines)
    alone = evaluate_model(model, photos, processor, output_dir=tmp_path / "out", **QUICK)
    assert alone.images == 14 and alone.top1 == whole["top1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "r", "top1"), [("deit-tiny-patch16-224", 0, 87.6), ("vit-tiny-patch16-224", 8, 88.2)]
)
def test_accuracies_on_photographs(shared, tmp_path, folder, r, top1):
    model = ViTForImageClassification.from_pretrained(shared / "models" / folder)
    data = load_dataset("imagefolder", data_dir=str(shared / "data" / "nips17_1000"), split="validation")
    images = ViTImageProcessor.from_pretrained(shared / "models" / folder)
    report = evaluate_model(reduce_tokens(model, ToMeConfig(r=r)), data, images, progress=False, output_dir=tmp_path)
    assert report.images == 1000 and report.top1 == pytest.approx(top1, abs=0.11)
    assert report.top1_interval[0] < report.top1 < report.top1_interval[1]
