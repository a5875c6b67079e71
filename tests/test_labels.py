"""DL-ViT's offline stages: labels by masking patches, measured once, and the filter that learns them."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_from_disk
from helpers import NUM_PATCHES, reduce_tiny, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTImageProcessor, ViTModel

from hf_tokenreduce import DLViTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.training.deltas import embed, gradient_deltas
from hf_tokenreduce.training.filter import fit_filter
from hf_tokenreduce.training.labels import make_labels


PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
LABEL = Value("int64")
WORKERS = """
import os, signal, sys
from datasets import load_from_disk
from helpers import tiny_model
from transformers import ViTImageProcessor
from hf_tokenreduce.training.labels import make_labels

data, folder = sys.argv[1:]
kill_at, calls = 0, 0

class Deadly(ViTImageProcessor):
    def __call__(self, *images, **options):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*images, **options)

def launch(world):
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            processor = Deadly(size={"height": 32, "width": 32})
            done = make_labels(
                tiny_model(), load_from_disk(data), folder, on_error="skip", image_processor=processor, batch_size=130
            )
            print("computed", done.computed, "calls", calls, flush=True)
            os._exit(0)
        children.append(child)
    print("ended", *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)

kill_at = 3
launch(1)
for name in sorted(os.listdir(folder + "/parts")):
    print("part", name, os.stat(folder + "/parts/" + name).st_mtime_ns, flush=True)
print("ready" if not os.path.exists(folder + "/labels") else "too early")
# As if the process had been killed while it wrote.
with open(folder + "/parts/00000002.npz.1.part", "wb") as file:
    file.write(b"half a part")
kill_at = 0
launch(2)
"""


def photographs(count, label=LABEL, broken=()):
    """Random ones, of labels 0, 1, 2, ... ; those in `broken` cannot be read."""
    generator = np.random.default_rng(5)
    images = list(generator.integers(0, 256, (count, 40, 36, 3), dtype=np.uint8))
    images = [{"bytes": b"no image", "path": None} if n in broken else image for n, image in enumerate(images)]
    features = Features(image=Image(), label=label)
    return Dataset.from_dict({"image": images, "label": [n % 5 for n in range(count)]}, features=features)


def label(model, dataset, folder, **options):
    return make_labels(model, dataset, folder, **{"image_processor": PROCESSOR, **options})


def stored(folder):
    return load_from_disk(str(folder / "labels")).with_format("numpy")[:]


def naive_deltas(model, photo, target, masks, way="remove"):
    """The loss of the whole model, and what masking each set of patches adds to it, one forward after the other."""
    pixels = PROCESSOR(photo, return_tensors="pt").pixel_values
    masked = None

    def mask(module, arguments, tokens):
        if masked is not None:
            prefix = tokens.shape[1] - NUM_PATCHES
            if way == "remove":
                left = [place for place in range(tokens.shape[1]) if place - prefix not in masked]
                return tokens[:, left]
            tokens = tokens.clone()
            tokens[:, prefix:][:, masked] = 0
        return tokens

    handle = model.base_model.embeddings.register_forward_hook(mask)
    losses = []
    with torch.no_grad():
        for masked in [None, *masks]:  # noqa: B007
            losses.append(F.cross_entropy(model(pixels).logits, torch.tensor([target])).item())
    handle.remove()
    return losses[0], np.array(losses[1:]) - losses[0]


@pytest.mark.parametrize(("backbone", "way"), [("vit", "zero"), ("deit", "remove"), ("deit-teacher", "remove")])
def test_deltas_equal_a_naive_loop(backbone, way, tmp_path):
    model, dataset = tiny_model(backbone), photographs(2)
    counts = label(model, dataset, tmp_path, batch_size=37, mask=way)
    table = stored(tmp_path)
    for row in range(2):
        patches = [[patch] for patch in range(NUM_PATCHES)]
        loss, deltas = naive_deltas(model, dataset[row]["image"], row, patches, way)
        assert abs(table["loss"][row] - loss) < 1e-5
        np.testing.assert_allclose(table["delta"][row], deltas, atol=1e-5)
    assert table["index"].tolist() == [0, 1] and table["label"].tolist() == [0, 1]
    assert (table["keep"] == (table["delta"] > 0)).all() and table["delta"].dtype == np.float32
    assert counts == (2, 0, 2, table["keep"].mean())


def test_a_reduced_model_that_drops_nothing_labels_as_the_stock_one(tmp_path):
    stock, dataset = tiny_model("deit"), photographs(2)
    label(stock, dataset, tmp_path)
    training = reduce_tokens(stock, DLViTConfig()).train()
    assert label(training, dataset, tmp_path).computed == 0  # by its fingerprint it is the same model
    assert label(training, dataset, tmp_path / "other", batch_size=200).computed == 2
    np.testing.assert_allclose(stored(tmp_path)["delta"], stored(tmp_path / "other")["delta"], atol=1e-5)
    assert all(module.training for module in training.modules())
    for setting in (ToMeConfig(r=3), DLViTConfig(trained=True)):
        with pytest.raises(ValueError, match=r"drops some.*restore"):
            label(reduce_tokens(stock, setting), dataset, tmp_path)


def test_groups_of_patches(tmp_path):
    model, dataset = tiny_model(image_size=32), photographs(1)
    label(model, dataset, tmp_path, labeller="groups")
    grid = np.arange(NUM_PATCHES).reshape(8, 8)
    squares = [grid[y : y + 2, x : x + 2].flatten().tolist() for y in range(0, 8, 2) for x in range(0, 8, 2)]
    _, deltas = naive_deltas(model, dataset[0]["image"], 0, squares)
    delta = stored(tmp_path)["delta"][0]
    for square, expected in zip(squares, deltas, strict=True):
        np.testing.assert_allclose(delta[square], expected, atol=1e-5)


def test_an_odd_grid_has_smaller_groups_at_its_ends(tmp_path):
    model, dataset = tiny_model(image_size=28), photographs(1)
    label(model, dataset, tmp_path, labeller="groups", image_processor=resizing(28), batch_size=5)
    delta = stored(tmp_path)["delta"][0]
    assert len(np.unique(delta)) == 16  # of 7 x 7 patches
    tokens = embed(model, [dataset[0]["image"]], resizing(28))
    target = torch.tensor([0])
    (whole, _), (corner, _) = (
        gradient_deltas(model, some, target, batch_size=1) for some in (tokens, tokens[:, :-1])
    )  # the losses with and without the last patch, a group of its own
    assert delta[-1] == pytest.approx((corner - whole).item(), abs=1e-5)


def resizing(size):
    return ViTImageProcessor(size={"height": size, "width": size})


def test_gradient_is_the_first_order(tmp_path):
    model, dataset = tiny_model().double(), photographs(3)
    tokens = embed(model, [dataset[row]["image"] for row in range(3)], PROCESSOR)
    targets = torch.tensor([0, 1, 2])
    loss, delta = gradient_deltas(model, tokens, targets, batch_size=2)
    for patch in (0, 17, 63):
        smaller = tokens.clone()
        smaller[:, 1 + patch] *= 1 - 1e-5
        change = (gradient_deltas(model, smaller, targets, batch_size=3)[0] - loss) / 1e-5
        # The loss is in float32.
        torch.testing.assert_close(change.float(), delta[:, patch].float(), atol=0.05, rtol=0.05)
    label(model.float(), dataset, tmp_path, labeller="gradient", batch_size=2)
    np.testing.assert_allclose(stored(tmp_path)["delta"], delta.numpy(), atol=1e-4)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_killed_and_resumed_by_two_processes(tmp_path):
    dataset, folder = photographs(11, broken=[2, 7]), tmp_path / "resumed"
    whole = label(tiny_model(), dataset, tmp_path / "whole", on_error="skip", batch_size=130)
    assert whole[:3] == (9, 2, 9)
    dataset.save_to_disk(tmp_path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    here = Path(__file__).parent
    # Buffered, a line of one process is one write, and the other's does not get into it.
    environment = {"PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1", **address}
    environment["PYTHONPATH"] = f"{here}{os.pathsep}{here.parent}"
    command = [sys.executable, "-c", WORKERS, str(tmp_path / "data"), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment})
    said = [line.split() for line in run.stdout.splitlines()]

    assert [line[1:] for line in said if line[0] == "ended"] == [[str(-signal.SIGKILL)], ["0", "0"]], run.stderr
    assert ["ready"] in said
    before = {name: int(time) for _, name, time in (line for line in said if line[0] == "part")}
    after = {file.name: file.stat().st_mtime_ns for file in (folder / "parts").iterdir()}
    assert len(before) == 2 and before.items() <= after.items() and len(after) == 6
    # Rows 0, 1 and 3 were there, and 2 was known to be broken.
    computed = [int(line[1]) for line in said if line[0] == "computed"]
    assert sum(computed) == 9 - 3 and min(computed) > 0
    resumed, uninterrupted = stored(folder), stored(tmp_path / "whole")
    assert resumed["index"].tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10]
    for name, values in uninterrupted.items():
        np.testing.assert_allclose(resumed[name], values, atol=1e-6)


def test_labelling_anew_measures_nothing(tmp_path):
    model, dataset = tiny_model(), photographs(4)
    label(model, dataset, tmp_path, max_samples=3, seed=1, batch_size=70)
    first, settings = stored(tmp_path), json.loads((tmp_path / "settings.json").read_text())
    assert settings["num_images"] == 3 and settings["labels"]["threshold"] == 0
    assert label(model, dataset.with_format("numpy"), tmp_path, max_samples=3, seed=1)[:3] == (3, 0, 0)
    cut = float(np.median(first["delta"]))
    anew = label(model, dataset, tmp_path, max_samples=3, seed=1, threshold=cut, batch_size=500)
    assert anew[:3] == (3, 0, 0) and abs(anew.share_kept - 0.5) < 0.01
    assert (stored(tmp_path)["keep"] == (first["delta"] > cut)).all()
    assert label(model, dataset, tmp_path, max_samples=3, seed=1, keep_share=0.25).share_kept == 0.25
    again = stored(tmp_path)
    assert again["delta"][again["keep"]].min() > again["delta"][~again["keep"]].max()
    assert (again["delta"] == first["delta"]).all() and len(set(first["index"])) == 3

    for changes, message in [
        ({"labeller": "groups"}, "labeller was 'exact', now 'groups'"),
        ({"max_samples": 2}, "num_images was 3, now 2; max_samples was 3, now 2"),
        ({"seed": 2}, "seed was 1, now 2"),
        ({"image_processor": ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)}, "do_normalize"),
    ]:
        with pytest.raises(ValueError, match=message):
            label(model, dataset, tmp_path, **{"max_samples": 3, "seed": 1, **changes})
    other = photographs(5).select([1, 2, 3, 4]).remove_columns("label").add_column("label", dataset["label"])
    with pytest.raises(ValueError, match="images was "):  # other images with the same labels
        label(model, other.cast_column("label", LABEL), tmp_path, max_samples=3, seed=1)
    with torch.no_grad():
        model.classifier.bias[0] += 1
    with pytest.raises(ValueError, match="model was "):
        label(model, dataset, tmp_path, max_samples=3, seed=1)


def test_images_that_cannot_be_read(tmp_path):
    model, dataset = tiny_model(), photographs(3, broken=[1])
    with pytest.raises(ValueError, match="Row 1 of the data set holds no readable image"):
        label(model, dataset, tmp_path)
    assert label(model, dataset, tmp_path, on_error="skip") == (2, 1, 1, stored(tmp_path)["keep"].mean())
    with pytest.raises(ValueError, match="1 of 3 images could not be read when they were tried, the first in row 1"):
        label(model, dataset, tmp_path)
    with pytest.raises(ValueError, match="1 of 1 images"):
        label(model, dataset.select([1]), tmp_path / "none", on_error="skip")


def test_what_does_not_fit_is_refused_before_any_forward(tmp_path):
    model, dataset = tiny_model(), photographs(4)
    model.base_model.forward = model.base_model.embeddings.forward = None
    names = ClassLabel(names=["cat", "dog", "owl", "hen", "fox"])
    model.config.label2id = {"dog": 0, "cat": 1, "owl": 2, "hen": 3, "fox": 4}
    for data, options, message in [
        (dataset.select([]), {}, "data set is empty"),
        (dataset.rename_column("label", "class"), {}, "no column 'label', only image, class"),
        (photographs(6).map(lambda row: {"label": row["label"] * 2}), {}, "Row 3 .* label 6, .* classes are 0 to 4"),
        (photographs(3, names), {}, "'cat' is number 0 in the data set and 1 in the model.*align_labels"),
        (photographs(2, ClassLabel(names=["dog", "cow"])), {}, "no class 'cow'. Its classes are .*'dog'"),
        (dataset, {"labeller": "guess"}, "labeller must be one of 'exact'"),
        (dataset, {"threshold": 0.1, "keep_share": 0.5}, "exclude each other"),
        (dataset, {"keep_share": 1.5}, "keep_share must be above 0"),
        (dataset, {"on_error": "ignore"}, "on_error must be"),
        (dataset, {"max_samples": 0}, "max_samples must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            label(model, data, tmp_path, **options)
    with pytest.raises(ValueError, match="needs a classifier, one of ViTForImageClassification"):
        label(model.base_model, dataset, tmp_path)
    several = tiny_model(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="make_labels compares the class of each image"):
        label(several, dataset, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def lesson(tmp_path):
    """Photographs, and labels that say of a patch whether its token points along one direction."""
    stock, dataset = tiny_model(), photographs(40)
    label(stock, dataset, tmp_path, labeller="gradient")
    table = load_from_disk(str(tmp_path / "labels"))
    tokens = embed(stock, [row["image"] for row in dataset], PROCESSOR)[:, 1:]
    scores = tokens @ torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(4))
    keep = scores > scores.quantile(0.7)
    return stock, dataset, table.remove_columns("keep").add_column("keep", keep.tolist())


def test_the_filter_learns_and_the_model_then_drops_patches(lesson, tmp_path):
    stock, dataset, labels = lesson
    model = reduce_tiny(stock, DLViTConfig(hidden_size=32))
    frozen = {name: parameter.clone() for name, parameter in stock.named_parameters()}
    wants_gradient = [parameter.requires_grad for parameter in model.parameters()]
    options = {"image_processor": PROCESSOR, "epochs": 40, "learning_rate": 1e-2, "batch_size": 8}
    fit = fit_filter(model.train(), labels, dataset, **options)
    assert fit.precision > 0.85 and fit.recall > 0.9 and fit.images == 4
    assert abs(fit.share_kept - fit.share_labelled) < 0.1

    assert model.config.reduction == DLViTConfig(hidden_size=32, trained=True) and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wants_gradient
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in stock.named_parameters())
    images = PROCESSOR([row["image"] for row in dataset.select(range(6))], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model.eval()(images)
    assert output.token_counts[:, 0].min() > 5 and output.token_counts[:, 0].max() < 40
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        again = loaded(images)
    assert torch.equal(again.logits, output.logits) and torch.equal(again.token_counts, output.token_counts)

    # The same by the same seed, whatever the filter was before and whether the images are remembered.
    options |= {"epochs": 2}
    fits = [fit_filter(loaded, labels, dataset, **options), fit_filter(loaded, labels, dataset, **options)]
    other = reduce_tokens(stock, DLViTConfig(hidden_size=32))
    fits.append(fit_filter(other, labels, dataset, **options, max_cache_bytes=0))
    assert fits[0] == fits[1] == fits[2] != fit_filter(other, labels, dataset, **options, seed=1)
    # Measured by the decisions the model makes, whatever its setting.
    share = fit_filter(reduce_tokens(stock, DLViTConfig(keep_rate=0.5)), labels, dataset, **options).share_kept
    assert share == 0.5


def test_labels_that_do_not_fit(lesson, tmp_path):
    stock, dataset, labels = lesson
    model = reduce_tokens(stock, DLViTConfig())
    small = reduce_tokens(tiny_model(image_size=16), DLViTConfig())
    same = labels.remove_columns("keep").add_column("keep", [[True] * NUM_PATCHES] * 40)
    for reduced, given, images, options, message in [
        (stock, labels, dataset, {}, "no filter to fit"),
        (reduce_tokens(stock, ToMeConfig(r=2)), labels, dataset, {}, "no filter to fit"),
        (small, labels, dataset, {}, "64 patches per image, but the model has 16"),
        (model, tmp_path, dataset.select(range(39)), {}, "data set with 40 rows, but this one has 39"),
        (model, tmp_path, dataset.select(range(39, -1, -1)), {}, "of these in another order"),
        (model, labels, dataset.select(range(7)), {}, "a row 39, but this one has 7"),
        (model, tmp_path / "parts", dataset, {}, "holds no labels"),
        (model, same, dataset, {}, "keep every patch, so there is nothing to learn"),
        (model, labels, dataset, {"validation_share": 1.0}, "none to learn from"),
        (model, labels, dataset, {"epochs": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_filter(reduced, given, images, image_processor=PROCESSOR, **options)
    assert not model.config.reduction.trained


def test_the_example(tmp_path):
    model = tiny_model()
    model.config.id2label = dict(enumerate(["cat", "dog", "owl", "hen", "fox"]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "stock")
    PROCESSOR.save_pretrained(tmp_path / "stock")
    for row in photographs(8):
        folder = tmp_path / "images" / "train" / ("hen" if row["label"] % 2 else "0004_fox")
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{len(list(folder.iterdir()))}.png")
    script = Path(__file__).resolve().parents[1] / "examples" / "run_delta_loss.py"
    command = [sys.executable, str(script), "--model_name_or_path", str(tmp_path / "stock")]
    command += ["--train_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    command += ["--max_train_samples", "6", "--keep_share", "0.4", "--num_train_epochs", "2"]
    command += ["--reduction_args", '{"keep_rate": 0.5, "hidden_size": 12}']
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "6 images were labelled and 0 skipped. The labels keep 40.1% of the patches" in done.stdout
    assert "On 1 held-out images the filter keeps 50.0% of the patches" in done.stdout
    assert set(stored(tmp_path / "out" / "labels")["label"]) == {3, 4}
    record = json.loads((tmp_path / "out" / "model" / "record.json").read_text())
    assert record["base_model"] == "stock"
    assert record["command"].startswith("python examples/run_delta_loss.py --model")
    reduced = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model")
    pixels = PROCESSOR(photographs(1)[0]["image"], return_tensors="pt").pixel_values
    assert reduced(pixels).token_counts.tolist() == [[33] * 4]
    ViTModel(model.config).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="its classifier would be random"):
        runpy.run_path(str(script))["main"](command[2:])


def test_the_labels_keep_a_fifth_unless_the_user_says_otherwise():
    script = Path(__file__).resolve().parents[1] / "examples" / "run_delta_loss.py"
    parse = runpy.run_path(str(script))["parse_arguments"]
    words = ["--model_name_or_path", "model", "--train_dir", "images", "--output_dir", "out"]
    assert (parse(words).keep_share, parse(words).threshold) == (0.2, None)
    chosen = parse([*words, "--threshold", "0.1"])
    assert (chosen.keep_share, chosen.threshold) == (None, 0.1)
    assert parse([*words, "--keep_share", "0.4"]).keep_share == 0.4
